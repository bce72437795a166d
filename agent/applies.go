package agent

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/agent/plan"
	"belay/agent/run"
	"belay/agent/update"
)

// An apply carries a plan out. It does next to nothing itself: each step that guests could
// feel is an operation of its own, which is safe by itself, and has its name before it is
// begun. Going back is the same, in reverse order.

// byApply is who asks for the operations of an apply.
const byApply = "apply:"

// applyGrace is what an apply has beside the time for which guests are waited for.
const applyGrace = 12 * time.Hour

// Apply admits a plan, if it is still the one that would be made, writes it down and starts
// it.
func (a *Agent) Apply(ctx context.Context, by string, r maint.ApplyRequest) (maint.Op, error) {
	what := "cannot apply " + cmp.Or(r.Plan.Update.ID, "the plan")
	if err := cmp.Or(a.mayCommand(by), checkReason(r.Reason)); err != nil {
		return maint.Op{}, err
	}
	if err := a.checkPlan(ctx, what, r.Plan); err != nil {
		return maint.Op{}, err
	}
	now := time.Now()
	end := now
	if r.Plan.Deadline.After(now) {
		end = r.Plan.Deadline
	}
	return a.submit(ctx, what, maint.Op{ID: newOpID("apply", now), Kind: maint.OpApply, By: by, Reason: r.Reason,
		Deadline: end.Add(a.longestNotice() + applyGrace), Apply: &r})
}

// CheckPlan refuses a plan that Apply would refuse, and changes nothing.
func (a *Agent) CheckPlan(ctx context.Context, p maint.Plan) error {
	return a.checkPlan(ctx, "cannot apply the plan", p)
}

// checkPlan refuses a plan that is not the one that would be made now, and says what is
// different.
func (a *Agent) checkPlan(ctx context.Context, what string, p maint.Plan) error {
	if p.Seal().Hash != p.Hash || p.Version != maint.PlanVersion {
		return refuse(what, maint.Problemf(maint.CodeTampered, "plan", "make it again (belay plan)", "is not as it was made"))
	}
	if err := maint.Refuse(what, update.Check(p.Update)); err != nil {
		return err
	}
	l, err := a.ladder(ctx, p.Update, p.Options, "")
	if err != nil {
		return a.cannotAsk(what, err)
	}
	now := plan.Make(p.Update, l, p.Options)
	if p.Host != now.Host || p.HostUUID != now.HostUUID {
		return refuse(what, maint.Problemf(maint.CodeTampered, "plan", "make one here (belay plan)", "is for host %s, and this is %s", p.Host, now.Host))
	}
	if err := maint.Refuse(what, p.Blockers); err != nil {
		return err
	}
	misplaced := plan.Misplaced(p, l)
	longer := slices.ContainsFunc(now.Guests, func(g maint.PlannedGuest) bool {
		return slices.ContainsFunc(p.Guests, func(told maint.PlannedGuest) bool { return told.UUID == g.UUID && g.Outlasts(told) })
	})
	over := p.Deadline.Before(now.Made) && p.Update.Urgency != maint.UrgencyEmergency
	if p.World == now.World && len(now.Blockers) == 0 && p.Same(now) && len(misplaced) == 0 && !longer && !over {
		return nil
	}
	diff := maint.PlanDiff(p, now)
	for _, why := range misplaced {
		diff = append(diff, why.Error())
	}
	if over {
		diff = append(diff, "guests were to be waited for until "+p.Deadline.Format(time.RFC3339))
	}
	if len(diff) == 0 {
		diff = []string{"its steps, or what they were made from, would be others"}
	}
	return refuse(what, maint.Problemf(maint.CodeStalePlan, "plan", "make it again (belay plan), and look at what is different", "is out of date: %s", strings.Join(diff, "; ")))
}

// replan makes a plan anew, from what is so now.
func (a *Agent) replan(ctx context.Context, p maint.Plan) (maint.Plan, error) {
	return a.planUpdate(ctx, p.Update, p.Options)
}

