package vmm

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// What the methods cost, measured with QEMU 10.0 under libvirt 9.0 and emulation
// on two cores, and rounded up: an estimate is to be on the safe side. In place
// that was 0.5 to 0.7 s with 192 and 512 MiB of memory (suspend 6 ms, state out 14,
// quit 60, start 390, state in 22, resume 19), as with 2 GiB; a save and a restore
// of 512 MiB were 4.0 s.
const (
	// inPlacePause is that of a guest with a disk and a network interface:
	// most of it is libvirt's taking a domain down and QEMU's start.
	inPlacePause = 1000 * time.Millisecond
	// perDevice is what each further disk, interface or channel adds.
	perDevice = 20 * time.Millisecond
	// copyPause is what a save and a restore take without any memory, and
	// copyRate the bytes of memory per second, out and in again.
	copyPause = 2500 * time.Millisecond
	copyRate  = 250 << 20
	// bouncePause is the blackout of a live migration within the host;
	// libvirt and QEMU aim at 300 ms at most.
	bouncePause = 400 * time.Millisecond

	// overhead is what a QEMU needs beside the guest's memory.
	overhead = 256 << 20
	// stateRoom is what the state of devices may take, video memory too.
	stateRoom = 64 << 20
)

// Choices tells of every method what it would cost this guest and what stands
// in its way: those that are possible first, by their pause.
//
// A guest that is between two QEMUs has one choice: to go on.
func Choices(f Facts) []maint.VMMChoice {
	if f.GoesOn != "" {
		return []maint.VMMChoice{{Method: f.GoesOn}}
	}
	mem := f.Guest.MemoryBytes
	common := unfit(f)
	all := []maint.VMMChoice{
		{Method: maint.VMMInPlace, MemoryBytes: stateRoom,
			Pause:    inPlacePause + time.Duration(len(f.Guest.Disks)+len(f.Guest.Devices))*perDevice,
			Problems: slices.Concat(common, inPlaceProblems(f))},
		{Method: maint.VMMCopy, MemoryBytes: mem + stateRoom,
			Pause:    copyPause + time.Duration(float64(mem)/copyRate*float64(time.Second)),
			Problems: slices.Concat(common, copyProblems(f))},
	}
	if !f.NoBounce {
		all = append(all, maint.VMMChoice{Method: maint.VMMBounce, MemoryBytes: mem + overhead, Pause: bouncePause,
			Problems: slices.Concat(common, bounceProblems(f))})
	}
	Order(all)
	return all
}

// Order sorts choices: those that are possible first, then those that are unproven, each by
// their pause.
func Order(choices []maint.VMMChoice) {
	last := func(c maint.VMMChoice) int {
		switch {
		case len(c.Problems) > 0:
			return 2
		case c.Unproven != "":
			return 1
		}
		return 0
	}
	slices.SortStableFunc(choices, func(a, b maint.VMMChoice) int {
		return cmp.Or(cmp.Compare(last(a), last(b)), cmp.Compare(a.Pause, b.Pause))
	})
}

// Choose takes the method that is asked for, or the cheapest that is possible, proven
// and whose pause is accepted (0: any). Else it returns a *maint.Refusal with
// every reason, of every method when none was asked for.
func Choose(guest string, choices []maint.VMMChoice, method maint.VMMMethod, maxPause time.Duration) (maint.VMMChoice, error) {
	var problems []maint.Problem
	for _, c := range choices {
		if method != "" && c.Method != method {
			continue
		}
		against := c.Problems
		if method == "" && c.Unproven != "" {
			against = append(slices.Clone(against), *maint.Problemf(maint.CodeQEMU, "guest "+guest, "try it with one that does not matter (--method "+string(c.Method)+")",
				"%s is not taken by itself: %s", c.Method, c.Unproven))
		}
		if maxPause > 0 && c.Pause > maxPause {
			against = append(slices.Clone(against), *maint.Problemf(maint.CodeLongPause, "guest "+guest, "accept a longer pause (--max-pause)",
				"%s would pause it for about %v, and at most %v is accepted", c.Method, c.Pause.Round(10*time.Millisecond), maxPause))
		}
		if len(against) == 0 {
			return c, nil
		}
		for _, p := range against {
			if !slices.Contains(problems, p) {
				problems = append(problems, p)
			}
		}
	}
	if len(problems) == 0 {
		problems = []maint.Problem{*maint.Problemf(maint.CodeBadRequest, "guest "+guest,
			"use in-place, copy or bounce, or leave the choice to Belay", "there is no method %q here", method)}
	}
	return maint.VMMChoice{}, maint.Refuse("cannot put a new QEMU under guest "+guest, problems)
}

