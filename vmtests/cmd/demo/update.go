package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/measure"
	"belay/vmtests/observer"
	"belay/vmtests/updates"
)

// update is one that guests stay on their host for, and how one would do it without Belay.
type update struct {
	manifest string
	title    string
	what     string // in the table
	rung     string
	about    string
	script   string // runs on the host; $g is each of the guests in a loop
	cost     string // of the script, beside the silence
}

// stays are the updates that the guests stay for, by what they feel.
func stays() []update {
	return []update{{
		manifest: updates.Component, title: "A: a component restarts under the guests", what: "virtlogd restarts", rung: "A",
		about: "virtlogd, which has the other end of the guests' consoles, executes a new program.",
		script: `
kill -USR1 "$(cat /run/virtlogd.pid)"`,
		cost: "Nobody feels this either. It has not looked whether the guests are well, before and after.",
	}, {
		manifest: updates.Network, title: "B1: the guests are held while the host's uplink is down", what: "uplink down and up", rung: "B1",
		about: "Nothing that a guest sends meanwhile gets lost: it does not run.",
		script: `
for g in GUESTS; do virsh suspend $g; done
ip link set uplink down; ip link set uplink txqueuelen 2000; sleep 0.4
ip link set uplink up
for g in GUESTS; do virsh resume $g; done`,
		cost: "Their clocks stay behind until somebody sets them. Had it died half way, they would still stand.",
	}, {
		manifest: updates.QEMU, title: "B2: a new QEMU under the running guests", what: "new QEMU", rung: "B2",
		about: "Each guest goes on in another QEMU process, with its memory where it is.",
		script: `
for g in GUESTS; do virsh save $g /run/g; virsh restore /run/g; done
rm /run/g`,
		cost: "Their clocks stay behind, and each guest's memory is written out and read in again.",
	}}
}

// update applies one by Belay and then by its script, and shows what the guests felt.
func (d *demo) update(ctx context.Context, u update) error {
	host := d.flock.At()
	d.line("  %s", u.about)
	d.line("")
	p, err := d.plan(ctx, host, u.manifest)
	if err != nil {
		return err
	}
	var op maint.OpID
	reports, err := d.feel(ctx, func() (err error) {
		op, err = d.belay(ctx, host, "apply", u.manifest+".plan")
		return err
	})
	if err != nil {
		return err
	}
	if err := d.felt(ctx, host, op, reports); err != nil {
		return err
	}
	if err := d.flock.Prove(ctx, nil); err != nil {
		return err
	}
	d.line("  All are whole: the same boot, their memory's checksums.")
	d.line("")
	d.line("  The same by a plain script:")
	plain, err := d.plain(ctx, host, u.script)
	if err != nil {
		return err
	}
	d.line("  %s", u.cost)
	if err := measure.SyncClocks(ctx, host); err != nil {
		return err
	}
	d.rows = append(d.rows, row{what: u.what, rung: u.rung, belay: reports, predicted: predicted(p), script: plain})
	return nil
}

// plan has an update planned and saved, and shows the plan in short.
func (d *demo) plan(ctx context.Context, n *cluster.Node, update string) (p maint.Plan, err error) {
	if _, err := updates.Write(d.dir, update); err != nil {
		return p, err
	}
	args := []string{"plan", update + ".toml", "--out", update + ".plan"}
	d.command(n, args...)
	text, err := d.quietly(ctx, n, append(args, "-o", "json")...)
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return p, err
	}
	for _, c := range p.Changes {
		d.line("    %s (%s) by rung %s", c.Change, p.Update.Description, c.Rung)
		for _, r := range c.Refused {
			d.line("      not by %s: %s", r.Rung, r.Problems[0].Reason)
		}
	}
	const form = "    %-8s %-22s %-24s %s"
	d.line(form, "GUEST", "BY", "PREDICTED", "BEGINS")
	for _, g := range p.Guests {
		d.line(form, g.Guest, by(g), expected(g), begins(p, g))
	}
	d.line("    and %d steps, which belay plan lists", len(p.Steps))
	return p, nil
}

// by is how a guest is served.
func by(g maint.PlannedGuest) string {
	switch {
	case len(g.Feels) == 0:
		return "-"
	case g.Rung == maint.RungC:
		return "C, then D to " + g.To
	case g.To != "":
		return "D to " + g.To
	}
	return strings.TrimSpace(string(g.Feels[0]) + " " + string(g.Method))
}

