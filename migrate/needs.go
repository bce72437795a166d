package migrate

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"belay/agent/maint"
)

// Ground is what a destination finds at itself of what an arrival needs, beside
// what its libvirt has.
type Ground struct {
	Files   map[string]File // by path
	Links   map[string]Link // by name
	Sockets map[string]Socket
	PCI     map[string]bool // by address: it is there
	SwTPM   bool
	// Listening are the addresses on which somebody listens; Addresses are the
	// host's own.
	Listening []netip.AddrPort
	Addresses []netip.Addr
}

// File is what is behind a path. Where nothing is known, because this host's
// belayd may not look or the path is no file of its storage, Known is false.
type File struct {
	Known  bool
	Hangs  bool           // its storage did not answer in time
	Kind   maint.FileKind // "" when nothing is there
	Bytes  uint64
	Inode  uint64
	Device string // see maint.FileNeed
	Marked bool   // the mark that was asked for is beside it
}

// Link is a network link.
type Link struct{ Up, Bridge bool }

// Socket is what is at a socket's path.
type Socket struct {
	Folder bool // there is a folder to make it in
	There  bool
	Bound  bool // some process listens on it
}

// CheckNeeds lists what a guest needs and this host does not have.
func CheckNeeds(n maint.Needs, host string, g Ground, s maint.Supplies) []maint.Problem {
	c := needsCheck{host: "host " + host, ground: g, supplies: s}
	for _, f := range n.Files {
		c.file(f)
	}
	for _, name := range n.Networks {
		c.network(name)
	}
	for _, name := range n.Pools {
		c.pool(name)
	}
	for _, l := range n.Links {
		c.link(l)
	}
	for _, address := range n.PCI {
		if !g.PCI[address] {
			c.add(maint.CodeHostDevice, "give the guest a device that is there: attach it with its address on each host, or by a libvirt network of mode hostdev that both have",
				"has no PCI device %s, which the guest is to get back on arrival", address)
		}
	}
	for _, need := range n.Secrets {
		c.secret(need)
	}
	for _, need := range n.Sockets {
		c.socket(need)
	}
	for _, p := range n.Ports {
		c.port(p)
	}
	if n.SwTPM && !g.SwTPM {
		c.add(maint.CodeTPM, "install swtpm there", "has no swtpm, which emulates the guest's TPM")
	}
	return c.found
}

type needsCheck struct {
	host     string
	ground   Ground
	supplies maint.Supplies
	found    []maint.Problem
}

func (c *needsCheck) add(code maint.Code, remedy, format string, args ...any) {
	c.found = append(c.found, *maint.Problemf(code, c.host, remedy, format, args...))
}

// What an operator can do about disks.
const (
	shareIt  = "have the same storage at the same path on both hosts; to move a disk to shared storage under the running guest, virsh blockcopy GUEST DISK --dest PATH --pivot --wait; or have it copied along (--copy-disks), with nothing there at its path"
	mountIt  = "mount the storage there at the same path as here; if it is this host's own, have the disk copied along (--copy-disks)"
	bringIt  = "copy it there to the same path, put it on shared storage, or take it out of the guest (virsh change-media GUEST DISK --eject for a drive)"
	reviveIt = "see there what its mount or path waits for (findmnt, dmesg)"
)

func (c *needsCheck) file(n maint.FileNeed) {
	f := c.ground.Files[n.Path]
	switch {
	case f.Hangs:
		c.add(maint.CodeStorageHangs, reviveIt, "its storage does not answer for %s, which is %s", n.Path, n.For)
	case !f.Known:
	case f.Kind == "" && n.Same:
		c.add(maint.CodeDiskMissing, mountIt, "has no %s, which is %s", n.Path, n.For)
	case f.Kind == "":
		c.add(maint.CodeDiskMissing, bringIt, "has no %s, which is %s", n.Path, n.For)
	case f.Kind != n.Kind:
		c.add(maint.CodeDiskNotShared, shareIt, "has a %s at %s, %s is a %s", f.Kind, n.Path, n.For, n.Kind)
	case n.Same && !same(n, f):
		c.add(maint.CodeDiskNotShared, shareIt, "has a %s of its own at %s, not the one that is %s", f.Kind, n.Path, n.For)
	case n.Bytes != 0 && n.Bytes != f.Bytes && n.Same:
		c.add(maint.CodeDiskNotShared, "have both hosts see the device alike (rescan it after a resize), or have the same one at that path on both",
			"%s has %d bytes there and %d here; it is %s", n.Path, f.Bytes, n.Bytes, n.For)
	case n.Bytes != 0 && n.Bytes != f.Bytes:
		c.add(maint.CodeDiskDiffers, bringIt, "%s has %d bytes there and %d here; it is %s", n.Path, f.Bytes, n.Bytes, n.For)
	}
}

