package main

import (
	"fmt"
	"slices"
	"time"

	"belay/vmtests/guest"
	"belay/vmtests/measure"
	"belay/vmtests/observer"
)

// row is an update in the table at the end: what the observer saw of each guest.
type row struct {
	what, rung    string
	belay, script []observer.Report
	predicted     string
}

// table shows what the updates have cost.
func (d *demo) table() {
	const form = "  %-19s %-5s %-7s %-15s %-23s %-15s %s"
	d.line(form, "UPDATE", "RUNG", "GUESTS", "BY BELAY", "PREDICTED", "PLAIN SCRIPT", "RATIO")
	var own, plain time.Duration
	for _, r := range d.rows {
		d.line(form, r.what, r.rung, fmt.Sprint(len(r.belay)), spread(r.belay), orDash(r.predicted), spread(r.script), r.ratio(d.nothing))
		own, plain = max(own, furthest(r.belay)), max(plain, furthest(r.script))
	}
	d.line("")
	d.line("  Median / worst of the guests' longest silence on the network. A ratio is left out where it")
	d.line("  would be one of nothing: up to %s, while nothing was done. After Belay no guest's clock", millis(d.nothing))
	d.line("  was off by more than %s, after the scripts by up to %s, until it was set by hand.", millis(own), millis(plain))
	if d.accel == guest.TCG {
		d.line("  An emulated guest is silent for longer than it stands still, as the report has it: in another")
		d.line("  QEMU, all its code is translated anew. Belay moves guests side by side, the script did not.")
	}
	d.line("  Each was done once, on a machine that is both hosts, accelerator %s%s:", d.accel, emulated(d.accel))
	d.line("  nothing of this says how fast a real host is; make bench has benchmarks.")
}

// silences are the longest silence of each guest.
func silences(reports []observer.Report) (all []time.Duration) {
	for _, r := range reports {
		all = append(all, r.Pause())
	}
	return all
}

// spread is the median and the worst of guests' silences.
func spread(reports []observer.Report) string {
	all := silences(reports)
	return fmt.Sprintf("%d / %s", measure.Median(all).Round(time.Millisecond).Milliseconds(), millis(slices.Max(all)))
}

// furthest is by how much the clock was set back, or forward, that was so most.
func furthest(reports []observer.Report) (d time.Duration) {
	for _, r := range reports {
		if step, _, ok := r.ClockStep(); ok {
			d = max(d, step.Abs())
		}
	}
	return d
}

// ratio is what Belay's median is of the script's, unless both are about nothing.
func (r row) ratio(nothing time.Duration) string {
	b, s := measure.Median(silences(r.belay)), measure.Median(silences(r.script))
	if max(b, s) < 2*nothing {
		return "-"
	}
	return fmt.Sprintf("%.2f", float64(b)/float64(s))
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func emulated(a guest.Accel) string {
	if a == guest.TCG {
		return " (guests' CPUs are emulated)"
	}
	return ""
}

func millis(t time.Duration) string {
	return fmt.Sprintf("%d ms", t.Round(time.Millisecond).Milliseconds())
}