// problems collects what is said about one guest.
type problems struct {
	guest string
	list  []maint.Problem
}

func (ps *problems) add(code maint.Code, remedy, reason string, args ...any) {
	ps.list = append(ps.list, *maint.Problemf(code, "guest "+ps.guest, remedy, reason, args...))
}

// guarded is that an earlier operation has not let go of the guest.
func guarded(f Facts) maint.Problem {
	return *maint.Problemf(maint.CodeKept, "guest "+f.Guest.Name, "see 'belay ops show "+string(f.Guarded)+"'; once the guest is as it should be, remove its folder in /run/belay/vmm",
		"operation %s has kept its memory or its state, and has not ended well", f.Guarded)
}

// unfit is what stands in the way of every method.
func unfit(f Facts) []maint.Problem {
	ps := problems{guest: f.Guest.Name}
	g := f.Guest
	if f.Guarded != "" {
		ps.list = append(ps.list, guarded(f))
	}
	switch {
	case !g.State.Active():
		ps.add(maint.CodeGuestOff, "there is nothing to do: its next start is with the new QEMU", "is %s", g.State)
		return ps.list
	case g.State == maint.GuestPaused:
		ps.add(maint.CodeGuestPaused, "resume it first (virsh resume), if whoever paused it agrees",
			"is paused (%s), and Belay did not pause it", g.Reason)
	case g.State != maint.GuestRunning && g.State != maint.GuestBlocked, f.RunState != runRunning:
		ps.add(maint.CodeGuestState, "wait until it runs normally", "is %s (%s), and %s to QEMU", g.State, g.Reason, f.RunState)
	}
	if g.Job != "" {
		ps.add(maint.CodeBusy, "wait for the job to end, or abort it (virsh domjobabort)", "has a %s job in progress", g.Job)
	}
	if len(f.BlockJobs) > 0 {
		ps.add(maint.CodeBusy, "wait for them to end, or abort them (virsh blockjob)", "has jobs on its disks: %s", strings.Join(f.BlockJobs, ", "))
	}
	if f.Sealed != "" {
		ps.add(maint.CodeDevice, "shut it down and start it again", "has memory that is encrypted for this one QEMU (%s)", f.Sealed)
	}
	if len(f.Unfit) > 0 {
		ps.add(maint.CodeDevice, "detach them, or shut it down and start it again", "has what one QEMU cannot hand to another: %s", strings.Join(f.Unfit, "; "))
	}
	if len(f.Blockers) > 0 {
		ps.add(maint.CodeQEMU, "change what QEMU names", "QEMU refuses to hand it over: %s", strings.Join(f.Blockers, "; "))
	}
	if f.Snapshots && !g.Persistent {
		ps.add(maint.CodeDevice, "define it (virsh define), or remove its snapshots and checkpoints", "is transient and has snapshots, which libvirt forgets when its QEMU ends")
	}
	if len(f.Host.MachineTypes) > 0 && !slices.Contains(f.Host.MachineTypes, g.MachineType) {
		ps.add(maint.CodeMachineType, "install a QEMU that knows it", "has machine type %s, which the QEMU of this host does not know", g.MachineType)
	}
	if older(f.Host.QEMUVersion, f.QEMU) {
		ps.add(maint.CodeQEMU, "install a QEMU that is not older", "runs in QEMU %s, and the host's is %s", f.QEMU, f.Host.QEMUVersion)
	}
	return ps.list
}

// older reports whether version a comes before b; what cannot be read is not.
func older(a, b string) bool {
	parts := func(s string) (n [3]int, ok bool) {
		_, err := fmt.Sscanf(s, "%d.%d.%d", &n[0], &n[1], &n[2])
		return n, err == nil
	}
	x, okX := parts(a)
	y, okY := parts(b)
	return okX && okY && slices.Compare(x[:], y[:]) < 0
}

