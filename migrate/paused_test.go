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

// A guest that its owner pauses in the copy is started where it ends up, which is libvirt's
// doing: Belay says so at once, neither resumes nor pauses it, and sees the copy through.
func TestSuspendedInCopy(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fails bool // the copy
		goes  bool // on again, by its owner, before the copy's end
	}{"arrives": {}, "fails": {fails: true}, "resumed": {goes: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, x *bench) {
				x.w.SetCopy(hypervisortest.Copy{Passes: 2, Step: 4 * time.Second})
				x.w.OnCall(func(c hypervisortest.Call) {
					if !c.Done && (c.Op == "Resume" || c.Op == "Suspend" || c.Op == "Launch") {
						t.Errorf("%s of the guest on %s", c.Op, c.Host)
					}
				})
				var trouble []string
				x.Trouble = func(p *maint.Problem) {
					if p == nil {
						trouble = append(trouble, "none")
						return
					}
					trouble = append(trouble, p.Reason)
				}
				x.w.OnPhase(func(_ string, p hypervisortest.Phase) {
					if p != hypervisortest.PhaseCopying {
						return
					}
					time.Sleep(time.Second)
					x.a.Pause(t, x.UUID)
					if c.goes {
						time.AfterFunc(2*time.Second, func() { x.a.Unpause(t, x.UUID) })
					}
					if c.fails {
						time.AfterFunc(2*time.Second, func() { x.b.host.KillQEMU(t, x.UUID) })
					}
				})
				err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform))
				if (err != nil) != c.fails {
					t.Fatal(err)
				}
				on := x.b.host
				if c.fails {
					on = x.a
				}
				if g, err := on.Guest(t.Context(), x.UUID); err != nil || g.State != maint.GuestRunning {
					t.Errorf("on %s: %+v, %v", on.Name(), g, err)
				}
				if all := strings.Join(x.notes, "\n"); strings.Count(all, "somebody has paused the guest in the copy") != 1 {
					t.Errorf("notes %q", all)
				}
				if len(trouble) != 2 || !strings.Contains(trouble[0], "libvirt starts it on b") || trouble[1] != "none" {
					t.Errorf("told %q", trouble)
				}
			})
		})
	}
}

// A switch-over, however long, is nobody's pause.
func TestLongSwitchOverIsNoPause(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		x.w.SetCopy(hypervisortest.Copy{Passes: 2, Step: time.Second, Blackout: 10 * time.Second})
		if err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform)); err != nil {
			t.Fatal(err)
		}
		if all := strings.Join(x.notes, "\n"); strings.Contains(all, "paused") {
			t.Errorf("notes %q", all)
		}
	})
}
