package window

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/teambition/rrule-go"

	"belay/agent/maint"
)

const (
	minLength   = 2 * time.Hour
	maxLength   = 7 * 24 * time.Hour
	maxWindows  = 32
	maxRule     = 256 // characters
	maxTimes    = 24  // a day
	maxPos      = 7
	maxInterval = 366
	maxExcept   = 366
)

// Nobody means dates outside of these, and the work to get there is bounded.
var (
	firstDay = time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC)
	lastDay  = time.Date(2299, 12, 31, 0, 0, 0, 0, time.UTC)
)

// cycles are years after which the calendar is the same again, weekdays too: the
// Gregorian one repeats itself every 400. rrule-go looks for occurrences up to the
// year 9999, which takes it a second for a rule that has none. So rules are
// evaluated that much later, in the last centuries that it knows.
const cycles = 19 * 400

// window is a maint.Window that was found good.
type window struct {
	rule   rrule.ROption // without an end; days and times on the wall clock
	from   time.Time     // first day on the wall clock
	until  time.Time     // the last moment that an occurrence begins; zero: for ever
	zone   *time.Location
	length time.Duration
	except map[time.Time]bool // days on the wall clock
}

// fault is what is wrong with a window.
type fault struct{ reason, remedy string }

func faultf(remedy, reason string, args ...any) *fault {
	return &fault{reason: fmt.Sprintf(reason, args...), remedy: remedy}
}

func (f *fault) about(n int, w maint.Window) error {
	return maint.Problemf(maint.CodeBadRequest, fmt.Sprintf("window %d, %.*q", n, maxRule, w.Rule), f.remedy, "%s", f.reason)
}

func parse(from maint.Window) (w window, f *fault) {
	w.length, w.from = from.Length, firstDay
	if w.length < minLength || w.length > maxLength {
		return w, faultf("", "a length of %s is not between %s and %s", w.length, minLength, maxLength)
	}
	if w.zone, f = parseZone(from.Zone); f != nil {
		return w, f
	}
	if from.From != "" {
		if w.from, f = parseDay(from.From); f != nil {
			return w, f
		}
	}
	if len(from.Except) > maxExcept {
		return w, faultf("leave out those that are over", "%d dates are more than %d", len(from.Except), maxExcept)
	}
	w.except = make(map[time.Time]bool, len(from.Except))
	for _, date := range from.Except {
		day, f := parseDay(date)
		if f != nil {
			return w, f
		}
		w.except[day] = true
	}
	if f := w.parseRule(from.Rule); f != nil {
		return w, f
	}
	if w.rule.Interval > 1 && from.From == "" {
		return w, faultf(`give the first day as "from"`, "its INTERVAL has no day to count from")
	}
	for range w.starts(time.Time{}) {
		return w, nil
	}
	return w, faultf("", "it never occurs")
}

func parseDay(s string) (time.Time, *fault) {
	day, err := time.Parse(time.DateOnly, s)
	if err != nil || day.Before(firstDay) || day.After(lastDay) {
		return day, faultf(`dates are like "2026-12-24"`, "%.32q is no date", s)
	}
	return day, nil
}

// parseZone refuses what means another zone on another host: "Local", and files
// that lie about in the host's copy of the database.
func parseZone(name string) (*time.Location, *fault) {
	const remedy = `zones are like "Europe/Berlin" or "UTC"`
	folder, _, _ := strings.Cut(name, "/")
	if slices.Contains([]string{"", "Local", "localtime", "posixrules", "posix", "right"}, folder) || len(name) > 64 {
		return nil, faultf(remedy, "%.64q is no time zone of the IANA database", name)
	}
	zone, err := time.LoadLocation(name)
	if err != nil {
		return nil, faultf(remedy, "%q is no time zone of the IANA database", name)
	}
	return zone, nil
}

// parseRule reads the rule once the zone and the first day are known.
func (w *window) parseRule(text string) *fault {
	text = strings.TrimPrefix(strings.ToUpper(strings.TrimSpace(text)), "RRULE:")
	if len(text) > maxRule {
		return faultf("make several windows of it", "the rule has more than %d characters", maxRule)
	}
	if strings.ContainsAny(text, ":\r\n") {
		return faultf(`give the first day as "from", and dates to leave out as "except"`, "the rule must be one rule and no more")
	}
	parts := make(map[string]string)
	for part := range strings.SplitSeq(text, ";") {
		key, value, _ := strings.Cut(part, "=")
		if _, twice := parts[key]; twice {
			return faultf("", "the rule has %s twice", key)
		}
		parts[key] = value
		if refused, known := unsupported[key]; known {
			return faultf(refused.remedy, "%s", refused.reason)
		}
	}
	o, err := rrule.StrToROption(text)
	if err == nil {
		_, err = rrule.NewRRule(*o) // which checks bounds
	}
	if err != nil {
		return faultf(`rules are like "FREQ=WEEKLY;BYDAY=SA,SU;BYHOUR=2;BYMINUTE=0"`, "the rule cannot be read: %s", err)
	}
	if f := checkRule(o, parts); f != nil {
		return f
	}
	if until, given := parts["UNTIL"]; given {
		if w.until, err = parseUntil(until, w.zone); err != nil {
			return faultf(`dates in rules are like "20261224"`, "%s", err)
		}
	}
	w.rule = *o
	w.rule.Until = time.Time{}
	w.rule.Interval = max(1, o.Interval)
	return nil
}

// unsupported are parts of rules, by what is wrong with them.
var unsupported = map[string]fault{
	"COUNT":    {"COUNT ends a window after some weeks, unnoticed", "end it on a date, with UNTIL"},
	"DTSTART":  {"the rule has a DTSTART", `give the first day as "from"`},
	"BYSECOND": {"a window begins at a full minute", "leave BYSECOND out"},
	"BYWEEKNO": {"BYWEEKNO is not supported", "give months with BYMONTH"},
	"BYEASTER": {"BYEASTER is not in RFC 5545", `give dates to leave out as "except"`},
}

