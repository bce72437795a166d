package agent_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
)

// holdAll holds every guest for a moment.
var holdAll = maint.HoldRequest{All: true, MaxPause: 2 * time.Second,
	Step: maint.HostStep{Command: []string{"sleep", "20ms"}}}

// TestHoldKilledAnywhere kills the agent at every single thing that it does
// for a hold, starts it again, and looks: every guest that was held runs, the
// one that somebody else had paused is still paused, no leash is left, and the
// record is true.
func TestHoldKilledAnywhere(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		step string
	}{{"good step", "sleep 20ms"}, {"failing step", "false"}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			points := 0
			for n := 0; ; n++ {
				at := holdKilledAt(t, c.step, n)
				if at == "" {
					break
				}
				points++
			}
			if points < 20 {
				t.Fatalf("only %d points were met", points)
			}
			t.Logf("killed at %d points", points)
		})
	}
}

func holdKilledAt(t *testing.T, step string, n int) (at string) {
	t.Helper()
	w := agenttest.New(t, quiet(t), nil, "a")
	node := w.Nodes[0]
	held := []string{node.Host.PutGuest("web-1"), node.Host.PutGuest("web-2")}
	theirs := node.Host.PutGuest("theirs")
	ctx := ctxFor(t, patience)
	if err := node.Host.Suspend(ctx, theirs); err != nil {
		t.Fatal(err)
	}
	k := &killer{node: node, left: n, dead: make(chan struct{})}
	node.Stop()
	node.Start(k.hook)

	r := holdAll
	r.Step.Command = strings.Fields(step)
	r.Undo = &maint.HostStep{Command: []string{"true"}}
	op, err := node.Client.Hold(ctx, r)
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		select {
		case <-k.dead:
			node.Restart()
		case <-ctx.Done():
		}
	}()
	if err != nil { // killed while it was being admitted
		k.cut(t, err)
		<-restarted
		ops, err := node.Client.Ops(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(ops) == 1 {
			op = ops[0]
		}
	}
	if op.ID != "" {
		op = await(t, ctx, node, op.ID)
	}
	k.mu.Lock()
	at = k.at
	k.off = true
	k.mu.Unlock()
	if at != "" {
		<-restarted
	}
	story := fmt.Sprintf("killed %s (n=%d): operation %q ended %q, problems %v", at, n, op.ID, op.Outcome, op.Problems)
	for _, uuid := range held {
		if s, _, err := node.Host.State(ctx, uuid); err != nil || s != maint.GuestRunning {
			t.Fatalf("%s; guest %s is %s, %v", story, uuid, s, err)
		}
	}
	if s, _, err := node.Host.State(ctx, theirs); err != nil || s != maint.GuestPaused {
		t.Fatalf("%s; the guest that somebody else had paused is %s, %v", story, s, err)
	}
	if armed := node.Leashes.Armed(); len(armed) > 0 {
		t.Fatalf("%s; still armed: %v", story, armed)
	}
	if kept := node.Steps.Kept(); len(kept) > 0 {
		t.Fatalf("%s; left of its steps: %v", story, kept)
	}
	ran := node.Steps.Ran()
	stepRan := slices.Contains(ran, string(op.ID)+"-step")
	switch {
	case op.ID != "" && op.State != maint.OpEnded, op.Outcome == maint.OutcomeStuck:
		t.Fatal(story)
	case op.Outcome == maint.OutcomeDone && (step == "false" || !stepRan):
		t.Fatalf("%s, but the step failed or did not run", story)
	case op.Outcome == maint.OutcomeFailed && stepRan && !slices.Contains(ran, string(op.ID)+"-undo"):
		t.Fatalf("%s, and the step was not undone", story)
	case at == "" && step != "false" && op.Outcome != maint.OutcomeDone:
		t.Fatal(story)
	}
	node.Stop()
	w.Close()
	return at
}

