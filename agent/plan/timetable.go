package plan

import (
	"cmp"
	"slices"
	"time"

	"belay/agent/maint"
)

// timetable says when what is felt begins.
type timetable struct {
	now, deadline time.Time
	waits         bool // notices and windows count
	tells         bool
	all           []*candidate
	ways          []way
	begin         map[string]time.Time // of each guest's first impact, by UUID
	late          map[string]bool      // for which it was at the deadline that no window suits
	moved         time.Time            // when all moves have begun
	at            []time.Time          // of each change
	urgency       maint.Urgency
}

func newTimetable(p maint.Plan, l maint.Ladder, all []*candidate, ways []way) *timetable {
	t := &timetable{now: p.Made, deadline: p.Deadline, waits: p.Update.Urgency != maint.UrgencyEmergency, tells: l.Tells, all: all, ways: ways,
		begin: make(map[string]time.Time), late: make(map[string]bool), moved: p.Made, urgency: p.Update.Urgency}
	for _, c := range t.leaving() {
		t.moved = latest(t.moved, t.set(c, t.common([]*candidate{c}, t.now)))
	}
	cursor, booted := t.now, false
	for _, w := range ways {
		if w.rung != "" && w.rung != maint.RungA {
			cursor = latest(cursor, t.moved)
		}
		stay := t.feeling(w)
		switch {
		case w.rung == maint.RungB2:
			next := cursor
			for _, c := range stay {
				next = latest(next, t.set(c, t.common([]*candidate{c}, cursor)))
			}
			cursor = next
		case w.rung.Pauses() && (w.rung != maint.RungB3 || !booted):
			cursor = t.common(stay, cursor)
			for _, c := range stay {
				t.set(c, cursor)
			}
			booted = booted || w.rung == maint.RungB3
		}
		t.at = append(t.at, cursor)
	}
	return t
}

// leaving are the guests that move, in the order in which their moves begin.
func (t *timetable) leaving() (some []*candidate) {
	for _, c := range t.all {
		if c.peer != "" {
			some = append(some, c)
		}
	}
	slices.SortFunc(some, func(a, b *candidate) int {
		return cmp.Or(t.begin[a.g.UUID].Compare(t.begin[b.g.UUID]), biggest(a, b))
	})
	return some
}

// feeling are the guests that stay and feel a change.
func (t *timetable) feeling(w way) (some []*candidate) {
	for _, c := range t.all {
		if c.chosen == &c.stay && slices.Contains(c.stay.feels, w.rung) {
			some = append(some, c)
		}
	}
	return some
}

// set notes when a guest first feels something, and gives that moment.
func (t *timetable) set(c *candidate, at time.Time) time.Time {
	if was, set := t.begin[c.g.UUID]; !set || at.Before(was) {
		t.begin[c.g.UUID] = at
	}
	return at
}

// common is the first moment from then on that suits all of some guests: their notice has
// passed, and they are in a window for long enough. Where there is none it is the deadline.
func (t *timetable) common(some []*candidate, from time.Time) time.Time {
	at := from
	if !t.waits {
		return at
	}
	asked := false
	for _, c := range some {
		at = latest(at, t.now.Add(t.notice(c)))
		asked = asked || c.chosen.asked
	}
	if asked {
		return latest(at, t.deadline)
	}
	var waits []Wait
	for _, c := range some {
		if len(c.g.Policy.Windows) > 0 {
			waits = append(waits, Wait{Slots: c.g.Slots, For: c.chosen.longest.High})
		}
	}
	fits, ok := Common(waits, at, t.deadline)
	if !ok {
		return t.outside(some, latest(at, t.deadline))
	}
	return fits
}

// Wait is what a guest with windows waits for: so much time in one of them.
type Wait struct {
	Slots []maint.Slot
	For   time.Duration
}

// Common is the first moment from then on that suits all; false: none does until the
// deadline.
func Common(all []Wait, from, deadline time.Time) (at time.Time, ok bool) {
	at = from
	for again := true; again; {
		again = false
		for _, w := range all {
			fits, ok := within(w.Slots, at, w.For)
			if !ok || fits.After(deadline) {
				return at, false
			}
			if fits.After(at) {
				at, again = fits, true
			}
		}
	}
	return at, true
}

// outside notes whose windows the moment is not in.
func (t *timetable) outside(some []*candidate, at time.Time) time.Time {
	for _, c := range some {
		if len(c.g.Policy.Windows) == 0 {
			continue
		}
		if fits, ok := within(c.g.Slots, at, c.chosen.longest.High); !ok || !fits.Equal(at) {
			t.late[c.g.UUID] = true
		}
	}
	return at
}

func (t *timetable) notice(c *candidate) time.Duration {
	if !t.tells {
		return 0
	}
	return c.g.Policy.NoticeFor(t.urgency)
}

// within is the first moment from then on at which a slot has so much time left.
func within(slots []maint.Slot, from time.Time, need time.Duration) (time.Time, bool) {
	for _, s := range slots {
		at := latest(from, s.Start)
		if at.Before(s.End) && !at.Add(need).After(s.End) {
			return at.UTC(), true
		}
	}
	return time.Time{}, false
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// planned is a guest in the plan.
func (t *timetable) planned(c *candidate) maint.PlannedGuest {
	g := maint.PlannedGuest{Guest: c.g.Guest, UUID: c.g.UUID}
	if c.chosen == nil {
		g.Refused = c.sorted(func(maint.Rung) bool { return true })
		return g
	}
	o := c.chosen
	if len(o.feels) == 0 {
		g.Rung, g.Note = maint.RungA, o.note
		return g
	}
	g.Feels, g.Pauses, g.Method, g.To, g.Note = slices.Clone(o.feels), o.pauses, o.method, c.peer, o.note
	g.Rung = o.feels[len(o.feels)-1]
	e := o.longest
	if c.peer != "" {
		g.Blackout, g.Feels = &e, []maint.Rung{maint.RungD}
	} else {
		g.Pause = &e
	}
	g.Begin = t.begin[c.g.UUID]
	if t.tells && t.waits {
		g.Told = t.now
	}
	if t.waits && (o.asked || len(c.g.Policy.Windows) > 0) {
		g.Rung, g.Asked = maint.RungC, o.asked
	}
	if t.late[c.g.UUID] {
		g.Note = "none of its windows suits before the deadline"
	}
	// Of those that stay, the ways say why not by less.
	g.Refused = c.sorted(func(r maint.Rung) bool {
		return c.peer != "" && r != maint.RungD || c.peer == "" && r == maint.RungD && maint.RungD.In(c.g.Policy.Prefer)
	})
	return g
}

// sorted are the rungs that were refused and are asked for, in order.
func (c *candidate) sorted(which func(maint.Rung) bool) (some []maint.RefusedRung) {
	for _, r := range c.refused {
		if which(r.Rung) {
			some = append(some, r)
		}
	}
	slices.SortStableFunc(some, func(a, b maint.RefusedRung) int {
		return slices.Index(maint.Rungs, a.Rung) - slices.Index(maint.Rungs, b.Rung)
	})
	return some
}
