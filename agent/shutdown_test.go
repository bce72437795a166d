package agent_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/maint"
)

// logind is a host's, with no more than one lock at a time.
type logind struct {
	taken chan string   // why
	given chan struct{} // back
	fails chan error    // one for each time that it is to refuse
	limit time.Duration
}

func newLogind() *logind {
	return &logind{taken: make(chan string, 8), given: make(chan struct{}, 8), fails: make(chan error, 1), limit: time.Minute}
}

func (l *logind) Delay(_ context.Context, why string) (io.Closer, error) {
	select {
	case err := <-l.fails:
		l.taken <- ""
		return nil, err
	default:
		l.taken <- why
		return l, nil
	}
}

func (l *logind) Close() error { l.given <- struct{}{}; return nil }

func (l *logind) Limit(context.Context) (time.Duration, error) {
	if l.limit == 0 {
		return 0, errors.New("logind is masked")
	}
	return l.limit, nil
}

func next[T any](t *testing.T, ctx context.Context, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-ctx.Done():
		t.Fatalf("no lock is %s", what)
	}
	return v
}

// A shutdown waits as long as there is an operation, and no longer.
func TestShutdownWaits(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a, b := w.Nodes[0], w.Nodes[1]
	home, there := newLogind(), newLogind()
	for node, l := range map[*agenttest.Node]*logind{a: home, b: there} {
		node.Stop()
		node.Shutdown = l
		node.Start(nil)
	}
	a.Host.PutGuest("web-1")
	ctx := ctxFor(t, patience)
	began, goOn := make(chan struct{}), make(chan struct{})
	a.Steps.Did = func(string) { close(began); <-goOn }
	end := sync.OnceFunc(func() { close(goOn) })
	defer end()
	hold, err := a.Client.Hold(ctx, holdAll)
	if err != nil {
		t.Fatal(err)
	}
	<-began
	if why := next(t, ctx, "taken", home.taken); why != string(hold.ID) {
		t.Errorf("a shutdown waits for %q", why)
	}
	select {
	case <-home.given:
		t.Error("the lock is given back while guests are held")
	default:
	}
	end()
	await(t, ctx, a, hold.ID)
	next(t, ctx, "given back", home.given)

	// A guest on its way keeps both hosts.
	move, err := a.Client.Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: "b"})
	if err != nil {
		t.Fatal(err)
	}
	if why := next(t, ctx, "taken", there.taken); !strings.Contains(why, string(move.ID)) || !strings.Contains(why, "web-1") {
		t.Errorf("a shutdown waits for %q", why)
	}
	if op := await(t, ctx, a, move.ID); op.Outcome != maint.OutcomeDone {
		t.Fatalf("ended %s: %v", op.Outcome, op.Problems)
	}
	next(t, ctx, "given back", there.given)
	next(t, ctx, "given back", home.given)
}

// Where logind refuses, operations go on, and it is asked again.
func TestShutdownDoesNotWait(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a")
	node, l := w.Nodes[0], newLogind()
	l.fails <- errors.New("the host shuts down already")
	node.Stop()
	node.Shutdown = l
	node.Start(nil)
	node.Host.PutGuest("web-1")
	ctx := ctxFor(t, patience)
	r := holdAll
	r.Step.Command = []string{"sleep", "500ms"} // until it is asked again
	op, err := node.Client.Hold(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	if op = await(t, ctx, node, op.ID); op.Outcome != maint.OutcomeDone {
		t.Errorf("ended %s: %v", op.Outcome, op.Problems)
	}
	if why := next(t, ctx, "refused", l.taken); why != "" {
		t.Errorf("the first is taken, for %s", why)
	}
	next(t, ctx, "taken", l.taken)
	next(t, ctx, "given back", l.given)
}

// An operation that waits for its guests' notice has begun nothing.
func TestShutdownDuringNotice(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a")
	node, l := w.Nodes[0], newLogind()
	node.Stop()
	node.Shutdown = l
	node.Start(nil)
	node.Host.PutGuest("web-1")
	ctx := ctxFor(t, patience)
	op, err := node.Client.Hold(ctx, holdAll)
	if err != nil {
		t.Fatal(err)
	}
	awaitEvents(t, ctx, node, many(1))
	for len(l.taken) > 0 { // for the moment before its first step
		<-l.taken
		next(t, ctx, "given back", l.given)
	}
	if _, err := node.Client.Abort(ctx, op.ID); err != nil {
		t.Fatal(err)
	}
	await(t, ctx, node, op.ID)
}

func TestDoctorOnShutdown(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a")
	for _, c := range []struct {
		limit  time.Duration
		result maint.CheckResult
		text   string
	}{
		{time.Minute, maint.CheckOK, "waits 1m0s for operations"},
		{5 * time.Second, maint.CheckWarn, "a hold may take 10s"},
		{0, maint.CheckWarn, "logind is masked"},
	} {
		node := w.Nodes[0]
		node.Stop()
		l := newLogind()
		l.limit = c.limit
		node.Shutdown = l
		node.Config.Hold.MaxPause.Duration = 10 * time.Second
		node.Start(nil)
		checks, err := node.Client.Doctor(ctxFor(t, patience))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, got := range checks {
			if got.Name == "shutdown" {
				found = true
				if got.Result != c.result || !strings.Contains(got.Text, c.text) || (got.Remedy == "") != (c.result == maint.CheckOK) {
					t.Errorf("limit %s: %+v", c.limit, got)
				}
			}
		}
		if !found {
			t.Error("it is not told of")
		}
	}
}