// checkRule refuses what RFC 5545 forbids, what would have to come from a DTSTART,
// and what rrule-go does not stand.
func checkRule(o *rrule.ROption, parts map[string]string) *fault {
	has := func(key string) bool { return parts[key] != "" }
	numbered, plain, most := 0, 0, 5
	for _, day := range o.Byweekday {
		if n := max(day.N(), -day.N()); n > 0 {
			numbered = max(numbered, n)
		} else {
			plain++
		}
	}
	if o.Freq == rrule.YEARLY && !has("BYMONTH") {
		most = 53
	}
	switch {
	case o.Freq > rrule.DAILY:
		return faultf("use FREQ=DAILY with BYHOUR", "FREQ=%s is too often for windows of two hours and more", o.Freq)
	case has("INTERVAL") && (o.Interval < 1 || o.Interval > maxInterval):
		return faultf("", "INTERVAL is not between 1 and %d", maxInterval)
	case !has("BYHOUR"):
		return faultf("add BYHOUR", "the rule gives no hour")
	case len(o.Byhour)*max(1, len(o.Byminute)) > maxTimes:
		return faultf("windows that follow each other can be one longer window", "the rule gives more than %d times a day", maxTimes)
	case len(o.Bysetpos) > maxPos:
		return faultf("", "BYSETPOS has more than %d positions", maxPos)
	case o.Freq == rrule.WEEKLY && !has("BYDAY"):
		return faultf("add BYDAY", "the rule gives no day of the week")
	case o.Freq == rrule.MONTHLY && !has("BYDAY") && !has("BYMONTHDAY"):
		return faultf("add BYMONTHDAY or BYDAY", "the rule gives no day of the month")
	case o.Freq == rrule.YEARLY && !has("BYDAY") && !has("BYMONTHDAY") && !has("BYYEARDAY"):
		return faultf("add BYMONTH and BYMONTHDAY, BYDAY or BYYEARDAY", "the rule gives no day of the year")
	case o.Freq != rrule.YEARLY && has("BYYEARDAY"), o.Freq == rrule.WEEKLY && has("BYMONTHDAY"):
		return faultf("use another FREQ", "RFC 5545 allows no days of the month or the year in a rule that is %s", o.Freq)
	case numbered > 0 && o.Freq > rrule.MONTHLY:
		return faultf("use FREQ=MONTHLY", "a rule that is %s cannot number days, as in BYDAY=%s", o.Freq, parts["BYDAY"])
	case numbered > most:
		return faultf("", "there is no BYDAY=%s in what the rule counts in", parts["BYDAY"])
	case numbered > 0 && plain > 0:
		return faultf("make two windows of it", "BYDAY=%s has days with a number and without", parts["BYDAY"])
	}
	return nil
}

// parseUntil gives the last moment that is meant.
func parseUntil(s string, zone *time.Location) (time.Time, error) {
	if t, err := time.Parse("20060102T150405Z", s); err == nil {
		return t, nil
	}
	if wall, err := time.Parse("20060102T150405", s); err == nil {
		return moment(wall, zone), nil
	}
	day, err := time.Parse("20060102", s)
	if err != nil {
		return day, errors.New("UNTIL=" + s + " is no date or time")
	}
	return moment(day.AddDate(0, 0, 1), zone).Add(-1), nil
}

// starts are the moments at which occurrences begin, in order, some perhaps twice:
// all after a moment, and some before it.
func (w *window) starts(after time.Time) iter.Seq[time.Time] {
	return func(yield func(time.Time) bool) {
		// What begins later has a later time on the wall clock than it shows now.
		day := later(onWall(after, w.zone), w.from).Truncate(24 * time.Hour)
		rule := w.rule
		rule.Dtstart = w.period(day).AddDate(cycles, 0, 0)
		r, err := rrule.NewRRule(rule)
		if err != nil {
			return // parseRule has made one
		}
		next := r.Iterator()
		for wall, ok := next(); ok; wall, ok = next() {
			wall = wall.AddDate(-cycles, 0, 0)
			day := wall.Truncate(24 * time.Hour)
			if day.Before(w.from) || w.except[day] {
				continue
			}
			t := moment(wall, w.zone)
			if !w.until.IsZero() && t.After(w.until) || !yield(t) {
				return
			}
		}
	}
}

// period is the first day of the year, month, week or day that a day is in, or of an
// earlier one, so that the intervals since the first day come out even. The rule
// can be evaluated from there on, without all that was before.
func (w *window) period(day time.Time) time.Time {
	months := 12*(day.Year()-w.from.Year()) + int(day.Month()-w.from.Month())
	switch w.rule.Freq {
	case rrule.YEARLY:
		back := (day.Year() - w.from.Year()) % w.rule.Interval
		return time.Date(day.Year()-back, 1, 1, 0, 0, 0, 0, time.UTC)
	case rrule.MONTHLY:
		return time.Date(day.Year(), day.Month()-time.Month(months%w.rule.Interval), 1, 0, 0, 0, 0, time.UTC)
	}
	first, length := w.from, 1
	if w.rule.Freq == rrule.WEEKLY {
		length = 7
		// time.Weekday has Sunday as 0, rrule.Weekday has Monday.
		first = first.AddDate(0, 0, -(int(first.Weekday())+6-w.rule.Wkst.Day()+7)%7)
	}
	days := int(day.Sub(first) / (24 * time.Hour))
	return day.AddDate(0, 0, -(days % (length * w.rule.Interval)))
}
