package agent

import (
	"context"
	"math"

	"belay/agent/maint"
	"belay/agent/run"
)

// allStill is more than there can be operations that keep guests still.
const allStill = math.MaxInt64

// Calm waits until no guest stands still, held or between two QEMUs. From then on none
// does in this agent's life: an operation that is due waits, and the next life takes it
// up. So belayd can be started anew without an end to what the operator runs under a
// hold, which may be what installs the new belayd. All other operations stand a restart.
//
// It returns ctx's error, and lets operations go on, when ctx ends first.
func (a *Agent) Calm(ctx context.Context) error { return a.still.Acquire(ctx, allStill) }

// unlessCalm makes the named step one that Calm waits for, and that waits for Calm.
// Its undo is not: a restart ends none for good.
func (a *Agent) unlessCalm(name string, steps []run.Step) []run.Step {
	for i, step := range steps {
		if step.Name != name {
			continue
		}
		steps[i].Do = func(ctx context.Context, s *run.Scratch) error {
			if a.still.Acquire(ctx, 1) != nil {
				return maint.Problemf(maint.CodeBusy, "belayd on "+a.cfg.Host, "begin again in a moment",
					"is being started anew, and there was no time left to wait")
			}
			defer a.still.Release(1)
			return step.Do(ctx, s)
		}
	}
	return steps
}