// begins is when a guest feels it.
func begins(p maint.Plan, g maint.PlannedGuest) string {
	switch ahead := g.Begin.Sub(p.Made).Round(time.Minute); {
	case len(g.Feels) == 0:
		return "-"
	case g.Asked:
		return fmt.Sprintf("when its owner approves, or in %.0f h", ahead.Hours())
	case !g.Told.IsZero():
		return fmt.Sprintf("when it approves, or in %.0f min", ahead.Minutes())
	}
	return "at once"
}

// expected is what a guest is to feel.
func expected(g maint.PlannedGuest) string {
	e := g.Pause
	if e == nil {
		e = g.Blackout
	}
	if e == nil {
		return "nothing"
	}
	return fmt.Sprintf("%d (%d to %d) ms", e.Typical.Milliseconds(), e.Low.Milliseconds(), e.High.Milliseconds())
}

// predicted is the longest that a plan has predicted of its guests' standstills.
func predicted(p maint.Plan) string {
	longest := func(g maint.PlannedGuest) (d time.Duration) {
		for _, e := range []*maint.Estimate{g.Pause, g.Blackout} {
			if e != nil {
				d = max(d, e.Typical)
			}
		}
		return d
	}
	return expected(slices.MaxFunc(p.Guests, func(a, b maint.PlannedGuest) int { return cmp.Compare(longest(a), longest(b)) }))
}

// felt shows what guests felt of an operation: by the observer, and by Belay's own report.
func (d *demo) felt(ctx context.Context, n *cluster.Node, op maint.OpID, reports []observer.Report) error {
	d.command(n, "report", string(op))
	text, err := d.quietly(ctx, n, "report", string(op), "-o", "json")
	if err != nil {
		return err
	}
	var r maint.Report
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return err
	}
	own := make(map[string]string)
	for _, g := range r.Guests {
		own[g.Guest] = g.Fate
		if g.Felt != nil && g.Felt.Times > 0 {
			own[g.Guest] = "stood still for " + millis(g.Felt.Longest)
		}
	}
	d.observed(reports, "THE REPORT SAYS", own)
	return nil
}

// feel lets do change something, with guests that are at rest before, and reports what the
// LAN has seen of each until a while after.
func (d *demo) feel(ctx context.Context, do func() error) ([]observer.Report, error) {
	heard := func(beats int) error {
		for _, g := range d.flock.Guests {
			if err := d.flock.Observer.Await(ctx, g.Spec.Name, beats); err != nil {
				return err
			}
		}
		return nil
	}
	if err := heard(restful); err != nil {
		return nil, err
	}
	return d.flock.Feel(ctx, func() error {
		if err := do(); err != nil {
			return err
		}
		return heard(settled)
	})
}

// observed shows what the observer saw of each guest, and beside it what others say.
func (d *demo) observed(reports []observer.Report, who string, says map[string]string) {
	const form = "    %-8s %17s  %18s  %-17s  %s"
	d.line(form, "GUEST", "SILENT ON THE LAN", "LOST ON THE LAN", "CLOCK BEHIND BY", who)
	for _, s := range reports {
		d.line(form, s.Guest, millis(s.Pause()), fmt.Sprintf("%d of %d", s.Lost, s.Received+int(s.Lost)), behind(s), says[s.Guest])
	}
}

// behind is by how much a guest's clock is behind what it was, by its heartbeats.
func behind(r observer.Report) string {
	step, off, ok := r.ClockStep()
	if !ok {
		return "not known"
	}
	return fmt.Sprintf("%d ± %d ms", -step.Milliseconds(), off.Milliseconds())
}

// plain runs a script on a host and shows what guests felt of it.
func (d *demo) plain(ctx context.Context, n *cluster.Node, script string) ([]observer.Report, error) {
	names := make([]string, len(d.flock.Guests))
	for i, g := range d.flock.Guests {
		names[i] = g.Spec.Name
	}
	script = strings.TrimSpace(strings.ReplaceAll(script, "GUESTS", strings.Join(names, " ")))
	for line := range strings.Lines(script) {
		d.line("  %s# %s", n.Name, strings.TrimSpace(line))
	}
	reports, err := d.feel(ctx, func() error {
		if out, err := n.Command(ctx, "sh", "-ec", script).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", script, err, out)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	d.observed(reports, "", nil)
	return reports, nil
}
