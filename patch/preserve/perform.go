package preserve

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"belay/agent/maint"
)

// begun is what Perform saves before anything can be paused: whoever finds it
// goes back, and does not begin again.
type begun struct {
	Begun time.Time `json:"begun"`
}

// armTimeout bounds the arming of the leash: nothing is paused yet.
const armTimeout = 10 * time.Second

// Perform holds the guests around the step. When it returns no guest is held,
// whatever went wrong, but for one named in a *maint.Problem of code
// "still-paused": the leash stays at that. record is called once, after the
// release. An error of the step, or of Belay around it, is returned after the
// step's undo and the guests' release.
func (h *Hold) Perform(ctx context.Context, s Scratch, record func(Outcome) error) error {
	record = h.forgetting(record)
	if h.out != nil { // done before, in this life, and could not be written down
		return errors.Join(h.failure, record(*h.out))
	}
	var order Order
	if _, err := s.Load(PhasePreflight, &order); err != nil {
		return err
	}
	if before, err := s.Load(PhaseHold, new(begun)); err != nil {
		return err
	} else if before {
		return maint.Problemf(maint.CodeFailed, h.what(), "begin again", "belayd was restarted while they were held")
	}
	if err := s.Save(begun{time.Now()}); err != nil {
		return err
	}
	out, failure := h.hold(ctx, order)
	h.out, h.failure = &out, failure
	return errors.Join(failure, record(out))
}

// forgetting is record that also drops what is known of the steps elsewhere.
func (h *Hold) forgetting(record func(Outcome) error) func(Outcome) error {
	return func(o Outcome) error {
		if err := record(o); err != nil {
			return err
		}
		for _, role := range roles {
			h.Steps.Forget(stepName(h.Op, role))
		}
		return nil
	}
}

// hold is the pause from end to end. Nothing in it writes to disk.
func (h *Hold) hold(ctx context.Context, order Order) (out Outcome, failure error) {
	if err := h.Host.Warm(ctx, len(order.Guests)); err != nil {
		return h.notBegun(order, maint.Problemf(maint.CodeHypervisorDown, "libvirt",
			"see that it runs, and begin again", "cannot be reached, so nothing was paused: %v", err))
	}
	// Before the leash, whose time runs from its arming.
	if err := h.Steps.Prepare(ctx, stepName(h.Op, "step"), h.Request.Step); err != nil {
		return h.notBegun(order, maint.Problemf(maint.CodeStep, subject(h.Request.Step),
			"see that processes can be started and /run has room, and begin again", "cannot be prepared, so nothing was paused: %v", err))
	}
	defer func() {
		if out.Result.Step == nil { // nobody will begin it any more
			h.ended(context.WithoutCancel(ctx), "step")
		}
	}()
	arm, cancel := context.WithTimeout(ctx, armTimeout)
	line, err := h.Leash.Arm(arm, order)
	cancel()
	if err != nil {
		return h.notBegun(order, maint.Problemf(maint.CodeLeash, "leash",
			"see 'belay doctor' for rung B", "cannot be armed, so nothing was paused: %v", err))
	}
	p := newPause(h, line, order)
	if failure = p.begin(ctx); failure == nil {
		failure = h.service(ctx, p, &out.Result)
	}
	if failure != nil && out.Result.Step != nil {
		h.undo(ctx, p, &out.Result)
	}
	out.Result.Guests, out.Leash = p.end(context.WithoutCancel(ctx))
	return out, failure
}

// notBegun is a hold that was refused before anything was paused. Its record has the
// guests: belayd may die before the refusal is written down.
func (h *Hold) notBegun(order Order, why *maint.Problem) (out Outcome, err error) {
	for _, m := range order.Guests {
		out.Result.Guests = append(out.Result.Guests, maint.HeldGuest{Guest: m.Guest, UUID: m.UUID, Left: cmp.Or(m.Left, why.Subject+" "+why.Reason)})
	}
	return out, maint.Refuse("cannot hold "+h.what(), []maint.Problem{*why})
}

// service runs the step and sees that it worked.
func (h *Hold) service(ctx context.Context, p *pause, r *maint.HoldResult) error {
	ctx, cancel := context.WithDeadline(ctx, p.stepEnd(h.Request.Undo != nil))
	defer cancel()
	go func() { // without a leash there is no pause
		select {
		case <-p.line.Lost():
			cancel()
		case <-ctx.Done():
		}
	}()
	run := h.run(ctx, "step", h.Request.Step, p)
	r.Step = &run
	failed := stepFailure("the step", h.Request.Step, run)
	if failed == nil && h.Request.Verify != nil {
		run := h.run(ctx, "verify", *h.Request.Verify, p)
		r.Verify = &run
		failed = stepFailure("the check after the step", *h.Request.Verify, run)
	}
	select {
	case <-p.line.Lost():
		return maint.Problemf(maint.CodeLeash, "leash", "see the system's log for what ended it", "was lost, so the guests were released at once")
	default:
		return failed
	}
}