// applySteps wires a plan to the runner.
func (a *Agent) applySteps(op maint.Op) []run.Step {
	x := application{a: a, op: op, plan: op.Apply.Plan}
	var steps []run.Step
	last := 0
	for i, s := range x.plan.Steps {
		if s.Kind == maint.PlanVerify {
			last = i
		}
	}
	for i := 0; i < len(x.plan.Steps); i++ {
		at := x.plan.Steps[i]
		part := []maint.PlanStep{at}
		for at.Kind == maint.PlanMove && i+1 < len(x.plan.Steps) && x.plan.Steps[i+1].Kind == maint.PlanMove {
			i++
			part = append(part, x.plan.Steps[i]) // side by side
		}
		steps = append(steps, run.Step{Name: at.Name(), Commit: i == last,
			Do: func(ctx context.Context, s *run.Scratch) error {
				return x.cordonIfStuck(midway(at, x.do(ctx, s, part)))
			},
			Undo: func(ctx context.Context, s *run.Scratch) error { return x.cordonIfLeft(x.undo(ctx, s, part)) }})
	}
	return append(steps, run.Step{Name: phaseAccount, Do: func(context.Context, *run.Scratch) error { return x.account() }})
}

// midway has a refusal after an apply's first step not be taken for one of the apply: something
// was begun by then.
func midway(step maint.PlanStep, err error) error {
	var r *maint.Refusal
	if step.Kind == maint.PlanCheck || !errors.As(err, &r) {
		return err
	}
	p := together(r.Problems[0].Subject, r.Problems)
	return &p
}

// application is one plan on its way.
type application struct {
	a    *Agent
	op   maint.Op
	plan maint.Plan
}

func (x application) by() string { return byApply + string(x.op.ID) }

// do does a step; only moves come by several.
func (x application) do(ctx context.Context, s *run.Scratch, part []maint.PlanStep) error {
	step := part[0]
	switch step.Kind {
	case maint.PlanCheck:
		return x.check(ctx, s)
	case maint.PlanAnnounce:
		return x.announce(ctx, s)
	case maint.PlanPrepare:
		return x.prepare(ctx, s, step)
	case maint.PlanCordon:
		return x.cordon(s)
	case maint.PlanMove:
		return x.move(ctx, s, part)
	case maint.PlanPatch:
		return x.patch(ctx, s, step)
	case maint.PlanHold:
		return x.hold(ctx, s, step)
	case maint.PlanReplace:
		return x.replace(ctx, s, step)
	case maint.PlanKexec:
		return x.kexec(ctx, s, step)
	case maint.PlanService:
		return x.service(ctx, s, step)
	case maint.PlanReboot:
		return x.reboot(ctx, s, step)
	case maint.PlanVerify:
		return x.verify(ctx, s, step)
	case maint.PlanReturn:
		_, err := x.home(func(begin beginning) (maint.Op, error) { return x.through(ctx, maint.StepOp(x.op.ID, step.N), begin) })
		return cmp.Or(err, x.recordon(s))
	case maint.PlanUncordon:
		return x.uncordon()
	}
	return maint.Problemf(maint.CodeFailed, "plan", "make it again with this belayd", "has a step of a kind that this belayd does not know: %q", step.Kind)
}

// undo takes a step back that has been begun.
func (x application) undo(ctx context.Context, s *run.Scratch, part []maint.PlanStep) error {
	step := part[0]
	switch step.Kind {
	case maint.PlanCheck: // which is the last that is taken back
		return x.before().Keep()
	case maint.PlanAnnounce:
		x.a.callOff(x.op)
	case maint.PlanPrepare:
		return x.unprepare(ctx, s, step)
	case maint.PlanCordon:
		return cmp.Or(x.uncordon(), x.recordon(s))
	case maint.PlanUncordon:
		return x.uncordon()
	case maint.PlanMove:
		return x.unmove(step)
	case maint.PlanPatch:
		return x.unpatch(ctx, s, step)
	case maint.PlanHold:
		return x.unhold(ctx, s, step)
	case maint.PlanKexec:
		return x.unkexec(step)
	case maint.PlanService:
		return x.takeBack(ctx, s, step)
	}
	return nil
}

