package measure

import (
	"fmt"
	"io"
	"slices"
	"time"
)

// Range is how the values of several rounds lie.
type Range struct{ Min, Median, Max float64 }

// RangeOf returns the range of some values; zero for none. The median of an
// even number of values is the mean of the middle two.
func RangeOf[T ~int64 | ~uint64 | ~float64](values []T) Range {
	v := make([]float64, len(values))
	for i := range values {
		v[i] = float64(values[i])
	}
	slices.Sort(v)
	n := len(v)
	if n == 0 {
		return Range{}
	}
	return Range{Min: v[0], Median: (v[(n-1)/2] + v[n/2]) / 2, Max: v[n-1]}
}

// Median is that of RangeOf.
func Median[T ~int64 | ~uint64 | ~float64](values []T) T { return T(RangeOf(values).Median) }

// Summary is what the moves of one tool have in common. Times are in ns,
// memory in bytes.
type Summary struct {
	Tool                                string
	Rounds                              int
	Outage, Downtime, Total, Copy, Sent Range
}

// Summarise sums up one tool's moves among all.
func Summarise(tool string, moves []Move) Summary {
	var outage, downtime, total, copied []time.Duration
	var sent []uint64
	for _, m := range moves {
		if m.Tool != tool {
			continue
		}
		outage = append(outage, m.Outage)
		downtime = append(downtime, m.Downtime)
		total = append(total, m.Total)
		copied = append(copied, m.Copy)
		sent = append(sent, m.MemorySent)
	}
	return Summary{Tool: tool, Rounds: len(total),
		Outage: RangeOf(outage), Downtime: RangeOf(downtime), Total: RangeOf(total), Copy: RangeOf(copied), Sent: RangeOf(sent)}
}

// Agreement is how far reported blackouts are from measured ones.
type Agreement struct {
	Within, Of int           // how many are within 10 % or 5 ms, of how many
	Median     time.Duration // of reported less measured
}

// Agree compares what Belay has reported of its moves among all with what measured tells
// of each.
func Agree(moves []Move, measured func(Move) time.Duration) (a Agreement) {
	var off []time.Duration
	for _, m := range moves {
		if m.Op == nil {
			continue
		}
		is := measured(m)
		d := m.Downtime - is
		off = append(off, d)
		if d.Abs() <= max(is/10, 5*time.Millisecond) {
			a.Within++
		}
	}
	a.Of, a.Median = len(off), Median(off)
	return a
}

// String writes it in a line.
func (a Agreement) String() string {
	return fmt.Sprintf("within 10 %% or 5 ms in %d of %d moves, median difference %.1f ms", a.Within, a.Of, a.Median.Seconds()*1e3)
}

// PrintComparison writes a table of two summaries.
func PrintComparison(w io.Writer, a, b Summary) error {
	const msec = float64(time.Millisecond)
	return PrintTable(w, a.Tool, b.Tool, []Row{
		{"outage seen on the LAN", a.Outage, b.Outage, msec, "ms"},
		{"downtime reported by QEMU", a.Downtime, b.Downtime, msec, "ms"},
		{"total time of the command", a.Total, b.Total, msec, "ms"},
		{"  of that libvirt's job", a.Copy, b.Copy, msec, "ms"},
		{"memory sent", a.Sent, b.Sent, 1 << 20, "MiB"},
	})
}

// Row compares two ranges, in a unit of Scale of their own.
type Row struct {
	Name  string
	A, B  Range
	Scale float64
	Unit  string
}

// PrintTable writes rows: the median of each column with its least and largest
// value, and what the first's median is of the second's.
func PrintTable(w io.Writer, a, b string, rows []Row) error {
	const form = "%-27s %-25s %-25s %s\n"
	if _, err := fmt.Fprintf(w, form, "", a, b, a+"/"+b); err != nil {
		return err
	}
	for _, row := range rows {
		ratio := "-"
		if row.B.Median > 0 {
			ratio = fmt.Sprintf("%.2f", row.A.Median/row.B.Median)
		}
		if _, err := fmt.Fprintf(w, form, row.Name, row.A.In(row.Scale, row.Unit), row.B.In(row.Scale, row.Unit), ratio); err != nil {
			return err
		}
	}
	return nil
}

// In writes a range in a unit of so many of its own: "250 (200 to 335) ms".
// A small one has a decimal.
func (r Range) In(scale float64, unit string) string {
	digits := 0
	if r.Median/scale < 10 {
		digits = 1
	}
	return fmt.Sprintf("%.*f (%.*f to %.*f) %s", digits, r.Median/scale, digits, r.Min/scale, digits, r.Max/scale, unit)
}

// Phase is one phase of Belay's migrations and how long it took, ns.
type Phase struct {
	Name string
	Took Range
}

// Phases sums up the phases of Belay's moves among all, in their order.
func Phases(moves []Move) (phases []Phase) {
	took := map[string][]time.Duration{}
	for _, m := range moves {
		if m.Op == nil {
			continue
		}
		for _, s := range m.Op.Steps {
			if took[s.Name] == nil {
				phases = append(phases, Phase{Name: s.Name})
			}
			took[s.Name] = append(took[s.Name], s.Ended.Sub(s.Started))
		}
	}
	for i := range phases {
		phases[i].Took = RangeOf(took[phases[i].Name])
	}
	return phases
}
