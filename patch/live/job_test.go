package live_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/live"
	"belay/patch/live/livetest"
)

func TestApplyReplaceRevert(t *testing.T) {
	t.Parallel()
	for name, options := range kernels {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, options())
			b.apply("fix_1")
			if b.Loaded() != "fix_1" || b.known.Active == nil || b.known.Active.Name != "fix_1" || b.result.Transition <= 0 || b.result.Soaked <= 0 {
				t.Fatalf("loaded %q, known %+v, result %+v", b.Loaded(), b.known, b.result)
			}
			b.apply("fix_2") // the first's module is unloaded
			if b.Loaded() != "fix_2" || b.known.Active.Name != "fix_2" || b.result.Replaced != "fix_1" {
				t.Fatalf("loaded %q, known %+v, result %+v", b.Loaded(), b.known, b.result)
			}
			j, ctx := b.job(maint.PatchRequest{Action: maint.PatchRevert, Name: "fix_2"}), t.Context()
			if err := errors.Join(j.PreflightRevert(ctx, b.notes.of(live.PhasePreflight)), j.Withdraw(ctx, b.notes.of(live.PhaseWithdraw)), j.Finish(ctx, b.notes.of(live.PhaseFinish))); err != nil {
				t.Fatal(err)
			}
			if b.Loaded() != "" || b.known.Active != nil {
				t.Errorf("loaded %q, known %+v", b.Loaded(), b.known)
			}
			refusal(t, j.PreflightRevert(ctx, b.notes.of(live.PhasePreflight)), maint.CodeNothing)
		})
	}
}

// TestLooksAtSysfs: what newer kernels show is told where it is there.
func TestLooksAtSysfs(t *testing.T) {
	t.Parallel()
	for name, options := range kernels {
		b := newBench(t, options())
		b.apply("fix_1")
		v, err := b.View(t.Context(), b.known)
		if err != nil {
			t.Fatal(err)
		}
		if len(v.Loaded) != 1 || !v.Loaded[0].Whole() || v.Loaded[0].Kept == nil || v.Release != b.Release {
			t.Fatalf("%s: %+v", name, v)
		}
		p := v.Loaded[0]
		if o := p.Objects; len(o) != 1 || o[0].Name != "vmlinux" || !o[0].Patched || len(o[0].Functions) != 1 || o[0].Functions[0] != "meminfo_proc_show,1" {
			t.Errorf("%s: objects are %+v", name, o)
		}
		if (p.Replace != nil) != b.Replace || (p.StackOrder != nil) != b.StackOrder || b.Replace && !*p.Replace || b.StackOrder && *p.StackOrder != 1 {
			t.Errorf("%s: replace %v, stack order %v", name, p.Replace, p.StackOrder)
		}
	}
}

// TestStalledTransition: who holds it up is named, and then it is turned round.
func TestStalledTransition(t *testing.T) {
	t.Parallel()
	for _, before := range []string{"", "fix_0"} {
		b := newBench(t, livetest.Debian12())
		if before != "" {
			b.apply(before)
		}
		b.Hold(120, "meminfo_proc_show")
		b.Host.Timing.Limit = 300 * time.Millisecond
		err := b.run(b.begin(b.vendor.Make("fix_1", b.Release, b.Version, nil)))
		p := problem(t, err)
		if p.Code != maint.CodeStalled || !strings.Contains(p.Reason, "kernel thread kworker/0:120 (task 120), in meminfo_proc_show") {
			t.Errorf("the problem is %v", p)
		}
		for _, says := range []string{"may hold up the transition: kernel thread kworker/0:120", "the transition still waits for kernel thread"} {
			if !strings.Contains(b.notes.text(), says) {
				t.Errorf("the notes are %q, and lack %q", b.notes.text(), says)
			}
		}
		if b.Loaded() != before || (b.known.Active != nil) != (before != "") {
			t.Errorf("before %q, after %q, known %+v", before, b.Loaded(), b.known)
		}
	}
}

// TestTurnedRound: a transition that is aborted is turned round; what was before goes on.
func TestTurnedRound(t *testing.T) {
	t.Parallel()
	b := newBench(t, livetest.Newer())
	b.apply("fix_0")
	b.Hold(120, "worker_thread")
	ctx, cancel := context.WithCancel(t.Context())
	b.OnLoad = func(string) { cancel() }
	j := b.begin(b.vendor.Make("fix_1", b.Release, b.Version, nil))
	if err := j.Preflight(ctx, b.notes.of(live.PhasePreflight)); err != nil {
		t.Fatal(err)
	}
	if err := j.Load(ctx, b.notes.of(live.PhaseLoad)); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if b.Loaded() != "fix_0+fix_1*" {
		t.Fatalf("loaded %q", b.Loaded())
	}
	if err := j.Undo(t.Context(), b.notes.of(live.PhaseLoad)); err != nil {
		t.Fatal(err)
	}
	if b.Loaded() != "fix_0" || b.known.Active.Name != "fix_0" {
		t.Errorf("loaded %q, known %+v", b.Loaded(), b.known)
	}
}

