package report

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"

	"belay/agent/maint"
)

// Moment is how reports write times: UTC, to the millisecond.
const Moment = "2006-01-02 15:04:05.000"

// Markdown writes a report as CommonMark with GitHub's tables. All that comes from
// elsewhere, such as guests' names, is text in it.
func Markdown(w io.Writer, r maint.Report) error {
	m := &markdown{}
	m.line("# Operation %s on %s: %s", cell(string(r.Op)), cell(r.Host), cell(Ending(r)))
	m.line("")
	m.line("It %s. Asked for by %s%s.", cell(r.What), cell(r.By), cell(reason(r.Reason)))
	m.line("It began at %s UTC and took %s%s.", r.Started.UTC().Format(time.DateTime), Span(r.Took), soFar(r))
	if r.Resumed > 0 {
		m.line("It was taken up again %s after a restart of belayd.", count(uint64(r.Resumed), "time", "times"))
	}
	m.guests(r.Guests)
	m.list("Host", r.HostDone)
	m.problems(r)
	if len(r.Decisions) > 0 {
		m.heading("Decisions and remarks")
		for _, d := range r.Decisions {
			m.line("- %s", cell(Line(d)))
		}
	}
	if len(r.Timeline) > 0 {
		m.heading("Timeline (UTC)")
		m.table("time", "step", "what")
		for _, l := range r.Timeline {
			m.row(l.Time.UTC().Format(Moment), l.Step, l.Text)
		}
	}
	if len(r.Steps) > 0 {
		m.heading("Steps")
		m.table("step", "state", "took")
		for _, s := range r.Steps {
			m.row(s.Name, s.Status, StepTook(s))
		}
	}
	_, err := io.WriteString(w, m.String())
	return err
}

func soFar(r maint.Report) string {
	if r.Ended.IsZero() {
		return " so far"
	}
	return ""
}

// Line is a decision as one text.
func Line(l maint.ReportLine) string {
	switch {
	case l.Time.IsZero():
		return l.Text
	case l.Step == "":
		return l.Time.UTC().Format(Moment) + ": " + l.Text
	}
	return l.Time.UTC().Format(Moment) + ", " + l.Step + ": " + l.Text
}

// StepTook is how long a step took, "-" for one that has not ended.
func StepTook(s maint.StepReport) string {
	if s.Took == 0 {
		return "-"
	}
	return Span(s.Took)
}

type markdown struct{ strings.Builder }

func (m *markdown) line(format string, args ...any) { fmt.Fprintf(m, format+"\n", args...) }

func (m *markdown) heading(text string) { m.line("\n## %s\n", text) }

func (m *markdown) row(cells ...string) {
	for i := range cells {
		cells[i] = cell(cells[i])
	}
	m.line("| %s |", strings.Join(cells, " | "))
}

func (m *markdown) table(heads ...string) {
	m.row(heads...)
	m.line("|%s", strings.Repeat("---|", len(heads)))
}

func (m *markdown) list(heading string, items []string) {
	if len(items) == 0 {
		return
	}
	m.heading(heading)
	for _, text := range items {
		m.line("- %s", cell(text))
	}
}

func (m *markdown) guests(all []maint.GuestReport) {
	if len(all) == 0 {
		return
	}
	m.heading("Guests")
	m.table("guest", "what became of it", "felt", "expected", "limit", "clock was off by", "clock is off by")
	for _, g := range all {
		m.row(g.Guest, g.Fate, Felt(g), AgainstExpected(g), Limit(g), ClockBefore(g), ClockAfter(g))
	}
	first := true
	for _, g := range all {
		for _, text := range Remarks(g) {
			if first {
				m.line("")
				first = false
			}
			m.line("- %s", cell(g.Guest+": "+text))
		}
	}
}

// Remarks are what else there is to say of a guest.
func Remarks(g maint.GuestReport) []string {
	var all []string
	if g.SameBoot != nil && *g.SameBoot {
		all = append(all, "boot ID as before")
	}
	if g.SameBoot != nil && !*g.SameBoot {
		all = append(all, "its boot ID has changed: it was rebooted")
	}
	if g.Clock != nil && g.Clock.Stale > 0 {
		all = append(all, fmt.Sprintf("ran with a stale clock for %s ± %s", Fine(g.Clock.Stale), Fine(g.Clock.StaleError)))
	}
	all = append(all, g.Remarks...)
	for _, p := range g.Problems {
		all = append(all, p.Error())
	}
	return all
}

func (m *markdown) problems(r maint.Report) {
	var texts []string
	for _, p := range r.Problems {
		texts = append(texts, p.Error())
	}
	for _, s := range r.Steps {
		if s.Error != "" && len(r.Problems) == 0 {
			texts = append(texts, "step "+s.Name+": "+s.Error)
		}
	}
	m.list("Problems", texts)
}

// cell is a text as part of a line of Markdown, and as nothing else: no markup, no end of a
// cell or line, and nothing that a terminal obeys.
func cell(text string) string {
	var b strings.Builder
	all := []rune(Plain(text))
	for i, r := range all {
		switch {
		case strings.ContainsRune("\\`*|<>[]~&", r), r == '_' && !within(all, i):
			b.WriteByte('\\')
			b.WriteRune(r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// within reports whether a character has a letter or digit on both sides.
func within(all []rune, i int) bool {
	word := func(i int) bool {
		return i >= 0 && i < len(all) && (unicode.IsLetter(all[i]) || unicode.IsDigit(all[i]))
	}
	return word(i-1) && word(i+1)
}
