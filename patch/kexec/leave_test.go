package kexec_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/kexec"
	"belay/patch/kexec/kexectest"
)

// untilSaved begins, with a Belay that dies when all of the guest is saved, and its QEMU is still to be ended,
// which it may have been about to.
func (b *bed) untilSaved(about bool) {
	b.t.Helper()
	b.begin()
	at := "all is saved"
	if about {
		at = "QuitMigrated"
	}
	b.dies(at, func() { _ = b.Save(b.t.Context(), b.s) })
	if !b.has(".save") || b.has(".paused") == about || b.has(".quit") != about {
		b.t.Fatal("its state is not saved")
	}
}

// What is kept of a guest is out of date once it has run in its old QEMU, also if Belay was dead then,
// and the guest has ended.
func TestHasRunInItsOldQEMU(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		ends, boots bool
		want        maint.KexecFate
	}{
		"it runs":                 {false, false, maint.KexecRan},
		"it has ended":            {true, false, maint.KexecKept},
		"the host has gone down":  {false, true, maint.KexecLost},
		"it has ended, and so on": {true, true, maint.KexecLost},
	} {
		for _, about := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", about to end it: ", about), func(t *testing.T) {
				t.Parallel()
				b := newInPlaceBed(t)
				b.untilSaved(about)
				if err := b.m.Resume(t.Context(), b.uuid); err != nil {
					t.Fatal(err)
				}
				if c.ends {
					b.m.Stop(t, b.uuid, "shutdown")
				}
				if c.boots {
					b.h.Reboot()
					b.m.Boots(kexectest.Old)
				}
				g := b.mustRescue()
				if g.Fate != c.want || (b.state() == maint.GuestRunning) != (c.want == maint.KexecRan) {
					t.Errorf("%+v, %v; it is %s", g, g.Problem, b.state())
				}
				if d := b.m.Damage(); len(d) > 0 {
					t.Error(d)
				}
				if c.want == maint.KexecRan {
					b.whole()
				}
			})
		}
	}
}

// A Belay that died with the guest paused in its old QEMU, all of it saved: the next one saves it, a
// rescue has it run on, in a new QEMU once the old one was to end, and in another kernel it is restored if
// it has not run since.
func TestDiesBeforeItsQEMUEnds(t *testing.T) {
	t.Parallel()
	for name, after := range map[string]func(b *bed, about bool) maint.KexecFate{
		"belayd": func(b *bed, _ bool) maint.KexecFate {
			b.do(kexec.PhaseSave, b.Save)
			b.h.Reboot()
			b.m.Boots(kexectest.Next)
			return b.mustRescue().Fate
		},
		"belayd, which gives up": func(b *bed, about bool) maint.KexecFate {
			host, mover := b.Host, b.Mover.Host
			if !about {
				b.Host, b.Mover.Host = careful{b.m, b}, careful{b.m, b}
			}
			if problems, err := b.Back(b.t.Context(), b.s); err != nil || len(problems) > 0 {
				b.t.Errorf("%v, %v", problems, err)
			}
			b.Host, b.Mover.Host = host, mover
			return maint.KexecRestored
		},
		"a rescue": func(b *bed, about bool) maint.KexecFate {
			pid := b.m.PID(b.uuid)
			g := b.mustRescue()
			if (g.Fate == maint.KexecRan) == about || (b.m.PID(b.uuid) == pid) == about {
				b.t.Errorf("%+v", g)
			}
			return maint.KexecRestored
		},
		"its QEMU has ended": func(b *bed, _ bool) maint.KexecFate {
			if err := b.m.QuitMigrated(b.t.Context(), b.uuid); err != nil {
				b.t.Fatal(err)
			}
			return b.mustRescue().Fate
		},
		"the host has gone down": func(b *bed, _ bool) maint.KexecFate {
			b.h.Reboot()
			b.m.Boots(kexectest.Old)
			return b.mustRescue().Fate
		},
	} {
		for _, about := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", about to end it: ", about), func(t *testing.T) {
				t.Parallel()
				b := newInPlaceBed(t)
				b.untilSaved(about)
				if fate := after(b, about); fate != maint.KexecRestored {
					t.Errorf("%s", fate)
				}
				b.whole()
			})
		}
	}
}

// all checks that nothing of a guest was given up.
func (b *bed) all() {
	b.t.Helper()
	for _, ext := range []string{".save", ".quit", ".memory/pc.ram"} {
		if !b.has(ext) {
			b.t.Errorf("its %s is gone", ext)
		}
	}
}

