package maint

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Text is a plan for people.
func (p Plan) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "plan %.12s for host %s: %s (%s)\n", p.Hash, p.Host, p.Update.ID, p.Update.Urgency)
	if p.Update.Description != "" {
		fmt.Fprintf(&b, "%s\n", p.Update.Description)
	}
	if len(p.Update.Covers) > 0 {
		fmt.Fprintf(&b, "covers %s\n", strings.Join(p.Update.Covers, ", "))
	}
	b.WriteByte('\n')
	table(&b, func(row func(...string)) {
		row("CHANGE", "KIND", "BY")
		for _, c := range p.Changes {
			by := string(c.Rung)
			if c.Rung == "" {
				by = "none"
			} else if c.Rung == RungD {
				by = "D: no guest stays"
			}
			row(c.Change, string(c.Kind), by)
		}
	})
	for _, c := range p.Changes {
		refused(&b, c.Change, c.Refused)
	}
	if len(p.Guests) > 0 {
		b.WriteByte('\n')
		table(&b, func(row func(...string)) {
			row("GUEST", "RUNG", "LONGEST STANDSTILL", "BEGINS")
			for _, g := range p.Guests {
				row(g.Guest, g.rungText(), g.standstillText(), p.begin(g))
			}
		})
		p.notes(&b)
		for _, g := range p.Guests {
			refused(&b, g.Guest, g.Refused)
		}
	}
	if len(p.Off) > 0 {
		fmt.Fprintf(&b, "do not run, and feel nothing: %s\n", strings.Join(p.Off, ", "))
	}
	b.WriteByte('\n')
	for _, s := range p.Steps {
		fmt.Fprintf(&b, "%3d. %s", s.N, s.Text)
		if !s.At.IsZero() {
			fmt.Fprintf(&b, ", from %s", moment(s.At, p.Made))
		}
		if s.Expected > 0 {
			fmt.Fprintf(&b, ", about %s", s.Expected)
		}
		if s.Undo != "" {
			fmt.Fprintf(&b, "\n     undo: %s", s.Undo)
		}
		b.WriteByte('\n')
	}
	if len(p.Calibration) > 0 {
		b.WriteString("\npredictions so far:")
		for i, c := range p.Calibration {
			if i > 0 {
				b.WriteByte(';')
			}
			fmt.Fprintf(&b, " %s, %d of %d within their range, felt %.2f of what was predicted", rungOf(c), c.Within, c.Of, c.Ratio)
		}
		b.WriteByte('\n')
	}
	if len(p.Blockers) > 0 {
		b.WriteString("\nCannot be applied:\n")
		for _, why := range p.Blockers {
			problem(&b, "", why)
		}
	}
	return b.String()
}

func rungOf(c Calibration) string {
	if c.Method != "" {
		return string(c.Rung) + " " + string(c.Method)
	}
	return string(c.Rung)
}

// rungText is "B2", "C, then D to host-b".
func (g PlannedGuest) rungText() string {
	var feels []string
	for _, r := range g.Feels {
		feels = append(feels, string(r))
	}
	text := strings.Join(feels, "+")
	switch {
	case g.Rung == "":
		return "none"
	case g.Rung == RungA:
		return "A"
	case g.Rung == RungC:
		text = "C, then " + text
	}
	if g.Method != "" {
		text += " " + string(g.Method)
	}
	if g.To != "" {
		text += " to " + g.To
	}
	return text
}

// FeelsText is "pause 250ms (125ms to 500ms; assumed)", and "nothing".
func (g PlannedGuest) FeelsText() string {
	text := g.standstillText()
	if e := cmp.Or(g.Pause, g.Blackout); e != nil && g.Rung != "" {
		text = strings.TrimSuffix(text, ")") + "; " + e.From + ")"
	}
	return text
}

// standstillText is "2 pauses, 250ms (125ms to 500ms)", of which that is the longest.
func (g PlannedGuest) standstillText() string {
	what, e := "pause", g.Pause
	if e == nil {
		what, e = "blackout", g.Blackout
	}
	switch {
	case g.Rung == "":
		return "-"
	case e == nil:
		return "nothing"
	case g.Pauses > 1:
		what = fmt.Sprintf("%d %ss,", g.Pauses, what)
	}
	return fmt.Sprintf("%s %s (%s to %s)", what, round(e.Typical), round(e.Low), round(e.High))
}

// notes is what there is to say of guests beside, each once for all of whom it is true.
func (p Plan) notes(b *strings.Builder) {
	var texts []string
	of := make(map[string][]string)
	say := func(text string, g PlannedGuest) {
		if of[text] == nil {
			texts = append(texts, text)
		}
		of[text] = append(of[text], g.Guest)
	}
	for _, g := range p.Guests {
		if e := cmp.Or(g.Pause, g.Blackout); e != nil {
			say("predicted ("+e.From+")", g)
		}
		if g.Asked {
			say("begins earlier if its owner approves", g)
		}
		if g.Note != "" {
			say(g.Note, g)
		}
	}
	for _, text := range texts {
		line := "  " + text + ":"
		for i, name := range of[text] {
			if i < len(of[text])-1 {
				name += ","
			}
			if len(line)+len(" "+name) > planWidth {
				b.WriteString(line + "\n")
				line = "   "
			}
			line += " " + name
		}
		b.WriteString(line + "\n")
	}
}

