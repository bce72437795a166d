package agent_test

import (
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/maint"
	"belay/patch/vmm/vmmtest"
)

// Nobody is sent to resume a guest that a hold has paused; one that somebody else
// has paused is not the hold's.
func TestHeldGuestIsNotToBeResumed(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	node := w.Nodes[0]
	node.Stop()
	node.Machine = vmmtest.New(t, node.Host)
	node.Machine.PutGuest(t, "web-1")
	theirs := node.Machine.PutGuest(t, "theirs")
	began := make(chan struct{})
	node.Steps.Did = func(string) { close(began) }
	node.Start(nil)
	ctx := ctxFor(t, patience)
	if err := node.Host.Suspend(ctx, theirs); err != nil {
		t.Fatal(err)
	}
	r := holdAll
	r.MaxPause, r.Step.Command = 30*time.Second, []string{"sleep", "1h"}
	op, err := node.Client.Hold(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	<-began
	said := []string{"is held by operation " + string(op.ID), "wait for it (belay ops watch " + string(op.ID) + ")"}
	_, err = node.Client.Replace(ctx, maint.ReplaceRequest{Guest: "web-1"})
	refused(t, "a new QEMU", err, maint.CodeBusy, said...)
	_, err = node.Client.ReplaceChoices(ctx, "web-1")
	refused(t, "what a new QEMU costs", err, maint.CodeBusy, said...)
	_, err = node.Client.Migrate(ctx, toB)
	refused(t, "a migration", err, maint.CodeBusy, said...)
	_, err = node.Client.Clock(ctx, "web-1")
	refused(t, "its clock", err, maint.CodeBusy, said...)
	_, err = node.Client.SyncClock(ctx, "web-1")
	refused(t, "putting its clock right", err, maint.CodeBusy, said...)
	if _, err = node.Client.Clock(ctx, "theirs"); refusal(t, err)[0] != maint.CodeGuestState {
		t.Errorf("the clock of the other: %v", err)
	}
	if g, _ := seen(t, ctx, node); g.State != maint.GuestPaused || g.Reason != "held, operation "+string(op.ID) {
		t.Errorf("it is listed as %s (%s)", g.State, g.Reason)
	}
	inv, err := node.Client.Inventory(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range inv.Guests {
		if g.Name == "theirs" && g.Reason != "user" {
			t.Errorf("the other is listed as %s (%s)", g.State, g.Reason)
		}
	}
	if _, err := node.Client.Abort(ctx, op.ID); err != nil {
		t.Fatal(err)
	}
	await(t, ctx, node, op.ID)
	if g, _ := seen(t, ctx, node); g.State != maint.GuestRunning {
		t.Errorf("after it: %s (%s)", g.State, g.Reason)
	}
}
