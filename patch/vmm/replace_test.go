package vmm_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/vmm"
)

func TestReplace(t *testing.T) {
	t.Parallel()
	for _, method := range methods {
		for _, transient := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, transient %t", method, transient), func(t *testing.T) {
				t.Parallel()
				b := newBed(t, func(g *maint.Guest) { g.Persistent, g.Autostart = !transient, !transient })
				for range 2 {
					pid, was := b.PID(b.uuid), b.Progress(b.uuid)
					b.SetQEMU("10.0.2")
					var calls []string
					r, n := b.replacement(method), newNotebook()
					r.BeforePause = func(context.Context) error { calls = append(calls, "before "+string(b.state())); return nil }
					r.PointOfNoReturn = func(context.Context) error { calls = append(calls, "no return "+string(b.state())); return nil }
					if err := run(t.Context(), r, n); err != nil {
						t.Fatal(err)
					}
					b.runs()
					if b.PID(b.uuid) == pid || b.Progress(b.uuid) <= was {
						t.Errorf("process %d, was %d; progress %d, was %d", b.PID(b.uuid), pid, b.Progress(b.uuid), was)
					}
					want := []string{"before running", "no return paused"}
					if method == maint.VMMCopy {
						want[1] = "no return running" // libvirt pauses it
					}
					if fmt.Sprint(calls) != fmt.Sprint(want) {
						t.Errorf("the caller heard %q, want %q", calls, want)
					}
					res, err := r.Measure(t.Context(), n)
					if err != nil || res.Pause <= 0 || res.Attempts != 1 || res.Pauses != 1 || res.Method != method || res.NewQEMU != "10.0.2" || res.OldQEMU == "" || len(res.Choices) == 0 {
						t.Errorf("measured %+v, %v", res, err)
					}
					g, err := b.Guest(t.Context(), b.uuid)
					if err != nil || g.Persistent == transient || g.Autostart == transient {
						t.Errorf("it was transient %t, and is %+v, %v", transient, g, err)
					}
				}
			})
		}
	}
}

// Nothing that is refused, or that fails before the old QEMU ends, takes the
// guest anywhere.
func TestFailsBeforeTheEndOfTheOldQEMU(t *testing.T) {
	t.Parallel()
	no := func(context.Context) error { return errors.New("no leash") }
	for name, c := range map[string]struct {
		method maint.VMMMethod
		change func(b *bed, r *vmm.Replacement)
	}{
		"before the pause":       {maint.VMMInPlace, func(_ *bed, r *vmm.Replacement) { r.BeforePause = no }},
		"before the pause, copy": {maint.VMMCopy, func(_ *bed, r *vmm.Replacement) { r.BeforePause = no }},
		"leash fired":            {maint.VMMInPlace, func(_ *bed, r *vmm.Replacement) { r.PointOfNoReturn = no }},
		"leash fired, and resumed": {maint.VMMInPlace, func(b *bed, r *vmm.Replacement) {
			r.PointOfNoReturn = func(ctx context.Context) error { return b.Resume(ctx, b.uuid) }
		}},
		"a device is plugged": {maint.VMMInPlace, func(b *bed, r *vmm.Replacement) {
			r.BeforePause = func(context.Context) error {
				b.SetXML(b.t, b.uuid, func(x string) string {
					return strings.Replace(x, "</devices>", "<input type='tablet'/></devices>", 1)
				})
				return nil
			}
		}},
		"migration fails": {maint.VMMInPlace, func(b *bed, _ *vmm.Replacement) { b.FailMigrate = true }},
		"migration hangs": {maint.VMMInPlace, func(b *bed, _ *vmm.Replacement) { b.HangMigrate = true }},
		"save fails":      {maint.VMMCopy, func(b *bed, _ *vmm.Replacement) { b.FailSaves = 1 }},
		"suspend fails": {maint.VMMInPlace, func(b *bed, _ *vmm.Replacement) {
			b.Fault("Suspend", hypervisortest.Fault{Err: errors.New("x"), Times: 1})
		}},
		"suspend works, and fails": {maint.VMMInPlace, func(b *bed, _ *vmm.Replacement) {
			b.Fault("Suspend", hypervisortest.Fault{Err: errors.New("x"), After: true, Times: 1})
		}},
		"resume fails for a while": {maint.VMMInPlace, func(b *bed, _ *vmm.Replacement) {
			b.FailMigrate = true
			b.Fault("Resume", hypervisortest.Fault{Err: errors.New("x"), Times: 2})
		}},
		"libvirt away for a moment": {maint.VMMInPlace, func(b *bed, r *vmm.Replacement) {
			b.FailMigrate = true
			b.Fault("Guest", hypervisortest.Fault{Err: maint.ErrHypervisorDown, Times: 2})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			pid := b.PID(b.uuid)
			r, n := b.replacement(c.method), newNotebook()
			c.change(b, r)
			err := run(t.Context(), r, n)
			if err == nil || errors.Is(err, vmm.ErrStuck) {
				t.Fatalf("ended with %v", err)
			}
			b.Heal("Guest")
			b.runs()
			if b.PID(b.uuid) != pid {
				t.Error("its QEMU is another")
			}
			if got := b.Bandwidth(b.uuid); got != 128<<20 {
				t.Errorf("bandwidth is %d", got)
			}
			// and it can be tried again
			b.FailMigrate, b.HangMigrate = false, false
			if err := run(t.Context(), b.replacement(c.method), newNotebook()); err != nil {
				t.Fatal(err)
			}
			b.runs()
		})
	}
}

