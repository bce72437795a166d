package migrate

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// fast is a guest that writes more than the network takes, whatever is done.
var fast = hypervisortest.Copy{PostCopy: 10 * time.Second,
	Writes: hypervisortest.Writes{PerSecond: 5000 * mibs, WorkingSet: 256 * mibs, Network: 100 * mibs}}

// said checks that the notes are these, in order, and no others.
func (x *bench) said(t *testing.T, want ...string) {
	t.Helper()
	for i, n := range x.notes {
		if i >= len(want) || !strings.Contains(n, want[i]) {
			t.Errorf("note %d: %s", i, n)
		}
	}
	if len(x.notes) < len(want) {
		t.Errorf("not said: %q", want[len(x.notes):])
	}
}

// hasMoved checks that the guest runs on the destination alone, and that Verify leaves
// it defined there alone.
func (x *bench) hasMoved(t *testing.T) {
	t.Helper()
	if err := x.Verify(t.Context(), x.page(PhaseVerify)); err != nil {
		t.Error(err)
	}
	g, err := x.b.host.Guest(t.Context(), x.UUID)
	if err != nil || g.State != maint.GuestRunning || g.Reason != "migrated" || g.Job != "" || !g.Persistent {
		t.Errorf("on the destination it is %+v, %v", g, err)
	}
	if g, err := x.a.Guest(t.Context(), x.UUID); !errors.Is(err, maint.ErrNoGuest) {
		t.Errorf("on the source it is %+v, %v", g, err)
	}
}

func TestPostCopy(t *testing.T) {
	t.Parallel()
	const goesOn = "it goes on as post-copy: the guest is started on b, and the"
	for name, test := range map[string]struct {
		hosts hypervisortest.HostOptions
		allow []maint.Means
		limit uint64 // MiB/s
		moves bool
		notes []string
	}{
		"it is all that is allowed": {allow: []maint.Means{maint.MeansPostCopy}, moves: true, notes: []string{goesOn}},
		"it is not allowed":         {notes: []string{"it may end with a pause of 300ms"}},
		"after the limit is lifted": {allow: []maint.Means{maint.MeansPostCopy, maint.MeansBandwidth}, limit: 20, moves: true,
			notes: []string{"the limit of its bandwidth is lifted", goesOn}},
		"after it was slowed down": {allow: []maint.Means{maint.MeansSlow, maint.MeansPostCopy}, moves: true,
			notes: []string{"begun anew, with the guest slowed down", "it may end with a pause", "slowed by 99 %", "the guest was slowed down by up to 99 %"}},
		"several connections exclude it": {allow: []maint.Means{maint.MeansParallel, maint.MeansPostCopy}, moves: true,
			notes: []string{"begun anew, by 4 connections", "can go on as post-copy, and it is begun anew without that: ", "begun anew, by one connection, to go on as post-copy", goesOn}},
		"a newer QEMU takes both": {hosts: hypervisortest.HostOptions{QEMU: "10.1.0"}, allow: []maint.Means{maint.MeansParallel, maint.MeansPostCopy}, moves: true,
			notes: []string{"begun anew, by 4 connections", goesOn}},
		"the destination cannot": {hosts: hypervisortest.HostOptions{NoPostCopy: true}, allow: []maint.Means{maint.MeansPostCopy},
			notes: []string{"begun anew without that: ", "it may end with a pause of 300ms"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubbleOn(t, test.hosts, func(t *testing.T, x *bench) {
				x.w.SetCopy(fast)
				x.MaxPause, x.Allow, x.Params.BandwidthMiBs = 300*time.Millisecond, test.allow, test.limit
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
				defer cancel()
				err := x.Perform(ctx, t.Context(), x.page(PhasePerform))
				x.said(t, test.notes...)
				if test.moves {
					if err != nil {
						t.Fatal(err)
					}
					x.notes = nil
					x.hasMoved(t)
					x.said(t)
					if r, err := x.Measure(t.Context()); err != nil || r.Copy == 0 || r.Downtime == 0 {
						t.Errorf("measured: %+v, %v", r, err)
					}
					return
				}
				if p := new(maint.Problem); !errors.As(err, &p) || p.Code != maint.CodeTimeout {
					t.Errorf("%v", err)
				}
				if g, err := x.a.Guest(t.Context(), x.UUID); err != nil || g.State != maint.GuestRunning {
					t.Errorf("the guest is %+v, %v", g, err)
				}
			})
		})
	}
}

