package agent_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/api"
	"belay/agent/config"
	"belay/agent/maint"
)

// telling is a host that tells its guests; shop-1 and shop-2 have one owner.
func telling(c *config.Config) {
	c.Events = config.Events{Enabled: true, Policy: "any", Owners: map[string]config.Owner{"shop": {Guests: []string{"shop-*"}}}}
}

// awaitEvents waits until the events that are not over are as they should be.
func awaitEvents(t *testing.T, ctx context.Context, n *agenttest.Node, so func([]maint.ScheduledEvent) bool) (events []maint.ScheduledEvent) {
	t.Helper()
	found := errors.New("found")
	err := n.Client.WatchEvents(ctx, false, func(all []maint.ScheduledEvent) error {
		if events = all; so(all) {
			return found
		}
		return nil
	})
	if !errors.Is(err, found) {
		t.Fatalf("%v; there are %+v", err, events)
	}
	return events
}

func many(n int) func([]maint.ScheduledEvent) bool {
	return func(all []maint.ScheduledEvent) bool { return len(all) == n }
}

// Guests are told of a hold before it, one event for those with one owner, and it
// waits until all have approved; then the history has what was measured.
func TestHoldIsAnnounced(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a")
	node := w.Nodes[0]
	ctx := ctxFor(t, patience)
	uuids := make(map[string]string)
	for _, name := range []string{"web-1", "shop-1", "shop-2"} {
		uuids[name] = node.Host.PutGuest(name)
	}
	op, err := node.Client.Hold(ctx, holdAll)
	if err != nil {
		t.Fatal(err)
	}
	events := awaitEvents(t, ctx, node, many(2))
	for _, e := range events {
		if e.Impact != maint.ImpactFreeze || e.State != maint.EventScheduled || e.Op != op.ID || e.NotBefore.Sub(e.Announced) < 15*time.Minute {
			t.Errorf("announced is %+v", e)
		}
	}
	if i := slices.IndexFunc(events, func(e maint.ScheduledEvent) bool { return len(e.Guests) == 2 }); i < 0 ||
		!strings.HasPrefix(events[i].Guests[0].Name, "shop-") || !strings.HasPrefix(events[i].Guests[1].Name, "shop-") {
		t.Errorf("those of one owner are not told together: %+v", events)
	}
	node.Kill() // while it waits
	node.Restart()
	if _, err := node.Client.ApproveEvent(ctx, events[0].ID, "a quiet moment"); err != nil {
		t.Fatal(err)
	}
	if now, _ := node.Client.Op(ctx, op.ID); now.State != maint.OpRunning || now.Step != "announce" {
		t.Fatalf("one tenant's approval has cut the notice of another: %+v", now)
	}
	if _, err := node.Client.ApproveEvent(ctx, events[1].ID, ""); err != nil {
		t.Fatal(err)
	}
	if op = await(t, ctx, node, op.ID); op.Outcome != maint.OutcomeDone {
		t.Fatalf("%s: %+v", op.Outcome, op.Problems)
	}
	awaitEvents(t, ctx, node, many(0))
	history, err := node.Client.Events(ctx, true)
	if err != nil || len(history) != 2 {
		t.Fatal(history, err)
	}
	for _, e := range history {
		if e.State != maint.EventCompleted || e.Approval == nil || e.Approval.By != "root" || e.Started.Before(e.Approval.At) {
			t.Errorf("history %+v", e)
		}
		for _, g := range e.Guests {
			if e.Pauses[g.UUID] <= 0 {
				t.Errorf("no pause of %s was measured: %+v", g.Name, e.Pauses)
			}
		}
	}
	if _, err := node.Client.ApproveEvent(ctx, "nonsense", ""); problemCode(err) != maint.CodeNotFound {
		t.Errorf("approval of an event that is not there: %v", err)
	}
}

// problemCode is the code of the first problem that an error tells.
func problemCode(err error) maint.Code {
	var r *maint.Refusal
	if errors.As(err, &r) {
		return r.Problems[0].Code
	}
	var p *maint.Problem
	if errors.As(err, &p) {
		return p.Code
	}
	return ""
}

