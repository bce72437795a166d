package hypervisor

import (
	"cmp"
	"encoding/xml"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"belay/agent/maint"
)

// needsXML is what of a device tells what it needs of its host.
type needsXML struct {
	Backing    *backingXML `xml:"backingStore"`
	Auth       secretsXML  `xml:"auth"` // of older definitions, where it is not in the source
	Encryption secretsXML  `xml:"encryption"`
	Port       struct {
		Type string `xml:"type,attr"` // openvswitch, …
	} `xml:"virtualport"`
	Teaming struct {
		Type string `xml:"type,attr"` // persistent, transient
	} `xml:"teaming"`

	// Of <graphics>.
	AutoPort  string `xml:"autoport,attr"`
	TCPPort   int    `xml:"port,attr"` // -1: one that libvirt picks
	TLSPort   int    `xml:"tlsPort,attr"`
	WebSocket int    `xml:"websocket,attr"`
	Listens   []struct {
		Type    string `xml:"type,attr"`
		Address string `xml:"address,attr"`
		Socket  string `xml:"socket,attr"`
	} `xml:"listen"`
}

// endXML is what a <source> has that is an end of a channel, media that may be
// missing, or storage that wants a secret.
type endXML struct {
	Mode       string     `xml:"mode,attr"` // bind, connect
	Host       string     `xml:"host,attr"`
	Service    string     `xml:"service,attr"` // a port
	Policy     string     `xml:"startupPolicy,attr"`
	Auth       secretsXML `xml:"auth"`
	Encryption secretsXML `xml:"encryption"`
	VendorID   idXML      `xml:"vendor"` // of a USB device
	ProductID  idXML      `xml:"product"`
}

type idXML struct {
	ID string `xml:"id,attr"`
}

// backingXML is one file that another is an overlay of; an empty one ends the
// chain.
type backingXML struct {
	Type   string `xml:"type,attr"`
	Format struct {
		Type string `xml:"type,attr"`
	} `xml:"format"`
	Source  sourceXML   `xml:"source"`
	Backing *backingXML `xml:"backingStore"`
}

// secretsXML is <auth> or <encryption>.
type secretsXML struct {
	Secrets []struct {
		UUID  string `xml:"uuid,attr"`
		Usage string `xml:"usage,attr"`
	} `xml:"secret"`
	UUID string `xml:"secret,attr"` // of a TPM's state
}

type pagesXML struct {
	Size    uint64 `xml:"size,attr"`
	Unit    string `xml:"unit,attr"`
	NodeSet string `xml:"nodeset,attr"` // of the guest's cells
}

type cellXML struct {
	ID     int    `xml:"id,attr"`
	Memory uint64 `xml:"memory,attr"`
	Unit   string `xml:"unit,attr"`
}

// nodesXML is <memory> or <memnode> of <numatune>.
type nodesXML struct {
	Cell    int    `xml:"cellid,attr"`
	Mode    string `xml:"mode,attr"`
	NodeSet string `xml:"nodeset,attr"` // of the host's cells
}

// Needs is what a domain needs of its host.
type Needs struct {
	maint.Needs
	Pages []maint.PageNeed
	Bound []maint.BoundDevice
	// Unsafe are files and block devices that it writes to with flushes left
	// out (cache='unsafe').
	Unsafe []maint.FileNeed
}

