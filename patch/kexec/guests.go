package kexec

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"

	"belay/agent/maint"
	"belay/patch/vmm"
)

// guests are those of the plan, what keeps them from it, and how each would be kept.
func (j *Job) guests(ctx context.Context, g *judgement, pl *plan) (ways []maint.KexecGuest, err error) {
	ways = []maint.KexecGuest{}
	all, err := j.Host.Guests(ctx)
	if err != nil {
		return nil, err
	}
	info, err := j.Host.Info(ctx)
	if err != nil {
		return nil, err
	}
	named := make(map[string]bool)
	for _, name := range j.Request.Guests {
		i := slices.IndexFunc(all, func(q maint.Guest) bool { return q.Name == name || q.UUID == name })
		if i < 0 {
			g.add(maint.CodeUnknownGuest, "guest "+name, "see 'belay guests' for the names", "is not on this host")
			continue
		}
		named[all[i].UUID] = true
		if !all[i].State.Active() {
			g.add(maint.CodeGuestOff, "guest "+name, "leave it out", "does not run")
		}
	}
	for _, q := range all {
		if !q.State.Active() {
			continue
		}
		if !j.Request.All && !named[q.UUID] {
			g.add(maint.CodeUncovered, "guest "+q.Name, "name it too (--all), or move it away first (belay migrate "+maint.ShellWord(q.Name)+")",
				"runs on this host, and would end with its kernel")
			continue
		}
		d, err := j.Mover.Host.Describe(ctx, q.UUID)
		if errors.Is(err, maint.ErrNoGuest) {
			continue // it has ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		j.fits(g, q, info)
		err = vmm.CanRun(ctx, j.Mover.Host, q, info.Arch, d.CPU)
		if p := new(maint.Problem); errors.As(err, &p) {
			g.problems = append(g.problems, *p)
		} else if err != nil {
			return nil, err
		}
		pl.Guests = append(pl.Guests, member{Name: q.Name, UUID: q.UUID, Bytes: q.MemoryBytes, Machine: q.MachineType, Domain: q.DomainType, CPU: d.CPU,
			Paused: q.State == maint.GuestPaused, Autostart: q.Autostart, Disks: disks(q)})
		way := maint.KexecGuest{Guest: q.Name, UUID: q.UUID, Memory: maint.KexecCopied, Bytes: Needs(q.MemoryBytes)}
		s, why := j.seat(ctx, q, "plan")
		if way.Why = why; why == "" {
			way.Memory, way.Bytes = maint.KexecInPlace, stateRoom
			for _, path := range s.Memory {
				way.Bytes += grows(j.Tree.at(path))
			}
			pl.Guests[len(pl.Guests)-1].InPlace = true
		}
		ways = append(ways, way)
	}
	return ways, nil
}

// fits: a guest can be saved, and its world is there after the boot.
func (j *Job) fits(g *judgement, q maint.Guest, info maint.Host) {
	subject := "guest " + q.Name
	switch q.State {
	case maint.GuestRunning, maint.GuestBlocked, maint.GuestPaused:
	default:
		g.add(maint.CodeGuestState, subject, "wait until it has done that, or start it anew", "is %s", q.State)
	}
	if q.Job != "" {
		g.add(maint.CodeBusy, subject, "wait for it", "has a job of libvirt's, %q", q.Job)
	}
	if !slices.Contains(info.MachineTypes, q.MachineType) {
		g.add(maint.CodeMachineType, subject, "install the QEMU again that has it", "has machine type %s, which this host's QEMU %s has not", q.MachineType, info.QEMUVersion)
	}
	for _, d := range q.Devices {
		if what := unsaved(d); what != "" {
			g.add(maint.CodeDevice, subject, "detach it first, or shut the guest down and start it again afterwards", "has %s, whose state ends with the kernel", what)
		}
	}
	for _, d := range q.Disks {
		if !filepath.IsAbs(d.Source) || strings.HasPrefix(d.Source, "/dev/") && !strings.HasPrefix(d.Source, "/dev/shm/") {
			continue
		}
		m, err := j.Tree.Mount(d.Source)
		if err == nil && (m.Type == "tmpfs" || m.Type == "ramfs") || strings.HasPrefix(d.Source, j.Dir+"/") {
			g.add(maint.CodeVolatile, subject, "move it to a disk first (virsh blockcopy)", "has its disk %s in memory (%s), which a boot empties", d.Target, d.Source)
		}
	}
}

// unsaved says what a device is that is not saved with its guest; "": it is. That is found out
// before the first guest stands still, not by libvirt, which refuses the one after some others.
func unsaved(d maint.Device) string {
	switch {
	case d.Kind == "hostdev":
		return "the host's device " + d.Source
	case d.Kind == "interface" && (d.Type == "hostdev" || d.Type == "vdpa"):
		return "interface " + d.MAC + " of type " + d.Type
	case d.Kind == "shmem":
		return "memory that it shares with others (" + d.Source + ")"
	case d.Kind == "filesystem":
		return "the host's file system " + d.Source
	case d.Kind == "tpm" && d.Type != "emulator":
		return "the host's TPM"
	}
	return ""
}
