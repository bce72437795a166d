package agent_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// TestDrainTriesAnotherPeer: a peer at which copies fail loses its guests to another.
func TestDrainTriesAnotherPeer(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 4, nil, "a", "b", "c")
	f.OnPhase(func(uuid string, p hypervisortest.Phase) {
		b := f.Nodes[1].Host
		if g, err := b.Guest(context.Background(), uuid); p == hypervisortest.PhaseCopying && err == nil && g.Job != "" {
			b.KillQEMU(t, uuid)
		}
	})
	op := f.drain(maint.DrainRequest{})
	if op.Outcome != maint.OutcomeDone || f.count()["c"] != 4 {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, f.at())
	}
	tries := 0
	for _, m := range op.Moves {
		tries += m.Tries
	}
	if tries == 0 {
		t.Error("no move has failed: b was not tried")
	}
}

// TestDrainGivesUp: with no peer left to try a guest stays, the others go.
func TestDrainGivesUp(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil, "a", "b")
	unlucky := f.uuids["web-2"]
	f.OnPhase(func(uuid string, p hypervisortest.Phase) {
		if p == hypervisortest.PhaseCopying && uuid == unlucky {
			f.Nodes[1].Host.KillQEMU(t, uuid)
		}
	})
	op := f.drain(maint.DrainRequest{})
	at := f.at()
	if op.Outcome != maint.OutcomePartly || at["web-2"] != "a" || at["web-1"] != "b" || at["web-3"] != "b" || len(op.Problems) != 1 {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, at)
	}
	for _, m := range op.Moves {
		if m.Guest == "web-2" && (m.State != maint.MoveLeft || m.Tries != 3) {
			t.Errorf("%+v", m)
		}
	}
}

// TestDrainAborted: no more begin; those on their way end as they will, or are
// aborted; the drain's own cordon is lifted, another's stays.
func TestDrainAborted(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name        string
		now, before bool // abort what runs; cordoned before
		moved       int
	}{{"gently", false, false, 2}, {"now", true, false, 0}, {"cordoned before", false, true, 2}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, 5, func(c *config.Config) { c.Limits.MigrationsOut = 2 }, "a", "b", "c")
			ctx := ctxFor(t, patience)
			if c.before {
				if _, err := f.a.Client.Cordon(ctx, "mine"); err != nil {
					t.Fatal(err)
				}
			}
			begun := f.holding(2)
			op, err := f.a.Client.Drain(ctx, maint.DrainRequest{})
			if err != nil {
				t.Fatal(err)
			}
			begun()
			var refusal *maint.Refusal
			if err := f.a.Client.Uncordon(ctx); !errors.As(err, &refusal) {
				t.Errorf("uncordoned in the middle: %v", err)
			}
			if _, err := f.a.Client.Drain(ctx, maint.DrainRequest{}); !errors.As(err, &refusal) || refusal.Problems[0].Code != maint.CodeBusy {
				t.Errorf("a second drain: %v", err)
			}
			abort := f.a.Client.Abort
			if c.now {
				abort = f.a.Client.AbortNow
			}
			if _, err := abort(ctx, op.ID); err != nil {
				t.Fatal(err)
			}
			if !c.now {
				f.a.Host.ReleaseCopies()
			}
			op = await(t, ctx, f.a, op.ID)
			if n := f.count(); op.Outcome != maint.OutcomeAborted || n["a"] != 5-c.moved || n["b"]+n["c"] != c.moved {
				t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, f.at())
			}
			if k := f.cordoned(); (k != nil) != c.before {
				t.Errorf("cordon: %+v", k)
			}
			for _, m := range op.Moves {
				if m.State != maint.MoveMoved && (m.State != maint.MoveLeft || len(m.Problems) == 0) {
					t.Errorf("%+v", m)
				}
			}
			if running := slices.ContainsFunc(f.ops(f.a), func(op maint.Op) bool { return op.State != maint.OpEnded }); running {
				t.Error("an operation goes on")
			}
		})
	}
}

// TestDrainAbortedInNotice: guests that have not had their notice yet do not move, and
// are not waited for.
func TestDrainAbortedInNotice(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2, func(c *config.Config) { c.Events = config.Events{Enabled: true, Policy: "all"} }, "a", "b")
	ctx := ctxFor(t, patience)
	op, err := f.a.Client.Drain(ctx, maint.DrainRequest{})
	if err != nil {
		t.Fatal(err)
	}
	told := errors.New("told")
	if err := f.a.Client.WatchEvents(ctx, false, func(es []maint.ScheduledEvent) error {
		if len(es) == 2 {
			return told
		}
		return nil
	}); !errors.Is(err, told) {
		t.Fatal(err)
	}
	if _, err := f.a.Client.Abort(ctx, op.ID); err != nil {
		t.Fatal(err)
	}
	if op = await(t, ctx, f.a, op.ID); op.Outcome != maint.OutcomeAborted || f.count()["a"] != 2 || f.cordoned() != nil {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, f.at())
	}
}

