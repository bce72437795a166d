package maint

import (
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// Needs is what a guest uses of the host that it runs on, beside its CPU and its
// memory. What a host makes by itself for each guest (sockets in libvirt's own
// folders, ports that libvirt picks) is not among it.
type Needs struct {
	Files    []FileNeed   `json:"files,omitempty"`
	Networks []string     `json:"networks,omitempty"` // libvirt's, by name
	Pools    []string     `json:"pools,omitempty"`    // libvirt's storage pools, by name
	Links    []LinkNeed   `json:"links,omitempty"`
	PCI      []string     `json:"pci,omitempty"` // addresses, 0000:3b:02.1: plugged in again on arrival
	Secrets  []SecretNeed `json:"secrets,omitempty"`
	Sockets  []SocketNeed `json:"sockets,omitempty"`
	Ports    []PortNeed   `json:"ports,omitempty"`
	SwTPM    bool         `json:"swtpm,omitempty"` // the program that emulates a TPM
}

// Empty reports whether there is nothing that the guest needs.
func (n Needs) Empty() bool {
	return len(n.Files)+len(n.Networks)+len(n.Pools)+len(n.Links)+len(n.PCI)+len(n.Secrets)+len(n.Sockets)+len(n.Ports) == 0 && !n.SwTPM
}

// FileKind is what a path leads to.
type FileKind string

// The kinds of files that guests use.
const (
	FileRegular FileKind = "file"
	FileBlock   FileKind = "block device"
	FileDir     FileKind = "folder"
	FileSocket  FileKind = "socket"
	FileOther   FileKind = "special file"
)

// FileNeed is a file, block device or folder that is opened on arrival. What the
// source could not learn of it is left zero, and is not compared.
type FileNeed struct {
	For  string   `json:"for"` // "disk vda"
	Path string   `json:"path"`
	Kind FileKind `json:"kind"`
	// Same says that the guest writes to it, so that it must be the very same
	// storage; else a copy will do.
	Same bool `json:"same,omitempty"`
	// Bytes is the size of a block device, or of a file that is only read.
	Bytes uint64 `json:"bytes,omitempty"`
	Inode uint64 `json:"inode,omitempty"`
	// Device is the identity of a block device on whatever host: its WWID, or
	// the UUID that device-mapper gives it.
	Device string `json:"device,omitempty"`
	// Mark is the name of a file that the source has put beside it for this one
	// question, "" where it could not.
	Mark string `json:"mark,omitempty"`
}

// LinkNeed is a network link that an interface is put on.
type LinkNeed struct {
	For  string `json:"for"` // "interface 52:54:00:…"
	Name string `json:"name"`
	// Bridge is that it must be a Linux bridge, and not one of Open vSwitch.
	Bridge bool `json:"bridge,omitempty"`
	// Up is that it must be up for frames to pass.
	Up bool `json:"up,omitempty"`
}

// PageNeed is huge pages that a guest's memory is made of.
type PageNeed struct {
	PageBytes uint64 `json:"page_bytes"` // 0: of the host's default size
	Bytes     uint64 `json:"bytes"`
	// Cells are the host's NUMA cells that they must be in, none for any.
	Cells []int `json:"cells,omitempty"`
}

// SecretNeed is a secret that libvirt must have, by one of its two names.
type SecretNeed struct {
	For   string `json:"for"`
	UUID  string `json:"uuid,omitempty"`
	Usage string `json:"usage,omitempty"`
}

// SocketNeed is a Unix socket of a fixed path.
type SocketNeed struct {
	For  string `json:"for"` // "channel org.example.0"
	Path string `json:"path"`
	// Listen is that QEMU listens there; else it connects to who does.
	Listen bool `json:"listen,omitempty"`
}

// PortNeed is an address that QEMU listens on.
type PortNeed struct {
	For     string     `json:"for"` // "graphics vnc"
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port,omitempty"` // 0: one that libvirt picks
}

// The most that is taken of a guest's needs.
const (
	maxNeeds = 256 // of each sort
	maxWord  = 255 // bytes
	maxPath  = 4096
	maxCell  = 1023
)

var (
	markName   = regexp.MustCompile(`^\.belay-[0-9a-f]{32}$`)
	pciAddress = regexp.MustCompile(`^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$`)
)

// IsMark reports whether a file's name is one that Mark can be.
func IsMark(name string) bool { return markName.MatchString(name) }

// plain is a text without control characters, which can be shown and logged.
func plain(s string, most int) bool {
	return s != "" && len(s) <= most && !strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) })
}

