package agent_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
)

// during has f called once, when an apply is about to run a command of which the name ends so.
func (u *updates) during(what string, f func()) {
	called := false
	u.a.Steps.Did = func(name string) {
		if strings.HasSuffix(name, what) && !called {
			called = true
			f()
		}
	}
}

// TestApplyUndoMovesOfOthers: guests that their owners have ended, where they were moved, are not
// brought back, and that is told.
func TestApplyUndoMovesOfOthers(t *testing.T) {
	t.Parallel()
	for n := 1; n <= 3; n += 2 {
		u := newUpdates(t, nil)
		u.during("check-0", func() {
			for i := range n {
				u.Nodes[1].Host.Stop(t, u.uuids[fmt.Sprintf("web-%d", i+1)], "shutdown")
			}
		})
		op := u.apply(byMove+goesBad, false)
		if op.Outcome != maint.OutcomeFailed || !slices.ContainsFunc(op.Problems, func(p maint.Problem) bool { return p.Code == maint.CodeGuestOff }) {
			t.Errorf("%d are off: %s %v", n, op.Outcome, op.Problems)
		}
		if at := u.count(); at["a"] != 3-n || u.cordoned() != nil {
			t.Errorf("%d are off: %v, cordoned: %v", n, u.at(), u.cordoned())
		}
		u.settled(op)
	}
}

// TestApplyUndoWithoutPeer: a guest that cannot be brought back is not said to run where it ran.
func TestApplyUndoWithoutPeer(t *testing.T) {
	t.Parallel()
	u := newSpread(t, "a", "b", "c")
	u.during("check-0", u.Nodes[2].Kill)
	op := u.apply(byMove+goesBad, false)
	at := u.count()
	if op.Outcome != maint.OutcomeStuck || u.cordoned() == nil || at["a"] == 0 || at["c"] == 0 || at["a"]+at["c"] != 4 {
		t.Errorf("%s %v: %v, cordoned: %v", op.Outcome, op.Problems, u.at(), u.cordoned())
	}
	for name, where := range u.at() {
		if where == "c" && !strings.Contains(fmt.Sprint(op.Problems), name) {
			t.Errorf("nothing is said of %s: %v", name, op.Problems)
		}
	}
}

// TestApplyGuestInTheMidst: what becomes of a guest while an update is done.
func TestApplyGuestInTheMidst(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		do   func(u *updates, uuid string)
		want maint.Outcome
		says string
	}{
		{"it crashes", func(u *updates, uuid string) { u.a.Host.KillQEMU(u.t, uuid) }, maint.OutcomeFailed, "crashed"},
		{"its owner ends it", func(u *updates, uuid string) { u.a.Host.Stop(u.t, uuid, "shutdown") }, maint.OutcomeDone, ""},
		{"its owner pauses it", func(u *updates, uuid string) { u.a.Host.Pause(u.t, uuid) }, maint.OutcomeDone, ""},
		{"all are paused", func(u *updates, _ string) {
			for _, uuid := range u.uuids {
				u.a.Host.Pause(u.t, uuid)
			}
		}, maint.OutcomeDone, ""},
		{"it is migrated away", func(u *updates, uuid string) {
			op, err := u.a.Client.Migrate(u.ctx, maint.MigrateRequest{Guest: uuid, To: "b"})
			if err == nil {
				op, err = u.a.Client.Watch(u.ctx, op.ID, func(maint.Op) {})
			}
			if err != nil || op.Outcome != maint.OutcomeDone {
				u.t.Errorf("%s %v", op.Outcome, err)
			}
		}, maint.OutcomeDone, ""},
		{"another starts", func(u *updates, _ string) { u.a.Host.PutGuest("new") }, maint.OutcomeFailed, "new"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			u := newUpdates(t, nil)
			u.during("-prepare", func() { c.do(u, u.uuids["web-2"]) })
			op := u.apply(byPause, false)
			if op.Outcome != c.want || !strings.Contains(fmt.Sprint(op.Problems), c.says) || u.cordoned() != nil {
				t.Errorf("%s %v", op.Outcome, op.Problems)
			}
			u.settled(op)
		})
	}
}