// TestDrainOutOfTime begins no more, sees the others to their end, and says who is left.
func TestDrainOutOfTime(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, func(c *config.Config) { c.Limits.MigrationsOut = 1 }, "a", "b")
	ctx := ctxFor(t, patience)
	begun := f.holding(1)
	op, err := f.a.Client.Drain(ctx, maint.DrainRequest{Timeout: 3 * time.Second}) // a copy must have begun by then
	if err != nil {
		t.Fatal(err)
	}
	begun()
	left := func(op maint.Op) bool {
		return slices.ContainsFunc(op.Problems, func(p maint.Problem) bool { return p.Code == maint.CodeTimeout })
	}
	time.AfterFunc(time.Until(op.Deadline)+50*time.Millisecond, f.a.Host.ReleaseCopies)
	op = await(t, ctx, f.a, op.ID)
	if n := f.count(); op.Outcome != maint.OutcomePartly || !left(op) || n["a"] != 2 || n["b"] != 1 || f.cordoned() == nil {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, f.at())
	}
}

// TestDrainOfOneAborted: who aborts one guest's migration wants it to stay.
func TestDrainOfOneAborted(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2, nil, "a", "b", "c")
	ctx := ctxFor(t, patience)
	begun := f.holding(2)
	op, err := f.a.Client.Drain(ctx, maint.DrainRequest{})
	if err != nil {
		t.Fatal(err)
	}
	begun()
	for _, child := range f.ops(f.a) {
		if child.Guest == "web-1" {
			if _, err := f.a.Client.Abort(ctx, child.ID); err != nil {
				t.Fatal(err)
			}
			await(t, ctx, f.a, child.ID)
		}
	}
	f.a.Host.ReleaseCopies()
	op = await(t, ctx, f.a, op.ID)
	if at := f.at(); op.Outcome != maint.OutcomePartly || at["web-1"] != "a" || at["web-2"] == "a" || len(op.Problems) != 1 {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, at)
	}
}

// TestDrainWithAFullJournal goes on where it was when there is room again.
func TestDrainWithAFullJournal(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 4, func(c *config.Config) { c.Limits.MigrationsOut = 2 }, "a", "b", "c")
	ctx := ctxFor(t, patience)
	begun := f.holding(2)
	op, err := f.a.Client.Drain(ctx, maint.DrainRequest{})
	if err != nil {
		t.Fatal(err)
	}
	begun()
	f.a.FailJournal(errFull)
	f.a.Host.ReleaseCopies()
	time.Sleep(300 * time.Millisecond) // copies end meanwhile
	f.a.FailJournal(nil)
	op = await(t, ctx, f.a, op.ID)
	if op.Outcome != maint.OutcomeDone || f.count()["a"] != 0 {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, f.at())
	}
	f.oncePerGuest("after a full journal", op)
}

// TestRestoreAborted: what is on its way comes, or with now stays; the rest stays.
func TestRestoreAborted(t *testing.T) {
	t.Parallel()
	for _, now := range []bool{false, true} {
		t.Run(fmt.Sprintf("now %t", now), func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, 3, func(c *config.Config) { c.Limits.MigrationsIn = 1 }, "a", "b")
			if op := f.drain(maint.DrainRequest{}); op.Outcome != maint.OutcomeDone {
				t.Fatalf("%s: %v", op.Outcome, op.Problems)
			}
			b, ctx := f.Nodes[1].Host, ctxFor(t, patience)
			begun := f.holding(1)
			b.HoldCopies()
			op, err := f.a.Client.Restore(ctx, maint.RestoreRequest{})
			if err != nil {
				t.Fatal(err)
			}
			begun()
			abort, back := f.a.Client.Abort, 1
			if now {
				abort, back = f.a.Client.AbortNow, 0
			}
			if _, err := abort(ctx, op.ID); err != nil {
				t.Fatal(err)
			}
			if !now {
				b.ReleaseCopies()
			}
			op = await(t, ctx, f.a, op.ID)
			if n := f.count(); op.Outcome != maint.OutcomeAborted || n["a"] != back || n["b"] != 3-back {
				t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, f.at())
			}
		})
	}
}

// TestRestoreTellsGuests: they are told side by side by the hosts that they leave, and
// each comes when it has approved, no more at once than may come.
func TestRestoreTellsGuests(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 4, func(c *config.Config) {
		c.Limits.MigrationsIn = 2
		if c.Host == "b" {
			c.Events = config.Events{Enabled: true, Policy: "all"}
		}
	}, "a", "b")
	if op := f.drain(maint.DrainRequest{}); op.Outcome != maint.OutcomeDone {
		t.Fatalf("%s: %v", op.Outcome, op.Problems)
	}
	b, ctx := f.Nodes[1], ctxFor(t, patience)
	op, err := f.a.Client.Restore(ctx, maint.RestoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var events []maint.ScheduledEvent
	told := errors.New("told")
	if err := b.Client.WatchEvents(ctx, false, func(es []maint.ScheduledEvent) error {
		if events = es; len(es) == 4 {
			return told
		}
		return nil
	}); !errors.Is(err, told) {
		t.Fatal(err)
	}
	for _, e := range events {
		if _, err := b.Client.ApproveEvent(ctx, e.ID, ""); err != nil {
			t.Fatal(err)
		}
	}
	op = await(t, ctx, f.a, op.ID)
	if op.Outcome != maint.OutcomeDone || f.count()["a"] != 4 {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, f.at())
	}
	for _, m := range op.Moves {
		if m.Tries > 0 {
			t.Errorf("had its notice for nothing: %+v", m)
		}
	}
}