// cordonIfStuck has a host that can neither go on nor back take no guests in.
func (x application) cordonIfStuck(err error) error {
	var stuck *run.Stuck
	if errors.As(err, &stuck) {
		return x.cordonIfLeft(err)
	}
	return err
}

// cordonIfLeft does so if a step could not be taken back, which is what its error says.
func (x application) cordonIfLeft(err error) error {
	if beside := new(run.Beside); err == nil || errors.As(err, &beside) || x.a.life.Err() != nil {
		return err
	}
	if _, cerr := x.a.Cordon(x.a.life, x.by(), "an update is stuck: operation "+string(x.op.ID)); cerr != nil {
		x.a.log.Error("cannot cordon the host of an update that is stuck", "op", x.op.ID, "err", cerr)
	}
	return err
}

// beginning begins an operation that edit says more of.
type beginning = func(edit func(*maint.Op)) (maint.Op, error)

// through begins the operation of a step, unless it has begun, and sees it to its end. When
// the apply is to end, so is that.
func (x application) through(ctx context.Context, id maint.OpID, begin beginning) (end maint.Op, err error) {
	a := x.a
	for since := time.Now(); !x.begun(id); {
		changed := a.journal.Changed()
		_, err := begin(func(child *maint.Op) { child.ID, child.Part = id, x.op.ID })
		if err == nil || x.begun(id) {
			break
		}
		var r *maint.Refusal
		if !errors.As(err, &r) || !soon(r.Problems) || time.Since(since) > busyGrace {
			return maint.Op{}, err
		}
		select {
		case <-changed:
		case <-time.After(time.Second):
		case <-ctx.Done():
			return maint.Op{}, context.Cause(ctx)
		}
	}
	ended := func() bool {
		end, _ = a.journal.Op(id)
		return end.State == maint.OpEnded
	}
	if err = a.until(ctx, ended); err == nil {
		return end, x.outcome(end)
	}
	if a.life.Err() == nil {
		if _, aerr := a.Abort(a.life, x.by(), id); aerr != nil && !ended() {
			a.log.Warn("what is part of an update goes on, although that is to end", "op", id, "err", aerr)
		}
		if uerr := a.until(a.life, ended); uerr != nil {
			return end, uerr
		}
		if end.Outcome == maint.OutcomeStuck {
			return end, x.outcome(end)
		}
	}
	return end, err
}

// busyGrace is for how long a step waits for what somebody else has begun with its guests.
const busyGrace = 2 * time.Minute

// back is through for a step that is taken back, by one operation or several: one that has
// failed, as one does whose belayd dies while guests are held, leaves them as they were, and
// is begun anew. Each has the time that the operation has; end is the last.
func (x application) back(step maint.PlanStep, begin ...beginning) (end maint.Op, err error) {
	life := x.a.life
	for i, b := range begin {
		for try := 1; ; try++ {
			var stuck *run.Stuck
			if end, err = x.through(life, maint.UndoOp(x.op.ID, step.N, i*maxTries+try), b); err == nil {
				break
			}
			if errors.As(err, &stuck) || life.Err() != nil || try == maxTries || end.Kind == maint.OpRestore && onlyOf(end.Problems, noneToFetch) {
				return end, err
			}
			pause(life, time.Duration(try)*time.Second)
		}
	}
	return end, nil
}

// takeBackBy is back, with what is not as it should be beside.
func (x application) takeBackBy(step maint.PlanStep, begin ...beginning) error {
	end, err := x.back(step, begin...)
	if err == nil && end.Outcome == maint.OutcomePartly {
		return &run.Beside{Problems: end.Problems}
	}
	return err
}

// onlyOf reports whether there are problems, all of a kind.
func onlyOf(ps []maint.Problem, kind func(maint.Problem) bool) bool {
	return len(ps) > 0 && !slices.ContainsFunc(ps, func(p maint.Problem) bool { return !kind(p) })
}

