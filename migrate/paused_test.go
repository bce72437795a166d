package migrate

import (
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// A guest that its owner has paused moves, and stays paused; one whose copy is cancelled
// stays paused where it was.
func TestPausedGuestMoves(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		x.a.Pause(t, x.UUID)
		if err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform)); err != nil {
			t.Fatal(err)
		}
		if err := x.Verify(t.Context(), x.page(PhaseVerify)); err != nil {
			t.Fatal(err)
		}
		if g, err := x.b.host.Guest(t.Context(), x.UUID); err != nil || g.State != maint.GuestPaused || g.Reason != reasonUser || !g.Persistent {
			t.Errorf("on the destination: %+v, %v", g, err)
		}
		if all := strings.Join(x.notes, "\n"); !strings.Contains(all, "the guest was paused on a, and is so on b") || strings.Contains(all, "not Belay's doing") {
			t.Errorf("notes %q", all)
		}
	})
}

// The source's libvirt dies when the guest has arrived, and is still held paused there:
// the guest is at the destination, and nothing is started.
func TestPausedGuestLeftover(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		x.a.Pause(t, x.UUID)
		x.w.OnPhase(func(_ string, p hypervisortest.Phase) {
			if p == hypervisortest.PhaseResumed {
				x.a.KillLibvirt()
				time.AfterFunc(time.Second, x.a.RestartLibvirt)
			}
		})
		if err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform)); err != nil {
			t.Fatal(err)
		}
		err := x.Verify(t.Context(), x.page(PhaseVerify))
		p := maint.AsProblem(err, "", "")
		if p.Code != maint.CodeLeftover {
			t.Fatalf("%v", err)
		}
		for _, h := range []*hypervisortest.Host{x.a, x.b.host} {
			if g, err := h.Guest(t.Context(), x.UUID); err != nil || g.State != maint.GuestPaused {
				t.Errorf("on %s: %+v, %v", h.Name(), g, err)
			}
		}
	})
}

func TestUnfitPaused(t *testing.T) {
	t.Parallel()
	for reason, fits := range map[string]bool{"user": true, "I/O error": false, "migrating": false, "saving": false, "crashed": false} {
		if ps := (&Migration{}).unfit(maint.Guest{State: maint.GuestPaused, Reason: reason}); (len(ps) == 0) != fits {
			t.Errorf("paused (%s): %v", reason, ps)
		}
	}
}
