package agent_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"belay/agent/maint"
	"belay/patch/live/livetest"
)

const slirp = "0123456789abcdef0123456789abcdef01234567" // a build of a library

// qemuBed is a host with three guests whose QEMUs can be patched, and a fourth with a stock one.
type qemuBed struct{ *patchBed }

func newQEMUBed(t *testing.T) *qemuBed {
	t.Helper()
	b := &qemuBed{newPatchBed(t, nil)}
	b.QEMUs.Run("web-1", slirp)
	for _, name := range []string{"web-2", "web-3"} {
		b.Host.PutGuest(name, func(*maint.Guest) {})
		b.QEMUs.Run(name, slirp)
	}
	return b
}

var all = []string{"web-1", "web-2", "web-3"}

func (b *qemuBed) container() string {
	return livetest.WriteContainer(b.t, b.dir, "slirp_fix", b.vendor.Container("slirp_fix", slirp))
}

// set asks for the livepatch, and waits.
func (b *qemuBed) set(revert bool, guests ...string) maint.Op {
	b.t.Helper()
	return b.patch(maint.PatchRequest{Action: maint.PatchQEMU, File: b.container(), Guests: guests, All: len(guests) == 0, Revert: revert})
}

// has fails the test unless the QEMUs of just these guests have the livepatch.
func (b *qemuBed) has(guests string) {
	b.t.Helper()
	if got := b.QEMUs.Patched(); got != guests {
		b.t.Fatalf("patched are %q, want %q", got, guests)
	}
}

func TestPatchQEMU(t *testing.T) {
	t.Parallel()
	b := newQEMUBed(t)
	op := b.set(false, "web-1", "web-1")
	b.must(op, maint.OutcomeDone)
	b.has("web-1")
	op = b.set(false)
	b.must(op, maint.OutcomeDone)
	b.has("web-1 web-2 web-3")
	if r := op.Patched; r == nil || r.Name != "slirp_fix" || len(r.QEMUs) != 3 || !r.QEMUs[0].Before || r.QEMUs[0].Stopped != 0 || !r.QEMUs[2].Applied || r.QEMUs[2].Stopped <= 0 || r.QEMUs[2].PID == 0 {
		t.Errorf("%+v", r)
	}
	b.must(b.set(true, "web-2"), maint.OutcomeDone)
	b.has("web-1 web-3")
	op = b.set(true)
	b.must(op, maint.OutcomeDone)
	b.has("")
	if r := op.Patched; r.QEMUs[1].Before || r.QEMUs[1].Applied || !r.QEMUs[0].Before || r.QEMUs[0].Applied {
		t.Errorf("%+v", r)
	}
}

