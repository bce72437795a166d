// Package window says when a guest may be disturbed: the occurrences of recurrence
// rules (RFC 5545, section 3.3.10) on the wall clocks of time zones.
//
// # Daylight saving
//
// An occurrence begins when the wall clock first shows its time or a later one, and
// lasts a real duration:
//
//	a start that the clock skips          begins at the first moment after the gap
//	a start that the clock shows twice    begins at the first of them
//	four hours from 01:00                 end at 06:00 in spring, 04:00 in autumn
//
// So no occurrence is lost and none comes twice. Where two of them begin at the same
// moment, or overlap, they are one slot.
//
// Dates are those that the rule gives, also where the gap moves a start to the next
// day, or where the occurrence goes on past midnight.
//
// # Time zones
//
// The package brings a copy of the IANA database, for hosts that have none. The
// host's own is preferred: it is the newer one.
package window

import (
	"slices"
	"time"
	_ "time/tzdata"

	"belay/agent/maint"
)

// Horizon is how far Next looks ahead: further than from one leap day to the next.
const Horizon = 10 * 365 * 24 * time.Hour

// Slot is a stretch of time in which a guest may be disturbed. End is not part of
// it. Both are in the zone of the window that it begins with.
type Slot struct {
	Start, End time.Time
}

// Schedule is a guest's windows. They add up: it may be disturbed in each of them.
// The zero Schedule is a guest without windows, which may be disturbed at any time.
type Schedule struct {
	windows []window
}

// Parse reads windows. Its errors are *maint.Problem: they name the window, what is
// wrong with it and what would do. A rule must
//
//   - be YEARLY, MONTHLY, WEEKLY or DAILY, and give days, unless it is DAILY, and
//     hours: there is no DTSTART that they could be taken from;
//   - give at most 24 times of day;
//   - have no COUNT, BYSECOND or BYWEEKNO; UNTIL will do, as a date, which is
//     included, as a time on the wall clock or in UTC;
//   - have its first day in maint.Window.From if it has an INTERVAL;
//   - occur at all.
//
// A window that has ended is none of Parse's concern: what was good stays readable.
// Days are those from 1970 to 2399.
func Parse(windows ...maint.Window) (Schedule, error) {
	if len(windows) > maxWindows {
		return Schedule{}, maint.Problemf(maint.CodeBadRequest, "windows", "put several days or hours into one rule",
			"%d are more than %d", len(windows), maxWindows)
	}
	var s Schedule
	for n, from := range windows {
		w, err := parse(from)
		if err != nil {
			return Schedule{}, err.about(n+1, from)
		}
		s.windows = append(s.windows, w)
	}
	return s, nil
}

// Slots are the stretches between two moments, in order, apart from each other, and
// cut off at both. The work is in proportion to the time between them.
func (s Schedule) Slots(from, to time.Time) []Slot {
	if !from.Before(to) {
		return nil
	}
	if len(s.windows) == 0 {
		return []Slot{{from, to}}
	}
	var all []Slot
	for _, w := range s.windows {
		for start := range w.starts(from.Add(-w.length)) {
			if !start.Before(to) {
				break
			}
			if end := start.Add(w.length); end.After(from) {
				all = append(all, Slot{later(start, from).In(w.zone), earlier(end, to).In(w.zone)})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b Slot) int { return a.Start.Compare(b.Start) })
	merged := all[:0]
	for _, next := range all {
		if last := len(merged) - 1; last >= 0 && !next.Start.After(merged[last].End) {
			merged[last].End = later(merged[last].End, next.End.In(merged[last].End.Location()))
			continue
		}
		merged = append(merged, next)
	}
	return merged
}

// Contains reports whether a guest may be disturbed at a moment.
func (s Schedule) Contains(t time.Time) bool { return len(s.Slots(t, t.Add(1))) > 0 }

// Next is the slot that t is in, from t on, or else the first after it; false if
// there is none within the Horizon. What has no end by then is cut off there.
func (s Schedule) Next(t time.Time) (Slot, bool) {
	for ahead := 7 * 24 * time.Hour; ; ahead *= 4 {
		ahead = min(ahead, Horizon)
		slots := s.Slots(t, t.Add(ahead))
		if len(slots) > 0 && (ahead == Horizon || slots[0].End.Before(t.Add(ahead))) {
			return slots[0], true
		}
		if ahead == Horizon {
			return Slot{}, false
		}
	}
}

// Slot is the earliest moment from which work can be done in one go, within a slot
// and by the deadline; false if there is none.
func (s Schedule) Slot(need time.Duration, from, deadline time.Time) (time.Time, bool) {
	for _, slot := range s.Slots(from, deadline) {
		if slot.Holds(slot.Start, need) {
			return slot.Start, true
		}
	}
	return time.Time{}, false
}

// Holds reports whether work from a moment on fits into the slot.
func (s Slot) Holds(at time.Time, need time.Duration) bool {
	return !at.Before(s.Start) && at.Before(s.End) && !at.Add(need).After(s.End)
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