// ParseNeeds reads what a domain needs of its host. Disks, interfaces and memory
// are read from its live XML, where they are as QEMU has them; ends of channels
// and graphics from its migratable XML, which leaves out what libvirt has made up
// for this host.
func ParseNeeds(live, migratable string) (Needs, error) {
	var d, m domainXML
	if err := cmp.Or(xml.Unmarshal([]byte(live), &d), xml.Unmarshal([]byte(migratable), &m)); err != nil {
		return Needs{}, fmt.Errorf("cannot read domain XML: %w", err)
	}
	n := Needs{}
	n.file("the firmware", d.OS.Loader, maint.FileRegular, false)
	n.file("the kernel", d.OS.Kernel, maint.FileRegular, false)
	n.file("the initial ramdisk", d.OS.Initrd, maint.FileRegular, false)
	n.file("the device tree", d.OS.DevTree, maint.FileRegular, false)
	for i := range d.Devices.All {
		switch dev := &d.Devices.All[i]; dev.XMLName.Local {
		case "disk":
			n.disk(dev)
		case "interface":
			n.link(dev)
		case "filesystem":
			if dev.Type == "mount" || dev.Type == "" {
				n.file("file system "+dev.Target.Dir, dev.Source.Dir, maint.FileDir, true)
			}
		case "hostdev":
			n.hostdev(dev)
		case "tpm":
			n.tpm(dev)
		}
	}
	for i := range m.Devices.All {
		switch dev := &m.Devices.All[i]; dev.XMLName.Local {
		case "serial", "parallel", "console", "channel", "smartcard", "redirdev", "rng":
			n.end(dev)
		case "graphics":
			n.graphics(dev)
		}
	}
	slices.SortFunc(n.Secrets, func(a, b maint.SecretNeed) int { return strings.Compare(a.For+a.UUID+a.Usage, b.For+b.UUID+b.Usage) })
	n.Secrets = slices.Compact(n.Secrets)
	slices.Sort(n.Networks)
	n.Networks = slices.Compact(n.Networks)
	slices.Sort(n.Pools)
	n.Pools = slices.Compact(n.Pools)
	return n, n.pages(&d)
}

func (n *Needs) file(what, path string, kind maint.FileKind, same bool) {
	if filepath.IsAbs(path) { // a loader can be a word, which each libvirt knows
		n.Files = append(n.Files, maint.FileNeed{For: what, Path: filepath.Clean(path), Kind: kind, Same: same})
	}
}

func (n *Needs) disk(d *deviceXML) {
	what := cmp.Or(d.Device, "disk") + " " + d.Target.Dev
	for _, s := range []secretsXML{d.Auth, d.Encryption, d.Source.Auth, d.Source.Encryption} {
		n.secret(what, s)
	}
	switch d.Type {
	case "nvme", "vdpa", "vhostuser": // no storage, but a piece of this host
		n.Bound = append(n.Bound, maint.BoundDevice{What: fmt.Sprintf("%s (%s %s)", what, d.Type, d.Source.String()), How: "virsh detach-disk"})
		return
	}
	if d.Source.Pool != "" { // where its volume is the pool knows
		n.Pools = append(n.Pools, d.Source.Pool)
	}
	before := len(n.Files)
	// Missing media of any other policy are left out on arrival.
	if p := d.Source.Policy; p == "" || p == "mandatory" {
		n.file(what, cmp.Or(d.Source.File, d.Source.Dev), kindOf(d.Type), d.ReadOnly == nil)
	}
	if d.ReadOnly == nil && d.Driver.Cache == "unsafe" {
		n.Unsafe = append(n.Unsafe, n.Files[before:]...)
	}
	for b := d.Backing; b != nil; b = b.Backing {
		n.secret(what, b.Source.Auth)
		n.secret(what, b.Source.Encryption)
		n.file("the image below "+what, cmp.Or(b.Source.File, b.Source.Dev), kindOf(b.Type), false)
	}
}

// kindOf is what a disk of a type is opened as.
func kindOf(diskType string) maint.FileKind {
	if diskType == "block" {
		return maint.FileBlock
	}
	return maint.FileRegular
}

func (n *Needs) secret(what string, s secretsXML) {
	for _, one := range s.Secrets {
		n.Secrets = append(n.Secrets, maint.SecretNeed{For: what, UUID: one.UUID, Usage: one.Usage})
	}
	if s.UUID != "" {
		n.Secrets = append(n.Secrets, maint.SecretNeed{For: what, UUID: s.UUID})
	}
}