// A QEMU that was told to quit is never gone back to, whatever the answer was, and however long it takes, if
// it does not take too long.
func TestQuitIsNoWayBack(t *testing.T) {
	t.Parallel()
	soon := 5 * time.Millisecond
	for name, quit := range map[string]func(told int, gone, down func()) error{
		"the answer is late": func(_ int, gone, down func()) error {
			gone()
			down()
			return context.DeadlineExceeded
		},
		"the answer is late, and the end": func(told int, gone, down func()) error {
			if told == 3 {
				gone()
				down()
			}
			return context.DeadlineExceeded
		},
		"libvirt is slow": func(_ int, gone, down func()) error {
			gone()
			time.AfterFunc(soon, down)
			return nil
		},
		"QEMU is slow": func(_ int, gone, down func()) error {
			time.AfterFunc(soon, func() { gone(); down() })
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newInPlaceBed(t)
			b.Pace.Healed = time.Minute
			told := 0
			b.m.OnQuit = func(gone, down func()) error { told++; return quit(told, gone, down) }
			b.save()
			if g := b.mustRescue(); g.Fate != maint.KexecRestored {
				t.Errorf("%+v, %v", g, g.Problem)
			}
			b.whole()
		})
	}
}

// A QEMU that takes too long to end has all of its guest be kept, by whomever that is found: the guest goes on
// when it has ended.
func TestDoesNotQuit(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		quit func(gone, down func()) error // of the first time
		then func(b *bed, end func())
	}{
		"libvirt is slow":             {func(gone, _ func()) error { gone(); return nil }, func(_ *bed, end func()) { end() }},
		"QEMU is slow":                {func(_, _ func()) error { return nil }, func(_ *bed, end func()) { end() }},
		"the answer is late":          {func(_, _ func()) error { return context.DeadlineExceeded }, func(_ *bed, end func()) { end() }},
		"it was not told":             {func(_, _ func()) error { return errors.New("x") }, func(b *bed, _ func()) { b.m.OnQuit = nil }},
		"its operator ends it":        {func(_, _ func()) error { return errors.New("x") }, func(b *bed, _ func()) { b.m.Stop(b.t, b.uuid, "destroyed") }},
		"belayd dies, QEMU is slow":   {func(_, _ func()) error { runtime.Goexit(); return nil }, func(_ *bed, end func()) { end() }},
		"belayd dies before it hears": {func(gone, _ func()) error { gone(); runtime.Goexit(); return nil }, func(_ *bed, end func()) { end() }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newInPlaceBed(t)
			b.begin()
			var end func()
			b.m.OnQuit = func(gone, down func()) error {
				if end != nil {
					return context.DeadlineExceeded
				}
				end = func() { gone(); down() }
				return c.quit(gone, down)
			}
			died := true
			func() {
				if err := b.Save(t.Context(), b.s); err == nil && end == nil {
					t.Error("it is saved")
				} else if err != nil {
					died = false
				}
			}()
			b.all()
			if !died {
				if _, err := b.Back(t.Context(), b.s); err == nil {
					t.Error("all is well")
				}
				b.all()
			}
			if g := b.mustRescue(); g.Fate != maint.KexecKept || g.Problem == nil || g.Problem.Code != maint.CodeBetween || b.state() != maint.GuestPaused {
				t.Errorf("%+v, %v; it is %s", g, g.Problem, b.state())
			}
			b.all()
			c.then(b, end)
			if g := b.mustRescue(); g.Fate != maint.KexecRestored {
				t.Errorf("%+v, %v", g, g.Problem)
			}
			b.whole()
		})
	}
}

// A QEMU that ends before Belay has it end is waited for, too: that libvirt has not seen it yet is no sign of
// a guest that runs on.
func TestEndsBeforeItIsTold(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	b.untilSaved(false)
	var down func()
	b.m.OnQuit = func(gone, later func()) error { gone(); down = later; return nil }
	if err := b.m.QuitMigrated(t.Context(), b.uuid); err != nil {
		t.Fatal(err)
	}
	if err := b.Save(t.Context(), b.s); err == nil {
		t.Error("it is saved")
	}
	if g := b.mustRescue(); g.Fate != maint.KexecKept || !b.has(".save") || !b.has(".memory/pc.ram") {
		t.Errorf("%+v, %v", g, g.Problem)
	}
	down()
	if g := b.mustRescue(); g.Fate != maint.KexecRestored {
		t.Errorf("%+v, %v", g, g.Problem)
	}
	b.whole()
}

// ender is a host on which a guest's owner ends it in its pause, when all of it is saved.
type ender struct{ mortal }

func (e ender) Guest(ctx context.Context, uuid string) (maint.Guest, error) {
	if name := e.Dir() + "/" + uuid; exists(name+".save") && !exists(name+".quit") && e.PID(uuid) != 0 {
		e.Stop(e.t, uuid, "destroyed")
	}
	return e.Machine.Guest(ctx, uuid)
}

