package agent_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// ahead is a window that opens in some three hours, for two.
func ahead() maint.Window {
	at := time.Now().UTC().Add(3 * time.Hour)
	return maint.Window{Rule: fmt.Sprintf("FREQ=DAILY;BYHOUR=%d;BYMINUTE=%d", at.Hour(), at.Minute()), Zone: "UTC", Length: 2 * time.Hour}
}

// policy gives every guest one.
func (u *updates) policy(p maint.GuestPolicy) {
	u.t.Helper()
	for name := range u.uuids {
		_, err := u.a.Client.SetPolicy(u.ctx, name, p)
		check(u.t, err)
	}
}

// begin begins to apply a plan.
func (u *updates) begin(p maint.Plan) maint.Op {
	u.t.Helper()
	op, err := u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: p})
	if err != nil {
		u.t.Fatalf("%v\n%s", err, p.Text())
	}
	return op
}

// reaches waits until an apply is at a step of a kind.
func (u *updates) reaches(id maint.OpID, kind maint.PlanStepKind) {
	u.t.Helper()
	there := errors.New("it is there")
	err := u.a.Agent.Watch(u.ctx, id, func(op maint.Op) error {
		if strings.HasSuffix(op.Step, "-"+string(kind)) {
			return there
		}
		return nil
	})
	if !errors.Is(err, there) {
		u.t.Fatalf("it has not come to %s: %v", kind, err)
	}
}

// quietly sees that an apply begins nothing that a guest could feel, for long enough that it
// would have.
func (u *updates) quietly(id maint.OpID) {
	u.t.Helper()
	ctx, cancel := context.WithTimeout(u.ctx, 300*time.Millisecond)
	defer cancel()
	felt := errors.New("felt")
	if err := u.a.Agent.Watch(ctx, id, func(op maint.Op) error {
		if len(u.parts(id)) > 0 || op.State == maint.OpEnded {
			return felt
		}
		return nil
	}); errors.Is(err, felt) || err == nil {
		u.t.Fatalf("begun: %v", u.parts(id))
	}
}

// events waits until so many are scheduled.
func (u *updates) events(n int) (events []maint.ScheduledEvent) {
	u.t.Helper()
	all := errors.New("all are told")
	if err := u.a.Agent.WatchEvents(u.ctx, false, func(es []maint.ScheduledEvent) error {
		if events = es; len(es) == n {
			return all
		}
		return nil
	}); !errors.Is(err, all) {
		u.t.Fatal(err)
	}
	return events
}

func (u *updates) approve(events []maint.ScheduledEvent) {
	u.t.Helper()
	for _, e := range events {
		_, err := u.a.Client.ApproveEvent(u.ctx, e.ID, "")
		check(u.t, err)
	}
}

func (u *updates) abort(id maint.OpID) maint.Op {
	u.t.Helper()
	_, err := u.a.Client.Abort(u.ctx, id)
	check(u.t, err)
	op := await(u.t, u.ctx, u.a, id)
	if op.Outcome != maint.OutcomeAborted || u.count()["a"] != 3 {
		u.t.Errorf("%s %v: %v", op.Outcome, op.Problems, u.at())
	}
	u.settled(op)
	return op
}

func announcing(c *config.Config) { c.Events = config.Events{Enabled: true, Policy: "all"} }

// TestApplyWindows: guests that are not told feel nothing outside their windows, neither by a
// move nor by a pause, also if the plan was made when a window was open.
func TestApplyWindows(t *testing.T) {
	t.Parallel()
	for kind, manifest := range map[maint.PlanStepKind]string{maint.PlanMove: byMove, maint.PlanHold: byPause} {
		for _, late := range []bool{false, true} {
			u := newUpdates(t, nil)
			u.policy(maint.GuestPolicy{Windows: []maint.Window{ahead()}})
			p := u.plan(manifest, false)
			for i := range p.Steps {
				if late {
					p.Steps[i].At = time.Time{}
				}
			}
			op := u.begin(p.Seal())
			u.reaches(op.ID, kind)
			u.quietly(op.ID)
			u.a.Restart()
			u.quietly(op.ID)
			u.abort(op.ID)
		}
	}
}

// TestApplyTellsOfWindows: who is told is told of the window, and moves then, or on approval.
func TestApplyTellsOfWindows(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, announcing)
	w := ahead()
	u.policy(maint.GuestPolicy{Windows: []maint.Window{w}})
	op := u.begin(u.plan(byMove, false))
	events := u.events(3)
	for _, e := range events {
		if in := time.Until(e.NotBefore); in < 2*time.Hour || in > 3*time.Hour {
			t.Errorf("told of %s, in %s", e.NotBefore, in)
		}
	}
	u.reaches(op.ID, maint.PlanMove)
	u.quietly(op.ID)
	u.approve(events)
	op = await(t, u.ctx, u.a, op.ID)
	if op.Outcome != maint.OutcomeDone || u.count()["b"] != 3 {
		t.Fatalf("%s %v: %v", op.Outcome, op.Problems, u.at())
	}
	u.settled(op)
}

// TestApplyNotice: it is counted from when guests are told, not from when the plan was made.
func TestApplyNotice(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, announcing)
	u.policy(maint.GuestPolicy{Notice: time.Hour})
	p := u.plan(byPause, false)
	for i := range p.Steps {
		if at := &p.Steps[i].At; !at.IsZero() {
			*at = at.Add(-50 * time.Minute)
		}
	}
	p.Made = p.Made.Add(-50 * time.Minute)
	op := u.begin(p.Seal())
	for _, e := range u.events(3) {
		if notice := e.NotBefore.Sub(e.Announced); notice < time.Hour-time.Second {
			t.Errorf("its notice is %s", notice)
		}
	}
	u.abort(op.ID)
}