// TestSoak: what is not well after a livepatch has it taken back, and what was before
// brought back.
func TestSoak(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		do   func(*bench)
		says string
	}{
		{"Oops", func(b *bench) { b.Say("BUG: kernel NULL pointer dereference, address: 0000000000000010") }, "NULL pointer"},
		{"warning", func(b *bench) { b.Say("WARNING: CPU: 0 PID: 1 at kernel/x.c:1 f+0x1/0x2") }, "WARNING"},
		{"taint", func(b *bench) { b.SetTaint(512) }, "taint"},
		{"guest crashed", func(b *bench) { b.guests = guests(maint.GuestShutoff, "crashed") }, "crashed"},
		{"guest stopped by an error", func(b *bench) { b.guests = guests(maint.GuestPaused, "I/O error") }, "I/O error"},
		{"guest has gone", func(b *bench) { b.guests = nil }, "it has gone"},
		{"libvirt does not answer", func(b *bench) { b.libvirt = maint.ErrHypervisorDown }, "not reachable"},
		{"health", func(b *bench) { b.health = func(context.Context) error { return errors.New("exit status 3") } }, "exit status 3"},
		{"disabled by somebody", func(b *bench) {
			b.health = func(ctx context.Context) error { return b.Machine.Enable(ctx, "fix_1", false) }
		}, "not whole any more"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, livetest.Debian12())
			b.apply("fix_0")
			b.OnLoad = func(name string) {
				if name == "fix_1" {
					c.do(b)
				}
			}
			err := b.fail("fix_1")
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("the error is %v, want it to say %q", err, c.says)
			}
			if b.Loaded() != "fix_0" || b.known.Active.Name != "fix_0" {
				t.Errorf("loaded %q, known %+v", b.Loaded(), b.known)
			}
		})
	}
	for _, c := range []struct {
		name string
		do   func(*bench)
	}{
		{"nothing", func(*bench) {}},
		{"its owner has stopped a guest", func(b *bench) { b.guests = guests(maint.GuestShutoff, "shutdown") }},
		{"a guest has moved", func(b *bench) { b.guests = nil }},
		{"somebody has paused a guest", func(b *bench) { b.guests = guests(maint.GuestPaused, "user") }},
		{"the kernel talks", func(b *bench) { b.Say("usb 1-1: new high-speed USB device") }},
	} {
		t.Run(c.name+" is fine", func(t *testing.T) {
			t.Parallel()
			b := newBench(t, livetest.Debian12())
			b.Say("WARNING: CPU: 0 PID: 1 at kernel/x.c:1 f+0x1/0x2")
			b.guests[0].Persistent = true
			b.OnLoad = func(string) { c.do(b) }
			b.apply("fix_1")
		})
	}
}

func guests(s maint.GuestState, reason string) []maint.Guest {
	return []maint.Guest{{Name: "web-1", UUID: "u1", ID: 7, State: s, Reason: reason}}
}

// fail applies a livepatch that is not to be kept.
func (b *bench) fail(name string) error {
	b.t.Helper()
	j := b.begin(b.vendor.Make(name, b.Release, b.Version, nil))
	j.Health = func(ctx context.Context) error {
		if b.health == nil {
			return nil
		}
		return b.health(ctx)
	}
	err := b.run(j)
	if err == nil {
		b.t.Fatal("nothing was found to be wrong")
	}
	return err
}

// TestHostWentDown: what was begun before a boot is not gone on with, and nothing is loaded by
// itself from then on.
func TestHostWentDown(t *testing.T) {
	t.Parallel()
	b := newBench(t, livetest.Debian12())
	b.apply("fix_0")
	b.Hold(120, "worker_thread")
	ctx, cancel := context.WithCancel(t.Context())
	b.OnLoad = func(string) { cancel() }
	j := b.begin(b.vendor.Make("fix_1", b.Release, b.Version, nil))
	if err := j.Preflight(ctx, b.notes.of(live.PhasePreflight)); err != nil {
		t.Fatal(err)
	}
	if err := j.Load(ctx, b.notes.of(live.PhaseLoad)); err == nil {
		t.Fatal("it is loaded")
	}
	b.Boot()
	j.Boot = b.BootID()
	for _, phase := range []func(context.Context, live.Scratch) error{j.Preflight, j.Load, j.Soak} {
		if p := problem(t, phase(t.Context(), b.notes.of(live.PhaseLoad))); p.Code != maint.CodeHostRebooted {
			t.Errorf("%v", p)
		}
	}
	if err := j.Undo(t.Context(), b.notes.of(live.PhaseLoad)); err != nil {
		t.Fatal(err)
	}
	if b.Loaded() != "" || b.known.Active.Name != "fix_0" || !strings.Contains(b.known.NoReload, "fix_1") {
		t.Errorf("loaded %q, known %+v", b.Loaded(), b.known)
	}
	// By hand it is loaded again, which is a reason to trust it from then on.
	b.LetGo(120)
	b.OnLoad = nil
	b.notes = &notes{data: make(map[string][]byte)}
	if err := b.run(b.job(maint.PatchRequest{Action: maint.PatchReload})); err != nil {
		t.Fatal(err)
	}
	if b.Loaded() != "fix_0" || b.known.NoReload != "" {
		t.Errorf("loaded %q, known %+v", b.Loaded(), b.known)
	}
}

