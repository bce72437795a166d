package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/measure"
)

const (
	labName = "demo"

	dirtyMiBs     = 8
	workingSetMiB = 32

	// patience bounds the demo once its downloads are there.
	patience = 4 * time.Minute
	// cleanupTimeout bounds the cleanup, which goes on when the rest is over.
	cleanupTimeout = 2 * time.Minute
)

// turns is who moves the guest when: as often there as back, for each tool, and
// none always before the other, so that neither a difference between the ways
// nor a machine that gets slower favours one.
func turns() []string {
	b, v := measure.Belay, measure.Virsh
	return []string{b, v, v, b, b, v, v, b}
}

// demo is one run of the demonstration.
type demo struct {
	mu    sync.Mutex // of out
	out   io.Writer
	begin time.Time
	accel guest.Accel
	bed   *measure.Bed
	mine  bool // the lab of this name is this demo's
}

func (d *demo) run(ctx context.Context) (err error) {
	d.intro()
	if _, err := lab.Open(labName); err == nil {
		return errors.New("a demo is already running on this machine: wait until it has ended")
	}
	d.mine = true
	img, accel, reason, err := guest.Prepare(ctx, guest.DefaultCache(), slog.New(&teller{d}))
	if err != nil {
		return err
	}
	d.accel = accel
	d.fact("accelerator", "%s, because: %s", accel, firstLine(reason))
	bin, discard, err := cluster.Programs(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, discard()) }()

	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not done after %s", patience))
	defer cancel()
	d.title("1. Two hosts and a guest")
	d.bed, err = measure.Up(ctx, measure.Config{
		Lab:  lab.Config{Name: labName, Hooks: "dist/hooks"},
		Spec: guest.Spec{Accel: accel, FileMemory: true}, Image: img, Bin: bin,
		DirtyMiBs: dirtyMiBs, WorkingSetMiB: workingSetMiB,
		Stage: func(text string) { d.now("%s", text) },
	})
	if err != nil {
		return why(ctx, err)
	}
	defer func() { err = errors.Join(err, d.down(err != nil && context.Cause(ctx) != errInterrupted)) }()
	return why(ctx, d.acts(ctx))
}

// why puts the reason for which a context has ended in front of what came of it.
func why(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return fmt.Errorf("%w: %w", cause, err)
	}
	return err
}

// down removes the bed. After a failure the hosts' logs are kept.
func (d *demo) down(failed bool) error {
	signal.Ignore(endings()...) // also in the programs that clean up
	d.line("")
	if failed {
		dir := filepath.Join(os.TempDir(), "belay-artifacts", labName)
		if err := d.bed.Lab.CollectLogs(dir); err != nil {
			d.now("the hosts' logs could not be kept: %v", err)
		} else {
			d.now("the demo has failed; the hosts' logs are kept in %s", dir)
		}
	}
	d.now("removing the guest and the hosts (Ctrl-C has no effect meanwhile)")
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	if err := d.bed.Down(ctx); err != nil {
		return err
	}
	d.now("done; nothing is left but downloads in %s", guest.DefaultCache())
	return nil
}

// leaves reports whether something of this demo is still there.
func (d *demo) leaves() bool {
	names, err := lab.List()
	return d.mine && (err != nil || slices.Contains(names, labName))
}

// acts is the play itself.
func (d *demo) acts(ctx context.Context) error {
	if err := d.cast(ctx); err != nil {
		return err
	}
	d.title("2. Belay services the host under the guest")
	if err := d.preserve(ctx); err != nil {
		return err
	}
	d.title("3. Belay moves the guest")
	if err := d.migration(ctx); err != nil {
		return err
	}
	moves, err := d.contest(ctx)
	if err != nil {
		return err
	}
	if err := d.compare(moves); err != nil {
		return err
	}
	if err := d.proof(ctx, len(moves)+1); err != nil {
		return err
	}
	d.next()
	return nil
}

func (d *demo) intro() {
	d.line("Two virtualisation hosts are made on this machine, and a guest that never stops working. Its host")
	d.line("is serviced under it; then it moves to the other and back: first by Belay, step by step, then by")
	d.line("Belay and by virsh in turn, measured.")
	d.line("")
}

