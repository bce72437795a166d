package hypervisor_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/vmtests/lab"
)

// testDriver gives a host on libvirt's test driver, which has libvirtd's
// semantics without QEMU, and n domains defined beside its own one.
func testDriver(t testing.TB, n int) *hypervisor.Host {
	t.Helper()
	l := lab.ForTest(t, lab.Config{Hosts: 1})
	h := hypervisor.New(hypervisor.Config{Socket: l.Hosts[0].LibvirtSocket(), URI: "test:///default"})
	t.Cleanup(func() { _ = h.Close() })
	for i := range n {
		text := fmt.Sprintf("<domain type='test'><name>g%03d</name><memory unit='MiB'>64</memory><vcpu>2</vcpu>"+
			"<os><type>hvm</type></os></domain>", i)
		if err := h.Define(context.Background(), text); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func TestLibvirtd(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a libvirtd")
	}
	h := testDriver(t, 50)
	t.Run("TestDriver", func(t *testing.T) { checkTestDriver(t, h) })
	t.Run("Concurrent", func(t *testing.T) { checkConcurrent(t, h) })
	t.Run("Leaks", func(t *testing.T) { checkLeaks(t, h) })
}

func checkTestDriver(t *testing.T, h *hypervisor.Host) {
	ctx := t.Context()
	info, err := h.Info(ctx)
	if err != nil || info.Name == "" || info.MemoryBytes == 0 {
		t.Errorf("Info: %+v, %v", info, err)
	}
	guests, err := h.Guests(ctx)
	if err != nil || len(guests) != 51 {
		t.Fatalf("%d guests, %v; want 51", len(guests), err)
	}
	g := guests[7]
	if g.Name != "g007" || g.State != maint.GuestShutoff || g.MemoryBytes != 64<<20 || g.VCPUs != 2 || !g.Persistent {
		t.Errorf("guest %+v", g)
	}
	if g := guests[50]; g.Name != "test" || g.State != maint.GuestRunning {
		t.Errorf("the driver's own guest: %+v", g)
	}
	if err := h.UndefineInactive(ctx, guests[50].UUID); !errors.Is(err, hypervisor.ErrActive) {
		t.Errorf("UndefineInactive of a running guest: %v", err)
	}
	if err := h.UndefineInactive(ctx, g.UUID); err != nil {
		t.Errorf("UndefineInactive: %v", err)
	}
	if _, err := h.Guest(ctx, g.Name); !errors.Is(err, maint.ErrNoGuest) {
		t.Errorf("Guest: %v", err)
	}
	// It has a network and a storage pool, no secrets, and no huge pages.
	s, err := h.Supplies(ctx)
	if err != nil || !s.Networks["default"] || !s.Pools["default-pool"] || len(s.Secrets) > 0 {
		t.Errorf("Supplies: %+v, %v", s, err)
	}
	if pools, err := h.HugePages(ctx); err != nil || len(pools) > 0 {
		t.Errorf("HugePages: %+v, %v", pools, err)
	}
	// What the driver cannot do is an error with libvirt's code, no outage.
	err = h.DryRun(ctx, guests[50].UUID, maint.MoveParams{})
	var e *hypervisor.Error
	if !errors.As(err, &e) || e.Code == 0 || errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("DryRun: %v", err)
	}
}

// checkConcurrent has callers that give up among callers that do not: the
// former must not cost the latter their calls.
func checkConcurrent(t *testing.T, h *hypervisor.Host) {
	var callers sync.WaitGroup
	for i := range 16 {
		callers.Go(func() {
			for range 20 {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				if i%2 == 0 {
					time.AfterFunc(time.Duration(i)*time.Millisecond, cancel)
				}
				_, err := h.Guests(ctx)
				if err != nil && (i%2 != 0 || !errors.Is(err, context.Canceled) || errors.Is(err, maint.ErrHypervisorDown)) {
					t.Errorf("caller %d: %v", i, err)
				}
				cancel()
			}
		})
	}
	callers.Wait()
}

// checkLeaks uses a host in every way and looks for goroutines that outlive it.
func checkLeaks(t *testing.T, other *hypervisor.Host) {
	if err := other.Close(); err != nil { // its connections are not ours to count
		t.Fatal(err)
	}
	l := lab.ForTest(t, lab.Config{Hosts: 1})
	socket := l.Hosts[0].LibvirtSocket()
	settled := func() int {
		n := runtime.NumGoroutine()
		for range 50 { // until it stands still
			time.Sleep(20 * time.Millisecond)
			if m := runtime.NumGoroutine(); m < n {
				n = m
			}
		}
		return n
	}
	before := settled()
	for range 5 {
		h := hypervisor.New(hypervisor.Config{Socket: socket, URI: "test:///default"})
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() { _ = h.Run(ctx) })
		events, _ := h.Subscribe()
		<-events
		abandoned, _ := h.Subscribe() // nobody reads it
		_ = abandoned
		if err := h.Define(ctx, "<domain type='test'><name>x</name><memory>1024</memory><os><type>hvm</type></os></domain>"); err != nil {
			t.Fatal(err)
		}
		short, done := context.WithTimeout(ctx, time.Millisecond)
		_, _ = h.Guests(short)
		done()
		_ = h.Migrate(ctx, "10000000-0000-4000-8000-000000000000", maint.MoveParams{})
		cancel()
		run.Wait()
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}
	if after := settled(); after > before {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		t.Errorf("%d goroutines more than before:\n%s", after-before, relevant(string(stacks)))
	}
}

// relevant keeps the stacks in which libvirt is.
func relevant(stacks string) string {
	var keep []string
	for s := range strings.SplitSeq(stacks, "\n\n") {
		if strings.Contains(s, "libvirt") || strings.Contains(s, "belay/hypervisor.") {
			keep = append(keep, s)
		}
	}
	return strings.Join(keep, "\n\n")
}

// BenchmarkGuests50 lists 51 domains of the test driver.
func BenchmarkGuests50(b *testing.B) {
	h := testDriver(b, 50)
	for b.Loop() {
		if _, err := h.Guests(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