func inPlaceProblems(f Facts) []maint.Problem {
	ps := problems{guest: f.Guest.Name}
	if !f.Guest.State.Active() {
		return nil
	}
	const shareable = "give it <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>, with memory_backing_dir (qemu.conf) on a tmpfs or in reserved memory (DAX), from its next start on"
	for _, m := range f.Memory {
		switch {
		case m.Kind != "memory-backend-file":
			ps.add(maint.CodeMemory, shareable, "its memory %s (%s) is in no file that another QEMU could map", m.ID, strings.TrimPrefix(m.Kind, "memory-backend-"))
		case !m.Shared:
			ps.add(maint.CodeMemory, shareable, "its memory %s is a file, but not shared", m.ID)
		case m.Discard:
			ps.add(maint.CodeMemory, "take <discard/> out of its <memoryBacking>, from its next start on", "QEMU throws its memory %s away when it ends", m.ID)
		case m.Plugged: // hw/virtio/virtio-mem.c, virtio_mem_device_realize: without a look at -incoming before 8.1
			ps.add(maint.CodeMemory, "use another method", "its memory %s is a virtio-mem device's, which a QEMU empties when it starts", m.ID)
		case m.Ours && !m.InRAM:
			ps.add(maint.CodeMemory, "put memory_backing_dir (qemu.conf) on a tmpfs or in reserved memory (DAX), from its next start on", "its memory %s, in %s, is not in RAM", m.ID, m.Path)
		case !m.Mapped:
			ps.add(maint.CodeMemory, shareable, "its memory %s is not, or no longer, the file %s", m.ID, m.Path)
		}
	}
	if len(f.Memory) == 0 {
		ps.add(maint.CodeMemory, shareable, "QEMU names no memory of it")
	}
	if !f.IgnoreShared {
		ps.add(maint.CodeQEMU, "update QEMU and start the guest anew", "its QEMU, %s, cannot leave memory where it is (%s)", f.QEMU, ignoreShared)
	}
	if f.PowerOff != "" && f.PowerOff != "destroy" {
		ps.add(maint.CodeDevice, "set <on_poweroff>destroy</on_poweroff>", "libvirt is to %s it when its QEMU ends", f.PowerOff)
	}
	if len(f.OneWay) > 0 {
		ps.add(maint.CodeDevice, "use another method", "has what only libvirt can carry over: %s", strings.Join(f.OneWay, "; "))
	}
	if f.Hook != "" {
		ps.add(maint.CodeHook, "install dist/hooks/qemu.d/belay as /etc/libvirt/hooks/qemu.d/belay, executable, and restart libvirt's daemon; guests go on running",
			"libvirt does not run Belay's hook: %s", f.Hook)
	}
	switch {
	case f.Reach != "":
		ps.add(maint.CodeConfined, "allow its QEMU sockets in its folder in /var/lib/libvirt/qemu, or use another method",
			"QEMU (user %d, label %q): %s", f.UID, f.Confined, f.Reach)
	case strings.Contains(f.Confined, "svirt"):
		ps.add(maint.CodeConfined, "use another method", "SELinux gives each QEMU a label of its own (%s), and its memory's would not fit the new one", f.Confined)
	}
	return ps.list
}

// overBootProblems is what else stands in the way of memory that is to stay in place over a boot: nobody
// but its owner knows where a file of theirs is then, and what is written to it meanwhile.
func overBootProblems(f Facts) []maint.Problem {
	ps := problems{guest: f.Guest.Name}
	for _, m := range f.Memory {
		if m.Kind == "memory-backend-file" && m.Shared && !m.Ours {
			ps.add(maint.CodeMemory, "use another method", "its memory %s is a file of its owner's, %s", m.ID, m.Path)
		}
	}
	return ps.list
}

func copyProblems(f Facts) []maint.Problem {
	ps := problems{guest: f.Guest.Name}
	if !f.Guest.State.Active() {
		return nil
	}
	need := f.Guest.MemoryBytes + stateRoom
	if !f.CopiesInRAM {
		ps.add(maint.CodeNoRoom, "name a folder on a tmpfs", "would be saved in %s, which is not in RAM", f.Copies)
	} else if f.CopiesFree < need {
		ps.add(maint.CodeNoRoom, "make that tmpfs larger (mount -o remount,size=)", "needs %d MiB in %s, which has %d MiB", need>>20, f.Copies, f.CopiesFree>>20)
	}
	ps.memory(f, need)
	return ps.list
}

func bounceProblems(f Facts) []maint.Problem {
	ps := problems{guest: f.Guest.Name}
	if !f.Guest.State.Active() {
		return f.Bounce
	}
	if f.FixedCID {
		ps.add(maint.CodeDevice, "give its vsock <cid auto='yes'/>, or use another method", "has a vsock address of its own, and would be there twice")
	}
	if len(f.OneWay) > 0 {
		ps.add(maint.CodeDevice, "use another method", "has what cannot be there twice: %s", strings.Join(f.OneWay, "; "))
	}
	ps.memory(f, f.Guest.MemoryBytes+overhead)
	return append(ps.list, f.Bounce...)
}

// memory asks for memory of the host's.
func (ps *problems) memory(f Facts, need uint64) {
	if f.Host.FreeMemoryBytes < need {
		ps.add(maint.CodeNoRoom, "free memory, or use another method", "needs %d MiB beside its own memory, and the host has %d MiB free", need>>20, f.Host.FreeMemoryBytes>>20)
	}
}
