package agent_test

import (
	"testing"

	"belay/agent/agenttest"
	"belay/agent/maint"
	"belay/patch/vmm/vmmtest"
)

// A guest that is between two QEMUs is gone on with at once, whatever waits for the
// notice of others; and that waits for it.
func TestRecoveryWaitsForNoNotice(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a")
	node := w.Nodes[0]
	node.Stop()
	node.Machine = vmmtest.New(t, node.Host)
	node.Machine.PutGuest(t, "web-1", transient)
	node.Machine.PutGuest(t, "web-2")
	node.Machine.FailStarts = 1000
	node.Start(nil)
	ctx := ctxFor(t, patience)
	op, err := node.Client.Replace(ctx, maint.ReplaceRequest{Guest: "web-1", Method: maint.VMMInPlace, Emergency: "x"})
	if err != nil {
		t.Fatal(err)
	}
	if op = await(t, ctx, node, op.ID); op.Outcome != maint.OutcomeStuck {
		t.Fatalf("ended %s: %v", op.Outcome, op.Problems)
	}
	for _, what := range []string{"hold", "replace"} {
		var other maint.Op
		if what == "hold" {
			other, err = node.Client.Hold(ctx, holdAll)
		} else {
			other, err = node.Client.Replace(ctx, maint.ReplaceRequest{Guest: "web-2", Method: maint.VMMInPlace})
		}
		if err != nil {
			t.Fatal(err)
		}
		awaitEvents(t, ctx, node, many(1))
		recovery, err := node.Client.Replace(ctx, maint.ReplaceRequest{Guest: "web-1"})
		if err != nil {
			t.Fatalf("%s waits for its notice, and web-1, which is off, is not gone on with: %v", what, err)
		}
		if ended := await(t, ctx, node, recovery.ID); ended.Outcome != maint.OutcomeStuck { // no QEMU starts
			t.Errorf("%s: %+v", ended.Outcome, ended.Problems)
		}
		if now, _ := node.Client.Op(ctx, other.ID); now.Step != "announce" {
			t.Errorf("%s goes on: %s %s", what, now.State, now.Step)
		}
		if _, err := node.Client.Abort(ctx, other.ID); err != nil {
			t.Fatal(err)
		}
		await(t, ctx, node, other.ID)
	}
}