// The agent stays dead: the leash releases the guests, and the next agent
// journals that it did.
func TestHoldAgentStaysDead(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a")
	node := w.Nodes[0]
	uuid := node.Host.PutGuest("web-1")
	ctx := ctxFor(t, patience)
	began := make(chan struct{})
	node.Steps.Did = func(name string) {
		if strings.HasSuffix(name, "-step") {
			close(began)
		}
	}
	r := holdAll
	r.Step.Command = []string{"sleep", "1h"}
	op, err := node.Client.Hold(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	<-began
	events, stop := node.Host.Subscribe()
	defer stop()
	node.Kill()
	for e := range events {
		if e.UUID == uuid && e.Change == "resumed" {
			break
		}
	}
	node.Restart()
	op = await(t, ctx, node, op.ID)
	if op.Outcome != maint.OutcomeFailed || !slices.ContainsFunc(op.Leash, func(e maint.LeashEvent) bool { return e.Kind == maint.LeashFired }) {
		t.Fatalf("ended %s, leash %+v", op.Outcome, op.Leash)
	}
	if g := op.Held.Guests[0]; g.ReleasedBy != "leash" || g.Pause < time.Second || g.Clock == nil {
		t.Errorf("%+v", g)
	}
	if !slices.ContainsFunc(op.Problems[1:], func(p maint.Problem) bool { return p.Code == maint.CodeLeash }) {
		t.Errorf("that the leash fired is not told: %+v", op.Problems)
	}
	status, err := node.Client.Status(ctx)
	if err != nil || !slices.ContainsFunc(status.Conditions, func(c maint.Condition) bool { return c.Code == maint.CodeLeash }) {
		t.Errorf("nobody who looks at the host learns of it: %+v, %v", status.Conditions, err)
	}
}

// A step that cannot be taken back needs a person.
func TestHoldCannotBeUndone(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a")
	node := w.Nodes[0]
	node.Host.PutGuest("web-1")
	ctx := ctxFor(t, patience)
	r := holdAll
	r.Step.Command = []string{"false"}
	r.Undo = &maint.HostStep{Command: []string{"false"}}
	op, err := node.Client.Hold(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	op = await(t, ctx, node, op.ID)
	if op.Outcome != maint.OutcomeStuck || len(op.Problems) != 2 || op.Problems[1].Code != maint.CodeStep || op.Held.Guests[0].ReleasedBy != "belayd" {
		t.Errorf("ended %s, %+v, %+v", op.Outcome, op.Problems, op.Held)
	}
}

// What is held is nobody else's meanwhile, and the other way round.
func TestHoldAndOthers(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a, b := w.Nodes[0], w.Nodes[1]
	a.Host.PutGuest("web-1")
	b.Host.PutGuest("web-2")
	ctx := ctxFor(t, patience)
	began := make(chan struct{}, 8)
	a.Steps.Did = func(string) { began <- struct{}{} }
	r := holdAll
	r.MaxPause, r.Step.Command = 30*time.Second, []string{"sleep", "1h"}
	op, err := a.Client.Hold(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	<-began
	if _, err := a.Client.Migrate(ctx, toB); !slices.Equal(refusal(t, err), []maint.Code{maint.CodeBusy}) {
		t.Errorf("a held guest's migration: %v", err)
	}
	if _, err := a.Client.Hold(ctx, r); !slices.Equal(refusal(t, err), []maint.Code{maint.CodeBusy}) {
		t.Errorf("a second hold: %v", err)
	}
	// A guest that came now would run while all others are held.
	arriving, err := b.Client.Migrate(ctx, maint.MigrateRequest{Guest: "web-2", To: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if got := await(t, ctx, b, arriving.ID); got.Outcome != maint.OutcomeBlocked {
		t.Errorf("a guest came while all were held: %s", got.Outcome)
	}
	if _, err := a.Client.Abort(ctx, op.ID); err != nil {
		t.Fatal(err)
	}
	if got := await(t, ctx, a, op.ID); got.Outcome != maint.OutcomeAborted || got.Held.Guests[0].ReleasedBy != "belayd" {
		t.Errorf("after an abort: %s %+v", got.Outcome, got.Held)
	}
}

// A journal that cannot be written while guests are held keeps nobody held.
func TestHoldJournalFails(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a")
	node := w.Nodes[0]
	uuid := node.Host.PutGuest("web-1")
	ctx := ctxFor(t, patience)
	node.Steps.Did = func(string) { node.FailJournal(errors.New("no space left on device")) }
	events, stop := node.Host.Subscribe()
	defer stop()
	op, err := node.Client.Hold(ctx, holdAll)
	if err != nil {
		t.Fatal(err)
	}
	for e := range events {
		if e.UUID == uuid && e.Change == "resumed" {
			break
		}
	}
	node.FailJournal(nil)
	op = await(t, ctx, node, op.ID)
	if op.Outcome != maint.OutcomeDone || op.Held.Guests[0].Pause == 0 {
		t.Fatalf("%s %+v %+v", op.Outcome, op.Problems, op.Held)
	}
}

func TestHoldRefused(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), func(c *config.Config) { c.Hold.MaxPauseLimit.Duration = time.Minute }, "a")
	node := w.Nodes[0]
	ctx := ctxFor(t, patience)
	edit := func(f func(*maint.HoldRequest)) maint.HoldRequest {
		r := holdAll
		f(&r)
		return r
	}
	for name, c := range map[string]struct {
		r    maint.HoldRequest
		code maint.Code
	}{
		"nobody runs":   {holdAll, maint.CodeNothing},
		"unknown guest": {edit(func(r *maint.HoldRequest) { r.All, r.Guests = false, []string{"web-9"} }), maint.CodeUnknownGuest},
		"no guest":      {edit(func(r *maint.HoldRequest) { r.All = false }), maint.CodeBadRequest},
		"all and one":   {edit(func(r *maint.HoldRequest) { r.Guests = []string{"web-1"} }), maint.CodeBadRequest},
		"long pause":    {edit(func(r *maint.HoldRequest) { r.MaxPause = time.Hour }), maint.CodeBadRequest},
		"short pause":   {edit(func(r *maint.HoldRequest) { r.MaxPause = time.Millisecond }), maint.CodeBadRequest},
		"negative":      {edit(func(r *maint.HoldRequest) { r.Step.Timeout = -1 }), maint.CodeBadRequest},
	} {
		_, err := node.Client.Hold(ctx, c.r)
		var p *maint.Problem
		if errors.As(err, &p) {
			if p.Code != c.code {
				t.Errorf("%s: %v", name, err)
			}
		} else if got := refusal(t, err); !slices.Equal(got, []maint.Code{c.code}) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if ops, err := node.Client.Ops(ctx); err != nil || len(ops) > 0 {
		t.Errorf("operations %v, %v", ops, err)
	}
}