// inPostCopy calls f, in a goroutine, when the guest has been started on the destination.
func (x *bench) inPostCopy(f func()) {
	x.w.OnPhase(func(_ string, p hypervisortest.Phase) {
		if p == hypervisortest.PhasePostCopy {
			go f()
		}
	})
}

// However the way between the hosts breaks in post-copy, and for however long, the guest
// arrives in the end: by itself while QEMU hopes for it, and else since it is resumed. An
// abort and the end of the operation's time change nothing.
func TestPostCopyBroken(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		strike  func(x *bench)
		abort   bool
		trouble bool // is told of
		unheld  bool // the destination cannot hold its connection
		notes   []string
		verify  []string
	}{
		"cut for a moment": {strike: func(x *bench) { x.a.CutLAN(); time.Sleep(20 * time.Second); x.a.RestoreLAN() }},
		"cut for longer than libvirt waits": {strike: func(x *bench) { x.a.CutLAN(); time.Sleep(2 * time.Minute); x.a.RestoreLAN() }, trouble: true,
			notes: []string{"the way to b broke in post-copy", "libvirt has lost sight of post-copy, and QEMU has not", "post-copy has come to its end, "}, verify: []string{"removed the definition that was left on a"}},
		"cut for longer than TCP waits": {strike: func(x *bench) { x.a.CutLAN(); time.Sleep(2 * time.Hour); x.a.RestoreLAN() }, trouble: true,
			notes: []string{"the way to b broke in post-copy", "libvirt has lost sight of post-copy, and QEMU has not", "post-copy has come to its end, "}, verify: []string{"removed the definition"}},
		"cut for longer than TCP waits, and only the source notices": {strike: func(x *bench) { x.a.CutLAN(); time.Sleep(20 * time.Minute); x.a.RestoreLAN() }, trouble: true, unheld: true,
			notes: []string{"may not outlive a cut network: not permitted", "the way to b broke in post-copy", "libvirt has lost sight of post-copy, and QEMU has not", "at attempt 1,", "at attempt 2,", "at attempt 4,", "at attempt 8,", "post-copy has come to its end, "}},
		"connection reset": {strike: func(x *bench) { x.a.BreakPostCopy(x.t, x.UUID) },
			notes: []string{"the way to b broke in post-copy", "post-copy has come to its end, "}},
		"source's libvirt killed":      {strike: func(x *bench) { x.a.KillLibvirt(); time.Sleep(time.Second); x.a.RestartLibvirt() }, trouble: true, verify: []string{"removed the definition"}},
		"destination's libvirt killed": {strike: func(x *bench) { x.b.host.KillLibvirt(); time.Sleep(5 * time.Second); x.b.host.RestartLibvirt() }, trouble: true, notes: []string{"the way to b broke in post-copy", "libvirt has lost sight of post-copy, and QEMU has not", "post-copy has come to its end, "}, verify: []string{"removed the definition"}},
		"aborted":                      {strike: func(*bench) {}, abort: true, notes: []string{"was to be aborted, but the guest is in post-copy"}},
		"aborted, and broken": {strike: func(x *bench) { x.a.BreakPostCopy(x.t, x.UUID) }, abort: true,
			notes: []string{"was to be aborted, but the guest is in post-copy", "the way to b broke in post-copy", "post-copy has come to its end"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, x *bench) {
				x.w.SetCopy(fast)
				x.t, x.MaxPause, x.Allow = t, 300*time.Millisecond, []maint.Means{maint.MeansPostCopy}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				x.inPostCopy(func() {
					time.Sleep(time.Second)
					if test.abort {
						cancel()
						time.Sleep(time.Second)
					}
					test.strike(x)
				})
				if test.unheld {
					x.b.hold = func(context.Context) error { return errors.New("not permitted") }
				}
				told, last := false, (*maint.Problem)(nil)
				x.Trouble = func(p *maint.Problem) {
					last = p
					told = told || p != nil && p.Code == maint.CodePostCopy && p.Remedy != ""
				}
				if err := x.Perform(ctx, t.Context(), x.page(PhasePerform)); err != nil {
					t.Fatal(err)
				}
				if told != test.trouble || last != nil {
					t.Errorf("troubles were told of: %v; now: %v", told, last)
				}
				notes := append([]string{"it goes on as post-copy"}, test.notes...)
				if test.abort {
					notes = append(notes, "had already moved")
				}
				x.said(t, notes...)
				x.notes = nil
				x.hasMoved(t)
				x.said(t, test.verify...)
			})
		})
	}
}