// TestPatchQEMURefused: what cannot be is told of every guest, with the remedy, and nothing is done.
func TestPatchQEMURefused(t *testing.T) {
	t.Parallel()
	b := newQEMUBed(t)
	b.Host.PutGuest("stock", func(*maint.Guest) {})
	b.QEMUs.Run("stock")
	b.Host.PutGuest("off", func(g *maint.Guest) { g.State = maint.GuestShutoff })
	for _, c := range []struct {
		guests []string
		want   []maint.Code
	}{
		{[]string{"stock"}, []maint.Code{maint.CodeNeedsPause}},
		{[]string{"web-1", "stock", "nobody", "off"}, []maint.Code{maint.CodeUnknownGuest, maint.CodeNothing, maint.CodeNeedsPause}},
		{nil, []maint.Code{maint.CodeNeedsPause}},
	} {
		op := b.set(false, c.guests...)
		b.must(op, maint.OutcomeBlocked)
		var got []maint.Code
		for _, p := range op.Problems {
			got = append(got, p.Code)
			if p.Code == maint.CodeNeedsPause && !strings.Contains(p.Remedy, "belay replace-vmm stock") {
				t.Errorf("%+v", p)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%v: %v", c.guests, op.Problems)
		}
	}
	foreign := livetest.WriteContainer(t, b.dir, "foreign", livetest.NewVendor(t).Container("foreign", slirp))
	op := b.patch(maint.PatchRequest{Action: maint.PatchQEMU, File: foreign, All: true})
	b.must(op, maint.OutcomeBlocked)
	if op.Problems[0].Code != maint.CodePatchSigned {
		t.Errorf("%v", op.Problems)
	}
	b.has("")
	for _, r := range []maint.PatchRequest{{Action: maint.PatchQEMU, File: "fix.so", All: true}, {Action: maint.PatchQEMU, File: foreign},
		{Action: maint.PatchQEMU, File: foreign, All: true, Guests: all}} {
		p := new(maint.Problem)
		if _, err := b.Client.Patch(b.ctx, r); !errors.As(err, &p) || p.Code != maint.CodeBadRequest {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

// TestPatchQEMUFails: the first that fails has those before put as they were, and no other.
func TestPatchQEMUFails(t *testing.T) {
	t.Parallel()
	b := newQEMUBed(t)
	b.must(b.set(false, "web-1"), maint.OutcomeDone)
	b.QEMUs.OnSet = func(guest string, on bool) error {
		if guest == "web-3" && on {
			return maint.Problemf(maint.CodeQEMURefused, "guest web-3", "", "its locks are busy")
		}
		return nil
	}
	op := b.set(false)
	b.must(op, maint.OutcomeFailed)
	b.has("web-1")
	if op.Problems[0].Reason != "its locks are busy" || len(op.Patched.QEMUs) != 3 || op.Patched.QEMUs[2].Problem == nil || op.Patched.QEMUs[1].Applied {
		t.Errorf("%v, %+v", op.Problems, op.Patched)
	}
}

// TestPatchQEMUUnsure: when a QEMU may be inconsistent, nothing more is touched, and the
// guest's way out is told.
func TestPatchQEMUUnsure(t *testing.T) {
	t.Parallel()
	b := newQEMUBed(t)
	b.QEMUs.OnSet = func(guest string, on bool) error {
		if guest == "web-2" {
			return maint.Problemf(maint.CodeQEMUUnsure, "guest web-2", "belay migrate web-2", "its QEMU may be inconsistent")
		}
		return nil
	}
	op := b.set(false)
	b.must(op, maint.OutcomeStuck)
	b.has("web-1")
	if len(op.Problems) != 1 || op.Problems[0].Code != maint.CodeQEMUUnsure || len(op.Patched.QEMUs) != 2 || op.Patched.QEMUs[1].Problem == nil {
		t.Errorf("%v, %+v", op.Problems, op.Patched)
	}
	b.must(b.set(true), maint.OutcomeBlocked)
	b.has("web-1")
}

// TestPatchQEMUOfWhatEnds: a guest that ends meanwhile is left out.
func TestPatchQEMUOfWhatEnds(t *testing.T) {
	t.Parallel()
	b := newQEMUBed(t)
	b.QEMUs.OnSet = func(guest string, on bool) error {
		if guest == "web-1" {
			b.QEMUs.Run("web-2", slirp) // it was started again
		}
		return nil
	}
	op := b.set(false)
	b.must(op, maint.OutcomeDone)
	b.has("web-1 web-3")
	if !op.Patched.QEMUs[1].Gone {
		t.Errorf("%+v", op.Patched)
	}
}

// TestPatchQEMUKilledAnywhere kills the agent at every single thing that it does, starts it again,
// and looks: either every QEMU is as asked for, or each is as it was.
func TestPatchQEMUKilledAnywhere(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name           string
		revert, fails  bool
		before, as, or string // whose QEMU has the livepatch
	}{
		{name: "apply", as: "web-1 web-2 web-3"},
		{name: "apply, where one has it", before: "web-2", as: "web-1 web-2 web-3", or: "web-2"},
		{name: "revert", revert: true, before: "web-1 web-2 web-3", or: "web-1 web-2 web-3"},
		{name: "apply, and the last fails", fails: true, before: "web-2", or: "web-2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			points := 0
			for n := 0; ; n++ {
				b := newQEMUBed(t)
				if c.before != "" {
					b.must(b.set(false, strings.Fields(c.before)...), maint.OutcomeDone)
				}
				if c.fails {
					b.QEMUs.OnSet = func(guest string, on bool) error {
						if guest == "web-3" {
							return maint.Problemf(maint.CodeQEMURefused, "guest web-3", "", "its locks are busy")
						}
						return nil
					}
				}
				at := b.killedAt(n, c.revert)
				b.check(at, c.fails, c.as, c.or)
				b.Stop()
				b.w.Close()
				if at == "" {
					break
				}
				points++
			}
			if points < 20 {
				t.Fatalf("only %d points were met", points)
			}
			t.Logf("killed at %d points", points)
		})
	}
}

func (b *qemuBed) killedAt(n int, revert bool) (at string) {
	b.t.Helper()
	k := &killer{node: b.Node, left: n, dead: make(chan struct{})}
	b.Stop()
	b.Start(k.hook)
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		select {
		case <-k.dead:
			b.Restart()
		case <-b.ctx.Done():
		}
	}()
	op, err := b.Client.Patch(b.ctx, maint.PatchRequest{Action: maint.PatchQEMU, File: b.container(), All: true, Revert: revert})
	if err == nil {
		await(b.t, b.ctx, b.Node, op.ID)
	} else { // killed while it was being admitted
		k.cut(b.t, err)
		<-restarted
	}
	k.mu.Lock()
	at, k.off = k.at, true
	k.mu.Unlock()
	if at != "" {
		<-restarted
	}
	b.settled()
	return at
}

// check holds the record of the operation, if there is one, against what the QEMUs have.
func (b *qemuBed) check(at string, fails bool, as, or string) {
	b.t.Helper()
	ops, err := b.Client.Ops(b.ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	var op maint.Op
	for _, o := range ops {
		if o.Patch.All {
			op = o
		}
	}
	want, outcome := or, maint.Outcome("")
	switch {
	case fails && op.ID != "":
		outcome = maint.OutcomeFailed
	case op.ID != "":
		want, outcome = as, maint.OutcomeDone
	}
	if got := b.QEMUs.Patched(); got != want || op.Outcome != outcome {
		b.t.Fatalf("killed %s: operation %q ended %q, %v; patched are %q, want %q", at, op.ID, op.Outcome, op.Problems, got, want)
	}
	if op.ID == "" {
		return
	}
	said := ""
	for _, q := range op.Patched.QEMUs {
		if q.Applied {
			said += q.Guest + " "
		}
	}
	if strings.TrimSpace(said) != want {
		b.t.Fatalf("killed %s: its record says that %q are patched, and %q are: %+v", at, said, want, op.Patched)
	}
	if files, _ := filepath.Glob(filepath.Join(b.Config.StateDir, "qemu-live", "*")); len(files) > 1 {
		b.t.Fatalf("killed %s: copies are left: %v", at, files)
	}
}
