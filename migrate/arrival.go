package migrate

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"

	"belay/agent/maint"
)

// Room is what a destination knows when it judges an arrival.
type Room struct {
	Host         maint.Host
	Guests       []maint.Guest
	Reservations []maint.Reservation
	// MemoryLimit bounds what all guests together may use, 0 for no limit;
	// MemoryReserve stays free for the host itself. Bytes.
	MemoryLimit, MemoryReserve uint64
	// HugePages are those of the host, for arrivals that need some, and
	// HugePageBytes is the size of those that are meant where none is given.
	HugePages     []maint.PagePool
	HugePageBytes uint64
}

// CPUComparer says whether this host can run a guest CPU: nil when it can
// (virConnectCompareHypervisorCPU).
type CPUComparer interface {
	CompareCPU(ctx context.Context, domainType, arch, machine, cpuXML string) error
}

// overhead is what QEMU needs beside the guest's memory, bytes: page tables,
// device state and I/O buffers. The figure is oVirt's long-standing estimate
// for guests without host devices, rounded up.
const overhead = 128 << 20

// CheckArrival lists every reason why a guest cannot come to this host.
func CheckArrival(ctx context.Context, a maint.Arrival, room Room, cpu CPUComparer) []maint.Problem {
	var ps []maint.Problem
	host := "host " + room.Host.Name
	add := func(code maint.Code, remedy, format string, args ...any) {
		ps = append(ps, *maint.Problemf(code, host, remedy, format, args...))
	}

	if a.HostUUID != "" && a.HostUUID == room.Host.UUID {
		add(maint.CodeSameHost, "give each host its own host_uuid in /etc/libvirt/libvirtd.conf",
			"has the same libvirt host UUID %s as the source", a.HostUUID)
	}
	for _, g := range room.Guests {
		switch {
		case g.UUID == a.GuestUUID && g.State.Active():
			add(maint.CodeNameTaken, "find out with 'virsh domstate --reason' which copy is the right one before anything else",
				"already has guest %s with this UUID, state %s", g.Name, g.State)
		case g.UUID == a.GuestUUID:
			add(maint.CodeNameTaken, fmt.Sprintf("if nothing in it is wanted, remove it there: virsh undefine %s", maint.ShellWord(g.Name)),
				"already has an inactive definition of guest %s", g.Name)
		case g.Name == a.Guest:
			add(maint.CodeNameTaken, "rename one of the two guests (virsh domrename)",
				"has another guest named %s (UUID %s)", g.Name, g.UUID)
		}
	}
	for _, r := range room.Reservations {
		if r.Op != a.Op && (r.GuestUUID == a.GuestUUID || r.Guest == a.Guest) {
			add(maint.CodeBusy, "wait for that operation to end, or abort it on its host",
				"already expects guest %s from %s (operation %s)", r.Guest, r.From, r.Op)
		}
	}

	if a.Arch != "" && a.Arch != room.Host.Arch {
		add(maint.CodeDomainType, "choose a peer of that architecture", "is %s, the guest needs %s", room.Host.Arch, a.Arch)
	}
	if !slices.Contains(room.Host.DomainTypes, a.DomainType) {
		add(maint.CodeDomainType, "enable virtualisation in the firmware and load the kvm module, or choose another peer",
			"cannot run %q guests, only %s", a.DomainType, strings.Join(room.Host.DomainTypes, ", "))
	}
	if a.MachineType != "" && !slices.Contains(room.Host.MachineTypes, a.MachineType) {
		add(maint.CodeMachineType, "install the same or a newer QEMU there, or choose another peer",
			"its QEMU %s has no machine type %s", room.Host.QEMUVersion, a.MachineType)
	}
	if a.CPUXML != "" {
		if err := cpu.CompareCPU(ctx, a.DomainType, a.Arch, a.MachineType, a.CPUXML); err != nil {
			add(maint.CodeCPU, "choose a peer with the same or a newer CPU, or give the guest a CPU model that all hosts have",
				"cannot run the guest's CPU: %v", err)
		}
	}
	return slices.Concat(ps, checkMemory(a, room), checkPages(a, room))
}

func checkMemory(a maint.Arrival, room Room) []maint.Problem {
	claimed, expected := room.taken(a.Op)
	need := Takes(a.MemoryBytes, a.Pages)
	var ps []maint.Problem
	if free := minus(room.Host.FreeMemoryBytes, plus(room.MemoryReserve, expected)); need.Free > free {
		ps = append(ps, *maint.Problemf(maint.CodeNoRoom, "host "+room.Host.Name,
			"free memory there, or choose another peer",
			"has %s free for guests, the guest needs %s (free %s, kept for the host %s, promised to other arrivals %s)",
			MiB(free), MiB(need.Free), MiB(room.Host.FreeMemoryBytes), MiB(room.MemoryReserve), MiB(expected)))
	}
	if left := minus(room.MemoryLimit, claimed); room.MemoryLimit > 0 && need.Limit > left {
		ps = append(ps, *maint.Problemf(maint.CodeNoRoom, "host "+room.Host.Name,
			"raise limits.guest_memory there, or choose another peer",
			"its limits.guest_memory of %s leaves %s, the guest needs %s", MiB(room.MemoryLimit), MiB(left), MiB(need.Limit)))
	}
	return ps
}

// taken is what guests of the host, and those on their way to it, may use together,
// and what of that is not taken yet. A guest that is being copied here is among the
// guests, paused, but most of its memory is still free. What is promised to operation
// except is left out.
func (room Room) taken(except maint.OpID) (claimed, expected uint64) {
	states := make(map[string]maint.GuestState)
	for _, g := range room.Guests {
		states[g.UUID] = g.State
		if g.State.Active() {
			claimed = plus(claimed, g.MemoryBytes, overhead)
		}
	}
	for _, r := range room.Reservations {
		if r.Op == except {
			continue
		}
		takes := Takes(r.MemoryBytes, r.Pages)
		if !states[r.GuestUUID].Active() {
			claimed = plus(claimed, takes.Limit)
		}
		if states[r.GuestUUID] != maint.GuestRunning {
			expected = plus(expected, takes.Free)
		}
	}
	return claimed, expected
}

// Takes is what a guest takes of its host's memory. Memory that is free has no huge
// pages in it.
func Takes(memory uint64, pages []maint.PageNeed) maint.GuestBytes {
	return maint.GuestBytes{Free: plus(ordinary(memory, pages), overhead), Limit: plus(memory, overhead)}
}

// Left is what the host has for guests that nobody has been promised; limit is nil
// where there is none.
func (room Room) Left() (free uint64, limit *uint64) {
	claimed, expected := room.taken("")
	if room.MemoryLimit > 0 {
		left := minus(room.MemoryLimit, claimed)
		limit = &left
	}
	return minus(room.Host.FreeMemoryBytes, plus(room.MemoryReserve, expected)), limit
}

// plus adds, and stays at the largest number where the sum is larger.
func plus(terms ...uint64) (sum uint64) {
	for _, t := range terms {
		if sum += t; sum < t {
			return math.MaxUint64
		}
	}
	return sum
}

// minus subtracts, and stays at 0 where the difference is less.
func minus(a, b uint64) uint64 {
	if b > a {
		return 0
	}
	return a - b
}

// MiB writes a number of bytes for people.
func MiB(bytes uint64) string { return fmt.Sprintf("%d MiB", bytes>>20) }
