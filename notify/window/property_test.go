package window_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"belay/agent/maint"
	"belay/notify/window"
)

// changes are zones, and days around which their clocks are set.
var changes = []struct {
	zone string
	days []string
}{
	{"Europe/Berlin", []string{"2026-03-29", "2026-10-25"}},
	{"Europe/London", []string{"2026-03-29", "2026-10-25"}},
	{"Europe/Dublin", []string{"2026-03-29", "2026-10-25"}}, // summer is standard time
	{"America/New_York", []string{"2026-03-08", "2026-11-01"}},
	{"Australia/Lord_Howe", []string{"2026-04-05", "2026-10-04"}}, // half an hour
	{"Asia/Kolkata", []string{"2026-03-29", "2026-12-31"}},        // none
	{"America/Santiago", []string{"2026-04-05", "2026-09-06"}},    // at midnight
	{"Africa/Cairo", []string{"2026-04-24", "2026-10-30"}},        // at midnight
	{"America/Nuuk", []string{"2026-03-29", "2026-10-25"}},        // the hour before midnight
	{"Antarctica/Troll", []string{"2026-03-29", "2026-10-25"}},    // two hours
	{"Pacific/Apia", []string{"2011-12-30", "2011-04-02"}},        // a day
	{"UTC", []string{"2028-02-29", "2026-12-31"}},
}

// recipe is a window from which its occurrences can be told without reading the
// rule.
type recipe struct {
	maint.Window
	zone     *time.Location
	from     time.Time
	every    int // days or weeks
	weekly   bool
	weekdays []time.Weekday
	months   []time.Month
	hours    []int
	minute   int
}

func drawRecipe(t *rapid.T, zone string, near time.Time) recipe {
	r := recipe{
		every:  rapid.SampledFrom([]int{1, 1, 2, 3}).Draw(t, "every"),
		weekly: rapid.Bool().Draw(t, "weekly"),
		hours:  rapid.SliceOfNDistinct(rapid.IntRange(0, 23), 1, 3, rapid.ID).Draw(t, "hours"),
		minute: rapid.SampledFrom([]int{0, 0, 15, 30, 59}).Draw(t, "minute"),
		from:   near.AddDate(0, 0, -rapid.IntRange(-3, 20).Draw(t, "first day before")),
	}
	r.zone, _ = time.LoadLocation(zone)
	r.Zone, r.From = zone, r.from.Format(time.DateOnly)
	r.Length = time.Duration(rapid.IntRange(120, 30*60).Draw(t, "minutes")) * time.Minute
	if r.weekly {
		r.weekdays = rapid.SliceOfNDistinct(rapid.Map(rapid.IntRange(0, 6), func(n int) time.Weekday { return time.Weekday(n) }), 1, 7, rapid.ID).Draw(t, "weekdays")
	}
	if rapid.IntRange(0, 3).Draw(t, "months") == 0 {
		r.months = []time.Month{near.Month()}
	}
	for range rapid.IntRange(0, 2).Draw(t, "exceptions") {
		r.Except = append(r.Except, near.AddDate(0, 0, rapid.IntRange(-3, 3).Draw(t, "except")).Format(time.DateOnly))
	}
	r.Rule = fmt.Sprintf("FREQ=DAILY;INTERVAL=%d", r.every)
	if r.weekly {
		r.Rule = fmt.Sprintf("FREQ=WEEKLY;INTERVAL=%d;BYDAY=", r.every)
		for n, d := range r.weekdays {
			r.Rule += []string{"", ","}[min(n, 1)] + []string{"SU", "MO", "TU", "WE", "TH", "FR", "SA"}[d]
		}
	}
	for _, m := range r.months {
		r.Rule += fmt.Sprintf(";BYMONTH=%d", m)
	}
	r.Rule += fmt.Sprintf(";BYMINUTE=%d;BYHOUR=", r.minute)
	for n, h := range r.hours {
		r.Rule += []string{"", ","}[min(n, 1)] + fmt.Sprint(h)
	}
	return r
}

// on tells whether the window occurs on a day.
func (r recipe) on(day time.Time) bool {
	days := int(day.Sub(r.from).Hours()) / 24
	if r.weekly {
		days += (int(r.from.Weekday()) + 6) % 7 // since the Monday before
	}
	switch {
	case day.Before(r.from) || slices.Contains(r.Except, day.Format(time.DateOnly)):
		return false
	case len(r.months) > 0 && !slices.Contains(r.months, day.Month()):
		return false
	case r.weekly:
		return days/7%r.every == 0 && slices.Contains(r.weekdays, day.Weekday())
	}
	return days%r.every == 0
}

