package kexec_test

import (
	"strings"
	"testing"

	"belay/agent/maint"
	"belay/patch/kexec"
	"belay/patch/kexec/kexectest"
	"belay/patch/vmm/vmmtest"
)

// A guest that its owner pauses after the plan is copied, and paused after the boot, too.
func TestPausedMeanwhile(t *testing.T) {
	t.Parallel()
	for name, save := range map[string]func(b *bed){
		"before it is saved": func(b *bed) {
			if err := b.m.Suspend(b.t.Context(), b.uuid); err != nil {
				b.t.Fatal(err)
			}
			b.do(kexec.PhaseSave, b.Save)
		},
		"right before Belay does": func(b *bed) {
			b.Mover.Host = vmmtest.Pausing{Machine: b.m.Machine}
			b.do(kexec.PhaseSave, b.Save)
			b.Mover = b.m.Mover()
		},
		"and belayd dies when it is saved": func(b *bed) {
			if err := b.m.Suspend(b.t.Context(), b.uuid); err != nil {
				b.t.Fatal(err)
			}
			b.dies("after Save", func() { _ = b.Save(b.t.Context(), b.s) })
			b.do(kexec.PhaseSave, b.Save)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newInPlaceBed(t)
			b.begin()
			save(b)
			if b.has(".memory") || b.has(".paused") {
				t.Error("its memory is kept twice")
			}
			b.h.Reboot()
			b.m.Boots(kexectest.Next)
			if g := b.mustRescue(); g.Fate != maint.KexecRestored || g.Memory != maint.KexecCopied || b.state() != maint.GuestPaused {
				t.Errorf("%+v, %v; it is %s", g, g.Problem, b.state())
			}
			if err := b.m.Resume(t.Context(), b.uuid); err != nil {
				t.Error(err)
			}
			b.whole()
		})
	}
}

// It is not copied where that takes the room which others need, and stays as its owner has it.
func TestPausedMeanwhileWithoutRoom(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	b.h.Edit(t, b.uuid, func(g *maint.Guest) { g.MemoryBytes = 1 << 60 })
	b.begin()
	if err := b.m.Suspend(t.Context(), b.uuid); err != nil {
		t.Fatal(err)
	}
	pid := b.m.PID(b.uuid)
	if err := b.Save(t.Context(), b.s); err == nil || !strings.Contains(err.Error(), "is paused") || !strings.Contains(err.Error(), "MiB") {
		t.Errorf("%v", err)
	}
	if g := b.mustRescue(); g.Fate != maint.KexecRan || b.state() != maint.GuestPaused || b.m.PID(b.uuid) != pid {
		t.Errorf("%+v; it is %s", g, b.state())
	}
}
