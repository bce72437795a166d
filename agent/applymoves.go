package agent

import (
	"context"
	"errors"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/agent/run"
)

// move has guests moved away, each by a migration of its own, side by side.
func (x application) move(ctx context.Context, s *run.Scratch, part []maint.PlanStep) error {
	a := x.a
	var recs []maint.Record
	n := make(map[string]int)
	now, _ := a.journal.Op(x.op.ID)
	for i, step := range part {
		uuid := step.Guests[0]
		n[uuid] = i
		if slices.ContainsFunc(now.Moves, func(m maint.GuestMove) bool { return m.GuestUUID == uuid }) {
			continue
		}
		m := maint.GuestMove{GuestUUID: uuid, Peer: step.To, State: maint.MovePlanned}
		for _, g := range x.plan.Guests {
			if g.UUID == uuid {
				m.Guest = g.Guest
			}
		}
		recs = append(recs, moveRecord(m))
	}
	if err := s.Append(recs...); err != nil {
		return err
	}
	c := newConvoy(a, x.op, s)
	c.atOnce = a.atOnce(a.cfg.Limits.MigrationsOut)
	rooms, _ := a.rooms(ctx, a.destinations(ctx, slices.DeleteFunc(peersOf(c.moves()), func(p string) bool { return a.peers[p] == nil })))
	for name, r := range rooms {
		c.perPeer[name] = r.In
	}
	c.ownMoves(func(m *maint.GuestMove) {
		m.Op = maint.StepOp(x.op.ID, part[n[m.GuestUUID]].N) // it has been announced by that name
		if x.begun(m.Op) {
			m.Op = newOpID("mig", time.Now())
		}
	}, x.by(), func(m maint.GuestMove) maint.MigrateRequest {
		return maint.MigrateRequest{Guest: m.GuestUUID, To: m.Peer, Reason: x.reason(), Emergency: x.emergency()}
	})
	c.when = func(m maint.GuestMove) time.Time {
		at, err := x.moment(ctx, part[n[m.GuestUUID]], c.now)
		if err != nil || x.emergency() != "" {
			return c.now // its migration meets what is wrong, too
		}
		return at
	}
	c.look = func(context.Context, bool) (wait bool, err error) {
		for _, m := range c.moves() {
			step := part[n[m.GuestUUID]]
			id := maint.StepOp(x.op.ID, step.N)
			if off := a.calledOff(id); off != nil && m.State == maint.MovePlanned && !x.begun(id) {
				m.State, m.Problems = maint.MoveLeft, []maint.Problem{*maint.AsProblem(off, maint.CodeEventState, "guest "+m.Guest)}
				err = errors.Join(err, c.put(m))
			}
			if m.State == maint.MovePlanned && m.Peer == "" { // one that has failed goes where it was to
				m.Peer = step.To
				err = errors.Join(err, c.put(m))
			}
			wait = wait || m.State == maint.MovePlanned || m.State == maint.MoveMoving
		}
		return wait, err
	}
	if err := x.awaitFirst(ctx, part); err != nil {
		return err
	}
	if err := c.run(ctx); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for _, m := range maint.Left(c.moves()) {
		off := func(p maint.Problem) bool { return p.Code == maint.CodeGuestOff || p.Code == maint.CodeUnknownGuest }
		if child, known := a.journal.Op(m.Op); known && child.Outcome == maint.OutcomeStuck {
			p := whyLeft(m)
			return &run.Stuck{Problem: &p}
		}
		if !slices.ContainsFunc(m.Problems, off) {
			p := whyLeft(m)
			return &p
		}
	}
	return nil
}

// awaitFirst waits until the first of some moves may begin, and sees that it still may.
func (x application) awaitFirst(ctx context.Context, part []maint.PlanStep) error {
	if x.emergency() != "" || slices.ContainsFunc(part, func(t maint.PlanStep) bool { return x.begun(maint.StepOp(x.op.ID, t.N)) }) {
		return nil
	}
	if err := x.untilMoment(ctx, func(now time.Time) (first time.Time, err error) {
		for _, step := range part {
			at, err := x.moment(ctx, step, now)
			if err != nil {
				return first, err
			}
			if first.IsZero() || at.Before(first) {
				first = at
			}
		}
		return first, nil
	}); err != nil {
		return err
	}
	return x.noWorse(ctx)
}

// home brings back those that have moved away, by an operation that do sees through.
func (x application) home(do func(beginning) (maint.Op, error)) (end maint.Op, err error) {
	now, _ := x.a.journal.Op(x.op.ID)
	if !slices.ContainsFunc(now.Moves, func(m maint.GuestMove) bool { return m.State == maint.MoveMoved }) {
		return end, nil
	}
	end, err = do(func(edit func(*maint.Op)) (maint.Op, error) {
		op := maint.Op{Kind: maint.OpRestore, By: x.by(), Reason: x.reason(), Deadline: time.Now().Add(maint.DrainTimeout),
			Restore: &maint.RestoreRequest{Drain: x.op.ID, Timeout: maint.DrainTimeout, Reason: x.reason()}}
		edit(&op)
		return x.a.submit(x.a.life, "cannot bring guests back", op)
	})
	if onlyOf(end.Problems, isBack) {
		err = nil
	}
	return end, err
}

// isBack says of a guest that it is here again.
func isBack(p maint.Problem) bool { return p.Code == maint.CodeNothing }

// unmove brings back those that have moved away. It is an error if one could not be, but for
// those that nobody could fetch: their owners have ended them, or taken them elsewhere.
func (x application) unmove(step maint.PlanStep) error {
	end, err := x.home(func(begin beginning) (maint.Op, error) { return x.back(step, begin) })
	switch {
	case err != nil && onlyOf(end.Problems, noneToFetch):
		return &run.Beside{Problems: end.Problems}
	case err != nil || len(end.Moves) == 0:
		return err
	}
	guests, err := x.a.presentAtLast(x.a.life)
	if err != nil {
		return err
	}
	var away, beside []maint.Problem
	for _, m := range end.Moves {
		switch {
		case m.State == maint.MoveMoved, onlyOf(m.Problems, noneToFetch):
			beside = append(beside, slices.DeleteFunc(slices.Clone(m.Problems), isBack)...)
		case !slices.ContainsFunc(guests, func(g maint.Guest) bool { return keyOf(g) == m.GuestUUID && g.State.Active() }):
			away = append(away, whyLeft(m))
		}
	}
	if len(away) > 0 {
		p := together(away[0].Subject, away)
		return &p
	}
	if len(beside) == 0 {
		return nil
	}
	return &run.Beside{Problems: beside}
}