// outcome is an error unless the operation of a step has done it. What was not as it should
// be beside is told in the end; see account.
func (x application) outcome(end maint.Op) error {
	if end.Outcome.TookEffect() {
		return offUnder(end)
	}
	p := maint.Problem{Code: maint.CodeFailed, Subject: "operation " + string(end.ID), Reason: "has ended as " + string(end.Outcome),
		Remedy: "see 'belay ops show " + string(end.ID) + "'"}
	if len(end.Problems) > 0 {
		p = together(end.Problems[0].Subject, end.Problems)
	}
	if end.Outcome == maint.OutcomeStuck {
		return &run.Stuck{Problem: &p}
	}
	return &p
}

// offUnder is an error if a guest does not run under another kernel: no step that follows brings
// it back, and another boot would end it.
func offUnder(end maint.Op) error {
	if end.Kexeced == nil {
		return nil
	}
	var off []maint.Problem
	for _, g := range end.Kexeced.Guests {
		if g.Problem != nil && (g.Fate == maint.KexecKept || g.Fate == maint.KexecLost && !g.Started) {
			off = append(off, *g.Problem)
		}
	}
	if len(off) == 0 {
		return nil
	}
	p := together(off[0].Subject, off)
	return &run.Stuck{Problem: &p}
}

// begun reports whether the operation of a step has been.
func (x application) begun(id maint.OpID) bool {
	_, begun := x.a.journal.Op(id)
	return begun
}

// done reports whether the operation of a step has had its effect.
func (x application) done(id maint.OpID) (maint.Op, bool) {
	op, known := x.a.journal.Op(id)
	return op, known && op.State == maint.OpEnded && op.Outcome.TookEffect()
}

// account tells what is not as it should be, of all steps.
func (x application) account() error {
	var ps []maint.Problem
	if err := x.before().Keep(); err != nil {
		x.a.log.Warn("what was kept to take the update back cannot be removed", "op", x.op.ID, "err", err)
	}
	for _, op := range x.a.journal.Ops() {
		if op.Part == x.op.ID && op.Outcome == maint.OutcomePartly {
			ps = append(ps, op.Problems...)
		}
	}
	return maint.Refuse("not all is well after the update", ps)
}

// change is the change of that name.
func (x application) change(name string) maint.Change {
	i := slices.IndexFunc(x.plan.Update.Changes, func(c maint.Change) bool { return c.Name == name })
	if i < 0 {
		return maint.Change{Name: name}
	}
	return x.plan.Update.Changes[i]
}

// here are the guests of a step that are on this host, of a hold those that run; stranger is one
// that runs here and would feel it, although nothing, or something else, was planned for it.
func (x application) here(ctx context.Context, step maint.PlanStep) (uuids []string, stranger *maint.Problem, err error) {
	guests, err := x.a.presentAtLast(ctx)
	if err != nil {
		return nil, nil, err
	}
	const remedy = "make the plan again (belay plan)"
	hold := step.Kind == maint.PlanHold
	for _, g := range guests {
		i := slices.IndexFunc(x.plan.Guests, func(p maint.PlannedGuest) bool { return p.UUID == g.UUID })
		switch {
		case !g.State.Active():
		case slices.Contains(step.Guests, g.UUID):
			if !hold || works(g) {
				uuids = append(uuids, g.UUID)
			}
		case i < 0:
			stranger = maint.Problemf(maint.CodeStalePlan, "guest "+g.Name, remedy, "has started since the plan was made, and has no part in it")
		case x.plan.Guests[i].To != "":
			stranger = maint.Problemf(maint.CodeStalePlan, "guest "+g.Name, remedy, "was to be moved to %s, and is here", x.plan.Guests[i].To)
		case hold && works(g):
			stranger = maint.Problemf(maint.CodeStalePlan, "guest "+g.Name, remedy, "was paused when the plan was made, and runs")
		}
	}
	return uuids, stranger, nil
}

// emergency waives guests' notice where the update does.
func (x application) emergency() string {
	if x.plan.Update.Urgency == maint.UrgencyEmergency {
		return "update " + x.plan.Update.ID + " is an emergency"
	}
	return ""
}

// goingBack is why guests are not told when a step is taken back.
func (x application) goingBack() string { return "update " + x.plan.Update.ID + " is taken back" }