func (n *Needs) link(d *deviceXML) {
	what := "interface " + cmp.Or(d.MAC.Address, d.Target.Dev)
	transient := d.Teaming.Type == "transient"
	if d.Source.Network != "" {
		n.Networks = append(n.Networks, d.Source.Network)
	}
	switch {
	case d.Type == "hostdev" && !transient:
		n.Bound = append(n.Bound, maint.BoundDevice{What: fmt.Sprintf("%s (SR-IOV, %s)", what, d.Source.String()),
			How: "virsh detach-interface; or make it one of a pair, with <teaming type='transient'>, and libvirt detaches it by itself"})
	case d.Type == "hostdev" && d.Source.Network == "":
		n.PCI = append(n.PCI, d.Source.String())
	case d.Type == "vdpa" || d.Type == "vhostuser":
		n.Bound = append(n.Bound, maint.BoundDevice{What: fmt.Sprintf("%s (%s %s)", what, d.Type, d.Source.String()), How: "virsh detach-interface"})
	case d.Source.Network != "": // libvirt's to find the link
	case d.Type == "bridge" && d.Source.Bridge != "":
		linux := d.Port.Type == "" // the port of an Open vSwitch bridge that bears its name is often down
		n.Links = append(n.Links, maint.LinkNeed{For: what, Name: d.Source.Bridge, Bridge: linux, Up: linux})
	case d.Type == "direct" && d.Source.Dev != "":
		n.Links = append(n.Links, maint.LinkNeed{For: what, Name: d.Source.Dev, Up: true})
	}
}

func (n *Needs) hostdev(d *deviceXML) {
	what := d.Type + " device " + d.Source.String()
	switch d.Type {
	case "pci":
		what = "PCI device " + d.Source.String()
		if d.Teaming.Type == "transient" {
			n.PCI = append(n.PCI, d.Source.String())
			return
		}
	case "usb":
		what = "USB device " + usbName(&d.Source)
	}
	n.Bound = append(n.Bound, maint.BoundDevice{What: what, How: "virsh detach-device"})
}

// usbName is a USB device's vendor and product, or where it is.
func usbName(s *sourceXML) string {
	if s.VendorID.ID != "" {
		return strings.TrimPrefix(s.VendorID.ID, "0x") + ":" + strings.TrimPrefix(s.ProductID.ID, "0x")
	}
	return fmt.Sprintf("%s-%s", s.Address.Bus, s.Address.Device)
}

func (n *Needs) tpm(d *deviceXML) {
	switch d.Backend.Type {
	case "emulator":
		n.SwTPM = true
		n.secret("TPM", d.Backend.Encryption)
	case "external":
		n.socket("TPM", d.Backend.Source.Path, false)
	case "passthrough":
		n.Bound = append(n.Bound, maint.BoundDevice{What: "TPM of the host", How: "virsh detach-device, while it is off"})
	}
}

// socket adds a socket, but one that libvirt makes in a folder of its own for each
// domain, and one that was said already: a <console> can stand for a <serial>.
func (n *Needs) socket(what, path string, listen bool) {
	own := listen && slices.ContainsFunc([]string{"/run/libvirt/", "/var/run/libvirt/", "/var/lib/libvirt/qemu/"},
		func(dir string) bool { return strings.HasPrefix(path, dir) })
	need := maint.SocketNeed{For: what, Path: filepath.Clean(path), Listen: listen}
	again := slices.ContainsFunc(n.Sockets, func(s maint.SocketNeed) bool { return s.Path == need.Path })
	if filepath.IsAbs(path) && !own && !again { // one that is not absolute is abstract
		n.Sockets = append(n.Sockets, need)
	}
}

// end reads a character device's end on the host.
func (n *Needs) end(d *deviceXML) {
	what := strings.TrimSpace(d.XMLName.Local + " " + d.Target.Name)
	src := d.Source
	switch d.Type {
	case "unix":
		n.socket(what, src.Path, src.Mode == "bind")
	case "tcp":
		if src.Mode == "bind" {
			n.port(what, src.Host, src.Service)
		}
	case "dev":
		n.Bound = append(n.Bound, maint.BoundDevice{What: what + " (" + src.Path + ")", How: "virsh detach-device"})
	}
}