// What is called off is not done; an emergency is, at once, and says why; what is
// refused was never announced.
func TestEventsThatDoNotWait(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a")
	node := w.Nodes[0]
	ctx := ctxFor(t, patience)
	node.Host.PutGuest("web-1")
	op, err := node.Client.Hold(ctx, holdAll)
	if err != nil {
		t.Fatal(err)
	}
	events := awaitEvents(t, ctx, node, many(1))
	if _, err := node.Client.CancelEvent(ctx, events[0].ID, "not today"); err != nil {
		t.Fatal(err)
	}
	op = await(t, ctx, node, op.ID)
	if op.Outcome != maint.OutcomeFailed || op.Held != nil || !strings.Contains(op.Problems[0].Reason, "cancelled") {
		t.Errorf("cancelled: %s, %+v, %+v", op.Outcome, op.Problems, op.Held)
	}

	r := holdAll
	r.Emergency = "the host is on fire"
	if op, err = node.Client.Hold(ctx, r); err != nil {
		t.Fatal(err)
	}
	if op = await(t, ctx, node, op.ID); op.Outcome != maint.OutcomeDone {
		t.Errorf("emergency: %s, %+v", op.Outcome, op.Problems)
	}
	awaitEvents(t, ctx, node, many(0))
	all, err := node.Client.Events(ctx, true)
	if err != nil {
		t.Fatal(err)
	}
	if e := all[len(all)-1]; e.Emergency == nil || e.Emergency.By != "root" || !strings.Contains(e.Description, r.Emergency) {
		t.Errorf("the emergency is told as %+v", e)
	}

	n := len(all)
	r = holdAll
	r.Step.Command = []string{"/does/not/exist"}
	if op, err = node.Client.Hold(ctx, r); err == nil {
		op = await(t, ctx, node, op.ID)
	}
	if all, _ := node.Client.Events(ctx, true); len(all) != n {
		t.Errorf("%s, and was announced all the same: %+v", op.Outcome, all[n:])
	}
}

// A guest that starts while others have been told is told as well.
func TestLateGuestIsTold(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a")
	node := w.Nodes[0]
	ctx := ctxFor(t, patience)
	node.Host.PutGuest("web-1")
	op, err := node.Client.Hold(ctx, holdAll)
	if err != nil {
		t.Fatal(err)
	}
	first := awaitEvents(t, ctx, node, many(1))
	node.Host.PutGuest("web-2")
	if _, err := node.Client.ApproveEvent(ctx, first[0].ID, ""); err != nil {
		t.Fatal(err)
	}
	both := awaitEvents(t, ctx, node, many(2))
	if now, _ := node.Client.Op(ctx, op.ID); now.Step != "announce" || both[1].Guests[0].Name != "web-2" {
		t.Fatalf("%s, %+v", now.Step, both)
	}
	if _, err := node.Client.ApproveEvent(ctx, both[1].ID, ""); err != nil {
		t.Fatal(err)
	}
	if op = await(t, ctx, node, op.ID); op.Outcome != maint.OutcomeDone || len(op.Held.Guests) != 2 {
		t.Errorf("%s, %+v", op.Outcome, op.Held)
	}
}

// TestToldAnywhere kills the source at every single thing it does for a migration
// of which the guest is told: the guest's events end where the guest is, once, and
// its document there was never one that it had before.
func TestToldAnywhere(t *testing.T) {
	t.Parallel()
	points := 0
	for n := 0; ; n++ {
		if at := toldAt(t, n); at == "" {
			break
		}
		points++
	}
	if points < 10 {
		t.Fatalf("only %d points were met", points)
	}
	t.Logf("killed at %d points", points)
}

