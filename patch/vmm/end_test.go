package vmm_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/vmm"
)

// A QEMU that was told to quit is never gone back to, whatever the answer was, and however long it takes: it
// may end in any moment, and with it the guest.
func TestQuitIsNoWayBack(t *testing.T) {
	t.Parallel()
	late := context.DeadlineExceeded
	for name, c := range map[string]func(b *bed, r *vmm.Replacement){
		"it is refused at first": func(b *bed, _ *vmm.Replacement) {
			b.Fault("QuitMigrated", hypervisortest.Fault{Err: errors.New("x"), Times: 2})
		},
		"the answer is late": func(b *bed, _ *vmm.Replacement) {
			b.OnQuit = func(gone, down func()) error { gone(); down(); return late }
		},
		"the answer is late, and the end": func(b *bed, _ *vmm.Replacement) {
			told := 0
			b.OnQuit = func(gone, down func()) error {
				if told++; told == 3 {
					gone()
					down()
				}
				return late
			}
		},
		"libvirt is slow": func(b *bed, _ *vmm.Replacement) {
			b.OnQuit = func(gone, down func()) error {
				gone()
				time.AfterFunc(20*time.Millisecond, down)
				return nil
			}
		},
		"QEMU is slow": func(b *bed, _ *vmm.Replacement) {
			b.OnQuit = func(gone, down func()) error {
				time.AfterFunc(20*time.Millisecond, func() { gone(); down() })
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			pid := b.PID(b.uuid)
			r := b.replacement(maint.VMMInPlace)
			c(b, r)
			if err := run(t.Context(), r, newNotebook()); err != nil || b.PID(b.uuid) == pid {
				t.Errorf("%v; its QEMU is %d, was %d", err, b.PID(b.uuid), pid)
			}
			b.runs()
		})
	}
}

// A QEMU that does not end in the time there is has all of the guest be kept, until it has.
func TestDoesNotQuit(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		quit func(gone, down func()) error
		then func(b *bed, end func())
		runs bool // in its old QEMU
	}{
		"it ends later":        {func(_, _ func()) error { return nil }, func(_ *bed, end func()) { end() }, false},
		"it was not told":      {func(_, _ func()) error { return errors.New("x") }, func(*bed, func()) {}, false},
		"libvirt knows it yet": {func(gone, _ func()) error { gone(); return nil }, func(_ *bed, end func()) { end() }, false},
		"libvirt says so": {func(_, _ func()) error { return nil }, func(b *bed, end func()) {
			b.Edit(b.t, b.uuid, func(g *maint.Guest) { g.State = maint.GuestShutdown })
			end()
		}, false},
		"somebody resumes it": {func(_, _ func()) error { return errors.New("x") }, func(b *bed, _ func()) {
			if err := b.Resume(b.t.Context(), b.uuid); err != nil {
				b.t.Fatal(err)
			}
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			pid := b.PID(b.uuid)
			r, n := b.replacement(maint.VMMInPlace), newNotebook()
			r.GivesUp(30 * time.Millisecond)
			var end func()
			b.OnQuit = func(gone, down func()) error {
				end = func() { gone(); down() }
				return c.quit(gone, down)
			}
			if err := run(t.Context(), r, n); !errors.Is(err, vmm.ErrStuck) || b.state() != maint.GuestPaused {
				t.Fatalf("%v; it is %s", err, b.state())
			}
			b.OnQuit = nil
			c.then(b, end)
			again := b.replacement(maint.VMMInPlace)
			again.Op = r.Op
			err := run(t.Context(), again, n)
			if moved := b.PID(b.uuid) != pid; moved == c.runs || moved != (err == nil) || errors.Is(err, vmm.ErrStuck) {
				t.Errorf("%v; in a new QEMU: %t", err, moved)
			}
			b.runs()
		})
	}
}

// Called off when the guest has left its old QEMU, it is not left off.
func TestBackFromBetween(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"before QuitMigrated", "after QuitMigrated", "before CreatePaused"} {
		b := newBed(t)
		r, n := b.replacement(maint.VMMInPlace), newNotebook()
		host := r.Host
		r.Host = &mortal{Host: host, at: func(call string) {
			if call == at {
				panic(errKilled)
			}
		}}
		func() {
			defer func() { _ = recover() }()
			t.Errorf("was to be killed, and ended with %v", run(t.Context(), r, n))
		}()
		again := b.replacement(maint.VMMInPlace)
		again.Op = r.Op
		if err := again.Back(t.Context(), n); !errors.Is(err, vmm.ErrStuck) || b.state() != maint.GuestRunning {
			t.Errorf("killed %s: %v; it is %s", at, err, b.state())
		}
		if err := run(t.Context(), b.replacement(maint.VMMInPlace), newNotebook()); err != nil {
			t.Errorf("killed %s: %v", at, err)
		}
		b.runs()
	}
}

// leavesMemory has a save of the guest be without its memory, as a Belay that died may have left it.
func (b *bed) leavesMemory() {
	b.t.Helper()
	on := map[string]any{"capabilities": []map[string]any{{"capability": "x-ignore-shared", "state": true}}}
	if _, err := b.QMP(b.t.Context(), b.uuid, "migrate-set-capabilities", on); err != nil {
		b.t.Fatal(err)
	}
}

// A guest does not run for a moment in a QEMU in which a save, by whomever, would leave its memory behind; and
// Belay saves none so.
func TestTakesItsMemoryAlong(t *testing.T) {
	t.Parallel()
	t.Run("in place", func(t *testing.T) {
		t.Parallel()
		b := newBed(t)
		r := b.replacement(maint.VMMInPlace)
		host, resumed := r.Host, false
		r.Host = &mortal{Host: host, at: func(call string) {
			if call == "before Resume" {
				if resumed = true; b.IgnoresShared(b.uuid) {
					t.Error("its memory would be left behind")
				}
			}
		}}
		if err := run(t.Context(), r, newNotebook()); err != nil || !resumed {
			t.Error(err)
		}
		b.runs()
	})
	t.Run("copied", func(t *testing.T) {
		t.Parallel()
		b := newBed(t)
		b.leavesMemory()
		if err := run(t.Context(), b.replacement(maint.VMMCopy), newNotebook()); err != nil {
			t.Error(err)
		}
		b.runs()
	})
	t.Run("QEMU does not say", func(t *testing.T) {
		t.Parallel()
		b := newBed(t)
		b.leavesMemory()
		r := b.replacement(maint.VMMCopy)
		r.BeforePause = func(context.Context) error {
			b.Fault("QMP", hypervisortest.Fault{Err: errors.New("x"), Times: 1})
			return nil
		}
		pid := b.PID(b.uuid)
		if err := run(t.Context(), r, newNotebook()); err == nil || b.PID(b.uuid) != pid || b.state() != maint.GuestRunning || len(b.Damage()) > 0 {
			t.Errorf("%v; it is %s; %q", err, b.state(), b.Damage())
		}
	})
}
