package hypervisor

import (
	"cmp"
	"encoding/xml"
	"fmt"
	"io"
	"slices"
	"strings"

	"belay/agent/maint"
)

// domainXML is the part of a <domain> that Belay reads. XML is never written
// back: a definition is passed on as the text libvirt gave.
type domainXML struct {
	Type   string `xml:"type,attr"`
	ID     int    `xml:"id,attr"`
	Name   string `xml:"name"`
	UUID   string `xml:"uuid"`
	Memory struct {
		Unit  string `xml:"unit,attr"`
		Value uint64 `xml:",chardata"`
	} `xml:"memory"`
	Metadata struct {
		Placement struct {
			AntiAffinity string `xml:"anti-affinity,attr"`
		} `xml:"urn:belay:placement:1 placement"`
		Policy string `xml:"urn:belay:policy:1 policy"`
	} `xml:"metadata"`
	MemoryBacking struct {
		HugePages *struct {
			Pages []pagesXML `xml:"page"`
		} `xml:"hugepages"`
		Source struct {
			Type string `xml:"type,attr"` // anonymous, file, memfd
		} `xml:"source"`
		Access struct {
			Mode string `xml:"mode,attr"` // private, shared
		} `xml:"access"`
	} `xml:"memoryBacking"`
	VCPU int `xml:"vcpu"`
	OS   struct {
		Type struct {
			Machine string `xml:"machine,attr"`
		} `xml:"type"`
		Loader  string `xml:"loader"`
		Kernel  string `xml:"kernel"`
		Initrd  string `xml:"initrd"`
		DevTree string `xml:"dtb"`
	} `xml:"os"`
	CPU struct {
		Mode  string    `xml:"mode,attr"`
		Model string    `xml:"model"`
		Cells []cellXML `xml:"numa>cell"`
	} `xml:"cpu"`
	NUMATune struct {
		Memory nodesXML   `xml:"memory"`
		Nodes  []nodesXML `xml:"memnode"`
	} `xml:"numatune"`
	Devices struct {
		All []deviceXML `xml:",any"`
	} `xml:"devices"`
}

// deviceXML is any child of <devices>; which fields are set depends on its kind.
type deviceXML struct {
	XMLName  xml.Name
	Type     string    `xml:"type,attr"`
	Mode     string    `xml:"mode,attr"`
	Model    string    `xml:"model,attr"`
	Device   string    `xml:"device,attr"`
	Source   sourceXML `xml:"source"`
	Backend  backend   `xml:"backend"`
	Target   targetXML `xml:"target"`
	MAC      addrAttr  `xml:"mac"`
	CID      cidXML    `xml:"cid"`
	Driver   driverXML `xml:"driver"`
	ReadOnly *struct{} `xml:"readonly"`
	Shared   *struct{} `xml:"shareable"`

	needsXML
}

type sourceXML struct {
	// One of these says where from, by the device's type.
	File    string `xml:"file,attr"`
	Dev     string `xml:"dev,attr"`
	Dir     string `xml:"dir,attr"`
	Bridge  string `xml:"bridge,attr"`
	Network string `xml:"network,attr"`
	Path    string `xml:"path,attr"`
	Name    string `xml:"name,attr"`
	Pool    string `xml:"pool,attr"`
	Volume  string `xml:"volume,attr"`
	endXML
	Address struct {
		UUID     string `xml:"uuid,attr"` // mediated device
		Domain   string `xml:"domain,attr"`
		Bus      string `xml:"bus,attr"`
		Device   string `xml:"device,attr"` // of a USB device
		Slot     string `xml:"slot,attr"`
		Function string `xml:"function,attr"`
	} `xml:"address"`
}

type targetXML struct {
	Dev   string `xml:"dev,attr"`
	Dir   string `xml:"dir,attr"`
	Name  string `xml:"name,attr"`
	Type  string `xml:"type,attr"`
	State string `xml:"state,attr"` // of a guest agent's channel: connected, disconnected
}

type driverXML struct {
	Type  string `xml:"type,attr"`
	Cache string `xml:"cache,attr"`
}

type backend struct {
	Type       string     `xml:"type,attr"`
	Source     sourceXML  `xml:"source"`     // of a TPM that another process emulates
	Encryption secretsXML `xml:"encryption"` // of a TPM's state
}

type addrAttr struct {
	Address string `xml:"address,attr"`
}

type cidXML struct {
	Address uint32 `xml:"address,attr"`
}

// agentChannel is the virtio port of the QEMU guest agent.
const agentChannel = "org.qemu.guest_agent.0"

// ParseGuest reads a domain's XML. What XML does not tell (state, job,
// persistence, autostart) is left unset.
func ParseGuest(text string) (maint.Guest, error) {
	var g maint.Guest
	err := fill(&g, text)
	return g, err
}