// What only a person can settle is said, and nothing is touched.
func TestPostCopyLost(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		strike func(x *bench)
		reason string
		remedy string
	}{
		"destination's QEMU killed": {func(x *bench) { x.b.host.KillQEMU(x.t, x.UUID) }, "has ended on b in post-copy, while part of its memory was on a", "never resume it on a"},
		"source's QEMU killed":      {func(x *bench) { x.a.KillQEMU(x.t, x.UUID) }, "the part of its memory that was on a is gone", "as after a power cut"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, x *bench) {
				x.w.SetCopy(fast)
				x.t, x.MaxPause, x.Allow = t, 300*time.Millisecond, []maint.Means{maint.MeansPostCopy}
				x.inPostCopy(func() { time.Sleep(time.Second); test.strike(x) })
				err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform))
				p := new(maint.Problem)
				if !errors.Is(err, ErrUnsettled) || !errors.As(err, &p) || !strings.Contains(p.Reason, test.reason) || !strings.Contains(p.Remedy, test.remedy) {
					t.Errorf("%v; %+v", err, p)
				}
				for _, h := range []*hypervisortest.Host{x.a, x.b.host} {
					if g, err := h.Guest(t.Context(), x.UUID); err == nil && g.State == maint.GuestRunning && g.Reason != reasonPostCopyFailed {
						t.Errorf("on %s it is %+v", h.Name(), g)
					}
				}
			})
		})
	}
}

// An agent that dies anywhere in a post-copy leaves one that the next agent sees to its
// end, broken or not.
func TestPostCopyOfTheNextAgent(t *testing.T) {
	t.Parallel()
	for after := time.Second; after < 90*time.Second; after += 1300 * time.Millisecond {
		t.Run(fmt.Sprint(after), func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, x *bench) {
				x.w.SetCopy(fast)
				x.t, x.MaxPause, x.Allow = t, 300*time.Millisecond, []maint.Means{maint.MeansPostCopy}
				x.inPostCopy(func() {
					time.Sleep(3 * time.Second)
					x.a.BreakPostCopy(x.t, x.UUID)
					x.a.CutLAN()
					time.Sleep(time.Minute)
					x.a.RestoreLAN()
				})
				life, die := context.WithTimeout(t.Context(), after)
				defer die()
				if err := x.Perform(life, life, x.page(PhasePerform)); err != nil && life.Err() == nil {
					t.Fatal(err)
				}
				if err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform)); err != nil {
					t.Fatal(err)
				}
				x.hasMoved(t)
			})
		})
	}
}

// deaf is a host whose first word on post-copy is lost, and whose libvirt then refuses it.
type deaf struct {
	here
	asked *int
}

func (d deaf) StartPostCopy(context.Context, string) error {
	if *d.asked++; *d.asked == 1 {
		return maint.ErrHypervisorDown
	}
	return fmt.Errorf("QEMU has no post-copy: %w", maint.ErrNoJob)
}

// A post-copy of which it is not known whether it was begun, and that is refused from then
// on, has not begun: the copy goes on as it is, and can be cancelled.
func TestPostCopyRefusedForGood(t *testing.T) {
	t.Parallel()
	for name, restart := range map[string]bool{"in this life": false, "in the next one": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, x *bench) {
				x.w.SetCopy(fast)
				x.MaxPause, x.Allow = 300*time.Millisecond, []maint.Means{maint.MeansPostCopy}
				asked := 0
				x.Source = deaf{here{x.a}, &asked}
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // while it is not known
				defer cancel()
				if restart {
					life, die := context.WithTimeout(t.Context(), 20*time.Second)
					defer die()
					if err := x.Perform(ctx, life, x.page(PhasePerform)); asked < 2 || !errors.Is(err, context.DeadlineExceeded) {
						t.Fatalf("asked %d times: %v", asked, err)
					}
				}
				err := x.Perform(ctx, t.Context(), x.page(PhasePerform))
				if p := new(maint.Problem); !errors.As(err, &p) || p.Code != maint.CodeTimeout {
					t.Errorf("%v", err)
				}
				if g, err := x.a.Guest(t.Context(), x.UUID); err != nil || g.State != maint.GuestRunning || g.Job != "" {
					t.Errorf("the guest is %+v, %v", g, err)
				}
				if notes := strings.Join(x.notes, "\n"); !strings.Contains(notes, "there is no way back, and it goes on") || !strings.Contains(notes, "post-copy is refused, and the copy goes on as it is") {
					t.Error(notes)
				}
			})
		})
	}
}
