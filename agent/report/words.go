package report

import (
	"cmp"
	"fmt"
	"strings"
	"time"
	"unicode"

	"belay/agent/maint"
)

// Span writes a duration for people: three digits are enough.
func Span(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	}
	return d.Round(100 * time.Microsecond).String()
}

// Fine writes a duration to the tenth of a millisecond, below that to the
// microsecond.
func Fine(d time.Duration) string {
	if d.Abs() < time.Millisecond {
		return d.Round(time.Microsecond).String()
	}
	return d.Round(100 * time.Microsecond).String()
}

// Bytes writes a number of bytes for people.
func Bytes(n uint64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%d KiB", n>>10)
}

// Offset writes a clock's offset with its error bar.
func Offset(o *maint.ClockOffset) string {
	if o == nil {
		return "-"
	}
	return fmt.Sprintf("%s ± %s", Fine(o.Offset), Fine(o.Error))
}

// Felt says how a guest stood still.
func Felt(g maint.GuestReport) string {
	s := g.Felt
	switch {
	case s == nil:
		return "-"
	case s.Times == 0:
		return "nothing"
	case !s.Known():
		return kind(*s) + ", not measured"
	}
	text := kind(*s) + " " + Span(s.Longest)
	if s.AtMost {
		text = kind(*s) + " ≤ " + Span(s.Longest)
	}
	if s.Times > 1 {
		text += fmt.Sprintf(", the longest of %d", s.Times)
	}
	return text
}

func kind(s maint.Standstill) string {
	if s.Blackout {
		return "blackout"
	}
	return "pause"
}

// AgainstExpected says what was predicted of a guest's standstill, and how that holds.
func AgainstExpected(g maint.GuestReport) string {
	e := g.Expected
	if e == nil {
		return "-"
	}
	text := "about " + Span(e.Typical)
	if e.High > 0 {
		text += fmt.Sprintf(" (%s to %s)", Span(e.Low), Span(e.High))
	}
	if g.Felt == nil || !g.Felt.Known() || e.Typical <= 0 {
		return text
	}
	switch felt := g.Felt.Longest; {
	case e.High > 0 && felt > e.High:
		text += ", longer"
	case e.High > 0 && felt < e.Low:
		text += ", shorter"
	case e.High > 0:
		text += ", as expected"
	default:
		text += fmt.Sprintf(", was %.2g times that", float64(felt)/float64(e.Typical))
	}
	return text
}

// Limit says how long a guest was to stand still at most, and whether it did for longer.
func Limit(g maint.GuestReport) string {
	switch {
	case g.Limit == 0:
		return "-"
	case g.Felt != nil && !g.Felt.AtMost && g.Felt.Longest > g.Limit:
		return Span(g.Limit) + ", exceeded"
	}
	return Span(g.Limit)
}

// ClockBefore and ClockAfter say how a guest's clock was found, and left.
func ClockBefore(g maint.GuestReport) string {
	if g.Clock == nil {
		return "-"
	}
	return Offset(g.Clock.Before)
}

// ClockAfter is how it was left.
func ClockAfter(g maint.GuestReport) string {
	switch k := g.Clock; {
	case k == nil:
		return "-"
	case k.State == maint.ClockUnsynchronised:
		return string(k.State) + reason(k.Reason)
	case k.State == maint.ClockOff:
		return Offset(cmp.Or(k.After, k.Before)) + ", off" + reason(k.Reason)
	default:
		return Offset(cmp.Or(k.After, k.Before))
	}
}

// Ending says how an operation ended, or where it is.
func Ending(r maint.Report) string {
	switch {
	case r.State == maint.OpUndoing:
		return "going back: " + r.Step
	case r.State != maint.OpEnded:
		return "running: " + r.Step
	}
	return string(r.Outcome)
}

// Progress is how much of an operation is done; of is 0 where that is not known.
func Progress(op maint.Op) (done, of uint64) {
	part := func(left, all uint64) (uint64, uint64) { return all - min(left, all), all }
	switch p := op.Progress; {
	case len(op.Moves) > 0:
		for _, m := range op.Moves {
			if m.State == maint.MoveMoved {
				done++
			}
		}
		return done, uint64(len(op.Moves))
	case p == nil || op.State != maint.OpRunning:
		return 0, 0
	case p.DiskTotal > 0 && (p.MemoryTotal == 0 || p.Iteration == 0): // disks first
		return part(p.DiskLeft, p.DiskTotal)
	}
	return part(op.Progress.MemoryLeft, op.Progress.MemoryTotal)
}

// Plain is a text in which everything can be seen: what has no form of its own, or turns
// what follows around, is escaped as in JSON.
func Plain(text string) string {
	if strings.IndexFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		if unicode.IsPrint(r) {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}
