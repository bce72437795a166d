package agent

import (
	"context"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/agent/run"
	"belay/notify/board"
	"belay/notify/campaign"
)

// announce tells every guest of the plan that is to be told, once, of all that it will feel:
// each step's operation finds its events there when it begins.
func (x application) announce(ctx context.Context, s *run.Scratch) error {
	a, told := x.a, 0
	for _, step := range x.plan.Steps {
		kind := kindOf(step.Kind)
		if kind == "" || !a.cfg.Events.Enabled {
			continue
		}
		child := maint.Op{ID: maint.StepOp(x.op.ID, step.N), Kind: kind, By: x.by(), Deadline: x.op.Deadline, Guests: step.Guests}
		missing, err := a.untold(ctx, child)
		if err != nil {
			return err
		}
		at, err := x.announced(ctx, step)
		if err != nil {
			return err
		}
		for _, guests := range campaign.Partition(missing, a.ownerOf(missing), a.policy()) {
			if err := a.announceTo(child, guests, x.standstill(guests, kind), at); err != nil {
				return err
			}
			told += len(guests)
		}
	}
	if told == 0 {
		return nil
	}
	return s.Note("%d notices have been given", told)
}

// standstill is what guests are told that it takes, 0 for what is not known.
func (x application) standstill(guests []maint.EventGuest, kind maint.OpKind) (d time.Duration) {
	for _, g := range x.plan.Guests {
		if !slices.ContainsFunc(guests, func(e maint.EventGuest) bool { return e.UUID == g.UUID }) {
			continue
		}
		e := g.Pause
		if kind == maint.OpMigrate {
			e = g.Blackout
		}
		if e != nil {
			d = max(d, e.Typical)
		}
	}
	return d
}

// kindOf is the operation that does a step which guests feel.
func kindOf(k maint.PlanStepKind) maint.OpKind {
	switch k {
	case maint.PlanMove:
		return maint.OpMigrate
	case maint.PlanHold:
		return maint.OpHold
	case maint.PlanReplace:
		return maint.OpReplace
	case maint.PlanKexec:
		return maint.OpKexec
	}
	return ""
}

// await waits until a step may begin, and sees that it still may.
func (x application) await(ctx context.Context, step maint.PlanStep) error {
	if x.emergency() != "" {
		return nil
	}
	if err := x.untilMoment(ctx, func(now time.Time) (time.Time, error) { return x.moment(ctx, step, now) }); err != nil {
		return err
	}
	return x.noWorse(ctx)
}

// noWorse sees, before the first thing that a guest feels, that the update has come to no more
// for any of them since they were told.
func (x application) noWorse(ctx context.Context) error {
	if slices.ContainsFunc(x.a.journal.Ops(), func(op maint.Op) bool { return op.Part == x.op.ID && op.Kind != maint.OpPatch }) {
		return nil
	}
	left := x.plan
	left.Update.Changes = slices.DeleteFunc(slices.Clone(left.Update.Changes), func(c maint.Change) bool { return x.patched(c.Name) })
	now, err := x.a.replan(ctx, left)
	if err != nil {
		return x.a.cannotAsk("cannot go on with the update", err)
	}
	worse := func(reason string, args ...any) error {
		return maint.Problemf(maint.CodeStalePlan, "plan", "make it again (belay plan)", reason, args...)
	}
	for _, p := range now.Blockers {
		return worse("could not be made any more: %s", p.Error())
	}
	for _, g := range now.Guests {
		i := slices.IndexFunc(x.plan.Guests, func(p maint.PlannedGuest) bool { return p.UUID == g.UUID })
		if i < 0 && len(g.Feels) > 0 {
			return worse("guest %s has started since it was made, and has not been told", g.Guest)
		}
		for _, r := range g.Feels {
			if !slices.Contains(x.plan.Guests[i].Feels, r) {
				return worse("guest %s would need rung %s by now, which it was not told of", g.Guest, r)
			}
		}
		if i >= 0 && g.Outlasts(x.plan.Guests[i]) {
			return worse("guest %s would feel %s by now, and was told of %s", g.Guest, g.FeelsText(), x.plan.Guests[i].FeelsText())
		}
	}
	return nil
}

// patched reports whether a change is done that nobody feels. What is left is planned without
// it: a livepatch that is loaded cannot be loaded.
func (x application) patched(change string) bool {
	now, _ := x.a.journal.Op(x.op.ID)
	for _, step := range x.plan.Steps {
		if step.Kind == maint.PlanPatch && slices.Contains(step.Changes, change) {
			return slices.ContainsFunc(now.Steps, func(s maint.Step) bool { return s.Name == step.Name() && s.Status == "done" })
		}
	}
	return false
}

// toCome reports whether an operation that is not there yet is a step of an apply that goes
// on.
func (a *Agent) toCome(id maint.OpID) bool {
	apply, is := maint.ApplyOf(id)
	if !is {
		return false
	}
	_, begun := a.journal.Op(id)
	op, known := a.journal.Op(apply)
	return !begun && known && op.State != maint.OpEnded
}

// callOff cancels what was announced of steps of an apply that were never begun.
func (a *Agent) callOff(apply maint.Op) {
	for _, e := range a.keeper.Events(func(e maint.ScheduledEvent) bool {
		of, is := maint.ApplyOf(e.Op)
		return is && of == apply.ID && e.State == maint.EventScheduled
	}) {
		if _, begun := a.journal.Op(e.Op); begun {
			continue // it ends its own
		}
		err := a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) {
			return b.Cancel(now, e.ID, "operation "+string(apply.ID)+" has not come to that")
		})
		if err != nil {
			a.log.Error("cannot call a scheduled event off", "event", e.ID, "op", apply.ID, "err", err)
		}
	}
}
