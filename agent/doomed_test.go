package agent_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/maint"
)

// doomed is a host to which an update is applied, and whose agent is killed in the middle.
type doomed struct {
	*agenttest.Node
	t     *testing.T
	ctx   context.Context
	world *agenttest.World
	// begin starts the agent with a hook, and again the one that was killed.
	begin func(hook func(string))
	again func()
	// approves: the guests' owner approves of all that they are told.
	approves bool
	// whole says what is wrong with the host and its guests after an apply, which has had its
	// effect or was taken back (or never begun: the zero Op).
	whole func(op maint.Op, done bool) string

	mu      sync.Mutex
	changed bool // by the commands that were run, the last of which was no undo
}

// newDoomed makes one of a host, as far as it is like others.
func newDoomed(t *testing.T, w *agenttest.World) *doomed {
	d := &doomed{Node: w.Nodes[0], t: t, world: w, ctx: ctxFor(t, patience)}
	d.begin = func(hook func(string)) { d.Stop(); d.Start(hook) }
	d.again = d.Restart
	d.Steps.Did = func(name string) {
		d.mu.Lock()
		defer d.mu.Unlock()
		switch what := name[strings.LastIndex(name, "-")+1:]; {
		case what == "undo", what == "step" && strings.Contains(name, "-undo"): // by a hold that takes it back
			d.changed = false
		case what == "apply", what == "step", what == "prepare":
			d.changed = true
		}
	}
	return d
}

// isChanged reports whether the host's commands have changed it.
func (d *doomed) isChanged() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed
}

// killedAt applies an update, kills the agent at the n-th thing that it does for it, starts it
// again, and looks. It gives what the thing was, "" if it did not do so many.
func (d *doomed) killedAt(r maint.PlanRequest, n int, want ...maint.Outcome) string {
	d.t.Helper()
	p, err := d.Client.Plan(d.ctx, r)
	check(d.t, err)
	k := &killer{node: d.Node, left: n, dead: make(chan struct{})}
	d.begin(k.hook)
	seen := d.witness()
	if d.approves {
		stop := d.approve()
		defer stop()
	}
	op, err := d.Client.Apply(d.ctx, maint.ApplyRequest{Plan: p})
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		select {
		case <-k.dead:
			d.again()
		case <-d.ctx.Done():
		}
	}()
	if err != nil { // killed while it was being admitted
		k.cut(d.t, err)
		<-restarted
		ops, err := d.Client.Ops(d.ctx)
		check(d.t, err)
		for _, o := range ops {
			if o.Kind == maint.OpApply {
				op = o
			}
		}
	}
	if op.ID != "" {
		op = await(d.t, d.ctx, d.Node, op.ID)
	}
	k.mu.Lock()
	at := k.at
	k.off = true
	k.mu.Unlock()
	if at != "" {
		<-restarted
	}
	story := fmt.Sprintf("killed %s (n=%d): apply %q ended %q %v", at, n, op.ID, op.Outcome, op.Problems)
	if op.ID != "" && !slices.Contains(want, op.Outcome) {
		d.t.Fatal(story)
	}
	ops := d.allEnd(story)
	for _, wrong := range d.wrong(op, ops, seen) {
		d.t.Errorf("%s: %s", story, wrong)
	}
	for _, n := range d.world.Nodes {
		n.Stop()
	}
	d.world.Close()
	return at
}

// allEnd waits until every operation has: what an apply has moved is settled after it.
func (d *doomed) allEnd(story string) []maint.Op {
	d.t.Helper()
	for {
		ops, err := d.Client.Ops(d.ctx) // it may be down just now
		if err == nil && !slices.ContainsFunc(ops, func(o maint.Op) bool { return o.State != maint.OpEnded }) {
			return ops
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-d.ctx.Done():
			d.t.Fatalf("%s: what goes on after it? %v, %v", story, ops, err)
		}
	}
}

