package twin

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/internal/scratchtest"
)

// astray leaves the guest in the twin, with nothing known of how it got there.
func (s *site) astray() {
	s.t.Helper()
	s.book.Phase = PhaseOut
	if err := s.visit().Out(s.t.Context(), s.t.Context(), s.book); err != nil {
		s.t.Fatal(err)
	}
	s.book = scratchtest.New()
	s.isAway()
}

// A visit of a guest that is in the twin already brings it home, also when belayd
// dies at any call of it, before and after.
func TestAdoptKilledAtEveryCall(t *testing.T) {
	for n := 1; ; n++ {
		survived := false
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t)
			s.astray()
			life, die := context.WithCancel(t.Context())
			calls := 0
			s.world.OnCall(func(hypervisortest.Call) {
				if calls++; calls == n {
					die()
				}
			})
			done := map[string]bool{}
			err := s.run(s.visit(), life, life, done, false)
			if survived = calls < n; survived && err != nil {
				t.Fatal(err)
			}
			if !survived {
				time.Sleep(time.Duration(n%7) * 100 * time.Millisecond) // a copy goes on meanwhile
				// Before preflight is done nothing is known of it: a new visit is made.
				if err := s.run(s.visit(), t.Context(), t.Context(), done, false); err != nil {
					t.Fatalf("killed at call %d: %v", n, err)
				}
			}
			s.isHome()
			if s.second.running {
				t.Errorf("killed at call %d: the twin was not stopped", n)
			}
			if survived {
				s.book.Phase = PhaseFinish
				if r, err := s.visit().Finish(t.Context(), s.book); err != nil || r.Pauses != 1 || r.Attempts != 1 || r.Pause == 0 {
					t.Errorf("result %+v, %v", r, err)
				}
			}
		})
		if survived {
			if n < 20 {
				t.Errorf("only %d calls were there to be killed at", n)
			}
			return
		}
	}
}

// A transient guest is unknown at home, and comes home all the same.
func TestAdoptTransient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.home.Edit(t, s.uuid, func(g *maint.Guest) { g.Persistent, g.Autostart = false, false })
		s.book.Phase = PhaseOut
		if err := s.visit().Out(t.Context(), t.Context(), s.book); err != nil {
			t.Fatal(err)
		}
		s.book = scratchtest.New()
		if _, err := s.home.Guest(t.Context(), s.uuid); !errors.Is(err, maint.ErrNoGuest) {
			t.Fatalf("it is known at home: %v", err)
		}
		if err := s.run(s.visit(), t.Context(), t.Context(), map[string]bool{}, false); err != nil {
			t.Fatal(err)
		}
		if g, err := s.home.Guest(t.Context(), s.uuid); err != nil || g.State != maint.GuestRunning || g.Persistent {
			t.Errorf("at home: %+v, %v", g, err)
		}
	})
}

// What is not to be moved is refused, and left as it is.
func TestAdoptRefuses(t *testing.T) {
	noRoom := *maint.Problemf(maint.CodeNoRoom, "guest web-1", "", "does not fit")
	for name, c := range map[string]struct {
		strike func(s *site)
		code   maint.Code
	}{
		"no room":                     {func(s *site) { s.second.noRoom = []maint.Problem{noRoom} }, maint.CodeNoRoom},
		"paused by somebody":          {func(s *site) { s.away.Pause(s.t, s.uuid) }, maint.CodeGuestPaused},
		"runs at home too":            {func(s *site) { s.home.Start(s.t, s.uuid) }, maint.CodeUnverified},
		"home's libvirt is not there": {func(s *site) { s.home.KillLibvirt() }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				s.astray()
				c.strike(s)
				moved := false
				s.world.OnCall(func(call hypervisortest.Call) { moved = moved || call.Op == "Migrate" || call.Op == "QuitMigrated" })
				done := map[string]bool{}
				err := s.run(s.visit(), t.Context(), t.Context(), done, false)
				var code maint.Code
				var refusal *maint.Refusal
				var p *maint.Problem
				if errors.As(err, &refusal) {
					code = refusal.Problems[0].Code
				} else if errors.As(err, &p) {
					code = p.Code
				}
				if err == nil || code != c.code || done[PhasePreflight] || moved || !s.second.running {
					t.Errorf("ended with %v (%s), done are %v, moved: %t, the twin runs: %t", err, code, done, moved, s.second.running)
				}
			})
		})
	}
}

// A QEMU that waits for the guest, of a warm-up of which nobody knows any more, is
// ended; one that may have been the guest is not.
func TestAdoptAmongTwoQEMUs(t *testing.T) {
	for _, c := range []struct {
		home, away string // QAPI's RunState
		refused    bool
	}{
		{"running", "inmigrate", false},
		{"running", "postmigrate", false},
		{"running", "paused", true},
		{"running", "running", true},
		{"inmigrate", "running", false},
		{"", "running", false},
		{"paused", "running", true},
		{"paused", "inmigrate", true},
		{"", "inmigrate", true},
		{"inmigrate", "inmigrate", true},
		{"postmigrate", "inmigrate", true},
	} {
		t.Run(c.home+" "+c.away, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t)
				p.home.state, p.away.state, p.second.names = c.home, c.away, []string{"web-1"}
				done := map[string]bool{}
				err := p.phases(p.visit(), t.Context(), t.Context(), done, false)
				switch {
				case c.refused:
					if err == nil || done[PhasePreflight] || p.home.state != c.home || p.away.state != c.away {
						t.Errorf("%v, done are %v; its QEMU at home is %q, in the twin %q", err, done, p.home.state, p.away.state)
					}
				case err != nil:
					t.Error(err)
				default:
					p.isHome("adopted")
				}
			})
		})
	}
}
