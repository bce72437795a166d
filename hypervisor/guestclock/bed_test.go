package guestclock_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/hypervisor/guestclock"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
)

// long reports whether the long forms of the tests are wanted.
func long() bool { return os.Getenv("BELAY_LONG") != "" }

// bed is a host of a lab with guests, their probes, and what is tested.
type bed struct {
	*guestclock.Clocks
	t      *testing.T
	host   *lab.Host
	hv     fan
	guests []*ward
}

// ward is one guest, and its probe for a ruler.
type ward struct {
	maint.Guest
	probe *guest.Control
}

// fan spreads guests over several pools of connections.
type fan []*hypervisor.Host

func (f fan) of(uuid string) *hypervisor.Host { return f[int(uuid[len(uuid)-1])%len(f)] }

func (f fan) GuestTime(ctx context.Context, uuid string) (time.Time, error) {
	return f.of(uuid).GuestTime(ctx, uuid)
}

func (f fan) SetGuestTime(ctx context.Context, uuid string, to time.Time) error {
	return f.of(uuid).SetGuestTime(ctx, uuid, to)
}

func (f fan) AgentCommand(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	return f.of(uuid).AgentCommand(ctx, uuid, command, args)
}

// setup says what a bed is to have.
type setup struct {
	guests  int
	cmdline string // more for the guests' kernels
	fans    int    // pools of 16 connections
	workers int    // libvirtd's max_workers; 0 leaves it at 20
}

func newBed(t *testing.T, s setup) *bed {
	t.Helper()
	img, accel := guest.ForTest(t)
	l := lab.ForTest(t, lab.Config{Hosts: 1, QEMU: img.QEMU})
	b := &bed{t: t, host: l.Hosts[0], guests: make([]*ward, s.guests)}
	ctx := b.ctx(8 * time.Minute)
	if s.workers > 0 {
		b.setWorkers(ctx, s.workers)
	}
	for range max(1, s.fans) {
		hv := hypervisor.New(hypervisor.Config{Socket: b.host.LibvirtSocket()})
		t.Cleanup(func() { hv.Close() })
		if err := hv.Warm(ctx, 16); err != nil {
			t.Fatal(err)
		}
		b.hv = append(b.hv, hv)
	}
	b.Clocks = guestclock.New(b.hv, 16*max(1, s.fans))
	// Few at once: a machine that boots twenty emulated guests together has no
	// time to get any of them up.
	turns := make(chan struct{}, 3)
	errs := make([]error, s.guests)
	var all sync.WaitGroup
	for i := range s.guests {
		all.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			w := &ward{Guest: maint.Guest{Name: fmt.Sprintf("web-%d", i+1), UUID: fmt.Sprintf("11111111-2222-4333-8444-%012d", i+1), Agent: maint.AgentConnected}}
			b.guests[i] = w
			spec := guest.Spec{Name: w.Name, UUID: w.UUID, Accel: accel, Cmdline: strings.TrimSpace(s.cmdline + " " + guest.SteadyClock)}
			if _, errs[i] = guest.Start(ctx, b.host, spec, img); errs[i] == nil {
				w.probe, errs[i] = guest.Dial(ctx, b.host, w.Name)
			}
		})
	}
	all.Wait()
	t.Cleanup(func() {
		for _, w := range b.guests {
			if w.probe != nil {
				w.probe.Close()
			}
		}
	})
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bed) ctx(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(b.t.Context(), d)
	b.t.Cleanup(cancel)
	return ctx
}

// setWorkers restarts libvirtd with more threads for calls.
func (b *bed) setWorkers(ctx context.Context, n int) {
	b.t.Helper()
	conf := b.host.Path("/etc/libvirt/libvirtd.conf")
	text, err := os.ReadFile(filepath.Clean(conf))
	if err == nil {
		err = os.WriteFile(conf, fmt.Appendf(text, "max_workers = %d\nmin_workers = %d\n", n, n), 0o644)
	}
	if err == nil {
		err = b.host.Kill(ctx, lab.Libvirtd, syscall.SIGKILL)
	}
	if err == nil {
		err = b.host.StartDaemon(ctx, lab.Libvirtd)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// ruling is what the probe says of a guest's clock: past libvirt, the agent and
// what is tested.
type ruling struct {
	off, bar time.Duration // the guest's clock less the host's
	steps    []step
	rtt      time.Duration // of the reading that the steps come from
}

// step is one setting of the guest's clock.
type step struct {
	at time.Time     // the host's; at the earliest when it happened, as noted by a thread of the guest's
	by time.Duration // forward
}

// rule asks the probe some times. Each answer bounds the offset from both sides.
func (b *bed) rule(w *ward) (r ruling) {
	b.t.Helper()
	ctx := b.ctx(2 * time.Minute)
	var least, most, best time.Duration
	for n := range 15 {
		asked := time.Now()
		c, err := w.probe.Clock(ctx)
		told := time.Now()
		if err != nil {
			b.t.Fatal(err)
		}
		wall := time.Unix(0, c.Wall)
		lo, hi := wall.Sub(told.Round(0)), wall.Sub(asked.Round(0))
		if n == 0 {
			least, most = lo, hi
		}
		least, most = max(least, lo), min(most, hi)
		if rtt := told.Sub(asked); n == 0 || rtt < best {
			best, r.rtt, r.steps = rtt, rtt, nil
			for _, s := range c.Steps {
				r.steps = append(r.steps, step{at: asked.Add(rtt/2 - (c.Monotonic - s.Monotonic)), by: s.By})
			}
		}
	}
	r.off, r.bar = (least+most)/2, (most-least)/2
	return r
}

// pause holds guests for a time and returns when each ran again.
func (b *bed) pause(d time.Duration, guests ...*ward) []time.Time {
	b.t.Helper()
	ctx := b.ctx(time.Minute)
	each := func(f func(i int, w *ward) error) {
		errs := make([]error, len(guests))
		var all sync.WaitGroup
		for i, w := range guests {
			all.Go(func() { errs[i] = f(i, w) })
		}
		all.Wait()
		if err := errors.Join(errs...); err != nil {
			b.t.Fatal(err)
		}
	}
	resumed := make([]time.Time, len(guests))
	each(func(_ int, w *ward) error { return b.hv.of(w.UUID).Suspend(ctx, w.UUID) })
	time.Sleep(d)
	each(func(i int, w *ward) error {
		err := b.hv.of(w.UUID).Resume(ctx, w.UUID)
		resumed[i] = time.Now()
		return err
	})
	return resumed
}

// hold prepares, pauses and corrects guests, all at once.
func (b *bed) hold(d time.Duration, guests ...*ward) ([]maint.ClockReport, []time.Time) {
	b.t.Helper()
	ctx := b.ctx(time.Minute)
	before := make([]guestclock.Baseline, len(guests))
	reports := make([]maint.ClockReport, len(guests))
	var all sync.WaitGroup
	for i, w := range guests {
		all.Go(func() {
			var problem *maint.Problem
			if before[i], problem = b.Prepare(ctx, w.Guest); problem != nil {
				b.t.Error(problem)
			}
		})
	}
	all.Wait()
	resumed := b.pause(d, guests...)
	for i := range guests {
		all.Go(func() { reports[i] = b.Correct(ctx, before[i], resumed[i], 0) })
	}
	all.Wait()
	return reports, resumed
}