func toldAt(t *testing.T, n int) (at string) {
	t.Helper()
	w := agenttest.New(t, quiet(t), telling, "a", "b")
	source, target := w.Nodes[0], w.Nodes[1]
	uuid := source.Host.PutGuest("web-1")
	k := &killer{node: source, left: n, dead: make(chan struct{})}
	source.Stop()
	source.Start(k.hook)
	ctx, end := context.WithTimeout(context.Background(), time.Minute)
	defer end()
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		select {
		case <-k.dead:
			source.Restart()
		case <-ctx.Done():
		}
	}()
	// The guest's owner approves whatever is announced, as soon as it is.
	go func() {
		for ctx.Err() == nil {
			_ = source.Client.WatchEvents(ctx, false, func(all []maint.ScheduledEvent) error {
				for _, e := range all {
					if e.Approval == nil {
						_, _ = source.Client.ApproveEvent(ctx, e.ID, "")
					}
				}
				return nil
			})
			select {
			case <-time.After(5 * time.Millisecond): // it may be dead
			case <-ctx.Done():
			}
		}
	}()
	op, err := source.Client.Migrate(ctx, toB)
	if err != nil {
		<-restarted
		ops, err := source.Client.Ops(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(ops) == 0 {
			return k.at // it was never admitted
		}
		op = ops[0]
	}
	for op.State != maint.OpEnded {
		if _, err := source.Client.Watch(ctx, op.ID, func(now maint.Op) { op = now }); err != nil && ctx.Err() != nil {
			t.Fatalf("killed at %s: %v", k.at, err)
		}
	}
	k.mu.Lock()
	k.off = true
	at = k.at
	k.mu.Unlock()
	if at != "" {
		<-restarted
	}
	fail := func(format string, args ...any) {
		t.Errorf("killed at %q: %s", at, fmt.Sprintf(format, args...))
	}
	if op.Outcome != maint.OutcomeDone {
		fail("outcome %s, %+v", op.Outcome, op.Problems)
		return at
	}
	if running, _ := places(t, w, uuid); running != "b" {
		fail("it runs on %s", running)
	}
	awaitEvents(t, ctx, source, many(0))
	awaitEvents(t, ctx, target, many(0))
	here, _ := source.Client.Events(ctx, true)
	there, err := target.Client.Events(ctx, true)
	if err != nil || len(there) != 1 || there[0].State != maint.EventCompleted || there[0].Approval == nil {
		fail("on b: %+v, %v; on a: %+v", there, err, here)
	}
	return at
}

