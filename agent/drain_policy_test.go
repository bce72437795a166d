package agent_test

import (
	"errors"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
)

// TestDrainAndRestoreTellAlike: policies are for plans. Neither to a drain nor to a restore does
// a guest's mean more than notice: both tell it, and wait no longer, whatever it has ask its owner.
func TestDrainAndRestoreTellAlike(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1, func(c *config.Config) { c.Events = config.Events{Enabled: true, Policy: "all"} }, "a", "b")
	ctx := ctxFor(t, patience)
	_, err := f.a.Client.SetPolicy(ctx, "web-1", maint.GuestPolicy{Ask: []maint.Rung{maint.RungD}, Windows: []maint.Window{ahead()}})
	check(t, err)
	told := func(on *agenttest.Node) {
		t.Helper()
		stop := errors.New("told")
		err := on.Agent.WatchEvents(ctx, false, func(events []maint.ScheduledEvent) error {
			if len(events) == 0 {
				return nil
			}
			e := events[0]
			if notice, least := e.NotBefore.Sub(e.Announced), maint.MinimumNotice(maint.ImpactFreeze); notice < least || notice > least+time.Minute {
				t.Errorf("told %s before", notice)
			}
			if _, err := on.Client.ApproveEvent(ctx, e.ID, ""); err != nil {
				return err
			}
			return stop
		})
		if !errors.Is(err, stop) {
			t.Fatal(err)
		}
	}
	drain, err := f.a.Client.Drain(ctx, maint.DrainRequest{})
	check(t, err)
	told(f.a)
	if op := await(t, ctx, f.a, drain.ID); op.Outcome != maint.OutcomeDone || f.count()["b"] != 1 {
		t.Fatalf("%s %v: %v", op.Outcome, op.Problems, f.at())
	}
	restore, err := f.a.Client.Restore(ctx, maint.RestoreRequest{})
	check(t, err)
	told(f.Nodes[1])
	if op := await(t, ctx, f.a, restore.ID); op.Outcome != maint.OutcomeDone || f.count()["a"] != 1 {
		t.Fatalf("%s %v: %v", op.Outcome, op.Problems, f.at())
	}
}
