package agent_test

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/api"
	"belay/agent/maint"
)

// An event that was cancelled ends its operation, also when belayd died before the
// operation could see it: guests are not told anew.
func TestCancelledForGood(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a")
	node := w.Nodes[0]
	ctx := ctxFor(t, patience)
	node.Host.PutGuest("web-1")
	node.Stop()
	var mu sync.Mutex
	events, killed := 0, make(chan struct{})
	node.Start(func(what string) {
		if mu.Lock(); strings.HasPrefix(what, "after append event") {
			if events++; events == 2 { // announced, cancelled
				node.Kill()
				close(killed)
			}
		}
		mu.Unlock()
	})
	op, err := node.Client.Hold(ctx, holdAll)
	if err != nil {
		t.Fatal(err)
	}
	first := awaitEvents(t, ctx, node, many(1))
	_, _ = node.Client.CancelEvent(ctx, first[0].ID, "not today") // belayd dies in it
	<-killed
	node.Restart()
	if op = await(t, ctx, node, op.ID); op.Outcome != maint.OutcomeFailed || op.Held != nil || !strings.Contains(op.Problems[0].Reason, "not today") {
		t.Errorf("%s: %+v, %+v", op.Outcome, op.Problems, op.Held)
	}
	if all, err := node.Client.Events(ctx, true); err != nil || len(all) != 1 {
		t.Errorf("%v: %+v", err, all)
	}
}

// A guest that has arrived is kept as it was, also where its events cannot be.
func TestSettledWithoutEvents(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a", "b")
	source, target := w.Nodes[0], w.Nodes[1]
	ctx := ctxFor(t, patience)
	uuid := source.Host.PutGuest("web-1")
	if err := source.Host.SetAutostart(ctx, uuid, true); err != nil {
		t.Fatal(err)
	}
	target.Stop()
	target.Start(func(what string) {
		if what == "before Note" {
			target.FailJournal(errors.New("no space left on device"))
		}
	})
	r := toB
	r.Emergency = "the host is on fire"
	op, err := source.Client.Migrate(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	if op = await(t, ctx, source, op.ID); op.Outcome != maint.OutcomePartly {
		t.Errorf("%s: %+v", op.Outcome, op.Problems)
	}
	if g, err := target.Host.Guest(ctx, uuid); err != nil || !g.Autostart || !g.Persistent {
		t.Errorf("%v: it has arrived as %+v", err, g)
	}
}

// A guest that is put off at the very moment that its operation is begun is left
// alone until its next moment.
func TestDeferredAsItBegins(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a")
	node := w.Nodes[0]
	ctx := ctxFor(t, patience)
	node.Host.PutGuest("web-1")
	node.Stop()
	var once sync.Once
	deferred := make(chan error, 1)
	node.Start(func(what string) {
		if what == "before append accepted " {
			once.Do(func() {
				_, err := node.Client.DeferCampaign(ctx, "nic", "web-1")
				deferred <- err
			})
		}
	})
	awaitInventory(t, ctx, node, 1)
	if _, err := node.Client.CreateCampaign(ctx, maint.CampaignRequest{ID: "nic", MaxDefers: 1, Security: true, Deadline: time.Now().Add(time.Hour),
		Action: maint.CampaignAction{Hold: &maint.HoldRequest{Step: holdAll.Step, MaxPause: holdAll.MaxPause}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Client.BookCampaign(ctx, "nic", api.Booking{Guest: "web-1"}); err != nil {
		t.Fatal(err)
	}
	if err := <-deferred; err != nil {
		t.Fatal(err)
	}
	var op maint.Op
	for op.ID == "" { // it is being admitted
		ops, err := node.Client.Ops(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(ops) > 0 {
			op = ops[0]
		}
	}
	if op = await(t, ctx, node, op.ID); op.Outcome != maint.OutcomeAborted || op.Held != nil {
		t.Errorf("%s: %+v, %+v", op.Outcome, op.Problems, op.Held)
	}
	if c, err := node.Client.Campaign(ctx, "nic"); err != nil || stateIn(c, "web-1") != maint.CampaignPending {
		t.Errorf("%v: %+v", err, c)
	}
}