// cast introduces the hosts and the guest.
func (d *demo) cast(ctx context.Context) error {
	b := d.bed
	d.now("all is up")
	d.line("")
	for _, n := range b.Cluster.Nodes {
		s, err := n.Client().Status(ctx)
		if err != nil {
			return err
		}
		d.fact(n.Name, "%s, libvirt %s, QEMU %s, belayd %s", n.Addr, s.Host.LibvirtVersion, s.Host.QEMUVersion, s.Version)
	}
	g := b.Guest
	d.fact("guest "+g.Spec.Name, "%s, %d MiB, on %s; Linux booted in %.1f s", g.Spec.IP.Addr(), g.Spec.MemoryMiB, b.At().Name, g.Boot.Agent.Seconds())
	d.fact("", "sends 1000 heartbeats a second to an observer on the LAN, who so sees every outage")
	d.fact("", "writes %d MiB/s to %d MiB of its memory, so that the copy has to catch up with it", dirtyMiBs, workingSetMiB)
	// A migration by libvirt takes the definition along, but not this.
	_, err := b.At().Virsh(ctx, "autostart", g.Spec.Name)
	return err
}

// contest has both tools move the guest in turn.
func (d *demo) contest(ctx context.Context) (moves []measure.Move, err error) {
	d.title("4. Belay and virsh in turn")
	d.line("  belay:  belay migrate %s --to HOST", d.bed.Guest.Spec.Name)
	d.line("  virsh:  virsh %s", strings.Join(measure.VirshArgs(d.bed.Guest.Spec.Name, "qemu+tcp://HOST/system"), " "))
	d.line("")
	d.line("  tool   way                 outage (LAN)  downtime (QEMU)  total time  memory sent")
	for _, tool := range turns() {
		move := d.bed.Belay
		if tool == measure.Virsh {
			move = d.bed.Virsh
		}
		m, err := move(ctx)
		if err != nil {
			return nil, err
		}
		d.line("  %-6s %-18s  %12s  %15s  %10s  %11s", m.Tool, m.From+" → "+m.To,
			millis(m.Outage), millis(m.Downtime), millis(m.Total), fmt.Sprintf("%d MiB", m.MemorySent>>20))
		moves = append(moves, m)
	}
	return moves, nil
}

// compare prints what the contest comes to.
func (d *demo) compare(moves []measure.Move) error {
	b, v := measure.Summarise(measure.Belay, moves), measure.Summarise(measure.Virsh, moves)
	d.title("5. The comparison")
	if err := measure.PrintComparison(indented{d}, b, v); err != nil {
		return err
	}
	var phases []string
	for _, p := range measure.Phases(moves) {
		phases = append(phases, fmt.Sprintf("%s %s", p.Name, millis(time.Duration(p.Took.Median))))
	}
	d.line("")
	d.line("  Medians of %d rounds each (least to most). Belay's total by its phases:", b.Rounds)
	d.line("  %s;", strings.Join(phases, ", "))
	d.line("  virsh does only what perform does, without looking at both hosts before and after.")
	d.line("  Where the ranges of both overlap widely, a ratio other than 1 may be chance.")
	d.line("  This is a lab on one machine, accelerator %s%s: the figures compare", d.accel, emulated(d.accel))
	d.line("  the two tools with each other and say nothing about how fast a real host is.")
	return nil
}

func emulated(a guest.Accel) string {
	if a == guest.TCG {
		return " (the guest's CPU is emulated)"
	}
	return ""
}

// proof shows that the guest has come through all moves whole.
func (d *demo) proof(ctx context.Context, moves int) error {
	d.title("6. The guest after a hold, a new QEMU and %d moves", moves)
	p, err := d.bed.Proof(ctx)
	if err != nil {
		return err
	}
	d.fact("never rebooted", "boot ID %s as at the start, up %.0f s", p.BootID, p.Uptime.Seconds())
	d.fact("memory intact", "each of %d pages holds what the guest has last written to it;", p.Pages)
	d.fact("", "%d MiB were written since the start; checksum of the rest %016x", p.Dirtied>>20, p.Checksum)
	d.fact("one copy", "runs on %s, and not on %s", p.Host, d.bed.Other().Name)
	d.fact("one definition", "on %s, and not on %s", p.Host, d.bed.Other().Name)
	return nil
}

func (d *demo) next() {
	d.title("7. What to try next")
	d.fact("docs/", "how to install Belay on a host, and what it does when something goes wrong")
	d.fact("make test", "all tests, also with hosts that die in the middle of a migration (needs root)")
	d.fact("a lab to keep", "go run ./vmtests/cmd/lab up (also: status, exec HOST COMMAND, down)")
}

func millis(t time.Duration) string {
	return fmt.Sprintf("%d ms", t.Round(time.Millisecond).Milliseconds())
}
