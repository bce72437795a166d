package maint

import (
	"fmt"
	"strings"
	"unicode"
)

// Role is what a caller of the API may do. Roles are ordered for people:
// an operator may do what a viewer may. A peer may only ask what one host
// asks of another.
type Role string

// The roles.
const (
	RoleNone     Role = ""
	RoleViewer   Role = "viewer"
	RoleOperator Role = "operator"
	RolePeer     Role = "peer"
)

// Arrival describes a guest that wants to come, for the destination's own
// checks.
type Arrival struct {
	Op          OpID   `json:"op"`
	Guest       string `json:"guest"`
	GuestUUID   string `json:"guest_uuid"`
	MemoryBytes uint64 `json:"memory_bytes"`
	VCPUs       int    `json:"vcpus"`
	Arch        string `json:"arch"`
	DomainType  string `json:"domain_type"`
	MachineType string `json:"machine_type"`
	// CPUXML is the <cpu> element of the guest's migratable XML.
	CPUXML string `json:"cpu_xml,omitempty"`
	// HostUUID is the source's host UUID; libvirt refuses its own.
	HostUUID string `json:"host_uuid"`
	// Pages are the huge pages that its memory is made of, none for a guest
	// whose memory is ordinary.
	Pages []PageNeed `json:"pages,omitempty"`
	// Disks are those that are copied along.
	Disks []DiskCopy `json:"disks,omitempty"`
	// Needs is what else it uses of a host. Checks want it; a reservation is of
	// memory only.
	Needs *Needs `json:"needs,omitempty"`
	// AntiAffinity are groups of which no other guest may be where it goes.
	AntiAffinity []string `json:"anti_affinity,omitempty"`
	// Way is how its memory is to come, nil from a source that is too old to say.
	Way *Way `json:"way,omitempty"`
}

// maxGuestMemory is more than any guest has, bytes; it keeps sums in range.
const maxGuestMemory = 1 << 50

// Validate refuses an Arrival that cannot be meant.
func (a Arrival) Validate() error {
	bad := func(field, format string, args ...any) error {
		return Problemf(CodeBadRequest, "arrival: "+field, "", format, args...)
	}
	switch {
	case a.Op == "" || len(a.Op) > 128:
		return bad("op", "%q is not an operation ID", a.Op)
	case len(a.GuestUUID) != 36:
		return bad("guest_uuid", "%q is not a UUID", a.GuestUUID)
	case a.Guest == "":
		return bad("guest", "is empty")
	case a.MemoryBytes == 0 || a.MemoryBytes > maxGuestMemory:
		return bad("memory_bytes", "%d is out of range", a.MemoryBytes)
	case a.DomainType == "":
		return bad("domain_type", "is empty")
	}
	if why := validGroups(a.AntiAffinity); why != "" {
		return bad("anti_affinity", "%s", why)
	}
	if why := validPages(a.Pages); why != "" {
		return bad("pages", "%s", why)
	}
	if why := validDisks(a.Disks); why != "" {
		return bad("disks", "%s", why)
	}
	if a.Needs != nil {
		if why := a.Needs.validate(); why != "" {
			return bad("needs", "%s", why)
		}
	}
	if a.Way != nil {
		if why := a.Way.validate(); why != "" {
			return bad("way", "%s", why)
		}
	}
	return nil
}

// maxGroups is how many anti-affinity groups a guest can be in.
const maxGroups = 64

// CheckGroups says why a guest cannot be in these anti-affinity groups, "" if it can.
func CheckGroups(names []string) string { return validGroups(names) }

// validGroups says why names of anti-affinity groups cannot be meant.
func validGroups(names []string) string {
	if len(names) > maxGroups {
		return fmt.Sprintf("%d groups are more than %d", len(names), maxGroups)
	}
	for _, n := range names {
		if n == "" || len(n) > 255 || strings.ContainsFunc(n, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return fmt.Sprintf("%.60q is not the name of a group", n)
		}
	}
	return ""
}

// View is what one host knows of one guest at this moment.
type View struct {
	Host  string `json:"host"`
	Guest *Guest `json:"guest"` // nil: the host has no such domain
	// Came are the operations by which the guest has come to run on the host, also where
	// it has gone from there since.
	Came []OpID `json:"came,omitempty"`
	// Vigil is what the host has seen of the guest by itself.
	Vigil Vigil `json:"vigil,omitzero"`
}

// Vigil is a host's watch over what a guest does there. What is not seen in one that has
// not been broken off has not happened.
type Vigil struct {
	// ID is of one unbroken watch; "" is of a host that does not watch.
	ID string `json:"id,omitempty"`
	// Ran is how often the guest has been seen to run there, or to arrive paused.
	Ran int `json:"ran,omitempty"`
}

// Since compares it with an earlier one: same says that the watch was not broken off
// meanwhile, and ran that the guest was seen.
func (v Vigil) Since(earlier Vigil) (same, ran bool) {
	same = v.ID != "" && v.ID == earlier.ID
	return same, same && v.Ran > earlier.Ran
}

// Running reports whether the guest's vCPUs run on this host.
func (v View) Running() bool {
	return v.Guest != nil && (v.Guest.State == GuestRunning || v.Guest.State == GuestBlocked)
}

// Settlement is how the destination is to keep a guest that has arrived.
type Settlement struct {
	Op        OpID   `json:"op"` // the operation that reserved room here
	GuestUUID string `json:"guest_uuid"`
	Autostart bool   `json:"autostart"`
	// Persistent asks for a definition; XML is the one the guest had on the
	// source, used only when libvirt did not bring it along.
	Persistent bool   `json:"persistent"`
	XML        string `json:"xml,omitempty"`
	// Events are the guest's scheduled events, which it also has with it.
	Events *GuestEvents `json:"events,omitempty"`
}
