package wholehost

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/guest"
	"belay/vmtests/machine"
	"belay/vmtests/observer"
	"belay/vmtests/probe"
)

// load is what guests do: heartbeats, microseconds apart, and writing memory, MiB/s.
type load struct {
	beatUs int
	rate   float64
}

// loads is what guests can do in an emulated host without being all that it does.
var loads = map[guest.Accel]load{guest.KVM: {50_000, 4}, guest.TCG: {500_000, .25}}

// inFull skips a test, or a part of one, that only the long form has: BELAY_LONG=1, make vmtest-long.
func inFull(t *testing.T) {
	t.Helper()
	if !long {
		t.Skip("in the long form only (BELAY_LONG=1, make vmtest-long)")
	}
}

var long = os.Getenv("BELAY_LONG") != ""

// bed is a lab with a guest, which writes memory, on its first host, and an observer.
type bed struct {
	*machine.Lab
	t     *testing.T
	accel guest.Accel // of guests
	guest *guest.Guest
	obs   *observer.Observer
	first probe.Status
	mem   probe.MemoryReport
	// behind: its clock was left so, as was told.
	behind bool
}

func newBed(t *testing.T, c machine.Config) *bed {
	t.Helper()
	b := newEmptyBed(t, c)
	b.boot(guest.Spec{})
	return b
}

// newEmptyBed is a bed whose guest is yet to be booted.
func newEmptyBed(t *testing.T, c machine.Config) *bed {
	t.Helper()
	b := &bed{Lab: machine.ForTest(t, c), t: t, accel: guest.KVM}
	var err error
	if b.obs, err = b.Observe(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.obs.Close() })
	return b
}

// boot starts the bed's guest, web-1, on the first host.
func (b *bed) boot(s guest.Spec) {
	b.t.Helper()
	b.guest = b.start(b.Hosts[0], web1(s))[0]
	b.meet()
}

// web1 has a guest be web-1.
func web1(s guest.Spec) guest.Spec {
	s.Name, s.IP = "web-1", netip.MustParsePrefix("10.77.1.1/16")
	return s
}

// meet has the guest write memory, and takes it for the one that it is by now.
func (b *bed) meet() {
	b.t.Helper()
	b.dirty(b.Hosts[0], loads[b.accel].rate)
	b.first, b.mem = b.look(b.Hosts[0])
}

// start starts guests, all at once, with heartbeats.
func (b *bed) start(h *machine.Host, specs ...guest.Spec) []*guest.Guest {
	b.t.Helper()
	guests, errs := make([]*guest.Guest, len(specs)), make([]error, len(specs))
	ctx := b.ctx(5 * time.Minute)
	var wg sync.WaitGroup
	for i, s := range specs {
		s.Accel, s.Heartbeat, s.IntervalUs = b.accel, b.obs.Addr(), loads[b.accel].beatUs
		wg.Go(func() { guests[i], errs[i] = guest.Start(ctx, h, s, b.Guest) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		b.t.Fatal(err)
	}
	for _, g := range guests {
		b.t.Logf("guest %s: probe after %s, agent after %s", g.Spec.Name, g.Boot.Probe.Round(time.Second), g.Boot.Agent.Round(time.Second))
	}
	return guests
}

func (b *bed) ctx(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(b.t.Context(), d)
	b.t.Cleanup(cancel)
	return ctx
}

// probe calls f with a connection to the guest's probe, on the host where it must be.
func (b *bed) probe(h *machine.Host, f func(context.Context, *guest.Control) error) {
	b.t.Helper()
	ctx := b.ctx(3 * time.Minute)
	c, err := b.guest.Dial(ctx, h)
	if err == nil {
		defer c.Close()
		err = f(ctx, c)
	}
	if err != nil {
		console, _ := b.guest.Console(ctx, h)
		b.t.Fatalf("guest %s on %s: %v; its console ends:\n%s", b.guest.Spec.Name, h.Name, err, console[max(0, len(console)-1500):])
	}
}

// look asks the guest how it is, and has it check its memory.
func (b *bed) look(h *machine.Host) (s probe.Status, m probe.MemoryReport) {
	b.t.Helper()
	b.probe(h, func(ctx context.Context, c *guest.Control) (err error) {
		if s, err = c.Status(ctx); err == nil {
			m, err = c.Verify(ctx)
		}
		return err
	})
	return s, m
}

// dirty has the guest write memory at a rate, MiB/s.
func (b *bed) dirty(h *machine.Host, rate float64) {
	b.t.Helper()
	b.probe(h, func(ctx context.Context, c *guest.Control) error {
		_, err := c.Dirty(ctx, probe.DirtySettings{RateMiBs: rate, WorkingSetMiB: 16})
		return err
	})
}

// isWhole checks that the guest is the one that was started, alive and whole, on h and on no
// other host.
func (b *bed) isWhole(h *machine.Host) {
	b.t.Helper()
	s, m := b.look(h)
	if s.BootID != b.first.BootID {
		b.t.Fatalf("the guest has rebooted: boot ID %s, was %s", s.BootID, b.first.BootID)
	}
	if !m.OK() || m.FixedChecksum != b.mem.FixedChecksum {
		b.t.Fatalf("the guest's memory is damaged: %+v, was %+v", m, b.mem)
	}
	for _, other := range b.Hosts {
		want := ""
		if other == h {
			want = b.guest.Spec.Name
		}
		for _, list := range [][]string{{"list", "--name"}, {"list", "--all", "--persistent", "--name"}} {
			out, err := other.Virsh(b.ctx(time.Minute), list...)
			if err != nil {
				b.t.Fatal(err)
			}
			if got := strings.TrimSpace(out); got != want {
				b.t.Fatalf("%s: virsh %v: %q, want %q", other.Name, list, got, want)
			}
		}
	}
	if err := b.obs.Await(b.ctx(2*time.Minute), b.guest.Spec.Name, 20); err != nil {
		b.t.Fatal(err)
	}
}

// belay runs belay in a host, where it is to print an operation that is done.
func (b *bed) belay(h *machine.Host, args ...string) maint.Op {
	b.t.Helper()
	var op maint.Op
	r, err := h.BelayJSON(b.ctx(5*time.Minute), &op, args...)
	if err != nil || op.Outcome != maint.OutcomeDone && !b.late(op) {
		b.t.Fatalf("belay %s: %v, %+v", strings.Join(args, " "), err, r)
	}
	return op
}

// late reports whether all that is wrong is that guests' agents did not answer in time, of guests that are
// emulated in a host that is emulated itself: there hwclock alone, which an agent runs to set a clock, may
// take minutes. From then on their clocks are behind.
func (b *bed) late(op maint.Op) bool {
	late := b.accel == guest.TCG && op.Outcome == maint.OutcomePartly &&
		!slices.ContainsFunc(op.Problems, func(p maint.Problem) bool { return p.Code != maint.CodeClock })
	b.behind = b.behind || late
	return late
}

// show is a property of a unit.
func show(t *testing.T, h *machine.Host, unit, property string) string {
	t.Helper()
	return must(t, h, "systemctl", "show", "--property="+property, "--value", unit)
}

// must runs a program that is to end with 0.
func must(t *testing.T, h *machine.Host, args ...string) string {
	t.Helper()
	out, err := h.Run(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}
