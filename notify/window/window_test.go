package window_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/notify/window"
)

const hour = time.Hour

func daily(zone string, at string, length time.Duration) maint.Window {
	clock, _ := time.Parse("15:04", at)
	return maint.Window{
		Rule: fmt.Sprintf("FREQ=DAILY;BYHOUR=%d;BYMINUTE=%d", clock.Hour(), clock.Minute()),
		Zone: zone, Length: length,
	}
}

func must(t testing.TB, windows ...maint.Window) window.Schedule {
	t.Helper()
	s, err := window.Parse(windows...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func utc(s string) time.Time {
	t, err := time.Parse("2006-01-02 15:04", s)
	if err != nil {
		panic(err)
	}
	return t
}

// show writes slots down in UTC and in the window's zone: "00:30-02:30 (01:30-04:30)".
func show(slots []window.Slot) string {
	var all []string
	for _, s := range slots {
		const f = "01-02 15:04"
		all = append(all, fmt.Sprintf("%s-%s (%s-%s)",
			s.Start.UTC().Format(f), s.End.UTC().Format(f), s.Start.Format(f), s.End.Format(f)))
	}
	return strings.Join(all, ", ")
}

func TestClockChanges(t *testing.T) {
	for _, c := range []struct {
		name, zone, at string
		length         time.Duration
		from, to       string // UTC
		want           string
	}{
		{"Berlin in spring, before the gap", "Europe/Berlin", "01:30", 2 * hour, "2026-03-28 12:00", "2026-03-29 12:00",
			"03-29 00:30-03-29 02:30 (03-29 01:30-03-29 04:30)"},
		{"Berlin in spring, in the gap", "Europe/Berlin", "02:30", 2 * hour, "2026-03-28 12:00", "2026-03-29 12:00",
			"03-29 01:00-03-29 03:00 (03-29 03:00-03-29 05:00)"},
		{"Berlin in spring, after the gap", "Europe/Berlin", "03:00", 2 * hour, "2026-03-28 12:00", "2026-03-29 12:00",
			"03-29 01:00-03-29 03:00 (03-29 03:00-03-29 05:00)"},
		{"Berlin in autumn, shown twice", "Europe/Berlin", "02:30", 2 * hour, "2026-10-24 12:00", "2026-10-25 12:00",
			"10-25 00:30-10-25 02:30 (10-25 02:30-10-25 03:30)"},
		{"Berlin in autumn, after it", "Europe/Berlin", "03:00", 2 * hour, "2026-10-24 12:00", "2026-10-25 12:00",
			"10-25 02:00-10-25 04:00 (10-25 03:00-10-25 05:00)"},
		{"Berlin over midnight and the gap", "Europe/Berlin", "23:00", 5 * hour, "2026-03-28 12:00", "2026-03-29 12:00",
			"03-28 22:00-03-29 03:00 (03-28 23:00-03-29 05:00)"},
		{"London in autumn, where the offset becomes 0", "Europe/London", "01:30", 2 * hour, "2026-10-24 12:00", "2026-10-25 12:00",
			"10-25 00:30-10-25 02:30 (10-25 01:30-10-25 02:30)"},
		{"New York in spring", "America/New_York", "02:00", 3 * hour, "2026-03-07 20:00", "2026-03-08 20:00",
			"03-08 07:00-03-08 10:00 (03-08 03:00-03-08 06:00)"},
		{"New York in autumn", "America/New_York", "01:00", 2 * hour, "2026-10-31 20:00", "2026-11-01 20:00",
			"11-01 05:00-11-01 07:00 (11-01 01:00-11-01 02:00)"},
		{"New York at midnight in autumn", "America/New_York", "00:00", 2 * hour, "2026-10-31 20:00", "2026-11-01 20:00",
			"11-01 04:00-11-01 06:00 (11-01 00:00-11-01 01:00)"},
		{"Lord Howe in spring, in the 30 minutes", "Australia/Lord_Howe", "02:15", 2 * hour, "2026-10-03 06:00", "2026-10-04 06:00",
			"10-03 15:30-10-03 17:30 (10-04 02:30-10-04 04:30)"},
		{"Lord Howe in autumn, shown twice", "Australia/Lord_Howe", "01:45", 2 * hour, "2026-04-04 06:00", "2026-04-05 06:00",
			"04-04 14:45-04-04 16:45 (04-05 01:45-04-05 03:15)"},
		{"Kolkata has no changes", "Asia/Kolkata", "02:30", 2 * hour, "2026-03-28 12:00", "2026-03-29 12:00",
			"03-28 21:00-03-28 23:00 (03-29 02:30-03-29 04:30)"},
		{"Santiago's midnight does not exist", "America/Santiago", "00:00", 2 * hour, "2026-09-05 12:00", "2026-09-06 12:00",
			"09-06 04:00-09-06 06:00 (09-06 01:00-09-06 03:00)"},
		{"Santiago's last hour comes twice", "America/Santiago", "23:30", 2 * hour, "2026-04-04 12:00", "2026-04-05 12:00",
			"04-05 02:30-04-05 04:30 (04-04 23:30-04-05 00:30)"},
		{"Santiago's midnight after that hour", "America/Santiago", "00:00", 2 * hour, "2026-04-04 12:00", "2026-04-05 12:00",
			"04-05 04:00-04-05 06:00 (04-05 00:00-04-05 02:00)"},
		{"Cairo's midnight does not exist", "Africa/Cairo", "00:30", 2 * hour, "2026-04-23 12:00", "2026-04-24 12:00",
			"04-23 22:00-04-24 00:00 (04-24 01:00-04-24 03:00)"},
		{"Nuuk's gap ends at midnight", "America/Nuuk", "23:30", 2 * hour, "2026-03-28 12:00", "2026-03-29 12:00",
			"03-29 01:00-03-29 03:00 (03-29 00:00-03-29 02:00)"},
		{"Apia skips a day: its start comes with the next day", "Pacific/Apia", "02:00", 3 * hour, "2011-12-29 20:00", "2011-12-31 00:00",
			"12-30 10:00-12-30 15:00 (12-31 00:00-12-31 05:00)"},
		{"leap day, over midnight", "Europe/Berlin", "22:00", 4 * hour, "2028-02-28 23:00", "2028-02-29 23:30",
			"02-28 23:00-02-29 01:00 (02-29 00:00-02-29 02:00), 02-29 21:00-02-29 23:30 (02-29 22:00-03-01 00:30)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := must(t, daily(c.zone, c.at, c.length))
			if got := show(s.Slots(utc(c.from), utc(c.to))); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

func TestRules(t *testing.T) {
	for _, c := range []struct {
		rule, from, except string // except: dates with commas
		want               string // UTC, the first days after 2027-12-30 that it begins on
	}{
		{"FREQ=WEEKLY;BYDAY=SA,SU;BYHOUR=2", "", "", "01-01 01-02 01-08 01-09"},
		{"rrule:freq=weekly;byday=sa,su;byhour=2", "", "", "01-01 01-02 01-08 01-09"},
		{"FREQ=WEEKLY;BYDAY=SA,SU;BYHOUR=2", "", "2028-01-02,2028-01-08", "01-01 01-09 01-15 01-16"},
		{"FREQ=WEEKLY;BYDAY=SA,SU;BYHOUR=2", "2028-01-09", "", "01-09 01-15 01-16 01-22"},
		{"FREQ=WEEKLY;INTERVAL=2;BYDAY=MO,SU;BYHOUR=2", "2027-12-20", "", "01-03 01-09 01-17 01-23"},
		// RFC 5545, 3.3.10: the start of the week makes a difference.
		{"FREQ=WEEKLY;INTERVAL=2;BYDAY=MO,SU;BYHOUR=2", "2027-12-26", "", "01-03 01-09 01-17 01-23"},
		{"FREQ=WEEKLY;INTERVAL=2;BYDAY=MO,SU;BYHOUR=2;WKST=SU", "2027-12-26", "", "01-09 01-10 01-23 01-24"},
		{"FREQ=WEEKLY;BYDAY=MO,TU,WE;BYSETPOS=-1;BYHOUR=2", "", "", "01-05 01-12 01-19 01-26"},
		{"FREQ=WEEKLY;BYDAY=MO,FR;BYSETPOS=1;BYHOUR=2", "", "", "01-03 01-10 01-17 01-24"},
		{"FREQ=DAILY;INTERVAL=10;BYHOUR=2", "2027-12-25", "", "01-04 01-14 01-24 02-03"},
		{"FREQ=DAILY;BYMONTH=2;BYHOUR=2", "", "", "02-01 02-02 02-03 02-04"},
		{"FREQ=MONTHLY;BYDAY=2TU;BYHOUR=2", "", "", "01-11 02-08 03-14 04-11"},
		{"FREQ=MONTHLY;BYDAY=-1FR;BYHOUR=2", "", "", "12-31 01-28 02-25 03-31"},
		{"FREQ=MONTHLY;BYMONTHDAY=-1;BYHOUR=2", "", "", "12-31 01-31 02-29 03-31"},
		{"FREQ=MONTHLY;BYMONTHDAY=31;BYHOUR=2", "", "", "12-31 01-31 03-31 05-31"},
		{"FREQ=MONTHLY;INTERVAL=5;BYMONTHDAY=3;BYHOUR=2", "2027-11-30", "", "04-03 09-03 02-03 07-03"},
		{"FREQ=MONTHLY;BYDAY=MO,TU,WE,TH,FR;BYSETPOS=1;BYHOUR=2", "", "", "01-03 02-01 03-01 04-03"},
		{"FREQ=MONTHLY;BYDAY=MO,TU,WE,TH,FR;BYSETPOS=-1;BYHOUR=2", "2028-01-15", "", "01-31 02-29 03-31 04-28"},
		{"FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=29;BYHOUR=2", "", "", "02-29 02-29 02-29 02-29"},
		{"FREQ=YEARLY;BYYEARDAY=-1;BYHOUR=2", "", "", "12-31 12-31 12-31 12-31"},
		{"FREQ=YEARLY;INTERVAL=2;BYMONTH=6;BYDAY=1SA;BYHOUR=2", "2026-01-01", "", "06-03 06-01 06-05 06-03"},
		{"FREQ=DAILY;BYHOUR=2;UNTIL=20280101", "", "", "12-31 01-01"},
		{"FREQ=DAILY;BYHOUR=2;UNTIL=20280101T020000", "", "", "12-31 01-01"},
		{"FREQ=DAILY;BYHOUR=2;UNTIL=20280101T015959Z", "", "", "12-31"},
	} {
		w := maint.Window{Rule: c.rule, Zone: "UTC", Length: 2 * hour, From: c.from}
		if c.except != "" {
			w.Except = strings.Split(c.except, ",")
		}
		s := must(t, w)
		var days []string
		for at := utc("2027-12-30 12:00"); len(days) < 4; {
			slot, ok := s.Next(at)
			if !ok {
				break
			}
			days = append(days, slot.Start.Format("01-02"))
			at = slot.End
		}
		if got := strings.Join(days, " "); got != c.want {
			t.Errorf("%s from %q except %q: got %s, want %s", c.rule, c.from, c.except, got, c.want)
		}
	}
}

// UNTIL as a time of day that the clock shows twice means the first.
func TestUntilInTheZone(t *testing.T) {
	for until, days := range map[string]int{
		"20261025T023000":  3, // 02:30 is shown twice
		"20261025T022959":  2,
		"20261025T003000Z": 3,
		"20261025T002959Z": 2,
		"20261024":         2,
		"20261025":         3,
	} {
		w := daily("Europe/Berlin", "02:30", 2*hour)
		w.Rule += ";UNTIL=" + until
		if got := must(t, w).Slots(utc("2026-10-22 12:00"), utc("2026-11-01 12:00")); len(got) != days {
			t.Errorf("UNTIL=%s: %s", until, show(got))
		}
	}
}

// Dates are the rule's, by the zone's calendar, not UTC's.
func TestExceptions(t *testing.T) {
	from, to := utc("2026-12-23 14:00"), utc("2026-12-25 14:00")
	for except, want := range map[string]string{
		"":           "12-23 17:00-12-23 21:00 (12-24 06:00-12-24 10:00), 12-24 17:00-12-24 21:00 (12-25 06:00-12-25 10:00)",
		"2026-12-24": "12-24 17:00-12-24 21:00 (12-25 06:00-12-25 10:00)",
	} {
		w := daily("Pacific/Auckland", "06:00", 4*hour)
		if except != "" {
			w.Except = []string{except}
		}
		if got := show(must(t, w).Slots(from, to)); got != want {
			t.Errorf("except %q: %s", except, got)
		}
	}
	// What goes on past midnight is not cut off by the next day's exception, and
	// a start that the gap moves to the next day keeps its date.
	w := daily("America/Nuuk", "23:30", 4*hour)
	w.Except = []string{"2026-03-29"}
	want := "03-28 01:30-03-28 05:30 (03-27 23:30-03-28 03:30), 03-29 01:00-03-29 05:00 (03-29 00:00-03-29 04:00)"
	if got := show(must(t, w).Slots(utc("2026-03-27 12:00"), utc("2026-03-30 12:00"))); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestWindowsAddUp(t *testing.T) {
	s := must(t,
		daily("Europe/Berlin", "01:00", 2*hour),    // 00:00-02:00
		daily("UTC", "01:30", 2*hour),              // overlaps
		daily("UTC", "03:30", 3*hour),              // touches
		daily("America/New_York", "12:00", 2*hour)) // 17:00-19:00
	want := "01-10 00:00-01-10 06:30 (01-10 01:00-01-10 07:30), 01-10 17:00-01-10 19:00 (01-10 12:00-01-10 14:00)"
	if got := show(s.Slots(utc("2026-01-09 20:00"), utc("2026-01-10 20:00"))); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestSlot(t *testing.T) {
	s := must(t, daily("UTC", "02:00", 2*hour), daily("UTC", "12:00", 4*hour))
	for _, c := range []struct {
		need           time.Duration
		from, deadline string
		want           string // "" is none
	}{
		{hour, "2026-01-01 00:00", "2026-01-02 00:00", "2026-01-01 02:00"},
		{2 * hour, "2026-01-01 00:00", "2026-01-02 00:00", "2026-01-01 02:00"},
		{2*hour + 1, "2026-01-01 00:00", "2026-01-02 00:00", "2026-01-01 12:00"},
		{hour, "2026-01-01 03:00", "2026-01-02 00:00", "2026-01-01 03:00"},
		{hour, "2026-01-01 03:01", "2026-01-02 00:00", "2026-01-01 12:00"},
		{hour, "2026-01-01 05:00", "2026-01-01 12:59", ""},
		{hour, "2026-01-01 05:00", "2026-01-01 13:00", "2026-01-01 12:00"},
		{5 * hour, "2026-01-01 05:00", "2026-02-01 13:00", ""},
		{0, "2026-01-01 04:00", "2026-01-01 12:00", ""},
		{hour, "2026-01-02 00:00", "2026-01-01 00:00", ""},
	} {
		got, ok := s.Slot(c.need, utc(c.from), utc(c.deadline))
		if want := c.want != ""; ok != want || ok && !got.Equal(utc(c.want)) {
			t.Errorf("%v: got %s, %t", c, got, ok)
		}
	}
}

func TestNoWindowsIsAnyTime(t *testing.T) {
	s := must(t)
	from, to := utc("2026-01-01 00:00"), utc("2026-02-01 00:00")
	if slots := s.Slots(from, to); len(slots) != 1 || slots[0] != (window.Slot{Start: from, End: to}) {
		t.Error(show(slots))
	}
	if !s.Contains(from) {
		t.Error("some time is out")
	}
	if slot, ok := s.Next(from); !ok || !slot.Start.Equal(from) || slot.End.Sub(from) != window.Horizon {
		t.Errorf("next is %v, %t", slot, ok)
	}
	if at, ok := s.Slot(hour, from, to); !ok || !at.Equal(from) {
		t.Errorf("slot at %s, %t", at, ok)
	}
}

func TestNextWithoutEnd(t *testing.T) {
	s := must(t, daily("Europe/Berlin", "02:00", 26*hour))
	at := utc("2026-01-01 00:00")
	if slot, ok := s.Next(at); !ok || !slot.Start.Equal(at) || slot.End.Sub(at) != window.Horizon {
		t.Errorf("got %v, %t", slot, ok)
	}
	ended := daily("Europe/Berlin", "02:00", 2*hour)
	ended.Rule += ";UNTIL=20251231"
	if slot, ok := must(t, ended).Next(at); ok {
		t.Errorf("got %v from a window that has ended", slot)
	}
}

func TestRefuses(t *testing.T) {
	good := maint.Window{Rule: "FREQ=WEEKLY;BYDAY=SA;BYHOUR=2", Zone: "Europe/Berlin", Length: 2 * hour}
	with := func(change func(*maint.Window)) maint.Window {
		w := good
		change(&w)
		return w
	}
	rule := func(r string) maint.Window { return with(func(w *maint.Window) { w.Rule = r }) }
	zone := func(z string) maint.Window { return with(func(w *maint.Window) { w.Zone = z }) }
	for _, c := range []struct {
		w    maint.Window
		want string // in the error
	}{
		{rule(""), "cannot be read"},
		{rule("every saturday"), "cannot be read"},
		{rule("BYDAY=SA;BYHOUR=2"), "FREQ is required"},
		{rule("FREQ=FORTNIGHTLY;BYHOUR=2"), "undefined frequency"},
		{rule("FREQ=WEEKLY;FREQ=DAILY;BYHOUR=2"), "FREQ twice"},
		{rule("FREQ=WEEKLY;BYDAY=XX;BYHOUR=2"), "undefined weekday"},
		{rule("FREQ=WEEKLY;BYDAY=SA;BYHOUR=24"), "byhour must be between"},
		{rule("FREQ=WEEKLY;BYDAY=SA;BYHOUR=2;BYMINUTE=60"), "byminute must be between"},
		{rule("FREQ=WEEKLY;BYDAY=SA;BYHOUR=2;X=1"), "unknown RRULE property"},
		{rule("FREQ=WEEKLY;BYDAY=SA;BYHOUR=2;"), "cannot be read"},
		{rule("FREQ=WEEKLY;BYDAY=SA"), "gives no hour (add BYHOUR)"},
		{rule("FREQ=WEEKLY;BYHOUR=2"), "no day of the week (add BYDAY)"},
		{rule("FREQ=MONTHLY;BYHOUR=2"), "no day of the month"},
		{rule("FREQ=YEARLY;BYMONTH=2;BYHOUR=2"), "no day of the year"},
		{rule("FREQ=HOURLY"), "FREQ=HOURLY is too often"},
		{rule("FREQ=MINUTELY;BYHOUR=2"), "FREQ=MINUTELY is too often"},
		{rule("FREQ=SECONDLY"), "FREQ=SECONDLY is too often"},
		{rule("FREQ=DAILY;BYHOUR=2;COUNT=3"), "COUNT ends a window"},
		{rule("DTSTART=20260101T000000;FREQ=DAILY;BYHOUR=2"), "has a DTSTART"},
		{rule("DTSTART:20260101T000000\nRRULE:FREQ=DAILY;BYHOUR=2"), "one rule and no more"},
		{rule("FREQ=DAILY;BYHOUR=2;BYSECOND=7"), "full minute"},
		{rule("FREQ=YEARLY;BYWEEKNO=20;BYDAY=SA;BYHOUR=2"), "BYWEEKNO is not supported"},
		{rule("FREQ=YEARLY;BYEASTER=1;BYHOUR=2"), "BYEASTER is not in RFC 5545"},
		{rule("FREQ=DAILY;INTERVAL=2;BYHOUR=2"), "no day to count from"},
		{rule("FREQ=DAILY;INTERVAL=0;BYHOUR=2"), "INTERVAL is not between"},
		{rule("FREQ=DAILY;INTERVAL=1000000000;BYHOUR=2"), "INTERVAL is not between"},
		{rule("FREQ=DAILY;BYHOUR=2,3,4;BYMINUTE=1,2,3,4,5,6,7,8,9"), "more than 24 times a day"},
		{rule("FREQ=WEEKLY;BYDAY=SA;BYHOUR=2;BYSETPOS=367"), "bysetpos must be between"},
		{rule("FREQ=WEEKLY;BYDAY=SA;BYHOUR=2;BYSETPOS=1,2,3,4,5,6,7,8"), "more than 7 positions"},
		{rule("FREQ=WEEKLY;BYDAY=SA;BYHOUR=2;BYMONTHDAY=3"), "RFC 5545 allows no days"},
		{rule("FREQ=MONTHLY;BYDAY=SA;BYHOUR=2;BYYEARDAY=3"), "RFC 5545 allows no days"},
		{rule("FREQ=WEEKLY;BYDAY=2SA;BYHOUR=2"), "cannot number days"},
		{rule("FREQ=MONTHLY;BYDAY=-10MO;BYHOUR=2"), "there is no BYDAY=-10MO"},
		{rule("FREQ=MONTHLY;BYDAY=53MO;BYMONTH=12;BYHOUR=2"), "there is no BYDAY=53MO"},
		{rule("FREQ=MONTHLY;BYDAY=MO,2TU;BYHOUR=2"), "with a number and without"},
		{rule("FREQ=DAILY;BYHOUR=2;UNTIL=tomorrow"), "cannot be read"},
		{rule("FREQ=DAILY;BYHOUR=2;UNTIL=20261301"), "cannot be read"},
		{rule("FREQ=MONTHLY;BYMONTH=2;BYMONTHDAY=30;BYHOUR=2"), "never occurs"},
		{rule("FREQ=DAILY;BYMONTH=2;BYMONTHDAY=30;BYHOUR=2"), "never occurs"},
		{rule("FREQ=MONTHLY;BYDAY=1SA;BYSETPOS=2;BYHOUR=2"), "never occurs"},
		{rule("FREQ=DAILY;BYHOUR=2;UNTIL=19691231"), "never occurs"},
		{rule("FREQ=DAILY;BYHOUR=" + strings.Repeat("2,", 200) + "2"), "more than 256 characters"},
		{zone(""), "no time zone"},
		{zone("Local"), "no time zone"},
		{zone("localtime"), "no time zone"},
		{zone("right/Europe/Berlin"), "no time zone"},
		{zone("Europe/Bielefeld"), `"Europe/Bielefeld" is no time zone`},
		{zone("../../etc/passwd"), "no time zone"},
		{zone("/etc/localtime"), "no time zone"},
		{with(func(w *maint.Window) { w.Length = 2*hour - 1 }), "1h59m59.999999999s is not between"},
		{with(func(w *maint.Window) { w.Length = -hour }), "is not between"},
		{with(func(w *maint.Window) { w.Length = 169 * hour }), "is not between"},
		{with(func(w *maint.Window) { w.Except = []string{"2026-12-24", "24.12.2026"} }), `"24.12.2026" is no date`},
		{with(func(w *maint.Window) { w.Except = []string{"2027-02-29"} }), `"2027-02-29" is no date`},
		{with(func(w *maint.Window) { w.Except = make([]string, 1000) }), "1000 dates are more than"},
		{with(func(w *maint.Window) { w.From = "soon" }), `"soon" is no date`},
		{with(func(w *maint.Window) { w.From = "9998-01-01" }), "is no date"},
		{with(func(w *maint.Window) {
			w.Rule, w.From, w.Except = "FREQ=DAILY;BYHOUR=2;UNTIL=20260102", "2026-01-01", []string{"2026-01-01", "2026-01-02"}
		}), "never occurs"},
	} {
		_, err := window.Parse(good, c.w)
		var p *maint.Problem
		if !errors.As(err, &p) || p.Code != maint.CodeBadRequest || !strings.Contains(p.Error(), c.want) || !strings.HasPrefix(p.Subject, "window 2, ") {
			t.Errorf("%.80v: got %v, want %q", c.w, err, c.want)
		}
	}
	if _, err := window.Parse(make([]maint.Window, 100)...); err == nil || !strings.Contains(err.Error(), "100 are more than 32") {
		t.Errorf("a hundred windows: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"FREQ=WEEKLY;BYDAY=SA,SU;BYHOUR=2;BYMINUTE=0", "FREQ=YEARLY;BYDAY=53MO;BYHOUR=2", "FREQ=MONTHLY;BYDAY=-5FR;BYHOUR=2",
		"FREQ=YEARLY;BYYEARDAY=366,-366;BYHOUR=0,23", "FREQ=DAILY;INTERVAL=366;BYHOUR=2;UNTIL=20300101", "FREQ=WEEKLY;BYDAY=MO;BYSETPOS=-366;BYHOUR=1",
	} {
		f.Add(s, "Europe/Berlin", "2026-01-01")
	}
	f.Fuzz(func(t *testing.T, rule, zone, day string) {
		s, err := window.Parse(maint.Window{Rule: rule, Zone: zone, Length: 2 * hour, From: day, Except: []string{"2026-12-24"}})
		if err != nil {
			return
		}
		at := utc("2026-01-01 00:00")
		if slot, ok := s.Next(at); ok && (slot.Start.Before(at) || !slot.Start.Before(slot.End) || !s.Contains(slot.Start)) {
			t.Errorf("%q in %q: next is %v", rule, zone, slot)
		}
	})
}
