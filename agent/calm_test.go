package agent_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/maint"
)

// A belayd that is to be started anew ends no hold, begins none from then on, and loses
// none: what waits is done by the next one.
func TestCalm(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a")
	node := w.Nodes[0]
	node.Host.PutGuest("web-1")
	ctx := ctxFor(t, patience)
	began, goOn := make(chan struct{}, 2), make(chan struct{})
	node.Steps.Did = func(string) { began <- struct{}{}; <-goOn }
	first, err := node.Client.Hold(ctx, holdAll)
	if err != nil {
		t.Fatal(err)
	}
	<-began

	soon, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := node.Agent.Calm(soon); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("it is calm while a guest is held: %v", err)
	}
	calm := make(chan error, 1)
	go func() {
		err := node.Agent.Calm(ctx)
		if armed := node.Leashes.Armed(); len(armed) > 0 {
			t.Errorf("it is calm, and these are armed: %v", armed)
		}
		calm <- err
	}()
	close(goOn)
	if op := await(t, ctx, node, first.ID); op.Outcome != maint.OutcomeDone {
		t.Errorf("the hold that was under way ended %s: %v", op.Outcome, op.Problems)
	}
	if err := <-calm; err != nil {
		t.Fatal(err)
	}

	second, err := node.Client.Hold(ctx, holdAll)
	if err != nil {
		t.Fatal(err)
	}
	awaitStep(t, ctx, node, second.ID, "hold")
	node.Stop()
	if ran := node.Steps.Ran(); len(ran) != 1 {
		t.Errorf("a hold has begun although belayd is to be started anew: %v", ran)
	}
	node.Start(nil)
	if op := await(t, ctx, node, second.ID); op.Outcome != maint.OutcomeDone || len(op.Held.Guests) != 1 || op.Held.Guests[0].Pause == 0 {
		t.Errorf("the hold that waited ended %s: %v, %+v", op.Outcome, op.Problems, op.Held)
	}
}

// A hold that waits can be given up, with nothing done.
func TestCalmAndAbort(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a")
	node := w.Nodes[0]
	node.Host.PutGuest("web-1")
	ctx := ctxFor(t, patience)
	if err := node.Agent.Calm(ctx); err != nil {
		t.Fatal(err)
	}
	op, err := node.Client.Hold(ctx, holdAll)
	if err != nil {
		t.Fatal(err)
	}
	awaitStep(t, ctx, node, op.ID, "hold")
	if _, err := node.Client.Abort(ctx, op.ID); err != nil {
		t.Fatal(err)
	}
	if op = await(t, ctx, node, op.ID); op.Outcome != maint.OutcomeAborted || op.Held != nil || len(node.Steps.Ran()) > 0 {
		t.Errorf("ended %s: %v, %+v", op.Outcome, op.Problems, op.Held)
	}
}

// awaitStep waits until an operation is in a step.
func awaitStep(t *testing.T, ctx context.Context, node *agenttest.Node, id maint.OpID, step string) {
	t.Helper()
	watching, stop := context.WithCancel(ctx)
	defer stop()
	met := false
	op, err := node.Client.Watch(watching, id, func(op maint.Op) {
		if op.Step == step {
			met = true
			stop()
		}
	})
	if !met {
		t.Fatalf("%s is not seen in step %s: %s %v, %v", id, step, op.Outcome, op.Problems, err)
	}
}
