package preserve

import (
	"context"
	"errors"
	"time"

	"belay/agent/maint"
)

// Why it is not known whether a guest was paused by a belayd that died.
var (
	errDied     = errors.New("it was found running: belayd died before it had said that it paused it")
	errNotArmed = errors.New("it is not held: belayd died before the command was begun")
)

// Recover ends what a belayd left behind that died within Perform: the step is
// ended and undone, every guest that Belay paused is released, and every clock
// is looked at that a pause may have stopped. It may be called again and again,
// and finds nothing to do after a Perform that came to its end.
func (h *Hold) Recover(ctx context.Context, s Scratch, record func(Outcome) error) error {
	var order Order
	if found, err := s.Load(PhasePreflight, &order); err != nil || !found {
		return err
	}
	var before begun
	if found, err := s.Load(PhaseHold, &before); err != nil || !found {
		return err
	}
	record = h.forgetting(record)
	line, err := h.Leash.Attach(ctx, h.Op)
	if err != nil {
		return maint.Problemf(maint.CodeLeash, "leash", "release guests that are paused by hand (virsh resume)", "cannot be taken up again: %v", err)
	}
	armed := line != nil
	if !armed {
		line = noLine{} // none was armed, or it was disarmed: no guest is paused
	}
	p := newPause(h, line, order)
	p.begun = before.Begun
	if armed {
		p.adopt(line.Marks())
	}
	var out Outcome
	r := &out.Result
	p.meanwhile(ctx, "end", func() { r.Step, r.Verify, r.Undo = h.ended(ctx, "step"), h.ended(ctx, "verify"), h.ended(ctx, "undo") })
	if !armed {
		p.assume(r.Step != nil)
	}
	if r.Step != nil && (r.Undo == nil || !r.Undo.OK()) {
		h.Steps.Forget(stepName(h.Op, "undo")) // it is begun anew
		h.undo(ctx, p, r)
	}
	r.Guests, out.Leash = p.end(context.WithoutCancel(ctx))
	return record(out)
}

// Clear removes what is kept of the steps of a hold that is over: its belayd may
// have died right after it had written that down.
func (h *Hold) Clear(ctx context.Context) {
	for _, role := range roles {
		h.ended(ctx, role)
		h.Steps.Forget(stepName(h.Op, role))
	}
}

// ended ends what an earlier belayd has left of a step, and says how it went;
// nil: it was not begun.
func (h *Hold) ended(ctx context.Context, role string) *maint.StepRun {
	run, err := h.Steps.End(ctx, stepName(h.Op, role))
	if err != nil {
		h.Log.Error("cannot end a host step", "step", role, "err", err)
		return &maint.StepRun{ExitCode: -1, Error: err.Error()}
	}
	return run
}

// adopt takes over the guests of an earlier belayd as its leash knows them.
func (p *pause) adopt(marks map[string]Mark) {
	for _, m := range p.order.Guests {
		switch mark := marks[m.UUID]; {
		case m.Left != "":
		case mark == Left:
			p.left[m.UUID] = "it was left as it was by the belayd that died"
		case mark == Released: // perhaps by the leash; its events will tell
			p.add(m, time.Time{}).over = true
		case mark == Armed:
			p.add(m, time.Time{}).unsure = errDied
		default:
			p.add(m, time.Time{})
		}
	}
}

// assume is adopt without a leash: either none was armed, or all guests were
// released before it was disarmed, which was so if the step was begun.
func (p *pause) assume(released bool) {
	for _, m := range p.order.Guests {
		if m.Left != "" {
			continue
		}
		g := p.add(m, time.Time{})
		g.over = true
		if !released {
			g.unsure = errNotArmed
		}
	}
}

// noLine stands for a leash where no guest is paused.
type noLine struct{}

func (noLine) Deadline() time.Time                                { return time.Now().Add(undoTimeout) }
func (noLine) Check() error                                       { return nil }
func (noLine) Mark(Mark, string)                                  {}
func (noLine) Marks() map[string]Mark                             { return nil }
func (noLine) Lost() <-chan struct{}                              { return nil }
func (noLine) Leave() []maint.LeashEvent                          { return nil }
func (noLine) Disarm(context.Context) ([]maint.LeashEvent, error) { return nil, nil }
