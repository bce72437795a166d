package agent_test

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"belay/agent/config"
	"belay/agent/maint"
)

// crashes is how many of the worlds with a crash run side by side.
const crashes = 4

// everywhere calls f with 0, 1, 2, …, some side by side, until it says that nothing
// was met any more.
func everywhere(t *testing.T, stride int, f func(n int) (at string)) {
	t.Helper()
	var mu sync.Mutex
	next, points, end := 0, 0, false
	var all sync.WaitGroup
	for range crashes {
		all.Go(func() {
			for {
				mu.Lock()
				n := next
				next += stride
				stop := end || t.Failed()
				mu.Unlock()
				if stop {
					return
				}
				at := f(n)
				mu.Lock()
				if at == "" {
					end = true
				} else {
					points++
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	if !t.Failed() && points*stride < 15 {
		t.Fatalf("only %d points were met", points)
	}
	t.Logf("killed at %d points", points)
}

// stride is between two points at which an agent is killed: all of them in the long
// form.
func stride(few int) int {
	if os.Getenv("BELAY_LONG") != "" {
		return 1
	}
	return few
}

// flock is how many guests are moved.
func flock() int {
	if os.Getenv("BELAY_LONG") != "" {
		return 8
	}
	return 4
}

// TestDrainKilledAnywhere kills the agent at things that it does for a drain, or for a
// restore, or the agent of a peer in a restore, starts it again, and looks: the
// operation has gone on, no guest was moved twice or forgotten, and each is where it
// must be.
func TestDrainKilledAnywhere(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		restore bool
		victim  int
	}{{"drain", false, 0}, {"drain, peer", false, 1}, {"restore", true, 0}, {"restore, peer", true, 1}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			everywhere(t, stride(6), func(n int) string { return killedInDrain(t, c.restore, c.victim, n) })
		})
	}
}

func killedInDrain(t *testing.T, restore bool, victim, n int) (at string) {
	f := newFleet(t, flock(), func(c *config.Config) { c.Limits.MigrationsOut = 2 }, "a", "b", "c")
	defer func() {
		for _, node := range f.Nodes {
			node.Stop()
		}
		f.World.Close()
	}()
	if restore {
		if op := f.drain(maint.DrainRequest{}); op.Outcome != maint.OutcomeDone {
			t.Errorf("%s: %v", op.Outcome, op.Problems)
			return ""
		}
	}
	k := &killer{node: f.Nodes[victim], left: n, dead: make(chan struct{})}
	f.Nodes[victim].Stop()
	f.Nodes[victim].Start(k.hook)
	ctx := ctxFor(t, patience)
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		select {
		case <-k.dead:
			f.Nodes[victim].Restart()
		case <-ctx.Done():
		}
	}()
	var op maint.Op
	var err error
	if restore {
		op, err = f.a.Client.Restore(ctx, maint.RestoreRequest{})
	} else {
		op, err = f.a.Client.Drain(ctx, maint.DrainRequest{})
	}
	if err != nil { // killed while it was being admitted
		k.cut(t, err)
		<-restarted
		for _, known := range f.ops(f.a) {
			if known.Kind == map[bool]maint.OpKind{true: maint.OpRestore, false: maint.OpDrain}[restore] {
				op = known
			}
		}
	}
	if op.ID != "" {
		op = await(t, ctx, f.a, op.ID)
	}
	k.mu.Lock()
	at = k.at
	k.off = true
	k.mu.Unlock()
	if at != "" {
		<-restarted
	}
	story := fmt.Sprintf("killed %s (n=%d): operation %q ended %q, problems %v; guests are at %v", at, n, op.ID, op.Outcome, op.Problems, f.at())
	home := f.count()["a"]
	// A peer that is away when it is asked takes no guests, which refuses the drain;
	// or is left out.
	away := victim != 0 && (op.Outcome == maint.OutcomeBlocked || op.Outcome == maint.OutcomePartly)
	switch {
	case op.ID == "":
		if restore == (home != 0) {
			t.Error(story)
		}
	case op.State != maint.OpEnded, op.Outcome != maint.OutcomeDone && !away:
		t.Error(story)
	case op.Outcome == maint.OutcomeDone && restore != (home == flock()):
		t.Error(story)
	}
	f.oncePerGuest(story, op)
	return at
}

// oncePerGuest checks that each guest is in one place, and was moved once by an
// operation, if at all.
func (f *fleet) oncePerGuest(story string, op maint.Op) {
	f.t.Helper()
	for name, at := range f.at() {
		if len(at) != 1 {
			f.t.Errorf("%s is at %q: %s", name, at, story)
		}
	}
	moved := make(map[string]int)
	for _, n := range f.Nodes {
		for _, child := range f.ops(n) {
			if child.Kind != maint.OpMigrate || child.Started.Before(op.Started) {
				continue
			}
			if child.State != maint.OpEnded {
				f.t.Errorf("%s was forgotten: %s", child.ID, story)
			}
			if child.Outcome == maint.OutcomeDone {
				moved[child.Guest]++
			}
		}
	}
	for name, times := range moved {
		if times > 1 {
			f.t.Errorf("%s was moved %d times: %s", name, times, story)
		}
	}
}