// planWidth is how wide the table of a plan's guests is meant to be, with what is said
// beneath it: names that are longer than usual make it wider.
const planWidth = 100

// round leaves three figures.
func round(d time.Duration) time.Duration {
	unit := time.Duration(1)
	for d/unit >= 1000 {
		unit *= 10
	}
	return d.Round(unit)
}

// begins is when a guest feels it, also for whom it is not certain.
func (p Plan) begins(g PlannedGuest) string {
	if g.Asked && !g.Begin.IsZero() {
		return moment(g.Begin, p.Made) + ", or when its owner approves"
	}
	return p.begin(g)
}

func (p Plan) begin(g PlannedGuest) string {
	switch {
	case g.Begin.IsZero():
		return "-"
	case !g.Begin.After(p.Made):
		return "at once"
	}
	return moment(g.Begin, p.Made)
}

// moment is a time with how far ahead it is.
func moment(at, now time.Time) string {
	ahead := at.Sub(now).Round(time.Minute)
	text := fmt.Sprintf("%dm", ahead%time.Hour/time.Minute)
	switch days := ahead / (24 * time.Hour); {
	case days >= 2:
		text = fmt.Sprintf("%dd %dh", days, ahead%(24*time.Hour)/time.Hour)
	case ahead >= time.Hour:
		text = fmt.Sprintf("%dh ", ahead/time.Hour) + text
	}
	return fmt.Sprintf("%s (in %s)", at.UTC().Format("2006-01-02 15:04Z"), text)
}

func refused(b *strings.Builder, of string, all []RefusedRung) {
	for _, r := range all {
		for _, why := range r.Problems {
			problem(b, of+" not by "+string(r.Rung)+": ", why)
		}
	}
}

func problem(b *strings.Builder, lead string, p Problem) {
	subject := p.Subject
	if subject != "" {
		subject += ": "
	}
	fmt.Fprintf(b, "  %s%s%s\n", lead, subject, p.Reason)
	if p.Remedy != "" {
		fmt.Fprintf(b, "    → %s\n", p.Remedy)
	}
}

func table(b *strings.Builder, rows func(row func(...string))) {
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	rows(func(cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")) })
	_ = w.Flush() // into memory
	for line := range strings.Lines(text.String()) {
		b.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
}

// PlanDiff says what is otherwise in another plan, a line each; none: nothing but figures
// and times that a guest does not feel.
func PlanDiff(was, is Plan) (lines []string) {
	say := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	either := func(what string, a, b string) {
		if a != b {
			say("%s: was %s, is %s", what, a, b)
		}
	}
	either("host", was.Host, is.Host)
	either("update", was.Update.ID, is.Update.ID)
	either("urgency", string(was.Update.Urgency), string(is.Update.Urgency))
	changes := make(map[string]PlannedChange)
	for _, c := range was.Changes {
		changes[c.Change] = c
	}
	for _, c := range is.Changes {
		if old, there := changes[c.Change]; !there {
			say("change %s: is new, by %s", c.Change, orNone(c.Rung))
		} else {
			either("change "+c.Change, "by "+orNone(old.Rung), "by "+orNone(c.Rung))
		}
		delete(changes, c.Change)
	}
	for _, c := range was.Changes {
		if _, gone := changes[c.Change]; gone {
			say("change %s: is no more", c.Change)
		}
	}
	guests := make(map[string]PlannedGuest)
	for _, g := range was.Guests {
		guests[g.UUID] = g
	}
	for _, g := range is.Guests {
		old, there := guests[g.UUID]
		if !there {
			say("guest %s: is new: %s, %s", g.Guest, g.rungText(), g.FeelsText())
			continue
		}
		delete(guests, g.UUID)
		either("guest "+g.Guest, old.rungText(), g.rungText())
		if old.rungText() == g.rungText() && (g.Outlasts(old) || old.Outlasts(g)) {
			say("guest %s: felt %s, feels %s", g.Guest, old.FeelsText(), g.FeelsText())
		}
		if old.Asked != g.Asked || old.Begin.Sub(was.Made).Round(time.Minute) != g.Begin.Sub(is.Made).Round(time.Minute) {
			either("guest "+g.Guest+" begins", was.begins(old), is.begins(g))
		}
	}
	for _, g := range was.Guests {
		if _, gone := guests[g.UUID]; gone {
			say("guest %s: does not run here any more", g.Guest)
		}
	}
	texts := func(p Plan) (all []string) {
		for _, why := range p.Blockers {
			all = append(all, string(why.Code)+" "+why.Subject)
		}
		return all
	}
	before, now := texts(was), texts(is)
	for i, t := range now {
		if !slices.Contains(before, t) {
			say("blocked by: %s", is.Blockers[i].Error())
		}
	}
	for i, t := range before {
		if !slices.Contains(now, t) {
			say("blocked no more by: %s", was.Blockers[i].Error())
		}
	}
	return lines
}

func orNone(r Rung) string {
	if r == "" {
		return "none"
	}
	return string(r)
}
