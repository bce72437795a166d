package journal

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"belay/agent/maint"
)

// Fold applies one record to an operation and is its whole transition table:
//
//	record        state before      state after
//	accepted      (none)            running
//	resumed       running, undoing  the same
//	step-start    running           running      step: doing
//	step-note     running, undoing  the same
//	step-done     running           running      step: done
//	step-failed   running           undoing      step: failed
//	undo-start    undoing           undoing      step: undoing
//	undo-done     undoing           undoing      step: undone
//	undo-failed   undoing           undoing      step: undo failed
//	abort         running, undoing  the same
//	moved, health, held, replaced, leash, patched, kexec, guest-move, clock: results, likewise
//	ended         running, undoing  ended
//	seen-to       ended             ended
//
// Anything else is an error, and op is unchanged then.
func Fold(op *maint.Op, r maint.Record) error {
	if r.Kind == maint.RecAccepted {
		if op.ID != "" {
			return fmt.Errorf("operation %s is accepted twice", r.Op)
		}
		if err := json.Unmarshal(r.Data, op); err != nil {
			return fmt.Errorf("operation %s: cannot read its acceptance: %w", r.Op, err)
		}
		op.ID, op.Started, op.State, op.Steps = r.Op, r.Time, maint.OpRunning, []maint.Step{}
		return nil
	}
	if op.ID == "" {
		return fmt.Errorf("operation %s has a %q record but was never accepted", r.Op, r.Kind)
	}
	if r.Kind == maint.RecSeenTo && op.State == maint.OpEnded {
		var report maint.ArrivalReport
		if err := json.Unmarshal(r.Data, &report); err != nil {
			return fmt.Errorf("operation %s: cannot read what became of its guest: %w", r.Op, err)
		}
		op.Arrival = &report
		return nil
	}
	if op.State == maint.OpEnded {
		return fmt.Errorf("operation %s has ended, a %q record cannot follow", r.Op, r.Kind)
	}

	needs := func(s maint.OpState) error {
		if op.State != s {
			return fmt.Errorf("operation %s: %q in state %q", r.Op, r.Kind, op.State)
		}
		return nil
	}
	step := func(status string) (*maint.Step, error) {
		i := slices.IndexFunc(op.Steps, func(s maint.Step) bool { return s.Name == r.Step })
		if i < 0 {
			return nil, fmt.Errorf("operation %s: %q of step %q, which was never started", r.Op, r.Kind, r.Step)
		}
		if status != "" {
			op.Steps[i].Status = status
		}
		return &op.Steps[i], nil
	}

	switch r.Kind {
	case maint.RecResumed:
		op.Resumed++
	case maint.RecAbort:
		op.AbortBy = r.By
		op.AbortNow = op.AbortNow || r.Text == maint.AbortNow
	case maint.RecMoved:
		op.Move = new(maint.MoveResult)
		return json.Unmarshal(r.Data, op.Move)
	case maint.RecMove:
		var m maint.GuestMove
		if err := json.Unmarshal(r.Data, &m); err != nil {
			return err
		}
		op.Moves = maint.PutMove(op.Moves, m)
	case maint.RecHealth:
		op.HealthBefore = new(maint.HealthReport)
		return json.Unmarshal(r.Data, op.HealthBefore)
	case maint.RecHeld:
		op.Held = new(maint.HoldResult)
		return json.Unmarshal(r.Data, op.Held)
	case maint.RecReplaced:
		op.Replaced = new(maint.VMMResult)
		return json.Unmarshal(r.Data, op.Replaced)
	case maint.RecPatched:
		op.Patched = new(maint.PatchResult)
		return json.Unmarshal(r.Data, op.Patched)
	case maint.RecKexec:
		op.Kexeced = new(maint.KexecResult)
		return json.Unmarshal(r.Data, op.Kexeced)
	case maint.RecLeash:
		return add(&op.Leash, r.Data)
	case maint.RecClock:
		op.Arrival = new(maint.ArrivalReport)
		return json.Unmarshal(r.Data, &op.Arrival.Clock)
	case maint.RecStepStart:
		if err := needs(maint.OpRunning); err != nil {
			return err
		}
		op.Step = r.Step
		if s, err := step("doing"); err == nil {
			s.Ended = time.Time{} // taken up again
			return nil
		}
		op.Steps = append(op.Steps, maint.Step{Name: r.Step, Started: r.Time, Status: "doing"})
	case maint.RecStepNote:
		s, err := step("")
		if err != nil {
			return err
		}
		if r.Text != "" {
			s.Notes = append(s.Notes, r.Text)
		}
		if r.Data != nil {
			s.Data = r.Data
		}
	case maint.RecStepDone, maint.RecStepFailed:
		if err := needs(maint.OpRunning); err != nil {
			return err
		}
		if r.Kind == maint.RecStepDone {
			s, err := step("done")
			if err != nil {
				return err
			}
			s.Ended, op.Step = r.Time, ""
			return nil
		}
		s, err := step("failed")
		if err != nil {
			return err
		}
		s.Ended, s.Error = r.Time, r.Text
		op.State = maint.OpUndoing
		return ending(op, r)
	case maint.RecUndoStart, maint.RecUndoDone, maint.RecUndoFailed:
		if err := needs(maint.OpUndoing); err != nil {
			return err
		}
		status := map[maint.RecordKind]string{
			maint.RecUndoStart: "undoing", maint.RecUndoDone: "undone", maint.RecUndoFailed: "undo failed"}[r.Kind]
		s, err := step(status)
		if err != nil {
			return err
		}
		op.Step = r.Step
		if r.Kind == maint.RecUndoFailed {
			s.Error = r.Text
		}
	case maint.RecEnded:
		if err := ending(op, r); err != nil {
			return err
		}
		op.State, op.Ended, op.Step = maint.OpEnded, r.Time, ""
	default:
		return fmt.Errorf("operation %s: unknown record kind %q", r.Op, r.Kind)
	}
	return nil
}

// add appends what a record has to a list of the operation's.
func add[T any](list *[]T, data json.RawMessage) error {
	var v T
	if err := json.Unmarshal(data, &v); err != nil {
		return err
	}
	*list = append(slices.Clip(*list), v)
	return nil
}

// ending takes over how the operation (is going to have) ended. A failed step
// says so before the way back begins, so that a crash on that way does not
// forget why.
func ending(op *maint.Op, r maint.Record) error {
	var e maint.Ending
	if err := json.Unmarshal(r.Data, &e); err != nil {
		return fmt.Errorf("operation %s: cannot read its ending: %w", r.Op, err)
	}
	op.Outcome, op.Problems = e.Outcome, e.Problems
	return nil
}
