package run

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"belay/agent/maint"
)

// Causes with which an operation's context ends.
var (
	// ErrAborted: somebody asked for an abort.
	ErrAborted = errors.New("aborted on request")
	// ErrLeftOpen is returned by Run when the agent is shutting down (or its
	// journal fails): the operation is in the journal as it is and is to be
	// taken up again.
	ErrLeftOpen = errors.New("left open, to be resumed")
)

// undoTimeout bounds one undo that does not bound itself.
const undoTimeout = 15 * time.Minute

// Step is one step of an operation.
type Step struct {
	Name string
	// Do brings the effect about and returns when it holds. It may find
	// that it does already. When its context ends it cancels what it began
	// and returns; with cause ErrAborted or a deadline the operation is
	// undone, else it is left open.
	Do func(ctx context.Context, s *Scratch) error
	// Undo takes the effect back, whether or not it came about. nil: there
	// is nothing to take back.
	Undo func(ctx context.Context, s *Scratch) error
	// Commit marks the point of no return.
	Commit bool
}

// Stuck is the error of a step that can neither go on nor go back: what holds
// is unknown or needs a person. The operation ends without any undo.
type Stuck struct{ Problem *maint.Problem }

// Beside is what an undo has to tell that was done: what is not as it should be
// beside.
type Beside struct{ Problems []maint.Problem }

func (b *Beside) Error() string {
	return (&maint.Refusal{What: "not all is well", Problems: b.Problems}).Error()
}

func (s *Stuck) Error() string { return s.Problem.Error() }
func (s *Stuck) Unwrap() error { return s.Problem }

// Log is the journal as Run needs it.
type Log interface {
	Append(...maint.Record) error
	Op(maint.OpID) (maint.Op, bool)
}

// Run takes operation id from where its records say it is to its end. life is
// the agent's life: when it ends Run returns ErrLeftOpen. op is life narrowed
// by the operation's deadline and by an abort (cause ErrAborted).
func Run(life, op context.Context, log Log, id maint.OpID, steps []Step, l *slog.Logger) (maint.Outcome, error) {
	r := &runner{log: log, id: id, steps: steps, slog: l.With("op", id)}
	end, err := r.forward(life, op)
	if err == nil {
		err = r.append(append(r.done, maint.Record{Kind: maint.RecEnded, Data: encode(end)})...)
	}
	if err != nil {
		return "", err
	}
	r.slog.Info("operation ended", "outcome", end.Outcome, "problems", len(end.Problems))
	return end.Outcome, nil
}

type runner struct {
	log   Log
	id    maint.OpID
	steps []Step
	slog  *slog.Logger
	// done says that the step before is; it is written together with what comes next, since
	// a step may be done again.
	done []maint.Record
}

// forward does the steps in order and returns how the operation ends.
func (r *runner) forward(life, op context.Context) (maint.Ending, error) {
	state, ok := r.log.Op(r.id)
	if !ok {
		return maint.Ending{}, fmt.Errorf("operation %s is not in the journal", r.id)
	}
	status := make(map[string]string)
	for _, s := range state.Steps {
		status[s.Name] = s.Status
	}
	if state.State == maint.OpUndoing {
		return r.back(life, maint.Ending{Outcome: state.Outcome, Problems: state.Problems}, status)
	}

	committed := false
	for _, step := range r.steps {
		ctx := op
		if committed {
			ctx = life
		}
		if status[step.Name] != "done" {
			if err := r.append(append(r.done, maint.Record{Kind: maint.RecStepStart, Step: step.Name})...); err != nil {
				return maint.Ending{}, err
			}
			r.done, status[step.Name] = nil, "doing"
			err := step.Do(ctx, r.scratch(step.Name))
			switch {
			case err != nil && life.Err() != nil:
				return maint.Ending{}, ErrLeftOpen
			case errors.Is(err, ErrLeftOpen): // the journal failed inside the step
				return maint.Ending{}, err
			case err != nil:
				return r.failed(life, op, step.Name, err, committed, status)
			}
			r.done, status[step.Name] = []maint.Record{{Kind: maint.RecStepDone, Step: step.Name}}, "done"
		}
		committed = committed || step.Commit
	}
	return maint.Ending{Outcome: maint.OutcomeDone}, nil
}

// failed writes down that a step failed and what follows, and goes that way.
func (r *runner) failed(life, op context.Context, step string, err error, committed bool, status map[string]string) (maint.Ending, error) {
	end := maint.Ending{Outcome: maint.OutcomeFailed}
	var refusal *maint.Refusal
	var stuck *Stuck
	errors.As(err, &stuck)
	switch {
	case errors.As(err, &refusal):
		end.Problems = refusal.Problems
	default:
		p := *maint.AsProblem(err, maint.CodeFailed, "step "+step)
		if !committed && stuck == nil {
			p = gaveUp(op, err, p)
		}
		end.Problems = []maint.Problem{p}
	}
	switch {
	case stuck != nil:
		end.Outcome = maint.OutcomeStuck
	case committed:
		end.Outcome = maint.OutcomePartly
	case errors.Is(context.Cause(op), ErrAborted):
		end.Outcome = maint.OutcomeAborted
	case refusal != nil:
		end.Outcome = maint.OutcomeBlocked
	}
	r.slog.Warn("step failed", "step", step, "err", err, "outcome", end.Outcome)
	if err := r.append(maint.Record{Kind: maint.RecStepFailed, Step: step, Text: err.Error(), Data: encode(end)}); err != nil {
		return maint.Ending{}, err
	}
	status[step] = "failed"
	return r.back(life, end, status)
}