// An abort or a deadline before the old QEMU ends has the guest run on; after
// that it changes nothing any more.
func TestAbort(t *testing.T) {
	t.Parallel()
	for _, method := range methods {
		t.Run(string(method), func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			ctx, abort := context.WithCancel(t.Context())
			r := b.replacement(method)
			r.BeforePause = func(context.Context) error { abort(); return nil }
			pid := b.PID(b.uuid)
			if err := run(ctx, r, newNotebook()); !errors.Is(err, context.Canceled) || b.PID(b.uuid) != pid {
				t.Fatalf("aborted before the pause: %v", err)
			}
			b.runs()

			ctx, abort = context.WithCancel(t.Context())
			m := &mortal{Host: b.Machine, at: func(call string) {
				if call == "after QuitMigrated" || call == "before Save" {
					abort()
				}
			}}
			r = b.replacement(method)
			r.Host = m
			if err := run(ctx, r, newNotebook()); b.PID(b.uuid) == pid || err != nil && !errors.Is(err, context.Canceled) {
				t.Fatalf("aborted after the old QEMU's end: %v", err)
			}
			if b.state() != maint.GuestRunning || len(b.Damage()) > 0 {
				t.Errorf("the guest is %s, %q", b.state(), b.Damage())
			}
		})
	}
}

// A state that cannot be loaded, or a QEMU that does not start, is tried again.
func TestNewQEMUFails(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		method        maint.VMMMethod
		starts, loads int
	}{
		"starts":       {maint.VMMInPlace, 2, 0},
		"loads":        {maint.VMMInPlace, 0, 2},
		"one and one":  {maint.VMMInPlace, 1, 1},
		"copy, starts": {maint.VMMCopy, 2, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			b.FailStarts, b.FailLoads = c.starts, c.loads
			r, n := b.replacement(c.method), newNotebook()
			if err := run(t.Context(), r, n); err != nil {
				t.Fatal(err)
			}
			b.runs()
			if res, err := r.Measure(t.Context(), n); err != nil || res.Attempts != 3 || len(n.Notes) != 2 {
				t.Errorf("%+v, %v; notes %q", res, err, n.Notes)
			}
		})
	}
}