// TestApplyCalledOff: an event that is called off ends the update, and nothing is done to the
// guest.
func TestApplyCalledOff(t *testing.T) {
	t.Parallel()
	for kind, manifest := range map[maint.PlanStepKind]string{maint.PlanMove: byMove, maint.PlanHold: byPause} {
		u := newUpdates(t, announcing)
		op := u.begin(u.plan(manifest, false))
		u.reaches(op.ID, kind)
		e := u.events(3)[0]
		_, err := u.a.Client.CancelEvent(u.ctx, e.ID, "not today")
		check(t, err)
		op = await(t, u.ctx, u.a, op.ID)
		if op.Outcome != maint.OutcomeFailed || len(u.parts(op.ID)) > 0 || u.count()["a"] != 3 || !strings.Contains(fmt.Sprint(op.Problems), "not today") {
			t.Errorf("%s %v: %v, %v", op.Outcome, op.Problems, u.parts(op.ID), u.at())
		}
		u.settled(op)
	}
}

// TestApplyPlansAgainBeforeMoves: a guest that has started while the others had their notice was
// not told.
func TestApplyPlansAgainBeforeMoves(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, announcing)
	op := u.begin(u.plan(byMove, false))
	events := u.events(3)
	u.reaches(op.ID, maint.PlanMove)
	u.a.Host.PutGuest("new")
	u.approve(events)
	op = await(t, u.ctx, u.a, op.ID)
	if op.Outcome != maint.OutcomeFailed || op.Problems[0].Code != maint.CodeStalePlan || len(u.parts(op.ID)) > 0 {
		t.Errorf("%s %v: %v", op.Outcome, op.Problems, u.parts(op.ID))
	}
	u.settled(op)
}

// TestApplyAfterPatch: what is planned again before the first thing that guests feel is what is
// left: the livepatch of the same update is loaded by then.
func TestApplyAfterPatch(t *testing.T) {
	t.Parallel()
	b := newPatchBed(t, nil)
	op, parts := applyOn(t, b.Node, fmt.Sprintf("id = \"u\"\n[[changes]]\nname = \"fix\"\nkind = \"livepatch\"\nfile = %q\n", b.file("fix_1"))+
		strings.SplitAfterN(byPause, "\n", 2)[1])
	if op.Outcome != maint.OutcomeDone || parts != "patch done; hold done" {
		t.Errorf("%s %v: %s", op.Outcome, op.Problems, parts)
	}
}

// TestApplyKilledInAnnouncedHold: a belayd that finds the hold begun does not wait for its notice
// again.
func TestApplyKilledInAnnouncedHold(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, announcing)
	op := u.begin(u.plan(strings.Replace(byPause, `"5ms"]`, `"300ms"]`, 1), false))
	u.approve(u.events(3))
	holding := func() bool {
		return slices.ContainsFunc(u.ops(u.a), func(o maint.Op) bool { return o.Part == op.ID && o.Step == "hold" })
	}
	for !holding() {
		if u.ctx.Err() != nil {
			t.Fatal("it does not hold")
		}
	}
	u.a.Kill()
	u.a.Restart()
	op = await(t, u.ctx, u.a, op.ID)
	if op.Outcome == maint.OutcomeStuck || strings.Contains(fmt.Sprint(op.Problems), "is started") || u.count()["a"] != 3 {
		t.Errorf("%s %v: %v", op.Outcome, op.Problems, u.at())
	}
	u.events(0) // the hold's are ended when it has
	u.settled(op)
}

// TestApplyNoLongerThanTold: guests that would stand still for longer by now than the plan has
// told are not moved, neither at the start nor when they have had their notice.
func TestApplyNoLongerThanTold(t *testing.T) {
	t.Parallel()
	for _, blackout := range []time.Duration{400 * time.Millisecond, time.Second} { // told: 250 ms, 500 ms at most
		u := newUpdates(t, announcing)
		longer := blackout > 500*time.Millisecond
		p := u.plan(byMove, false)
		op := u.begin(p)
		events := u.events(3)
		u.reaches(op.ID, maint.PlanMove)
		u.SetCopy(hypervisortest.Copy{Blackout: blackout})
		u.a.Host.PutGuest("new")
		other, err := u.a.Client.Migrate(u.ctx, maint.MigrateRequest{Guest: "new", To: "b", Emergency: "a test"})
		check(t, err)
		if other = await(t, u.ctx, u.a, other.ID); other.Outcome != maint.OutcomeDone {
			t.Fatalf("%s %v", other.Outcome, other.Problems)
		}
		u.SetCopy(hypervisortest.Copy{})
		u.approve(events)
		op = await(t, u.ctx, u.a, op.ID)
		if !longer {
			if op.Outcome != maint.OutcomeDone {
				t.Errorf("%s %v", op.Outcome, op.Problems)
			}
			continue
		}
		if op.Outcome != maint.OutcomeFailed || op.Problems[0].Code != maint.CodeStalePlan || !strings.Contains(op.Problems[0].Reason, "blackout 1") || len(u.parts(op.ID)) > 0 {
			t.Errorf("%s %v: %v", op.Outcome, op.Problems, u.parts(op.ID))
		}
		u.settled(op)
		var stale *maint.Refusal
		if _, err := u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: p}); !errors.As(err, &stale) || stale.Problems[0].Code != maint.CodeStalePlan {
			t.Errorf("it is begun again: %v", err)
		}
		if err := u.a.Agent.CheckPlan(u.ctx, u.plan(byMove, false)); err != nil {
			t.Errorf("the plan that tells of it: %v", err)
		}
	}
}