// first is when the zone's clock first shows a time or a later one, found by
// looking at the clock every minute.
func first(day time.Time, hour, minute int, zone *time.Location) time.Time {
	wanted := day.Add(time.Duration(hour*60+minute) * time.Minute).Format(time.DateTime)
	for t := day.Add(-26 * time.Hour); ; t = t.Add(time.Minute) {
		if t.In(zone).Format(time.DateTime) >= wanted {
			return t
		}
	}
}

func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		change := rapid.SampledFrom(changes).Draw(t, "zone")
		near, _ := time.Parse(time.DateOnly, rapid.SampledFrom(change.days).Draw(t, "day"))
		var recipes []recipe
		var windows []maint.Window
		for range rapid.IntRange(1, 2).Draw(t, "windows") {
			r := drawRecipe(t, change.zone, near)
			recipes, windows = append(recipes, r), append(windows, r.Window)
		}
		s, err := window.Parse(windows...)
		if err != nil {
			t.Skip(err) // all of its few occurrences are excluded
		}
		from, to := near.Add(-30*time.Hour), near.Add(54*time.Hour)
		slots := s.Slots(from, to)

		// Every occurrence is in one slot, and every slot is made of occurrences.
		var occurrences []window.Slot
		for _, r := range recipes {
			for n := -5; n <= 5; n++ {
				day := near.AddDate(0, 0, n)
				if !r.on(day) {
					continue
				}
				for _, h := range r.hours {
					start := first(day, h, r.minute, r.zone)
					occurrences = append(occurrences, window.Slot{Start: start, End: start.Add(r.Length)})
				}
			}
		}
		within := func(at time.Time, slots []window.Slot) (n int) {
			for _, s := range slots {
				if !at.Before(s.Start) && at.Before(s.End) {
					n++
				}
			}
			return n
		}
		for at := from; at.Before(to); at = at.Add(time.Minute) {
			want := within(at, occurrences) > 0
			if n := within(at, slots); n > 1 || (n == 1) != want {
				t.Fatalf("%s is in %d slots, want %t: %v", at, n, want, show(slots))
			}
		}
		for n, slot := range slots {
			if !slot.Start.Before(slot.End) || n > 0 && !slot.Start.After(slots[n-1].End) {
				t.Fatalf("slots are not apart: %s", show(slots))
			}
			if slot.Start.Before(from) || slot.End.After(to) {
				t.Fatalf("a slot is out of bounds: %s", show(slots))
			}
		}

		// Contains and Next agree with Slots; Next never goes back.
		a := from.Add(time.Duration(rapid.IntRange(0, 80*60).Draw(t, "a")) * time.Minute)
		b := a.Add(time.Duration(rapid.IntRange(0, 80*60).Draw(t, "b")) * time.Minute)
		for _, at := range []time.Time{a, b} {
			if at.Before(to) && s.Contains(at) != (within(at, slots) == 1) {
				t.Fatalf("contains %s: %t; %s", at, s.Contains(at), show(slots))
			}
		}
		nextA, okA := s.Next(a)
		nextB, okB := s.Next(b)
		if okB && !okA || okA && okB && (nextB.Start.Before(nextA.Start) || nextB.End.Before(nextA.End)) {
			t.Fatalf("next of %s is %v, of %s %v", a, nextA, b, nextB)
		}
		if okA && (nextA.Start.Before(a) || !s.Contains(nextA.Start) || !s.Contains(nextA.End.Add(-1)) || nextA.Start.After(a) && s.Contains(a)) {
			t.Fatalf("next of %s is %v", a, nextA)
		}

		// Work is in one slot, and could not be earlier.
		need := time.Duration(rapid.IntRange(0, 40*60).Draw(t, "need")) * time.Minute
		at, ok := s.Slot(need, a, b)
		holds := func(at time.Time) bool {
			return !at.Add(need).After(b) && slices.ContainsFunc(s.Slots(a, b), func(slot window.Slot) bool { return slot.Holds(at, need) })
		}
		for earlier := a; earlier.Before(b) && (!ok || earlier.Before(at)); earlier = earlier.Add(time.Minute) {
			if holds(earlier) {
				t.Fatalf("%s for %s could have begun at %s, not %s", need, b, earlier, at)
			}
		}
		if ok && !holds(at) {
			t.Fatalf("%s at %s does not fit: %s", need, at, show(s.Slots(a, b)))
		}
	})
}
