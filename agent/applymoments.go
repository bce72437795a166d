package agent

import (
	"context"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/agent/plan"
	"belay/notify/board"
	"belay/notify/window"
)

// When the steps of an apply begin. A plan says when, as of when it was made. It may be applied
// later, and its steps may come late to their turns: a belayd was down, or what came before
// took its time. So each moment is looked at anew.

// momentAgain is how often a moment that is waited for is looked at again: the clock may be set.
const momentAgain = time.Minute

// untilMoment waits for a moment, which what happens meanwhile may bring forward or put off.
func (x application) untilMoment(ctx context.Context, moment func(now time.Time) (time.Time, error)) error {
	for {
		changed, told := x.a.journal.Changed(), x.a.keeper.See(func(board.Board) {})
		now := time.Now()
		at, err := moment(now)
		if err != nil || !at.After(now) {
			return err
		}
		t := time.NewTimer(min(at.Sub(now), momentAgain))
		select {
		case <-t.C:
		case <-changed:
		case <-told:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// moment is when a step may begin at the earliest, not after now if it may: when its guests have
// had their notice, or approved, and if they are not told, when the plan says. Who has not
// approved it is left alone outside its windows, as long as the update waits for anybody. It is
// an error that a guest's event was called off.
func (x application) moment(ctx context.Context, step maint.PlanStep, now time.Time) (at time.Time, err error) {
	id := maint.StepOp(x.op.ID, step.N)
	if err := x.a.calledOff(id); err != nil {
		return at, err
	}
	events := x.a.openEvents(id)
	if len(events) == 0 {
		at = step.At
	}
	x.a.keeper.See(func(b board.Board) {
		for _, e := range events {
			if t, err := b.Startable(now, e.ID); err == nil && t.After(at) { // else it has started
				at = t
			}
		}
	})
	if at.After(now) {
		return at, nil
	}
	asked := slices.DeleteFunc(slices.Clone(step.Guests), func(uuid string) bool {
		return slices.ContainsFunc(events, func(e maint.ScheduledEvent) bool { return board.About(e, uuid) && e.Approval != nil })
	})
	return x.suits(ctx, asked, now)
}

// announced is the moment that the guests of a step are told: the plan's, but not before each
// has had the notice of its policy, nor outside their windows.
func (x application) announced(ctx context.Context, step maint.PlanStep) (time.Time, error) {
	at := step.At
	if x.emergency() != "" {
		return at, nil
	}
	guests, err := x.those(ctx, step.Guests)
	if err != nil {
		return at, err
	}
	now := time.Now()
	for _, g := range guests {
		p, _ := x.a.policyOf(g) // one that cannot be read has nothing planned for it
		if told := now.Add(p.NoticeFor(x.plan.Update.Urgency)); told.After(at) {
			at = told
		}
	}
	return x.suits(ctx, step.Guests, at)
}

// those are some guests, as far as they are here.
func (x application) those(ctx context.Context, uuids []string) ([]maint.Guest, error) {
	guests, err := x.a.presentAtLast(ctx)
	return slices.DeleteFunc(guests, func(g maint.Guest) bool { return !slices.Contains(uuids, g.UUID) }), err
}

// suits is the first moment from then on at which guests may be disturbed by their windows, or
// the update's deadline if there is none before.
func (x application) suits(ctx context.Context, uuids []string, from time.Time) (time.Time, error) {
	end := x.plan.Deadline
	if len(uuids) == 0 || !from.Before(end) {
		return from, nil
	}
	guests, err := x.those(ctx, uuids)
	if err != nil {
		return from, err
	}
	var waits []plan.Wait
	for _, g := range guests {
		p, _ := x.a.policyOf(g)
		w, err := window.Parse(p.Windows...)
		if err != nil || len(p.Windows) == 0 {
			continue
		}
		wait := plan.Wait{For: x.longestOf(g.UUID)}
		for _, s := range w.Slots(from, end.Add(policyAhead)) {
			wait.Slots = append(wait.Slots, maint.Slot(s))
		}
		waits = append(waits, wait)
	}
	if at, ok := plan.Common(waits, from, end); ok {
		return at, nil
	}
	return end, nil
}

// longestOf is for how long a guest may stand still at once, by the plan.
func (x application) longestOf(uuid string) (d time.Duration) {
	for _, g := range x.plan.Guests {
		if e := g.Pause; g.UUID == uuid && e != nil {
			d = e.High
		} else if e := g.Blackout; g.UUID == uuid && e != nil {
			d = e.High
		}
	}
	return d
}