// run runs one step under a name that is its operation's alone.
func (h *Hold) run(ctx context.Context, role string, step maint.HostStep, p *pause) (run maint.StepRun) {
	p.meanwhile(ctx, role, func() { run = h.start(ctx, role, step, p) })
	return run
}

func (h *Hold) start(ctx context.Context, role string, step maint.HostStep, p *pause) maint.StepRun {
	if step.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, step.Timeout)
		defer cancel()
	}
	h.Log.Info("host step begins", "step", role, "command", strings.Join(step.Command, " "), "unit", step.Unit)
	run := h.Steps.Run(ctx, stepName(h.Op, role), step, []string{
		"BELAY_OP=" + string(h.Op), "BELAY_GUESTS=" + strings.Join(p.names(), " ")})
	h.Log.Info("host step has ended", "step", role, "exit_code", run.ExitCode, "timed_out", run.TimedOut, "err", run.Error)
	return run
}

// roles are those of a hold's steps.
var roles = []string{"step", "verify", "undo"}

func stepName(op maint.OpID, role string) string { return string(op) + "-" + role }

// subject names a step in a problem.
func subject(step maint.HostStep) string {
	if step.Unit != "" {
		return "'" + step.Unit + "'"
	}
	return "'" + strings.Join(step.Command, " ") + "'"
}

func stepFailure(what string, step maint.HostStep, run maint.StepRun) error {
	if run.OK() {
		return nil
	}
	reason := fmt.Sprintf("%s ended with exit code %d", what, run.ExitCode)
	remedy := ""
	switch {
	case run.Error != "":
		reason = what + ": " + run.Error
	case run.TimedOut:
		reason = fmt.Sprintf("%s was ended after %s, so that the guests are released in time", what, run.Ended.Sub(run.Started).Round(time.Millisecond))
		remedy = "allow a longer pause (--max-pause)"
		if step.Timeout > 0 && run.Ended.Sub(run.Started) >= step.Timeout {
			reason, remedy = fmt.Sprintf("%s was ended after %s, which is all that it was given", what, step.Timeout), "allow it more time (--timeout)"
		}
	}
	return &maint.Problem{Code: maint.CodeStep, Subject: subject(step), Reason: reason, Remedy: remedy}
}

// undo takes the step back, while the guests are held if there is time.
func (h *Hold) undo(ctx context.Context, p *pause, r *maint.HoldResult) {
	if h.Request.Undo == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	run := h.run(ctx, "undo", *h.Request.Undo, p)
	r.Undo = &run
}

// undoTimeout bounds an undo, which may go on after the release.
const undoTimeout = 5 * time.Minute

// Judge says whether the step of a hold that is over worked, as Perform does.
func Judge(r maint.HoldRequest, held maint.HoldResult) error {
	if held.Step == nil {
		return maint.Problemf(maint.CodeFailed, "the step", "begin again", "was not begun")
	}
	if err := stepFailure("the step", r.Step, *held.Step); err != nil || r.Verify == nil {
		return err
	}
	if held.Verify == nil {
		return maint.Problemf(maint.CodeFailed, "the check after the step", "begin again", "was not made")
	}
	return stepFailure("the check after the step", *r.Verify, *held.Verify)
}

// Undone says whether a step that failed was taken back, where it was to be.
func Undone(r maint.HoldRequest, held maint.HoldResult) error {
	if r.Undo == nil || held.Step == nil || held.Undo != nil && held.Undo.OK() {
		return nil
	}
	const remedy = "see what the step has left on the host; belay ops show tells what the undo said"
	if held.Undo == nil {
		return maint.Problemf(maint.CodeStep, "the undo", remedy, "was not made")
	}
	p := *maint.AsProblem(stepFailure("the undo", *r.Undo, *held.Undo), maint.CodeStep, "the undo")
	p.Remedy = remedy
	return &p
}

// Verify says what is not as it should be after a hold, whatever became of its
// step.
func Verify(r maint.HoldResult, leash []maint.LeashEvent, maxPause time.Duration) []maint.Problem {
	var problems []maint.Problem
	for _, e := range leash {
		if e.Kind == maint.LeashFired {
			problems = append(problems, *maint.Problemf(maint.CodeLeash, "leash", "see why belayd did not release them in time (journalctl -u belayd)",
				"it released guests by itself: %s", e.Text))
		}
	}
	for _, g := range r.Guests {
		if g.Problem != nil {
			problems = append(problems, *g.Problem)
		} else if g.ReleasedBy == somebodyElse && !g.Paused.IsZero() {
			problems = append(problems, *maint.Problemf(maint.CodeReleased, "guest "+g.Guest, "see who resumed it (virsh resume), and whether the host was serviced under it",
				"was resumed by somebody else before the hold was over"))
		} else if g.Pause > maxPause {
			problems = append(problems, *maint.Problemf(maint.CodePauseTooLong, "guest "+g.Guest, "",
				"was paused for %s, longer than the %s allowed", g.Pause.Round(time.Millisecond), maxPause))
		}
	}
	return problems
}