// gaveUp puts p right where it says that a host gave no answer, or nothing in
// particular, and the reason is that the operation had no time left to wait or
// was aborted: that is not the host's fault.
func gaveUp(op context.Context, err error, p maint.Problem) maint.Problem {
	var given *maint.Problem
	if errors.As(err, &given) && p.Code != maint.CodePeerDown && p.Code != maint.CodeHypervisorDown {
		return p
	}
	switch cause := context.Cause(op); {
	case errors.Is(cause, ErrAborted):
		p.Code, p.Remedy = maint.CodeAborted, ""
	case errors.Is(cause, context.DeadlineExceeded):
		p.Code, p.Remedy = maint.CodeTimeout, "allow more time (--timeout)"
	}
	return p
}

// back undoes in reverse order every step that was begun.
func (r *runner) back(life context.Context, end maint.Ending, status map[string]string) (maint.Ending, error) {
	if end.Outcome == maint.OutcomePartly || end.Outcome == maint.OutcomeStuck {
		return end, nil
	}
	for i := len(r.steps) - 1; i >= 0; i-- {
		step := r.steps[i]
		begun := status[step.Name] != "" && status[step.Name] != "undone"
		if step.Undo == nil || !begun {
			continue
		}
		if err := r.append(maint.Record{Kind: maint.RecUndoStart, Step: step.Name}); err != nil {
			return maint.Ending{}, err
		}
		ctx, cancel := context.WithTimeout(life, undoTimeout)
		err := step.Undo(ctx, r.scratch(step.Name))
		cancel()
		if life.Err() != nil && err != nil {
			return maint.Ending{}, ErrLeftOpen
		}
		if beside := new(Beside); errors.As(err, &beside) {
			end.Problems, err = append(end.Problems, beside.Problems...), nil
		}
		if err != nil {
			r.slog.Error("undo failed", "step", step.Name, "err", err)
			end.Outcome = maint.OutcomeStuck
			end.Problems = append(end.Problems, *maint.AsProblem(err, maint.CodeFailed, "undo of step "+step.Name))
			return end, r.append(maint.Record{Kind: maint.RecUndoFailed, Step: step.Name, Text: err.Error()})
		}
		if err := r.append(maint.Record{Kind: maint.RecUndoDone, Step: step.Name}); err != nil {
			return maint.Ending{}, err
		}
	}
	return end, nil
}

func (r *runner) append(recs ...maint.Record) error {
	for i := range recs {
		recs[i].Op = r.id
	}
	if err := r.log.Append(recs...); err != nil {
		return fmt.Errorf("%w: %w", ErrLeftOpen, err)
	}
	return nil
}

func (r *runner) scratch(step string) *Scratch { return &Scratch{r: r, step: step} }

// Scratch is what a step writes down for people and for itself.
type Scratch struct {
	r    *runner
	step string
}

// Note journals a line for people.
func (s *Scratch) Note(format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	s.r.slog.Info(text, "step", s.step)
	return s.r.append(maint.Record{Kind: maint.RecStepNote, Step: s.step, Text: text})
}

// Save journals v as the step's data; it is there after a crash.
func (s *Scratch) Save(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.r.append(maint.Record{Kind: maint.RecStepNote, Step: s.step, Data: b})
}

// Load reads what the named step of this operation saved, and reports
// whether it did.
func (s *Scratch) Load(step string, v any) (bool, error) {
	op, _ := s.r.log.Op(s.r.id)
	for _, st := range op.Steps {
		if st.Name == step && st.Data != nil {
			return true, json.Unmarshal(st.Data, v)
		}
	}
	return false, nil
}

// Record journals a record of the operation itself, such as what it measured.
func (s *Scratch) Record(kind maint.RecordKind, v any) error {
	return s.r.append(maint.Record{Kind: kind, Data: encode(v)})
}

// Append journals records of the operation itself, all or none.
func (s *Scratch) Append(recs ...maint.Record) error {
	if len(recs) == 0 {
		return nil
	}
	for i := range recs {
		recs[i].Op = s.r.id
	}
	if err := s.r.log.Append(recs...); err != nil {
		return fmt.Errorf("%w: %w", ErrLeftOpen, err)
	}
	return nil
}

// encode marshals a vocabulary type, which cannot fail.
func encode(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("vocabulary type %T does not marshal: %v", v, err))
	}
	return b
}