func TestRevertThatStalls(t *testing.T) {
	t.Parallel()
	b := newBench(t, livetest.Debian12())
	b.apply("fix_0")
	ctx, cancel := context.WithCancel(t.Context())
	j := b.job(maint.PatchRequest{Action: maint.PatchRevert, Name: "fix_0"})
	if err := j.PreflightRevert(ctx, b.notes.of(live.PhasePreflight)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := j.Withdraw(ctx, b.notes.of(live.PhaseWithdraw)); err == nil {
		t.Fatal("an abort is not heard")
	}
	if err := j.UndoWithdraw(t.Context(), b.notes.of(live.PhaseWithdraw)); err != nil {
		t.Fatal(err)
	}
	if b.Loaded() != "fix_0" || b.known.Active == nil {
		t.Errorf("loaded %q, known %+v", b.Loaded(), b.known)
	}
}

func TestCover(t *testing.T) {
	t.Parallel()
	b := newBench(t, livetest.Debian12())
	cover := func(change string) maint.CoverageVerdict {
		v, err := b.View(t.Context(), b.known)
		if err != nil {
			t.Fatal(err)
		}
		return maint.Cover(v, change).Verdict
	}
	if got := cover("CVE-1"); got != maint.CoverageUnsure {
		t.Errorf("with nothing loaded: %s", got)
	}
	b.force("other") // nobody vouches for it
	if got := cover("CVE-1"); got != maint.CoverageUnsure {
		t.Errorf("with somebody else's: %s", got)
	}
	b = newBench(t, livetest.Debian12())
	spec := func(s *livetest.Spec) { s.Covers, s.Reboot = []string{"CVE-1"}, []string{"CVE-2"} }
	if err := b.run(b.begin(b.vendor.Make("fix_1", b.Release, b.Version, spec))); err != nil {
		t.Fatal(err)
	}
	for change, want := range map[string]maint.CoverageVerdict{"CVE-1": maint.Covered, "CVE-2": maint.NeedsReboot, "CVE-3": maint.CoverageUnsure} {
		if got := cover(change); got != want {
			t.Errorf("%s: %s, want %s", change, got, want)
		}
	}
	if err := b.Machine.Enable(t.Context(), "fix_1", false); err != nil { // on its way out
		t.Fatal(err)
	}
	if got := cover("CVE-1"); got != maint.CoverageUnsure {
		t.Errorf("in transition: %s", got)
	}
	b.Boot()
	if got := cover("CVE-1"); got != maint.CoverageUnsure {
		t.Errorf("after a boot: %s", got)
	}
}

// Of a livepatch of the same name that is another build, and of one whose functions somebody
// else's changes as well, nobody knows what it covers.
func TestCoveredByThisOneAlone(t *testing.T) {
	t.Parallel()
	const module = "sys/module/fix_1/"
	for name, c := range map[string]struct {
		do   func(b *bench)
		want maint.CoverageVerdict
	}{
		"itself":                {func(*bench) {}, maint.Covered},
		"nothing to be told by": {func(b *bench) { b.remove(module + "srcversion") }, maint.CoverageUnsure},
		"another srcversion":    {func(b *bench) { b.write(module+"srcversion", "ABCD") }, maint.CoverageUnsure},
		"stacked upon": {func(b *bench) {
			a := b.vendor.Make("other", b.Release, b.Version, func(s *livetest.Spec) { s.Cumulative = false })
			if err := b.Machine.Load(t.Context(), a); err != nil {
				t.Fatal(err)
			}
		}, maint.CoverageUnsure},
		"beside another": {func(b *bench) {
			a := b.vendor.Make("other", b.Release, b.Version, func(s *livetest.Spec) { s.Cumulative, s.Functions = false, []string{"vmlinux/f"} })
			if err := b.Machine.Load(t.Context(), a); err != nil {
				t.Fatal(err)
			}
		}, maint.Covered},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, livetest.Debian12())
			if err := b.run(b.begin(b.vendor.Make("fix_1", b.Release, b.Version, func(s *livetest.Spec) { s.Covers = []string{"CVE-1"} }))); err != nil {
				t.Fatal(err)
			}
			c.do(b)
			v, err := b.View(t.Context(), b.known)
			if err != nil {
				t.Fatal(err)
			}
			if got := maint.Cover(v, "CVE-1"); got.Verdict != c.want {
				t.Errorf("%+v, want %s", got, c.want)
			}
		})
	}
}