// What owners pick is done at their moment, without further notice; what they do not
// is done at the deadline, with it. A belayd that dies in between forgets nothing.
func TestCampaign(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a", "b")
	node := w.Nodes[0]
	ctx := ctxFor(t, patience)
	for _, name := range []string{"web-1", "web-2", "web-3"} {
		node.Host.PutGuest(name)
	}
	awaitInventory(t, ctx, node, 3)
	r := maint.CampaignRequest{ID: "nic", Description: "new NIC firmware", MaxDefers: 1, Security: true, Deadline: time.Now().Add(time.Hour),
		Action: maint.CampaignAction{Migrate: &maint.MigrateRequest{To: "b"}}}
	for name, spoil := range map[string]func(*maint.CampaignRequest){
		"nothing to do":   func(r *maint.CampaignRequest) { r.Action = maint.CampaignAction{} },
		"an unknown peer": func(r *maint.CampaignRequest) { r.Action.Migrate = &maint.MigrateRequest{To: "nowhere"} },
		"no time to pick": func(r *maint.CampaignRequest) { r.Deadline = time.Now().Add(-time.Hour) },
		"too little time": func(r *maint.CampaignRequest) { r.Security = false },
		"no such guest":   func(r *maint.CampaignRequest) { r.Guests = []string{"nobody"} },
		"no name":         func(r *maint.CampaignRequest) { r.ID = "../x" },
	} {
		bad := r
		spoil(&bad)
		if _, err := node.Client.CreateCampaign(ctx, bad); err == nil {
			t.Errorf("%s: it is created", name)
		}
	}
	if _, err := node.Client.CreateCampaign(ctx, r); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Client.CreateCampaign(ctx, r); err == nil {
		t.Error("it is created twice")
	}
	if _, err := node.Client.BookCampaign(ctx, "nic", api.Booking{Guest: "web-1"}); err != nil { // now
		t.Fatal(err)
	}
	if _, err := node.Client.BookCampaign(ctx, "nic", api.Booking{Guest: "web-2", At: time.Now().Add(300 * time.Millisecond)}); err != nil {
		t.Fatal(err)
	}
	node.Kill()
	node.Restart()
	for _, name := range []string{"web-1", "web-2"} {
		awaitCampaign(t, ctx, node, "nic", func(c maint.Campaign) bool { return stateIn(c, name) == maint.CampaignDone || stateIn(c, name) == "" })
		if _, err := w.Nodes[1].Host.Guest(ctx, name); err != nil {
			t.Errorf("%s has not moved: %v", name, err)
		}
	}
	if c, err := node.Client.Campaign(ctx, "nic"); err != nil || stateIn(c, "web-3") != maint.CampaignPending {
		t.Errorf("who has not picked is %+v, %v", c, err)
	}
	if _, err := node.Client.CloseCampaign(ctx, "nic"); err != nil {
		t.Fatal(err)
	}
	if g, err := node.Host.Guest(ctx, "web-3"); err != nil || g.State != maint.GuestRunning {
		t.Errorf("after it was called off: %+v, %v", g, err)
	}

	r.ID, r.Guests = "bridge", []string{"web-3"}
	r.Action = maint.CampaignAction{Hold: &maint.HoldRequest{Step: holdAll.Step, MaxPause: holdAll.MaxPause}}
	if _, err := node.Client.CreateCampaign(ctx, r); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Client.BookCampaign(ctx, "bridge", api.Booking{Guest: "web-3"}); err != nil {
		t.Fatal(err)
	}
	awaitCampaign(t, ctx, node, "bridge", func(c maint.Campaign) bool { return stateIn(c, "web-3") == maint.CampaignDone && !c.Closed.IsZero() })
	ops, err := node.Client.Ops(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if last := ops[len(ops)-1]; last.Kind != maint.OpHold || last.Outcome != maint.OutcomeDone || len(last.Held.Guests) != 1 {
		t.Errorf("%+v", last)
	}
}

func stateIn(c maint.Campaign, guest string) maint.CampaignState {
	for _, g := range c.Guests {
		if g.Guest == guest {
			return g.State
		}
	}
	return ""
}

// awaitCampaign waits until a campaign is as it should be.
func awaitCampaign(t *testing.T, ctx context.Context, n *agenttest.Node, id maint.CampaignID, so func(maint.Campaign) bool) {
	t.Helper()
	for {
		c, err := n.Client.Campaign(ctx, id)
		if err == nil && so(c) {
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			ops, _ := n.Client.Ops(context.Background())
			t.Fatalf("%+v, %v; %+v", c, err, ops)
		}
	}
}

// awaitInventory waits until belayd has listed so many guests.
func awaitInventory(t *testing.T, ctx context.Context, n *agenttest.Node, guests int) {
	t.Helper()
	for {
		s, err := n.Client.Status(ctx)
		if err == nil && s.Guests[maint.GuestRunning] == guests {
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("%+v, %v", s, err)
		}
	}
}

// Many guests can have their notice at once, and are moved as many at a time as may be.
func TestTurns(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), func(c *config.Config) { telling(c); c.Limits.MigrationsOut = 1 }, "a", "b")
	node := w.Nodes[0]
	ctx := ctxFor(t, patience)
	var ops []maint.OpID
	for _, name := range []string{"web-1", "web-2", "web-3"} {
		node.Host.PutGuest(name)
		op, err := node.Client.Migrate(ctx, maint.MigrateRequest{Guest: name, To: "b"})
		if err != nil {
			t.Fatal(err)
		}
		ops = append(ops, op.ID)
	}
	events := awaitEvents(t, ctx, node, many(3))
	node.Host.HoldCopies()
	started := func(n int) func([]maint.ScheduledEvent) bool {
		return func(all []maint.ScheduledEvent) bool {
			return len(slices.DeleteFunc(slices.Clone(all), func(e maint.ScheduledEvent) bool { return e.State != maint.EventStarted })) == n
		}
	}
	for _, e := range events {
		if _, err := node.Client.ApproveEvent(ctx, e.ID, ""); err != nil {
			t.Fatal(err)
		}
	}
	awaitEvents(t, ctx, node, started(1))
	node.Kill()
	node.Restart()
	awaitEvents(t, ctx, node, started(1))
	waiting, copying := 0, 0
	for _, id := range ops {
		op, err := node.Client.Op(ctx, id)
		if err != nil || op.State != maint.OpRunning {
			t.Fatalf("%+v, %v", op, err)
		}
		if op.Step == "announce" {
			waiting++
		} else {
			copying++
		}
	}
	if waiting != 2 || copying != 1 {
		t.Errorf("%d wait for their turn, and %d are being moved", waiting, copying)
	}
	node.Host.ReleaseCopies()
	for _, id := range ops {
		if op := await(t, ctx, node, id); op.Outcome != maint.OutcomeDone {
			t.Errorf("%s: %s: %+v", op.Guest, op.Outcome, op.Problems)
		}
	}
	if n := most(w, ops); n != 1 {
		t.Errorf("%d were moved at a time", n)
	}
}

// most is how many of the operations were at work at a time, after their notice.
func most(w *agenttest.World, ops []maint.OpID) (n int) {
	var spans [][2]time.Time
	for _, id := range ops {
		op, err := w.Nodes[0].Client.Op(context.Background(), id)
		if err == nil && len(op.Steps) > 1 {
			spans = append(spans, [2]time.Time{op.Steps[1].Started, op.Ended})
		}
	}
	for _, s := range spans {
		at := 0
		for _, o := range spans {
			if !o[0].After(s[0]) && o[1].After(s[0]) {
				at++
			}
		}
		n = max(n, at)
	}
	return n
}