// When it never works all is kept, nobody else can start the guest, and another
// operation goes on once the reason is gone.
func TestStuckAndTakenUp(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		method maint.VMMMethod
		state  maint.GuestState
		breakIt,
		heal func(b *bed)
	}{
		"loads": {maint.VMMInPlace, maint.GuestShutoff,
			func(b *bed) { b.FailLoads = 100 }, func(b *bed) { b.FailLoads = 0 }},
		"starts": {maint.VMMInPlace, maint.GuestShutoff,
			func(b *bed) { b.FailStarts = 100 }, func(b *bed) { b.FailStarts = 0 }},
		"copy": {maint.VMMCopy, maint.GuestShutoff,
			func(b *bed) { b.FailStarts = 100 }, func(b *bed) { b.FailStarts = 0 }},
		"lease": {maint.VMMInPlace, maint.GuestPaused,
			func(b *bed) { b.TakeLease(b.t, b.uuid) }, func(b *bed) { b.FreeLease(b.t, b.uuid) }},
		"lease, copy": {maint.VMMCopy, maint.GuestPaused,
			func(b *bed) { b.TakeLease(b.t, b.uuid) }, func(b *bed) { b.FreeLease(b.t, b.uuid) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			r := b.replacement(c.method)
			r.PointOfNoReturn = func(context.Context) error { c.breakIt(b); return nil }
			err := run(t.Context(), r, newNotebook())
			var p *maint.Problem
			if !errors.Is(err, vmm.ErrStuck) || !errors.As(err, &p) || p.Code != maint.CodeBetween || !strings.Contains(p.Remedy, "belay replace-vmm web-1") {
				t.Fatalf("ended with %v", err)
			}
			if b.state() != c.state {
				t.Fatalf("the guest is %s", b.state())
			}
			kept, err := b.Places().Kept()
			if err != nil || len(kept) != 1 || kept[0] != (vmm.Kept{Op: r.Op, Guest: "web-1", UUID: b.uuid}) {
				t.Errorf("kept: %+v, %v", kept, err)
			}
			if c.state == maint.GuestShutoff {
				if err := b.Boot(t.Context(), t, b.uuid); err == nil || !strings.Contains(err.Error(), "belay replace-vmm web-1") {
					t.Fatalf("somebody else could start it: %v", err)
				}
			}
			// Whoever asks for no method is given this one.
			f, err := vmm.Survey(t.Context(), b.Machine, b.Places(), b.uuid)
			if err != nil {
				t.Fatal(err)
			}
			if choice, err := vmm.Choose("web-1", vmm.Choices(f), "", 0); err != nil || choice.Method != c.method {
				t.Errorf("the choice is %+v, %v", choice, err)
			}
			// It goes on failing, and nothing is lost by that.
			if err := run(t.Context(), b.replacement(c.method), newNotebook()); !errors.Is(err, vmm.ErrStuck) {
				t.Fatalf("taken up, ended with %v", err)
			}
			c.heal(b)
			n := newNotebook()
			if err := run(t.Context(), b.replacement(c.method), n); err != nil || len(n.Notes) == 0 {
				t.Fatalf("taken up: %v, notes %q", err, n.Notes)
			}
			b.runs()
		})
	}
}

// A hook that is not run any more, or a guest that somebody else has started, is
// noticed before anything is poured into the wrong place.
func TestHookGone(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	r := b.replacement(maint.VMMInPlace)
	r.PointOfNoReturn = func(context.Context) error { b.NoHook = true; return nil }
	if err := run(t.Context(), r, newNotebook()); !errors.Is(err, vmm.ErrStuck) || !strings.Contains(err.Error(), "did not run the hook") {
		t.Fatalf("ended with %v", err)
	}
	if b.state() != maint.GuestShutoff {
		t.Fatalf("the guest is %s", b.state())
	}
	b.NoHook = false
	if err := run(t.Context(), b.replacement(maint.VMMInPlace), newNotebook()); err != nil {
		t.Fatal(err)
	}
	b.runs()
}

func TestStartedByOthers(t *testing.T) {
	t.Parallel()
	for _, method := range methods {
		t.Run(string(method), func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			b.FailStarts = 1
			r := b.replacement(method)
			r.Host = &mortal{Host: b.Machine, at: func(call string) {
				if call == "after CreatePaused" || call == "after Restore" { // it failed
					b.NoHook = true
					if err := b.Boot(context.Background(), t, b.uuid); err != nil {
						t.Error(err)
					}
				}
			}}
			pid := 0
			err := run(t.Context(), r, newNotebook())
			pid = b.PID(b.uuid)
			var p *maint.Problem
			if !errors.Is(err, vmm.ErrStuck) || !errors.As(err, &p) || p.Code != maint.CodeStarted {
				t.Fatalf("ended with %v", err)
			}
			if d := b.Damage(); len(d) != 1 || b.state() != maint.GuestRunning || b.PID(b.uuid) != pid {
				t.Errorf("the other's guest is %s; %q", b.state(), d)
			}
		})
	}
}

