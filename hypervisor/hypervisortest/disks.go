package hypervisortest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"belay/agent/maint"
)

// at is where a path of the host is, as far as its guests' disks are concerned.
func (h *Host) at(path string) string { return filepath.Join(h.root, path) }

// WriteFile writes a file of the host, with its folder.
func (h *Host) WriteFile(t testing.TB, path string, text []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(h.at(path)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.at(path), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// ReadFile reads a file of the host, nil where there is none.
func (h *Host) ReadFile(t testing.TB, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(h.at(path))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return text
}

// DiskSize tells how large the file of a disk is.
func (h *Host) DiskSize(ctx context.Context, uuid, disk string) (bytes, allocated uint64, err error) {
	_, err = onGuest(ctx, h, "DiskSize", uuid, func(g *guest) (struct{}, error) {
		d := g.disk(disk)
		if d == nil {
			return struct{}{}, h.failed("DomainGetBlockInfo", codeInvalidArg, "invalid argument: invalid path "+disk+" not assigned to domain")
		}
		info, err := os.Stat(h.at(d.Source))
		if err != nil {
			return struct{}{}, h.failed("DomainGetBlockInfo", codeSystem, "cannot stat file '"+d.Source+"'")
		}
		bytes, allocated = uint64(info.Size()), uint64(info.Sys().(*syscall.Stat_t).Blocks)*512
		return struct{}{}, nil
	})
	return bytes, allocated, err
}

// disk is one of a guest's, by its target or source, nil for none.
func (g *guest) disk(name string) *maint.Disk {
	i := slices.IndexFunc(g.Disks, func(d maint.Disk) bool { return d.Target == name || d.Source == name })
	if i < 0 {
		return nil
	}
	return &g.Disks[i]
}

// canCopy refuses disks that a guest does not have.
func (h *Host) canCopy(g *guest, op string, targets []string) error {
	for _, target := range targets {
		if g.disk(target) == nil {
			return h.failed(op, codeInvalidArg, fmt.Sprintf("invalid argument: disk target %s not found", target))
		}
	}
	return nil
}

// canTake refuses disks for which there is no file: libvirt would make one in a storage
// pool of that folder, of which there is none.
func (h *Host) canTake(g *guest, targets []string) error {
	for _, target := range targets {
		if _, err := os.Stat(h.at(g.disk(target).Source)); err != nil {
			return h.failed(opPerform, codeNoPool, fmt.Sprintf("Storage pool not found: no storage pool with matching target path '%s'", filepath.Dir(g.disk(target).Source)))
		}
	}
	return nil
}

// copyDisks writes to the destination's files what is in the source's: the first half of
// it, or all.
func (m *migration) copyDisks(all bool) {
	g := m.src.guests[m.uuid]
	for _, target := range m.params.CopyDisks {
		path := g.disk(target).Source
		text, err := os.ReadFile(m.src.at(path))
		if !all {
			text = text[:len(text)/2]
		}
		var file *os.File
		if err == nil { // not made anew: QEMU has it open
			file, err = os.OpenFile(m.dst.at(path), os.O_WRONLY, 0)
		}
		if err == nil {
			_, err = file.WriteAt(text, 0)
			_ = file.Close()
		}
		if err != nil {
			m.end(m.src.failed(opPerform, codeOperationFailed, fmt.Sprintf("operation failed: migration of disk %s failed: %v", target, err)))
			return
		}
	}
}

// diskStats adds those of copied disks, which come first and are then kept up with.
func (m *migration) diskStats(job *maint.Job) {
	for _, target := range m.params.CopyDisks {
		if info, err := os.Stat(m.src.at(m.src.guests[m.uuid].disk(target).Source)); err == nil {
			job.DiskTotal += uint64(info.Size())
		}
	}
	if m.phase == PhaseDisks {
		*job = maint.Job{Active: true, Operation: job.Operation, State: job.State, Elapsed: job.Elapsed,
			DiskTotal: job.DiskTotal, DiskLeft: job.DiskTotal / 2, DiskPerSecond: 1 << 20}
	}
}