// TestApplyResumedByOwner: a guest that was paused when the plan was made, and runs when it comes
// to the second hold, is not run over: neither by that change nor by what takes the first back.
func TestApplyResumedByOwner(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, nil)
	u.a.Host.Pause(t, u.uuids["web-3"])
	u.during("-step4-step", func() { u.a.Host.Unpause(t, u.uuids["web-3"]) })
	second := strings.SplitAfterN(byPause, "\n", 2)[1]
	op := u.apply(byPause+strings.Replace(second, `"storage"`, `"second"`, 1), false)
	if op.Outcome != maint.OutcomeFailed || op.Problems[0].Subject != "guest web-3" {
		t.Errorf("%s %v; %v", op.Outcome, op.Problems, u.a.Steps.Ran())
	}
	var held []int
	for _, o := range u.ops(u.a) {
		if o.Part == op.ID {
			held = append(held, len(o.Guests))
		}
	}
	if !slices.Equal(held, []int{2, 3}) {
		t.Errorf("held: %v", held)
	}
	u.settled(op)
}

// TestApplyUndoWaits: what takes an update back waits for what somebody else does with a guest.
func TestApplyUndoWaits(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, nil)
	u.during("check-0", func() {
		u.a.Host.HoldCopies()
		if _, err := u.a.Client.Migrate(u.ctx, maint.MigrateRequest{Guest: "web-1", To: "b"}); err != nil {
			t.Error(err)
		}
		time.AfterFunc(500*time.Millisecond, u.a.Host.ReleaseCopies)
	})
	op := u.apply(byPause+goesBad, false)
	if op.Outcome != maint.OutcomeFailed || u.cordoned() != nil {
		t.Errorf("%s %v", op.Outcome, op.Problems)
	}
	if parts := strings.Join(u.parts(op.ID), "; "); parts != "hold done; hold done" {
		t.Errorf("%s", parts)
	}
}

// TestApplyMoveWaitsForPeer: a peer that has no turn for a guest at first is asked again.
func TestApplyMoveWaitsForPeer(t *testing.T) {
	t.Parallel()
	u := &updates{newFleet(t, 3, func(c *config.Config) {
		if c.Host == "b" {
			c.Limits.MigrationsIn = 1
		}
		if c.Host == "a" {
			announcing(c)
		}
	}, "a", "b", "c"), ctxFor(t, patience)}
	c := u.Nodes[2]
	other := c.Host.PutGuest("other")
	p, err := u.a.Client.Plan(u.ctx, maint.PlanRequest{Manifest: byMove, Options: maint.PlanOptions{To: []string{"b"}}})
	check(t, err)
	op := u.begin(p)
	events := u.events(3)
	u.reaches(op.ID, maint.PlanMove)
	c.Host.HoldCopies()
	_, err = c.Client.Migrate(u.ctx, maint.MigrateRequest{Guest: other, To: "b"})
	check(t, err)
	for !slices.ContainsFunc(u.ops(c), func(o maint.Op) bool { return o.Step == "perform" }) {
		if u.ctx.Err() != nil {
			t.Fatal("the other guest does not come")
		}
	}
	u.approve(events)
	time.AfterFunc(time.Second, c.Host.ReleaseCopies)
	ctx, cancel := context.WithCancel(u.ctx)
	defer cancel()
	go func() { // whose move has failed is told of the next
		_ = u.a.Agent.WatchEvents(ctx, false, func(events []maint.ScheduledEvent) error {
			for _, e := range events {
				if _, err := u.a.Client.ApproveEvent(ctx, e.ID, ""); err != nil && ctx.Err() == nil {
					return err
				}
			}
			return nil
		})
	}()
	op = await(t, u.ctx, u.a, op.ID)
	if op.Outcome != maint.OutcomeDone || u.count()["b"] != 3 {
		t.Errorf("%s %v: %v", op.Outcome, op.Problems, u.at())
	}
}

// TestApplyCordonedBefore: who has cordoned the host beforehand finds it so afterwards.
func TestApplyCordonedBefore(t *testing.T) {
	t.Parallel()
	for manifest, want := range map[string]maint.Outcome{byMove: maint.OutcomeDone, byMove + goesBad: maint.OutcomeFailed} {
		u := newUpdates(t, nil)
		_, err := u.a.Client.Cordon(u.ctx, "disk")
		check(t, err)
		op := u.apply(manifest, true)
		if c := u.cordoned(); op.Outcome != want || u.count()["a"] != 3 || c == nil || c.Reason != "disk" {
			t.Errorf("%s %v: %v, cordoned: %+v", op.Outcome, op.Problems, u.at(), c)
		}
	}
}