// wrong is what is not as it must be after any apply.
func (d *doomed) wrong(op maint.Op, ops []maint.Op, seen func() map[string]time.Duration) (all []string) {
	say := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	done := op.Outcome.TookEffect()
	if text := d.whole(op, done); text != "" {
		say("%s", text)
	}
	if armed := d.Leashes.Armed(); len(armed) > 0 {
		say("leashes are armed: %v", armed)
	}
	if kept := d.Steps.Kept(); len(kept) > 0 {
		say("of its steps is left: %v", kept)
	}
	awaitEvents(d.t, d.ctx, d.Node, many(0)) // they end after their operation
	s, err := d.Client.Status(d.ctx)
	check(d.t, err)
	leaves := op.Apply != nil && done && slices.ContainsFunc(op.Apply.Plan.Update.Changes, func(c maint.Change) bool { return c.Kind == maint.ChangeLeave })
	if stays := op.Outcome == maint.OutcomeStuck || leaves; (s.Cordon != nil) != stays {
		say("its cordon: %+v", s.Cordon)
	}
	if op.ID == "" {
		return all
	}
	for _, part := range ops {
		if part.Part == op.ID && part.Outcome == maint.OutcomeStuck && op.Outcome != maint.OutcomeStuck {
			say("%s is stuck: %v", part.ID, part.Problems)
		}
	}
	// The record tells each standstill, and none that was measured as shorter than it was.
	r, err := d.Client.Report(d.ctx, op.ID)
	check(d.t, err)
	told, unmeasured := make(map[string]time.Duration), make(map[string]bool)
	for _, g := range r.Guests {
		switch {
		case g.Felt == nil: // of one whose belayd died when all had been released, and before that was written down
			unmeasured[g.UUID] = unmeasured[g.UUID] || strings.HasPrefix(g.Fate, "held") || strings.HasPrefix(g.Fate, "in its old QEMU")
		case g.Felt.Times > 0 && g.Felt.Longest == 0:
			unmeasured[g.UUID] = true
		default:
			told[g.UUID] = max(told[g.UUID], g.Felt.Longest)
		}
	}
	for uuid, still := range seen() {
		if told[uuid] < still-measured && !unmeasured[uuid] {
			say("guest %s stood still for %s, and the record tells %s", uuid, still, told[uuid])
		}
	}
	return all
}

// measured is how far off what an agent has measured may be from what its host tells, on a
// machine that is busy.
const measured = 20 * time.Millisecond

// witness sees how long each guest stands still at most, whoever has it stand still, until it
// is asked.
func (d *doomed) witness() func() map[string]time.Duration {
	d.t.Helper()
	events, cancel := d.Host.Subscribe()
	longest := make(map[string]time.Duration)
	since := make(map[string]time.Time)
	all := make(chan struct{})
	go func() {
		defer close(all)
		for e := range events {
			switch e.Change {
			case "suspended":
				if since[e.UUID].IsZero() {
					since[e.UUID] = e.Time
				}
			case "stopped":
				if e.Detail == "migrated" {
					delete(since, e.UUID)
				}
			case "resumed":
				if from, was := since[e.UUID]; was {
					longest[e.UUID] = max(longest[e.UUID], e.Time.Sub(from))
				}
				delete(since, e.UUID)
				if e.Name == theEnd {
					return
				}
			}
		}
	}()
	return func() map[string]time.Duration {
		d.Host.PutGuest(theEnd)
		<-all
		cancel()
		return longest
	}
}

// theEnd is a guest that tells a witness that there is nothing more to see.
const theEnd = "the-end"

// approve has whoever owns the guests approve of what they are told, until it is stopped.
func (d *doomed) approve() (stop func()) {
	ctx, cancel := context.WithCancel(d.ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			_ = d.Client.WatchEvents(ctx, false, func(all []maint.ScheduledEvent) error {
				for _, e := range all {
					if e.State == maint.EventScheduled {
						_, _ = d.Client.ApproveEvent(ctx, e.ID, "")
					}
				}
				return nil
			})
			select {
			case <-time.After(5 * time.Millisecond): // its agent is down
			case <-ctx.Done():
			}
		}
	}()
	return func() { cancel(); <-ended }
}