// A new QEMU that dies while a lease keeps its guest from running is replaced:
// the guest has not run in it.
func TestNewQEMUDiesWaitingForALease(t *testing.T) {
	t.Parallel()
	for _, method := range methods {
		b := newBed(t)
		r := b.replacement(method)
		r.PointOfNoReturn = func(context.Context) error { b.TakeLease(t, b.uuid); return nil }
		if err := run(t.Context(), r, newNotebook()); !errors.Is(err, vmm.ErrStuck) || !strings.Contains(err.Error(), "virsh resume") {
			t.Fatalf("%s: ended with %v", method, err)
		}
		b.Stop(t, b.uuid, "crashed")
		b.FreeLease(t, b.uuid)
		if err := run(t.Context(), b.replacement(method), newNotebook()); err != nil {
			t.Fatalf("%s: %v", method, err)
		}
		b.runs()
	}
}

// A guest that was resumed and whose vCPUs use no time is not said to run.
func TestNoSignOfLife(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.answer("query-cpus-fast", []any{})
	r := b.replacement(maint.VMMInPlace)
	r.Impatient()
	var p *maint.Problem
	n := newNotebook()
	if err := run(t.Context(), r, n); !errors.As(err, &p) || p.Code != maint.CodeUnverified || !n.done[vmm.PhaseSwap] {
		t.Fatalf("ended with %v", err)
	}
	b.Intercept(nil)
	if err := run(t.Context(), r, n); err != nil { // taken up
		t.Fatal(err)
	}
	b.runs()
}

// A guest that its owner pauses as soon as it runs is the owner's affair.
func TestPausedByItsOwner(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	r, n := b.replacement(maint.VMMInPlace), newNotebook()
	r.Host = &mortal{Host: b.Machine, at: func(call string) {
		if call == "before query-cpus-fast" {
			b.Pause(t, b.uuid)
		}
	}}
	if err := run(t.Context(), r, n); err != nil || len(n.Notes) != 1 || !strings.Contains(n.Notes[0], "not Belay's doing") {
		t.Fatalf("ended with %v, notes %q", err, n.Notes)
	}
	b.tidy()
}

// What is received is bounded, and ends with its context.
func TestReceive(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	ln, path, err := vmm.Listen(b.Places(), 1, "s.sock", os.Getuid(), os.Getgid())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if info, err := os.Stat(filepath.Join(b.Root, path)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	got := vmm.Receive(ctx, ln)
	conn, err := net.Dial("unix", filepath.Join(b.Root, path))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("some")); err != nil {
		t.Fatal(err)
	}
	cancel() // before its end
	if state, err := got.Result(); err == nil {
		t.Errorf("half a state was taken: %q", state)
	}
}

// A guest that its user shuts down before its turn is not started again.
func TestEndedByItself(t *testing.T) {
	t.Parallel()
	for _, method := range methods {
		for _, transient := range []bool{false, true} {
			b := newBed(t, func(g *maint.Guest) { g.Persistent = !transient })
			r := b.replacement(method)
			r.Host = &mortal{Host: b.Machine, at: func(call string) {
				if call == "before Guest" && b.PID(b.uuid) != 0 {
					if kept, _ := b.Places().Kept(); len(kept) > 0 {
						b.Stop(t, b.uuid, "shutdown")
					}
				}
			}}
			if err := run(t.Context(), r, newNotebook()); err == nil || errors.Is(err, vmm.ErrStuck) {
				t.Fatalf("ended with %v", err)
			}
			if b.state() != maint.GuestShutoff {
				t.Errorf("the guest is %s", b.state())
			}
			b.tidy()
		}
	}
}
