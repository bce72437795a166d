package agent

import (
	"strings"

	"belay/agent/maint"
	"belay/patch/leash"
)

// Sweeper is a preserve.Leash that tells what leashes have left behind, and
// discards what is not to be kept.
type Sweeper interface {
	Sweep(keep func(name maint.OpID) bool) ([]leash.Status, error)
}

// Sweep implements Sweeper.
func (l leashes) Sweep(keep func(name maint.OpID) bool) ([]leash.Status, error) {
	return leash.Sweep(l.client.Dir, keep)
}

// sweepLeashes discards what the leashes of operations that have ended, or that
// nobody knows, have left behind. Those of open ones are taken up by their
// operations. It is called before any operation is begun.
func (a *Agent) sweepLeashes() {
	s, ok := a.preserve.Leash.(Sweeper) // the twin's leashes are in the same folder
	if !ok {
		return
	}
	swept, err := s.Sweep(func(name maint.OpID) bool {
		op, known := a.journal.Op(leashedOp(name))
		return known && op.State != maint.OpEnded
	})
	for _, l := range swept {
		a.log.Info("what a leash had left behind is discarded", "op", l.Op, "fired", l.Fired)
		for _, e := range l.Events { // which the operation may not have written down
			a.log.Info(describeLeash(e), "op", l.Op, "at", e.Time)
		}
	}
	if err != nil {
		a.log.Error("not all that leashes have left behind can be discarded", "err", err)
	}
}

// leashedOp is the operation that a leash is of.
func leashedOp(name maint.OpID) maint.OpID {
	for _, suffix := range []string{homeSuffix, awaySuffix} {
		if op, ok := strings.CutSuffix(string(name), suffix); ok {
			return maint.OpID(op)
		}
	}
	return name
}
