package kexec_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/kexec"
)

// deaf has guests tell nothing.
type deaf struct{ inside }

func (deaf) Clock(_ context.Context, g maint.Guest, _ time.Duration) maint.ClockReport {
	return maint.ClockReport{Guest: g.Name, State: maint.ClockUnsynchronised, Reason: "its agent does not answer"}
}

// TestClockLeftBehind: a guest that runs again with a clock that nobody could put right is no
// success.
func TestClockLeftBehind(t *testing.T) {
	t.Parallel()
	for agent, want := range map[maint.AgentState]bool{maint.AgentConnected: true, maint.AgentNone: false} {
		b := newBed(t)
		b.h.SetAgent(t, b.uuid, agent)
		b.Inside = deaf{}
		var result maint.KexecResult
		b.Record = func(r maint.KexecResult) error { result = r; return nil }
		b.save()
		b.do(kexec.PhaseBoot, b.Boot)
		b.do(kexec.PhaseCheck, b.Check)
		time.Sleep(600 * time.Millisecond) // what a guest's own time service is not trusted with
		b.do(kexec.PhaseRestore, b.Restore)
		if len(result.Guests) != 1 || result.Guests[0].Fate != maint.KexecRestored {
			t.Fatalf("%+v", result)
		}
		var refusal *maint.Refusal
		err := b.Verify(result)
		told := errors.As(err, &refusal) && refusal.Problems[0].Code == maint.CodeClock && refusal.Problems[0].Remedy == "when its agent answers: belay clock web-1 --sync"
		if told != want || !want && err != nil {
			t.Errorf("with its agent %q: %v", agent, err)
		}
	}
}
