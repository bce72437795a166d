package vmm_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/internal/scratchtest"
	"belay/patch/vmm"
	"belay/patch/vmm/vmmtest"
)

// notebook is a Scratch that outlives a belayd, with the phases that were done.
type notebook struct {
	*scratchtest.Notebook
	done   map[string]bool
	undo   bool
	failed error
}

func newNotebook() *notebook {
	return &notebook{Notebook: scratchtest.New(), done: make(map[string]bool)}
}

type phase struct {
	name string
	do   func(context.Context, vmm.Scratch) error
	back func(context.Context, vmm.Scratch) error
}

// run takes a replacement through its phases, from where the notebook says it
// is, as package agent/run does.
func run(ctx context.Context, r *vmm.Replacement, n *notebook) error {
	phases := []phase{
		{vmm.PhasePreflight, r.Preflight, nil},
		{vmm.PhasePrepare, r.Prepare, r.Unprepare},
		{vmm.PhaseSwap, r.Swap, r.Back},
		{vmm.PhaseProve, r.Prove, nil},
		{vmm.PhaseFinish, r.Finish, nil},
	}
	for _, p := range phases {
		if n.done[p.name] || n.undo {
			continue
		}
		n.Phase = p.name
		if err := p.do(ctx, n); err != nil {
			if n.done[vmm.PhaseSwap] || errors.Is(err, vmm.ErrStuck) {
				return err
			}
			n.failed, n.undo = err, true
			break
		}
		n.done[p.name] = true
	}
	if !n.undo {
		return nil
	}
	for _, name := range []string{vmm.PhaseSwap, vmm.PhasePrepare} {
		for _, p := range phases {
			if p.name == name && n.Saved[vmm.PhasePreflight] != nil {
				if err := p.back(context.WithoutCancel(ctx), n); err != nil {
					return fmt.Errorf("undo of %s: %w (%w)", name, err, n.failed)
				}
			}
		}
	}
	return n.failed
}

// bed is a machine with one guest.
type bed struct {
	*vmmtest.Machine
	t    *testing.T
	uuid string
	ops  int
	disk string
}

func newBed(t *testing.T, edits ...func(*maint.Guest)) *bed {
	t.Helper()
	w := hypervisortest.NewWorld()
	t.Cleanup(w.Close)
	m := vmmtest.New(t, w.AddHost("host-a", hypervisortest.HostOptions{CannotRun: []string{"EPYC"}}))
	b := &bed{Machine: m, t: t, disk: "/disk.qcow2"}
	if err := os.WriteFile(filepath.Join(m.Root, b.disk), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	disk := func(g *maint.Guest) {
		g.Disks = []maint.Disk{{Target: "vda", Kind: "disk", Type: "file", Source: b.disk, Format: "qcow2"}}
	}
	b.uuid = m.PutGuest(t, "web-1", append([]func(*maint.Guest){disk}, edits...)...)
	return b
}

// replacement is a new operation.
func (b *bed) replacement(method maint.VMMMethod) *vmm.Replacement {
	b.ops++
	r := &vmm.Replacement{Op: maint.OpID(fmt.Sprintf("rep-%d", b.ops)), Guest: "web-1", UUID: b.uuid, Method: method,
		Host: b.Machine, Places: b.Places(), Log: slog.New(slog.NewTextHandler(b.t.Output(), nil))}
	r.Hurry()
	return r
}

func (b *bed) state() maint.GuestState {
	g, err := b.Guest(context.Background(), b.uuid)
	if errors.Is(err, maint.ErrNoGuest) {
		return maint.GuestShutoff
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return g.State
}

// runs checks that the guest runs, went on from where it was, and that nothing
// is left of a replacement.
func (b *bed) runs() {
	b.t.Helper()
	if b.state() != maint.GuestRunning {
		b.t.Errorf("the guest is %s", b.state())
	}
	if d := b.Damage(); len(d) > 0 {
		b.t.Errorf("damage: %q", d)
	}
	b.tidy()
	if b.IgnoresShared(b.uuid) {
		b.t.Error("a migration would leave its memory behind")
	}
}

func (b *bed) tidy() {
	b.t.Helper()
	for _, pattern := range []string{"run/belay/vmm/*-*", "ram/belay/*", "copies/*", "var/lib/libvirt/qemu/*/belay*"} {
		if left, _ := filepath.Glob(filepath.Join(b.Root, pattern)); len(left) > 0 {
			b.t.Errorf("left behind: %v", left)
		}
	}
}

var methods = []maint.VMMMethod{maint.VMMInPlace, maint.VMMCopy}
