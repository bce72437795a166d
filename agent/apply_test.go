package agent_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
)

// The updates that are applied: each has another rung do the work.
const (
	byPause = `id = "by-pause"
[[changes]]
name = "storage"
kind = "network"
rungs = ["B1"]
[changes.prepare]
command = ["true", "prepare"]
[changes.apply]
command = ["sleep", "5ms"]
expected = "5ms"
[changes.undo]
command = ["true", "undo"]
`
	byMove = `id = "by-move"
[[changes]]
name = "bios"
kind = "firmware"
[changes.apply]
command = ["true", "flash"]
[changes.undo]
command = ["true", "undo"]
`
	untouched = `id = "untouched"
[[changes]]
name = "arp"
kind = "sysctl"
rungs = ["A"]
[changes.apply]
command = ["true", "apply"]
[changes.undo]
command = ["true", "undo"]
`
	leaves = `id = "leaves"
[[changes]]
name = "retire"
kind = "host-leaves"
`
	goesBad = `
[[checks]]
name = "well"
when = ["after"]
command = ["false"]
failures = 1
`
)

// updates are hosts, of which the first is updated.
type updates struct {
	*fleet
	ctx context.Context
}

func newUpdates(t *testing.T, edit func(*config.Config)) *updates {
	t.Helper()
	return &updates{newFleet(t, 3, edit, "a", "b"), ctxFor(t, patience)}
}

func (u *updates) plan(manifest string, back bool) maint.Plan {
	u.t.Helper()
	p, err := u.a.Client.Plan(u.ctx, maint.PlanRequest{Manifest: manifest, Options: maint.PlanOptions{Return: back}})
	if err != nil {
		u.t.Fatal(err)
	}
	return p
}

func (u *updates) apply(manifest string, back bool) maint.Op {
	u.t.Helper()
	op, err := u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: u.plan(manifest, back)})
	if err != nil {
		u.t.Fatal(err)
	}
	return await(u.t, u.ctx, u.a, op.ID)
}

// parts are the operations that an apply had, each with its outcome.
func (u *updates) parts(apply maint.OpID) (all []string) {
	for _, op := range u.ops(u.a) {
		if op.Part == apply {
			all = append(all, string(op.Kind)+" "+string(op.Outcome))
		}
	}
	return all
}

func TestApply(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, manifest string
		back           bool
		want           maint.Outcome
		at             string // where the three guests are then
		parts          string
		cordoned       bool
	}{
		{"by a pause", byPause, false, maint.OutcomeDone, "a", "hold done", false},
		{"by a pause, and it goes bad", byPause + goesBad, false, maint.OutcomeFailed, "a", "hold done; hold done", false},
		{"nobody feels it", untouched, false, maint.OutcomeDone, "a", "", false},
		{"nobody feels it, and it goes bad", untouched + goesBad, false, maint.OutcomeFailed, "a", "", false},
		{"by moves", byMove, false, maint.OutcomeDone, "b", "migrate done; migrate done; migrate done", false},
		{"by moves, and back", byMove, true, maint.OutcomeDone, "a", "migrate done; migrate done; migrate done; restore done", false},
		{"by moves, and it goes bad", byMove + goesBad, false, maint.OutcomeFailed, "a", "migrate done; migrate done; migrate done; restore done", false},
		{"it goes bad, and stops there", byMove + goesBad + "on_fail = \"stop\"\n", true, maint.OutcomeStuck, "b", "migrate done; migrate done; migrate done", true},
		{"it goes bad, and on", byMove + goesBad + "on_fail = \"go-on\"\n", true, maint.OutcomeDone, "a", "migrate done; migrate done; migrate done; restore done", false},
		{"the host leaves", leaves, false, maint.OutcomeDone, "b", "migrate done; migrate done; migrate done", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			u := newUpdates(t, nil)
			op := u.apply(c.manifest, c.back)
			if op.Outcome != c.want {
				t.Errorf("%s: %v", op.Outcome, op.Problems)
			}
			if n := u.count(); n[c.at] != 3 {
				t.Errorf("guests are at %v", u.at())
			}
			if parts := strings.Join(u.parts(op.ID), "; "); parts != c.parts {
				t.Errorf("its parts: %s", parts)
			}
			if is := u.cordoned() != nil; is != c.cordoned {
				t.Errorf("cordoned: %t", is)
			}
			u.settled(op)
		})
	}
}

// TestRestoreAfterAnUpdate: the guests of a host that has left service come back when it is
// back; those that an update has brought back itself are nobody's to fetch.
func TestRestoreAfterAnUpdate(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, nil)
	if op := u.apply(leaves, false); op.Outcome != maint.OutcomeDone || u.count()["b"] != 3 || u.cordoned() == nil {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, u.at())
	}
	if op := u.restore(maint.RestoreRequest{}); op.Outcome != maint.OutcomeDone || u.count()["a"] != 3 || u.cordoned() != nil {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, u.at())
	}
	left := u.apply(byMove, false)
	u.apply(byPause, false)
	if op := u.restore(maint.RestoreRequest{}); op.Outcome != maint.OutcomeDone || op.Restore.Drain != left.ID || u.count()["a"] != 3 {
		t.Fatalf("%s of %s: %v, %v", op.Outcome, op.Restore.Drain, op.Problems, u.at())
	}

	u = newUpdates(t, nil)
	u.apply(byMove, true)
	u.apply(byMove+goesBad, false)
	var refusal *maint.Refusal
	if _, err := u.a.Client.Restore(u.ctx, maint.RestoreRequest{}); !errors.As(err, &refusal) || refusal.Problems[0].Code != maint.CodeNothing {
		t.Errorf("guests that are back are fetched: %v", err)
	}
}

