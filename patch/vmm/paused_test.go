package vmm_test

import (
	"errors"
	"testing"

	"belay/agent/maint"
	"belay/patch/vmm"
	"belay/patch/vmm/vmmtest"
)

// A guest that its owner pauses meanwhile is not taken for one that Belay has paused, and resumed.
func TestPausedMeanwhile(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	r, pid := b.replacement(maint.VMMInPlace), b.PID(b.uuid)
	r.Host = vmmtest.Pausing{Machine: b.Machine}
	if err := run(t.Context(), r, newNotebook()); !errors.Is(err, vmm.ErrPaused) {
		t.Error(err)
	}
	if b.state() != maint.GuestPaused || b.PID(b.uuid) != pid {
		t.Errorf("it is %s", b.state())
	}
	must(t, b.Resume(t.Context(), b.uuid))
	b.runs()
}
