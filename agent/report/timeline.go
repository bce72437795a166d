package report

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// lines are what happened, as it comes.
type lines []maint.ReportLine

func (l *lines) add(at time.Time, step, format string, args ...any) {
	*l = append(*l, maint.ReportLine{Time: at, Step: step, Text: fmt.Sprintf(format, args...)})
}

// inTime has lines in the order in which it happened.
func (l lines) inTime() []maint.ReportLine {
	slices.SortStableFunc(l, func(a, b maint.ReportLine) int { return a.Time.Compare(b.Time) })
	if l == nil {
		return []maint.ReportLine{}
	}
	return l
}

// timeline is what happened. What steps remarked is with the decisions.
func timeline(s Source) []maint.ReportLine {
	var l lines
	for _, r := range s.Records {
		l.record(s.Op, r)
	}
	l.felt(s.Op)
	if s.Op.Apply != nil {
		for _, part := range s.Parts {
			l.add(part.Started, "", "%s begins: it %s", part.ID, What(part))
			if !part.Ended.IsZero() {
				l.add(part.Ended, "", "%s has ended: %s", part.ID, part.Outcome)
			}
		}
	}
	for _, e := range s.Events {
		if e.Op == s.Op.ID {
			l.event(e)
		}
	}
	return l.inTime()
}

// record tells of one record.
func (l *lines) record(op maint.Op, r maint.Record) {
	switch r.Kind {
	case maint.RecAccepted:
		l.add(r.Time, "", "asked for by %s", op.By)
	case maint.RecResumed:
		l.add(r.Time, "", "taken up again after a restart of belayd")
	case maint.RecAbort:
		if r.Text == maint.AbortNow {
			l.add(r.Time, "", "%s asks for an abort, also of what runs", r.By)
		} else {
			l.add(r.Time, "", "%s asks for an abort", r.By)
		}
	case maint.RecStepStart:
		l.add(r.Time, r.Step, "begins")
	case maint.RecStepFailed:
		l.add(r.Time, r.Step, "failed: %s", r.Text)
	case maint.RecUndoStart:
		l.add(r.Time, r.Step, "is taken back")
	case maint.RecUndoDone:
		l.add(r.Time, r.Step, "has been taken back")
	case maint.RecUndoFailed:
		l.add(r.Time, r.Step, "could not be taken back: %s", r.Text)
	case maint.RecMove:
		var m maint.GuestMove
		if json.Unmarshal(r.Data, &m) == nil {
			l.add(r.Time, "", "guest %s: %s%s%s", m.Guest, moveFate(op.Kind, m), by(m), why(m.Problems))
		}
	case maint.RecLeash:
		var e maint.LeashEvent
		if json.Unmarshal(r.Data, &e) == nil && e.Kind != maint.LeashRenewed {
			at := r.Time // belayd fetches what the leash has noted when it is over
			if !e.Time.IsZero() {
				at = e.Time
			}
			l.add(at, "", "%s", leash(e))
		}
	case maint.RecEnded:
		l.add(r.Time, "", "ended: %s", op.Outcome)
	case maint.RecSeenTo:
		l.add(r.Time, "", "the guest's new host has told how it found it")
	}
}

func by(m maint.GuestMove) string {
	if m.Op == "" {
		return ""
	}
	return ", " + string(m.Op)
}

func why(ps []maint.Problem) string {
	if len(ps) == 0 {
		return ""
	}
	return ": " + ps[0].Error()
}

// leash says what the leash did.
func leash(e maint.LeashEvent) string {
	text := "the leash is " + e.Kind
	switch e.Kind {
	case maint.LeashFired:
		text = "the leash releases the guests by itself"
	case maint.LeashReleased:
		text = "the leash has released guest " + e.Guest
	case maint.LeashFailed:
		text = "the leash could not release guest " + e.Guest
	}
	if e.Way != "" {
		text += " by " + e.Way
	}
	if e.Text != "" {
		text += ": " + e.Text
	}
	return text
}

// felt tells when guests stood still, and what was done to the host meanwhile.
func (l *lines) felt(op maint.Op) {
	if m := op.Move; m != nil && !m.Stopped.IsZero() {
		l.add(m.Stopped, "", "guest %s stands still on %s", op.Guest, m.From)
		if m.Downtime > 0 { // its start is by the other host's clock
			l.add(m.Stopped.Add(m.Downtime), "", "it runs on %s, after %s", m.To, Span(m.Downtime))
		}
	}
	if op.Held == nil {
		return
	}
	for _, s := range hostSteps(op.Held) {
		l.add(s.run.Started, "", "%s begins", s.name)
		if !s.run.Ended.IsZero() {
			l.add(s.run.Ended, "", "%s has ended: %s", s.name, runText(*s.run))
		}
	}
	var paused []maint.HeldGuest
	for _, g := range op.Held.Guests {
		if !g.Paused.IsZero() {
			paused = append(paused, g)
		}
	}
	if len(paused) == 0 {
		return
	}
	first := slices.MinFunc(paused, func(a, b maint.HeldGuest) int { return a.Paused.Compare(b.Paused) })
	last := slices.MaxFunc(paused, func(a, b maint.HeldGuest) int { return a.Released.Compare(b.Released) })
	longest := slices.MaxFunc(paused, func(a, b maint.HeldGuest) int { return cmp.Compare(a.Pause, b.Pause) })
	l.add(first.Paused, "", "%s: vCPUs are stopped", count(uint64(len(paused)), "guest", "guests"))
	if !last.Released.IsZero() {
		l.add(last.Released, "", "all of them run; the longest pause was %s, of %s", Span(longest.Pause), longest.Guest)
	}
}

// event tells of what guests were told.
func (l *lines) event(e maint.ScheduledEvent) {
	names := make([]string, len(e.Guests))
	for i, g := range e.Guests {
		names[i] = g.Name
	}
	who := strings.Join(names, ", ")
	l.add(e.Announced, "", "told: %s, not before %s", who, e.NotBefore.UTC().Format(time.RFC3339))
	if a := e.Approval; a != nil {
		l.add(a.At, "", "%s approves for %s%s", a.By, who, reason(a.Reason))
	}
	if !e.Started.IsZero() {
		l.add(e.Started, "", "the event of %s has started", who)
	}
	if !e.Ended.IsZero() {
		l.add(e.Ended, "", "the event of %s is %s", who, e.State)
	}
}

func reason(s string) string {
	if s == "" {
		return ""
	}
	return ": " + s
}
