package agent

import (
	"context"
	"sync"

	"belay/agent/maint"
)

// turns sees to it that no more operations of a kind are at work on this host than may
// be. One whose guests are told beforehand takes its turn when they have had their
// notice: many can give notice at once.
type turns struct {
	mu    sync.Mutex
	taken map[maint.OpID]bool // by operations of this belayd that may not have said so yet
}

// waiting reports whether an operation has not had its turn: it tells its guests.
func (a *Agent) waiting(op maint.Op) bool {
	announces := op.Told && (op.Step == phaseAnnounce || len(op.Steps) == 0)
	return announces && !a.turns.taken[op.ID]
}

// atWork is how many operations of a kind are.
func (a *Agent) atWork(kind maint.OpKind) (n int) {
	for _, op := range a.journal.Ops() {
		switch {
		case op.State == maint.OpEnded:
			delete(a.turns.taken, op.ID)
		case op.Kind == kind && !a.waiting(op):
			n++
		}
	}
	return n
}

// turn waits until it is the operation's.
func (a *Agent) turn(ctx context.Context, op maint.Op) error {
	take := func() bool {
		a.turns.mu.Lock()
		defer a.turns.mu.Unlock()
		if a.atWork(op.Kind) >= a.most(op.Kind) || a.crowded(op) {
			return false
		}
		a.turns.taken[op.ID] = true
		return true
	}
	return a.until(ctx, take)
}

// until waits until something is so that the journal decides.
func (a *Agent) until(ctx context.Context, so func() bool) error {
	for {
		changed := a.journal.Changed()
		if so() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
