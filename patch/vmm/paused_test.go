package vmm_test

import (
	"context"
	"encoding/json"
	"errors"
	"testing"

	"belay/agent/maint"
	"belay/patch/vmm"
	"belay/patch/vmm/vmmtest"
)

// pausing is a host on which a guest's owner pauses it when Belay is about to.
type pausing struct{ *vmmtest.Machine }

func (p pausing) QMP(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	if command == "migrate-set-parameters" { // the last before the pause
		if err := p.Suspend(ctx, uuid); err != nil {
			return nil, err
		}
	}
	return p.Machine.QMP(ctx, uuid, command, args)
}

// A guest that its owner pauses meanwhile is not taken for one that Belay has paused, and resumed.
func TestPausedMeanwhile(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	r, pid := b.replacement(maint.VMMInPlace), b.PID(b.uuid)
	r.Host = pausing{b.Machine}
	if err := run(t.Context(), r, newNotebook()); !errors.Is(err, vmm.ErrPaused) {
		t.Error(err)
	}
	if b.state() != maint.GuestPaused || b.PID(b.uuid) != pid {
		t.Errorf("it is %s", b.state())
	}
	must(t, b.Resume(t.Context(), b.uuid))
	b.runs()
}