// settled sees that nothing is left of an apply.
func (u *updates) settled(op maint.Op) {
	u.t.Helper()
	events, err := u.a.Client.Events(u.ctx, false)
	if err != nil || len(events) > 0 {
		u.t.Errorf("events are left: %+v, %v", events, err)
	}
	if left := u.a.Steps.Prepared(); len(left) > 0 {
		u.t.Errorf("steps are left: %v", left)
	}
	for _, o := range u.ops(u.a) {
		if o.State != maint.OpEnded {
			u.t.Errorf("%s goes on after %s", o.ID, op.ID)
		}
	}
}

// TestApplyRefused: nothing is begun for a plan that is not the one that would be made.
func TestApplyRefused(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, nil)
	was := u.plan(byPause, false)
	other := was
	other.Guests = other.Guests[:2]
	elsewhere := was
	elsewhere.HostUUID = "another"
	old := was
	u.a.Host.PutGuest("new")
	for name, c := range map[string]struct {
		plan maint.Plan
		code maint.Code
	}{
		"changed":       {other, maint.CodeTampered},
		"another host":  {elsewhere.Seal(), maint.CodeTampered},
		"a guest began": {old, maint.CodeStalePlan},
	} {
		_, err := u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: c.plan})
		var p *maint.Problem
		var r *maint.Refusal
		switch {
		case errors.As(err, &p) && p.Code == c.code && p.Remedy != "":
		case errors.As(err, &r) && r.Problems[0].Code == c.code && r.Problems[0].Remedy != "":
		default:
			t.Errorf("%s: %v", name, err)
		}
	}
	if ops := u.ops(u.a); len(ops) > 0 {
		t.Errorf("%+v", ops)
	}
}

// TestApplyOnce: of two at once one wins, and the other is told who, and since when.
func TestApplyOnce(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, func(c *config.Config) { c.Events = config.Events{Enabled: true, Policy: "all"} })
	p := u.plan(byPause, false)
	op, err := u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: p})
	if err != nil {
		t.Fatal(err)
	}
	_, err = u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: p})
	if err == nil || !strings.Contains(err.Error(), string(op.ID)) || !strings.Contains(err.Error(), "begun by") {
		t.Errorf("%v", err)
	}
	if _, err := u.a.Client.Drain(u.ctx, maint.DrainRequest{}); err == nil {
		t.Error("a drain has begun")
	}
	if _, err := u.a.Client.Abort(u.ctx, op.ID); err != nil {
		t.Fatal(err)
	}
	op = await(t, u.ctx, u.a, op.ID)
	if op.Outcome != maint.OutcomeAborted || len(u.parts(op.ID)) > 0 {
		t.Errorf("%s %v, %v", op.Outcome, op.Problems, u.parts(op.ID))
	}
	u.settled(op)
}

// TestApplyTellsOnce: guests are told in the beginning, of each thing that they will feel,
// and it begins when they have approved that.
func TestApplyTellsOnce(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, func(c *config.Config) { c.Events = config.Events{Enabled: true, Policy: "all"} })
	op, err := u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: u.plan(byMove, false)})
	if err != nil {
		t.Fatal(err)
	}
	all := errors.New("all are told")
	var events []maint.ScheduledEvent
	if err := u.a.Client.WatchEvents(u.ctx, false, func(es []maint.ScheduledEvent) error {
		if events = es; len(es) == 3 {
			return all
		}
		return nil
	}); !errors.Is(err, all) {
		t.Fatal(err)
	}
	u.a.Restart() // what is to come is not taken for what was left
	if es, err := u.a.Client.Events(u.ctx, false); err != nil || len(es) != 3 {
		t.Fatalf("after a restart: %+v, %v", es, err)
	}
	for _, e := range events {
		if of, is := maint.ApplyOf(e.Op); !is || of != op.ID {
			t.Errorf("%+v", e)
		}
		if _, err := u.a.Client.ApproveEvent(u.ctx, e.ID, ""); err != nil {
			t.Fatal(err)
		}
	}
	op = await(t, u.ctx, u.a, op.ID)
	if op.Outcome != maint.OutcomeDone || u.count()["b"] != 3 {
		t.Fatalf("%s %v: %v", op.Outcome, op.Problems, u.at())
	}
	u.settled(op)
}

// TestApplyHoldsNoLongerThanAllowed: what guests' policies allow is the deadline of the hold, too,
// whatever the host's default.
func TestApplyHoldsNoLongerThanAllowed(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, nil)
	const allowed = 900 * time.Millisecond
	var guest string
	for guest = range u.at() {
		break
	}
	_, err := u.a.Client.SetPolicy(u.ctx, guest, maint.GuestPolicy{MaxPause: allowed})
	check(t, err)
	op := u.apply(byPause, false)
	for _, part := range u.ops(u.a) {
		if part.Part == op.ID && part.Hold != nil && part.Hold.MaxPause != allowed {
			t.Errorf("guests could be held for %s", part.Hold.MaxPause)
		}
	}
	if parts := strings.Join(u.parts(op.ID), "; "); parts != "hold done" {
		t.Errorf("its parts: %s", parts)
	}
}
