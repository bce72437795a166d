package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"belay/agent/health"
	"belay/agent/maint"
	"belay/agent/run"
)

// phaseFitness is where it is written down: the plan's first step.
func (x application) phaseFitness() string { return x.plan.Steps[0].Name() }

// check sees that the plan is still the one that would be made, and the host and its guests
// are fit for it.
func (x application) check(ctx context.Context, s *run.Scratch) error {
	what := "cannot apply " + x.plan.Update.ID
	if err := x.a.checkPlan(ctx, what, x.plan); err != nil {
		return err
	}
	if slices.ContainsFunc(x.plan.Update.Checks, func(c maint.UpdateCheck) bool { return c.Guests }) {
		if err := x.examine(ctx, s); err != nil {
			return err
		}
	}
	var ps []maint.Problem
	for i, c := range x.plan.Update.Checks {
		if !c.At(maint.CheckBefore) || c.Guests { // guests have just been asked
			continue
		}
		if p := x.ask(ctx, s, x.plan.Steps[0], i, c); p != nil {
			ps = append(ps, *p)
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return maint.Refuse(what, ps)
}

// verify sees that all guests run, here or where they were moved, and that the host and they
// are well.
func (x application) verify(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	when := maint.CheckAfter
	if slices.ContainsFunc(x.plan.Steps[step.N:], func(t maint.PlanStep) bool { return t.Kind == maint.PlanVerify }) {
		when = maint.CheckBetween
	}
	asked := slices.ContainsFunc(x.plan.Update.Checks, func(c maint.UpdateCheck) bool { return c.Guests && c.At(when) })
	if p := x.missing(ctx, asked); p != nil {
		return p
	}
	for i, c := range x.plan.Update.Checks {
		if !c.At(when) {
			continue
		}
		p := x.ask(ctx, s, step, i, c)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case p == nil:
		case c.OnFail == maint.FailGoOn:
			if err := s.Note("%s; the update goes on, as it says", p.Error()); err != nil {
				return err
			}
		case c.OnFail == maint.FailStop:
			p.Remedy = "find out why; then apply the plan again, or take it back by hand. Every guest runs, and nothing further is begun, as the update says (on_fail)"
			return &run.Stuck{Problem: p}
		default:
			return p
		}
	}
	return nil
}

// missing is a guest of the plan that ran, and is gone, or has crashed, unless a check is to say
// what follows from that.
func (x application) missing(ctx context.Context, asked bool) *maint.Problem {
	guests, err := x.a.presentAtLast(ctx)
	if err != nil {
		return maint.AsProblem(err, maint.CodeHypervisorDown, "host "+x.a.cfg.Host)
	}
	now, _ := x.a.journal.Op(x.op.ID)
	for _, g := range x.plan.Guests {
		i := slices.IndexFunc(guests, func(h maint.Guest) bool { return keyOf(h) == g.UUID })
		if i >= 0 && !asked && !guests[i].State.Active() && !ownDoing(guests[i]) {
			return maint.Problemf(maint.CodeGuestOff, "guest "+g.Guest, "see its log in /var/log/libvirt/qemu", "ran when the update began, and is %s (%s)", guests[i].State, guests[i].Reason)
		}
		moved := slices.ContainsFunc(now.Moves, func(m maint.GuestMove) bool { return m.GuestUUID == g.UUID && m.State == maint.MoveMoved })
		if i < 0 && !moved && !x.taken(g.UUID) {
			return maint.Problemf(maint.CodeUnknownGuest, "guest "+g.Guest, "look for it with 'belay guests' on other hosts", "is not on %s any more, and this update has not moved it", x.a.cfg.Host)
		}
	}
	return nil
}

// taken reports whether somebody else has migrated a guest away since the update began.
func (x application) taken(uuid string) bool {
	return slices.ContainsFunc(x.a.journal.Ops(), func(op maint.Op) bool {
		return op.Kind == maint.OpMigrate && op.Part != x.op.ID && op.GuestUUID == uuid && op.Ended.After(x.op.Started) && op.Outcome.TookEffect()
	})
}

// ask asks one check until it is well, or has failed so often in a row, or its time is up.
// n is its number.
func (x application) ask(ctx context.Context, s *run.Scratch, step maint.PlanStep, n int, c maint.UpdateCheck) *maint.Problem {
	const remedy = "find out why, and apply the plan again"
	if !pause(ctx, c.WarmUp) {
		return nil // the caller sees that
	}
	if c.Guests {
		ill := x.ailing(ctx, s)
		if len(ill) == 0 || ctx.Err() != nil {
			return nil
		}
		return maint.Problemf(maint.CodeStep, "check "+c.Name, remedy, "%s", few(ill))
	}
	tries := 0
	r := health.Pace{Every: checkEvery, Within: c.Timeout, Failures: c.Failures}.Until(ctx, time.Time{}, func(ctx context.Context) error {
		tries++
		return x.once(ctx, s, step, fmt.Sprintf("check-%d", n), c)
	})
	if r.Healthy {
		return nil
	}
	return maint.Problemf(maint.CodeStep, "check "+c.Name, remedy, "has failed %d times in a row: %s", r.Tries, r.Reason)
}

// checkEvery is the pause between tries of a check.
const checkEvery = time.Second

func (x application) once(ctx context.Context, s *run.Scratch, step maint.PlanStep, name string, c maint.UpdateCheck) error {
	do := maint.HostStep{Command: c.Command}
	switch {
	case c.TCP != "" || c.HTTP != "":
		return x.a.askOnce(ctx, "", health.Check{TCP: c.TCP, HTTP: c.HTTP})
	case c.Unit != "":
		do.Command = []string{"/usr/bin/systemctl", "is-active", "--quiet", "--", c.Unit}
	}
	id := string(maint.StepOp(x.op.ID, step.N)) + "-" + name
	if _, err := x.a.preserve.Steps.End(ctx, id); err != nil { // of an earlier belayd: what it found is out of date
		return err
	}
	x.a.preserve.Steps.Forget(id)
	defer x.a.preserve.Steps.Forget(id)
	return failedRun("check", do, x.a.preserve.Steps.Run(ctx, id, do, nil))
}