func cleanPath(s string) bool { return plain(s, maxPath) && path.IsAbs(s) && path.Clean(s) == s }

// validate says what of the needs cannot be meant, "" when all can.
func (n Needs) validate() string {
	for sort, count := range map[string]int{"files": len(n.Files), "networks": len(n.Networks), "pools": len(n.Pools), "links": len(n.Links), "pci": len(n.PCI),
		"secrets": len(n.Secrets), "sockets": len(n.Sockets), "ports": len(n.Ports)} {
		if count > maxNeeds {
			return fmt.Sprintf("%d %s are more than %d", count, sort, maxNeeds)
		}
	}
	for _, f := range n.Files {
		if !plain(f.For, maxWord) || !cleanPath(f.Path) || len(f.Device) > maxWord || f.Mark != "" && !IsMark(f.Mark) ||
			f.Kind != FileRegular && f.Kind != FileBlock && f.Kind != FileDir {
			return fmt.Sprintf("%.60q is no file that a guest can need", f.Path)
		}
	}
	for _, name := range slices.Concat(n.Networks, n.Pools) {
		if !plain(name, maxWord) {
			return fmt.Sprintf("%.60q is no name of a network or storage pool", name)
		}
	}
	for _, l := range n.Links {
		const most = 15 // IFNAMSIZ, less the zero
		if !plain(l.For, maxWord) || !plain(l.Name, most) || strings.Contains(l.Name, "/") || l.Name == "." || l.Name == ".." {
			return fmt.Sprintf("%.60q is no link's name", l.Name)
		}
	}
	for _, address := range n.PCI {
		if !pciAddress.MatchString(address) {
			return fmt.Sprintf("%.60q is no PCI address", address)
		}
	}
	for _, s := range n.Secrets {
		if !plain(s.For, maxWord) || (s.UUID == "") == (s.Usage == "") || !plain(s.UUID+s.Usage, maxWord) {
			return fmt.Sprintf("a secret for %.60q has no name, or two", s.For)
		}
	}
	for _, s := range n.Sockets {
		if !plain(s.For, maxWord) || !cleanPath(s.Path) {
			return fmt.Sprintf("%.60q is no socket's path", s.Path)
		}
	}
	for _, p := range n.Ports {
		if !plain(p.For, maxWord) || !p.Address.IsValid() || p.Address.Zone() != "" {
			return fmt.Sprintf("a port for %.60q has no address", p.For)
		}
	}
	return ""
}

// validPages says what of pages cannot be meant, "" when all can.
func validPages(pages []PageNeed) string {
	if len(pages) > maxNeeds {
		return fmt.Sprintf("%d kinds are more than %d", len(pages), maxNeeds)
	}
	for _, p := range pages {
		if p.PageBytes > maxGuestMemory || p.Bytes == 0 || p.Bytes > maxGuestMemory || len(p.Cells) > maxCell+1 {
			return fmt.Sprintf("%d bytes in pages of %d are out of range", p.Bytes, p.PageBytes)
		}
		for _, c := range p.Cells {
			if c < 0 || c > maxCell {
				return fmt.Sprintf("there is no NUMA cell %d", c)
			}
		}
	}
	return ""
}

// Supplies is what a host's libvirt has of what guests need.
type Supplies struct {
	Networks map[string]bool // by name: whether it is active
	Pools    map[string]bool // of storage, the same
	Secrets  []SecretNeed    // each by both its names, as far as it has them
}

// PagePool is the huge pages of one size that one NUMA cell of a host has.
type PagePool struct {
	Cell      int
	PageBytes uint64
	Free      uint64 // pages
}

// BoundDevice is a device of a guest that is a piece of its host's hardware, or a
// process there: it cannot go along.
type BoundDevice struct {
	What string // "PCI device 0000:3b:00.0"
	How  string // what detaches it
}

// MoveVerdict says whether a guest could be moved to a peer now.
type MoveVerdict struct {
	Guest     string    `json:"guest"`
	GuestUUID string    `json:"guest_uuid"`
	Peer      string    `json:"peer"`
	CanMove   bool      `json:"can_move"`
	Problems  []Problem `json:"problems"` // every reason against
	// Copies are the disks that are copied along, if it can move. If it cannot, and they
	// are named, it could with them copied: with --copy-disks.
	Copies []DiskCopy `json:"copies,omitempty"`
}