// fill sets what the XML tells of a guest.
func fill(g *maint.Guest, text string) error {
	var d domainXML
	if err := xml.Unmarshal([]byte(text), &d); err != nil {
		return fmt.Errorf("cannot read domain XML: %w", err)
	}
	memory, err := bytesOf(d.Memory.Value, d.Memory.Unit)
	if err != nil {
		return fmt.Errorf("cannot read domain XML: %w", err)
	}
	g.Name, g.UUID, g.ID = d.Name, d.UUID, d.ID
	g.MemoryBytes, g.VCPUs = memory, d.VCPU
	g.MemorySource, g.MemoryShared = d.memorySource(), d.MemoryBacking.Access.Mode == "shared"
	g.DomainType, g.MachineType = d.Type, d.OS.Type.Machine
	g.CPUModel = strings.TrimSpace(cmp.Or(d.CPU.Model, d.CPU.Mode))
	g.AntiAffinity = nil
	for _, name := range strings.Fields(d.Metadata.Placement.AntiAffinity) {
		if !slices.Contains(g.AntiAffinity, name) {
			g.AntiAffinity = append(g.AntiAffinity, name)
		}
	}
	slices.Sort(g.AntiAffinity)
	g.Policy = d.Metadata.Policy
	g.Agent = maint.AgentNone
	g.Disks, g.Devices = []maint.Disk{}, []maint.Device{}
	for i := range d.Devices.All {
		dev := &d.Devices.All[i]
		switch kind := dev.XMLName.Local; kind {
		case "emulator": // not a device
		case "disk":
			g.Disks = append(g.Disks, dev.disk())
		case "channel":
			if dev.Target.Name == agentChannel {
				g.Agent = maint.AgentDisconnected
				if dev.Target.State == "connected" {
					g.Agent = maint.AgentConnected
				}
			}
			fallthrough
		default:
			g.Devices = append(g.Devices, dev.device())
		}
	}
	return nil
}

// memorySource is in the words of maint.Guest.
func (d *domainXML) memorySource() string {
	switch b := d.MemoryBacking; {
	case b.HugePages != nil:
		return "hugepages"
	case b.Source.Type == "anonymous":
		return ""
	default:
		return b.Source.Type
	}
}

func (d *deviceXML) disk() maint.Disk {
	return maint.Disk{
		Target:   d.Target.Dev,
		Kind:     cmp.Or(d.Device, "disk"),
		Type:     d.Type,
		Source:   d.Source.String(),
		Format:   d.Driver.Type,
		Cache:    d.Driver.Cache,
		ReadOnly: d.ReadOnly != nil,
		Shared:   d.Shared != nil,
	}
}

func (d *deviceXML) device() maint.Device {
	return maint.Device{
		Kind: d.XMLName.Local,
		// A TPM's type is its backend's, a vsock's or a watchdog's its model.
		Type:   cmp.Or(d.Type, d.Backend.Type, d.Model, d.Mode),
		Source: d.Source.String(),
		Target: cmp.Or(d.Target.Dev, d.Target.Name, d.Target.Dir, d.Target.Type),
		MAC:    d.MAC.Address,
		CID:    d.CID.Address,
	}
}

// String gives the source as one word: a path, a bridge, a PCI address, …
func (s *sourceXML) String() string {
	if s.Pool != "" {
		return s.Pool + "/" + s.Volume
	}
	if a := s.Address; a.Slot != "" {
		trim := func(hex string) string { return strings.TrimPrefix(hex, "0x") }
		return fmt.Sprintf("%s:%s:%s.%s", trim(a.Domain), trim(a.Bus), trim(a.Slot), trim(a.Function))
	}
	return cmp.Or(s.File, s.Dev, s.Dir, s.Bridge, s.Network, s.Path, s.Name, s.Address.UUID)
}

// bytesOf converts a size with libvirt's unit; none means KiB.
func bytesOf(value uint64, unit string) (uint64, error) {
	switch unit {
	case "", "KiB", "k":
		return value << 10, nil
	case "MiB", "M":
		return value << 20, nil
	case "GiB", "G":
		return value << 30, nil
	case "b", "bytes":
		return value, nil
	}
	return 0, fmt.Errorf("unknown unit %q of memory", unit)
}

// cpuElement cuts the <cpu> child of <domain> out of the text, "" when there
// is none. It is not decoded and written anew, so nothing in it can be lost.
func cpuElement(text string) (string, error) {
	dec := xml.NewDecoder(strings.NewReader(text))
	depth, start := 0, int64(-1)
	for {
		before := dec.InputOffset()
		tok, err := dec.Token()
		if err == io.EOF {
			return "", nil
		}
		if err != nil {
			return "", fmt.Errorf("cannot read domain XML: %w", err)
		}
		switch tok := tok.(type) {
		case xml.StartElement:
			depth++
			if depth == 2 && tok.Name.Local == "cpu" {
				start = before
			}
		case xml.EndElement:
			depth--
			if depth == 1 && start >= 0 {
				return text[start:dec.InputOffset()], nil
			}
		}
	}
}
