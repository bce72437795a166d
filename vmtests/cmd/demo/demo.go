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
	"sync"
	"time"

	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/measure"
	"belay/vmtests/probe"
)

const (
	labName = "demo"

	// asksFirst is the guest whose owner is asked before it moves; the others are web-1
	// and web-2.
	asksFirst = "shop-1"
	guests    = 3
	// interval is the time between two heartbeats of a guest, and so about how fine its
	// silence is measured.
	interval = 5 * time.Millisecond

	dirtyMiBs     = 2
	workingSetMiB = 16

	// restful and settled are how many heartbeats of each guest are waited for before and
	// after something is done: one second, and half of one.
	restful, settled = 200, 100
	// quiet is for how many heartbeats nothing is done, to see how silent guests are then.
	quiet = 600

	// patience bounds the demo once its downloads are there.
	patience = 8 * time.Minute
	// cleanupTimeout bounds the cleanup, which goes on when the rest is over.
	cleanupTimeout = 2 * time.Minute
)

// demo is one run of the demonstration.
type demo struct {
	mu    sync.Mutex // of out
	out   io.Writer
	begin time.Time
	accel guest.Accel
	flock *measure.Flock
	bin   cluster.Binaries
	dir   string // of manifests and plans
	mine  bool   // the lab of this name is this demo's
	rows  []row  // of the table at the end

	nothing time.Duration // the longest silence while nothing was done
}

func (d *demo) run(ctx context.Context) (err error) {
	d.intro()
	if _, err := lab.Open(labName); err == nil {
		return errors.New("a demo is already running on this machine: wait until it has ended")
	}
	d.mine = true
	_, accel, reason, err := guest.Prepare(ctx, guest.DefaultCache(), slog.New(&teller{d}))
	if err != nil {
		return err
	}
	d.accel = accel
	d.fact("accelerator", "%s%s", accel, emulated(accel))
	if accel == guest.TCG {
		d.line("%s", cut("  "+firstLine(reason)))
	}
	bin, discard, err := cluster.Programs(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, discard()) }()
	d.bin = bin
	if d.dir, err = os.MkdirTemp("", "belay-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()

	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not done after %s", patience))
	defer cancel()
	d.title("1. Two hosts and three guests")
	d.flock, err = measure.FlockUp(ctx, measure.FlockConfig{
		Lab: lab.Config{Name: labName, Hooks: "dist/hooks"}, Bin: bin, Guests: guests, Interval: interval,
		Dirty: probe.DirtySettings{RateMiBs: dirtyMiBs, WorkingSetMiB: workingSetMiB},
		Edit: func(s *guest.Spec) {
			s.FileMemory, s.Gateway = true, lab.SwitchAddr() // for a new QEMU in place; to reach the metadata service
			if s.Name == fmt.Sprintf("web-%d", guests) {
				s.Name = asksFirst
			}
		},
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

// down removes the hosts and guests. After a failure the hosts' logs are kept.
func (d *demo) down(failed bool) error {
	signal.Ignore(endings()...) // also in the programs that clean up
	d.line("")
	if failed {
		dir := filepath.Join(os.TempDir(), "belay-artifacts", labName)
		if err := d.flock.Lab.CollectLogs(dir); err != nil {
			d.now("the hosts' logs could not be kept: %v", err)
		} else {
			d.now("the demo has failed; the hosts' logs are kept in %s", dir)
		}
	}
	d.now("removing the guests and the hosts (Ctrl-C has no effect meanwhile)")
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	if err := d.flock.Down(ctx); err != nil {
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
	for i, u := range stays() {
		d.title("%d. %s", i+2, u.title)
		if err := d.update(ctx, u); err != nil {
			return err
		}
	}
	d.title("5. D, and C for one of them: host-a leaves service, and comes back")
	if err := d.leave(ctx); err != nil {
		return err
	}
	d.title("6. What the updates have cost")
	d.table()
	d.next()
	return nil
}

func (d *demo) intro() {
	d.line("Two virtualisation hosts are made on this machine, with guests that never stop working. One")
	d.line("of the hosts has four updates, each by another rung of the ladder: by belay plan and belay")
	d.line("apply, and then once more as a plain script would do it. What the guests feel is measured")
	d.line("by an observer on their network, who hears each of them %d times a second.", time.Second/interval)
	d.line("")
}

// cast introduces the hosts and the guests.
func (d *demo) cast(ctx context.Context) error {
	f := d.flock
	if err := measure.SyncClocks(ctx, f.At()); err != nil { // a kernel boots by an RTC of whole seconds
		return err
	}
	d.now("all is up")
	d.line("")
	for _, n := range f.Cluster.Nodes {
		s, err := n.Client().Status(ctx)
		if err != nil {
			return err
		}
		d.fact(n.Name, "%s, libvirt %s, QEMU %s, belayd %s", n.Addr, s.Host.LibvirtVersion, s.Host.QEMUVersion, s.Version)
	}
	for _, g := range f.Guests {
		d.fact(g.Spec.Name, "%s, %d MiB, on %s; Linux booted in %.1f s", g.Spec.IP.Addr(), g.Spec.MemoryMiB, f.At().Name, g.Boot.Agent.Seconds())
	}
	reports, err := d.feel(ctx, func() error { return f.Observer.Await(ctx, asksFirst, quiet) })
	if err != nil {
		return err
	}
	d.nothing = slices.Max(silences(reports))
	d.line("")
	d.line("  While nothing is done, they are silent for up to %s: what is shorter cannot be told from it.", millis(d.nothing))
	return nil
}

func (d *demo) next() {
	d.title("What to try next")
	d.fact("docs/", "how to install Belay on a host, and what it does when something goes wrong")
	d.fact("docs/plan.md", "how a plan is made; the manifests of these updates are in vmtests/updates")
	d.fact("make test", "all tests, also with hosts that die in the middle of an update (needs root)")
	d.fact("a lab to keep", "go run ./vmtests/cmd/lab up (also: status, exec HOST COMMAND, down)")
}