// port adds what QEMU listens on. An address that is a name is looked up on
// arrival, and not here.
func (n *Needs) port(what, address, port string) {
	if address == "localhost" {
		address = "127.0.0.1"
	}
	ip, err := netip.ParseAddr(cmp.Or(address, "0.0.0.0"))
	if err != nil {
		return
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return
	}
	same := func(p maint.PortNeed) bool { return p.Address == ip && uint64(p.Port) == number }
	if !slices.ContainsFunc(n.Ports, same) { // a console can say a serial port's again
		n.Ports = append(n.Ports, maint.PortNeed{For: what, Address: ip, Port: uint16(number)})
	}
}

func (n *Needs) graphics(d *deviceXML) {
	what := "graphics " + d.Type
	for _, l := range d.Listens {
		switch l.Type {
		case "address":
			fixed := 0
			for _, port := range []int{d.TCPPort, d.TLSPort, d.WebSocket} {
				if port > 0 && (d.AutoPort != "yes" || port == d.WebSocket) {
					n.port(what, cmp.Or(l.Address, "localhost"), strconv.Itoa(port))
					fixed++
				}
			}
			if fixed == 0 { // the address must be there all the same
				n.port(what, cmp.Or(l.Address, "localhost"), "0")
			}
		case "socket":
			n.socket(what, l.Socket, true)
		}
	}
}

// pages reads how much of which huge pages the domain's memory takes, and where.
func (n *Needs) pages(d *domainXML) error {
	huge := d.MemoryBacking.HugePages
	if huge == nil {
		return nil
	}
	total, err := bytesOf(d.Memory.Value, d.Memory.Unit)
	if err != nil {
		return err
	}
	cells := d.CPU.Cells
	if len(cells) == 0 { // without a topology all memory is in one
		cells = []cellXML{{Memory: total, Unit: "b"}}
	}
	for _, c := range cells {
		need := maint.PageNeed{}
		if need.Bytes, err = bytesOf(c.Memory, c.Unit); err != nil {
			return err
		}
		if need.PageBytes, err = pageSize(huge.Pages, c.ID); err != nil {
			return err
		}
		if need.Cells, err = d.strictly(c.ID); err != nil {
			return err
		}
		total -= min(total, need.Bytes)
		if need.Bytes > 0 {
			n.Pages = append(n.Pages, need)
		}
	}
	if total > 0 && len(n.Pages) > 0 { // of memory modules
		n.Pages = append(n.Pages, maint.PageNeed{PageBytes: n.Pages[0].PageBytes, Bytes: total})
	}
	return nil
}

// pageSize is the size of the pages of one of the guest's cells, bytes; 0 for the
// host's default.
func pageSize(pages []pagesXML, cell int) (uint64, error) {
	var rest uint64
	for _, p := range pages {
		size, err := bytesOf(p.Size, p.Unit)
		if err != nil {
			return 0, err
		}
		if p.NodeSet == "" {
			rest = size
			continue
		}
		set, err := nodeSet(p.NodeSet)
		if err != nil {
			return 0, err
		}
		if slices.Contains(set, cell) {
			return size, nil
		}
	}
	return rest, nil
}

// strictly are the host's cells that the memory of one of the guest's must be in,
// none for any.
func (d *domainXML) strictly(cell int) ([]int, error) {
	rule := d.NUMATune.Memory
	for _, n := range d.NUMATune.Nodes {
		if n.Cell == cell {
			rule = n
		}
	}
	if rule.NodeSet == "" || rule.Mode != "" && rule.Mode != "strict" { // strict is the default
		return nil, nil
	}
	return nodeSet(rule.NodeSet)
}

// nodeSet reads libvirt's form of a set of small numbers, like "0-3,^2,7".
func nodeSet(text string) ([]int, error) {
	const most = 1 << 10
	in := make(map[int]bool)
	for part := range strings.SplitSeq(text, ",") {
		part, out := strings.CutPrefix(strings.TrimSpace(part), "^")
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		a, errA := strconv.Atoi(from)
		b, errB := strconv.Atoi(to)
		if errA != nil || errB != nil || a < 0 || b < a || b >= most {
			return nil, fmt.Errorf("cannot read domain XML: %q is no set of NUMA cells", text)
		}
		for i := a; i <= b; i++ {
			in[i] = !out
		}
	}
	var set []int
	for i := range most {
		if in[i] {
			set = append(set, i)
		}
	}
	return set, nil
}