// SameFile reports whether nothing speaks against a file's being the very same storage as
// the one that is needed, also where nothing is known of it.
func SameFile(n maint.FileNeed, f File) bool {
	return f.Hangs || !f.Known || f.Kind == n.Kind && same(n, f)
}

// same reports whether nothing speaks against a file's being the very same. A
// mark proves it. Where the source could leave none, a different inode number
// disproves it, as does a different identity of a block device.
func same(n maint.FileNeed, f File) bool {
	switch {
	case n.Mark != "":
		return f.Marked
	case n.Kind == maint.FileBlock:
		return n.Device == "" || f.Device == "" || n.Device == f.Device
	default:
		return n.Inode == 0 || n.Inode == f.Inode
	}
}

func (c *needsCheck) network(name string) {
	switch active, there := c.supplies.Networks[name]; {
	case !there:
		c.add(maint.CodeNetwork, fmt.Sprintf("define it there as it is here (virsh net-dumpxml %s), start it, and have it start with the host (virsh net-autostart)", maint.ShellWord(name)),
			"has no libvirt network %s", name)
	case !active:
		c.add(maint.CodeNetwork, "start it there: virsh net-start "+maint.ShellWord(name), "its libvirt network %s is not active", name)
	}
}

func (c *needsCheck) pool(name string) {
	switch active, there := c.supplies.Pools[name]; {
	case !there:
		c.add(maint.CodeDiskMissing, fmt.Sprintf("define it there with the same storage (virsh pool-dumpxml %s), start it, and have it start with the host (virsh pool-autostart)", maint.ShellWord(name)),
			"has no storage pool %s, which has a disk of the guest", name)
	case !active:
		c.add(maint.CodeDiskMissing, "start it there: virsh pool-start "+maint.ShellWord(name), "its storage pool %s is not active", name)
	}
}

func (c *needsCheck) link(n maint.LinkNeed) {
	l, there := c.ground.Links[n.Name]
	switch {
	case !there && n.Bridge:
		c.add(maint.CodeNetwork, "make it there, on the same LAN", "has no bridge %s, which %s is on", n.Name, n.For)
	case !there:
		c.add(maint.CodeNetwork, "have a link of that name there, on the same LAN", "has no link %s, which %s is on", n.Name, n.For)
	case n.Bridge && !l.Bridge:
		c.add(maint.CodeNetwork, "give the bridge the same name on both hosts", "its %s is no bridge, %s is on a bridge of that name", n.Name, n.For)
	case n.Up && !l.Up:
		c.add(maint.CodeNetwork, "set it up there: ip link set "+n.Name+" up", "its %s is down, which %s is on", n.Name, n.For)
	}
}

func (c *needsCheck) secret(n maint.SecretNeed) {
	if slices.ContainsFunc(c.supplies.Secrets, func(s maint.SecretNeed) bool {
		return n.UUID != "" && strings.EqualFold(n.UUID, s.UUID) || n.Usage != "" && n.Usage == s.Usage
	}) {
		return
	}
	c.add(maint.CodeSecret, "define it there with the same UUID and usage (virsh secret-define), and give it its value (virsh secret-set-value)",
		"its libvirt has no secret %s, which %s needs", n.UUID+n.Usage, n.For)
}

func (c *needsCheck) socket(n maint.SocketNeed) {
	s, known := c.ground.Sockets[n.Path]
	switch {
	case !known:
	case n.Listen && s.Bound:
		c.add(maint.CodeSocket, "give each guest a path of its own, or leave the path out for libvirt to choose",
			"somebody listens on %s there, which is the guest's %s", n.Path, n.For)
	case n.Listen && !s.Folder:
		c.add(maint.CodeSocket, "make the folder there, or leave the path out for libvirt to choose",
			"has no folder for the socket %s, which is the guest's %s", n.Path, n.For)
	case !n.Listen && !s.There:
		c.add(maint.CodeSocket, "start there what listens on it, or detach the device", "has no socket %s, to which the guest's %s connects", n.Path, n.For)
	}
}

func (c *needsCheck) port(n maint.PortNeed) {
	if a := n.Address; !a.IsUnspecified() && !a.IsLoopback() && !slices.Contains(c.ground.Addresses, a) {
		c.add(maint.CodePort, "have it listen on all addresses, on 127.0.0.1, or on that of a libvirt network (<listen type='network'>)",
			"has no address %s, on which the guest's %s listens", a, n.For)
		return
	}
	for _, l := range c.ground.Listening {
		if n.Port != 0 && l.Port() == n.Port && (l.Addr() == n.Address || l.Addr().IsUnspecified() || n.Address.IsUnspecified()) {
			c.add(maint.CodePort, "free it there, give the guest another, or have libvirt choose (autoport='yes')",
				"somebody listens on port %d there, which is the guest's %s", n.Port, n.For)
			return
		}
	}
}
