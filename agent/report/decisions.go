package report

import (
	"fmt"
	"strings"
	"time"

	"belay/agent/maint"
)

// decisions are what was chosen, with the numbers that spoke for it, and what steps
// remarked: those of the whole operation first.
func decisions(s Source) []maint.ReportLine {
	whole, l := lines{}, lines{}
	op := s.Op
	say := func(format string, args ...any) { whole.add(time.Time{}, "", format, args...) }
	if op.Told {
		say("guests are told beforehand, and have their notice")
	}
	if why := emergency(op); why != "" {
		say("the notice is waived: %s", why)
	}
	switch {
	case op.Migrate != nil:
		r := op.Migrate
		say("the copy may end with a pause of %s, %s, %s", Span(r.MaxPause), bandwidth(r.BandwidthMiBs), allowed(r.Allow))
	case op.Hold != nil:
		say("guests stand still for %s at most", Span(op.Hold.MaxPause))
		for i, g := range op.Hold.Groups {
			say("released in place %d: %s", i+1, strings.Join(g, ", "))
		}
	case op.Drain != nil:
		say("%s, %s", bandwidth(op.Drain.BandwidthMiBs), allowed(op.Drain.Allow))
	case op.Apply != nil:
		planned(&whole, op.Apply.Plan)
	case op.Kexec != nil && op.Kexec.Append != "":
		say("command line: %s", op.Kexec.Append)
	}
	if v := op.Replaced; v != nil {
		for _, c := range v.Choices {
			say("%s", choice(c, v.Method))
		}
	}
	for _, m := range op.Moves {
		if m.State == maint.MoveLeft {
			say("guest %s, %s of memory: %s", m.Guest, Bytes(m.MemoryBytes), moveFate(op.Kind, m))
			continue
		}
		say("guest %s, %s of memory: %s", m.Guest, Bytes(m.MemoryBytes), place(op.Kind, m))
	}
	for _, r := range s.Records {
		if r.Kind == maint.RecStepNote && r.Text != "" {
			l.add(r.Time, r.Step, "%s", r.Text)
		}
	}
	return append(whole, l.inTime()...)
}

// planned are the decisions of a plan: by which rung each change, and each guest, and why not
// by one with less impact.
func planned(l *lines, p maint.Plan) {
	say := func(format string, args ...any) { l.add(time.Time{}, "", format, args...) }
	say("plan %.12s, made at %s, urgency %s", p.Hash, p.Made.UTC().Format(time.RFC3339), p.Update.Urgency)
	for _, c := range p.Changes {
		say("change %s (%s): rung %s%s", c.Change, c.Kind, c.Rung, refused(c.Refused))
	}
	for _, g := range p.Guests {
		text := string(g.Rung)
		if g.To != "" {
			text += " to " + g.To
		}
		if g.Method != "" {
			text += " by " + string(g.Method)
		}
		say("guest %s: rung %s%s", g.Guest, text, refused(g.Refused))
	}
}

// refused says why not by rungs with less impact.
func refused(rungs []maint.RefusedRung) string {
	var b strings.Builder
	for _, r := range rungs {
		fmt.Fprintf(&b, "; not %s%s", r.Rung, why(r.Problems))
	}
	return b.String()
}

// place is where a guest was sent.
func place(kind maint.OpKind, m maint.GuestMove) string {
	text := "to " + m.Peer
	if kind == maint.OpRestore {
		text = "from " + m.Peer
	}
	if m.Peer == "" {
		text = "no peer yet"
	}
	if len(m.AntiAffinity) > 0 {
		text += ", apart from others of " + strings.Join(m.AntiAffinity, ", ")
	}
	return text
}

// choice is the word on one method of replacing a QEMU.
func choice(c maint.VMMChoice, taken maint.VMMMethod) string {
	text := fmt.Sprintf("method %s: a pause of about %s, %s of memory beside", c.Method, Span(c.Pause), Bytes(c.MemoryBytes))
	switch {
	case len(c.Problems) > 0:
		return fmt.Sprintf("method %s is not possible%s", c.Method, why(c.Problems))
	case c.Method == taken:
		return text + "; taken"
	}
	return text
}

func bandwidth(mibs uint64) string {
	if mibs == 0 {
		return "bandwidth is not limited"
	}
	return fmt.Sprintf("bandwidth is limited to %d MiB/s", mibs)
}

func allowed(means []maint.Means) string {
	if len(means) == 0 {
		return "nothing more is allowed for one that does not come to its end"
	}
	words := make([]string, len(means))
	for i, m := range means {
		words[i] = string(m)
	}
	return "allowed for one that does not come to its end: " + strings.Join(words, ", ")
}

// emergency is why the notice was waived, "" where it was not.
func emergency(op maint.Op) string {
	switch {
	case op.Migrate != nil:
		return op.Migrate.Emergency
	case op.Hold != nil:
		return op.Hold.Emergency
	case op.Replace != nil:
		return op.Replace.Emergency
	case op.Drain != nil:
		return op.Drain.Emergency
	case op.Kexec != nil:
		return op.Kexec.Emergency
	}
	return ""
}