// A guest that its owner ends in its pause stays off.
func TestEndedInItsPause(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]func(b *bed){
		"belayd is dead, and a rescue": func(b *bed) {
			b.untilSaved(false)
			b.m.Stop(b.t, b.uuid, "destroyed")
		},
		"belayd is dead, and the next": func(b *bed) {
			b.untilSaved(false)
			b.m.Stop(b.t, b.uuid, "destroyed")
			b.do(kexec.PhaseSave, b.Save)
			b.do(kexec.PhaseSave, b.Save)
			b.h.Reboot()
			b.m.Boots(kexectest.Next)
		},
		"belayd is not": func(b *bed) {
			b.begin()
			host, mover := b.Host, b.Mover
			m := ender{mortal{Machine: b.m, t: b.t}}
			b.Host, b.Mover.Host = m, m
			if err := b.Save(b.t.Context(), b.s); err == nil {
				b.t.Error("it is saved")
			}
			b.Host, b.Mover = host, mover
			if problems, err := b.Back(b.t.Context(), b.s); err != nil || len(problems) > 0 {
				b.t.Errorf("%v, %v", problems, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newInPlaceBed(t)
			f(b)
			for range 2 {
				if g := b.mustRescue(); g.Fate != maint.KexecLeft || g.Problem != nil || b.state() != maint.GuestShutoff || b.has(".save") || b.has(".memory") {
					t.Errorf("%+v, %v; it is %s", g, g.Problem, b.state())
				}
			}
		})
	}
}

// A guest does not run for a moment in a QEMU in which a save, by whomever, would leave its memory behind.
func TestSettledBeforeItRuns(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	b.save()
	b.dies("Resume", func() { _, _ = b.Rescue(t.Context()) })
	if b.state() != maint.GuestPaused || b.m.IgnoresShared(b.uuid) {
		t.Errorf("it is %s; its memory would be left behind: %v", b.state(), b.m.IgnoresShared(b.uuid))
	}
	b.mustRescue()
	b.whole()
}

// A guest that is copied is so with its memory, whatever a Belay that died has left in its QEMU, or not at all.
func TestCopiedWithItsMemory(t *testing.T) {
	t.Parallel()
	for _, silent := range []bool{false, true} {
		b := newInPlaceBed(t)
		b.InPlace = false
		b.begin()
		on := map[string]any{"capabilities": []map[string]any{{"capability": "x-ignore-shared", "state": true}}}
		if _, err := b.m.QMP(t.Context(), b.uuid, "migrate-set-capabilities", on); err != nil {
			t.Fatal(err)
		}
		if silent {
			b.h.Fault("QMP", hypervisortest.Fault{Err: errors.New("x"), Times: 1})
		}
		if err := b.Save(t.Context(), b.s); (err != nil) != silent || (b.state() == maint.GuestRunning) != silent {
			t.Errorf("%v; it is %s", err, b.state())
		}
		if d := b.m.Damage(); len(d) > 0 {
			t.Error(d)
		}
	}
}

// Memory that has run in its new QEMU does not go with its state any more, also in the same boot, where Belay
// has not seen it run. That of a QEMU which could not take the state in, as Belay saw, does: it may have
// written to it.
func TestMemoryOfAnEarlierTry(t *testing.T) {
	t.Parallel()
	begun := func(b *bed) {
		b.dies("Resume", func() { _, _ = b.Rescue(b.t.Context()) })
		b.rewrite("restoring")
	}
	fails := func(b *bed) {
		b.m.FailLoads = 1 << 30
		b.kept(b.mustRescue(), maint.CodeKeptGuest, maint.GuestShutoff)
		b.m.FailLoads = 0
	}
	writes := func(b *bed) {
		if err := os.Truncate(b.m.Dir()+"/"+b.uuid+".memory/pc.ram", 16); err != nil {
			b.t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		do   func(b *bed)
		want maint.KexecFate
	}{
		"it has run, and ended": {func(b *bed) {
			begun(b)
			if err := b.m.Resume(b.t.Context(), b.uuid); err != nil {
				b.t.Fatal(err)
			}
			b.m.Stop(b.t, b.uuid, "shutdown")
		}, maint.KexecLost},
		"it has ended":           {func(b *bed) { begun(b); b.m.Stop(b.t, b.uuid, "destroyed") }, maint.KexecRestored},
		"it could not be loaded": {func(b *bed) { fails(b); writes(b) }, maint.KexecRestored},
		"once more, unseen": {func(b *bed) {
			fails(b)
			b.dies("after CreatePaused", func() { _, _ = b.Rescue(b.t.Context()) })
			writes(b)
			b.m.Stop(b.t, b.uuid, "crashed")
		}, maint.KexecLost},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newInPlaceBed(t)
			b.save()
			c.do(b)
			if g := b.mustRescue(); g.Fate != c.want || (b.state() == maint.GuestRunning) != (c.want == maint.KexecRestored) {
				t.Errorf("%+v, %v; it is %s", g, g.Problem, b.state())
			}
			if d := b.m.Damage(); len(d) > 0 {
				t.Error(d)
			}
		})
	}
}
