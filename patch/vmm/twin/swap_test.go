package twin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
)

func TestSwap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		if err := p.phases(p.visit(), t.Context(), t.Context(), map[string]bool{}, false); err != nil {
			t.Fatal(err)
		}
		p.isHome("prewarmed")
		if got := strings.Join(p.ran, " "); got != "home away home" {
			t.Errorf("it ran: %s", got)
		}
		if p.longest > 50*time.Millisecond {
			t.Errorf("it stood still for %s", p.longest)
		}
		p.book.Phase = PhaseFinish
		if r, err := p.visit().Finish(t.Context(), p.book); err != nil || r.Pauses != 2 || r.Pause < fakeLoad || r.Pause > 60*time.Millisecond {
			t.Errorf("result %+v, %v", r, err)
		}
	})
}

// belayd dies at every call and is started again, to go on or to undo, at once or
// when a leash has resumed a guest that stood.
func TestSwapKilledAtEveryCall(t *testing.T) {
	for _, c := range []struct {
		name        string
		undo, leash bool
	}{{"goes on", false, false}, {"undoes", true, false}, {"goes on after a leash", false, true}, {"undoes after a leash", true, true}} {
		for n := 1; ; n++ {
			survived := false
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t)
				life, die := context.WithCancel(t.Context())
				defer die()
				p.dead = life
				p.onCall = func(call int) {
					if call == n {
						die()
					}
				}
				// The leash is told which side to resume, and is let go at
				// the point of no return.
				var leash *fakeQEMU
				v := p.visit()
				v.BeforePause = func(_ context.Context, atHome bool) error {
					leash = p.away
					if atHome {
						leash = p.home
					}
					return nil
				}
				v.PointOfNoReturn = func(context.Context) error { leash = nil; return nil }
				done := map[string]bool{}
				err := p.phases(v, life, life, done, false)
				if survived = err == nil; survived {
					return
				}
				if !done[PhasePreflight] {
					return
				}
				p.dead = nil
				if c.leash {
					time.Sleep(time.Second)
					if leash != nil && leash.state != "running" && leash.state != "" {
						leash.set("running")
					}
				}
				what := fmt.Sprintf("killed at call %d, %s", n, c.name)
				if err := p.phases(p.visit(), t.Context(), t.Context(), done, c.undo); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				p.isHome(what)
			})
			if survived {
				if n < 50 {
					t.Errorf("only %d calls were there to be killed at", n)
				}
				break
			}
		}
	}
}

// belayd is told to end at every call. It leaves no guest that stands still.
func TestSwapStoppedAtEveryCall(t *testing.T) {
	for n := 1; ; n++ {
		survived := false
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t)
			life, stop := context.WithCancel(t.Context())
			defer stop()
			p.onCall = func(call int) {
				if call == n {
					stop()
				}
			}
			done := map[string]bool{}
			if err := p.phases(p.visit(), life, life, done, false); err == nil {
				survived = true
				return
			}
			if p.home.state != "running" && p.away.state != "running" {
				t.Errorf("stopped at call %d, its QEMU at home is %q, in the twin %q", n, p.home.state, p.away.state)
			}
			if !done[PhasePreflight] {
				return
			}
			if err := p.phases(p.visit(), t.Context(), t.Context(), done, false); err != nil {
				t.Fatalf("stopped at call %d: %v", n, err)
			}
			p.isHome(fmt.Sprintf("stopped at call %d", n))
		})
		if survived {
			if n < 50 {
				t.Errorf("only %d calls were there to be stopped at", n)
			}
			return
		}
	}
}

// What goes wrong on the way out leaves the guest where it was; on the way back
// it comes home all the same, by live migration.
func TestSwapFaults(t *testing.T) {
	type fault struct {
		name   string
		strike func(v *Visit, p *fakePair, from, to *fakeQEMU)
	}
	for _, f := range []fault{
		{"the second QEMU does not start", func(_ *Visit, _ *fakePair, _, to *fakeQEMU) { to.noStart = true }},
		{"the second QEMU dies while it loads", func(_ *Visit, _ *fakePair, _, to *fakeQEMU) { to.dieLoading = true }},
		{"the first QEMU does not send", func(_ *Visit, _ *fakePair, from, _ *fakeQEMU) { from.noSend = true }},
		{"the second QEMU cannot be resumed", func(_ *Visit, _ *fakePair, _, to *fakeQEMU) { to.noResume = true }},
		{"the pause is not allowed", func(v *Visit, _ *fakePair, _, _ *fakeQEMU) {
			v.BeforePause = func(context.Context, bool) error { return errors.New("no leash") }
		}},
		{"the leash has fired", func(v *Visit, p *fakePair, from, _ *fakeQEMU) {
			v.PointOfNoReturn = func(context.Context) error {
				from.set("running")
				return errors.New("it has fired")
			}
		}},
	} {
		for _, out := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t)
				v := p.visit()
				what := fmt.Sprintf("%s, out %t", f.name, out)
				done := map[string]bool{}
				if out {
					f.strike(v, p, p.home, p.away)
					err := p.phases(v, t.Context(), t.Context(), done, false)
					var stayed *stayedError
					if !errors.As(err, &stayed) || errors.Is(err, ErrStuck) {
						t.Errorf("%s: %v", what, err)
					}
					p.isHome(what)
					return
				}
				p.book.Phase = PhaseOut
				if err := v.Out(t.Context(), t.Context(), p.book); err != nil {
					t.Fatal(err)
				}
				done[PhasePreflight], done[PhaseOut] = true, true
				f.strike(v, p, p.away, p.home)
				if p.home.noResume {
					// Nothing brings it home before the lease is free.
					time.AfterFunc(2*time.Minute, func() { p.home.noResume = false })
				}
				if err := p.phases(v, t.Context(), t.Context(), done, false); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				p.isHome(what)
				if notes := strings.Join(p.book.Notes, "; "); !strings.Contains(notes, "live migration") {
					t.Errorf("%s: notes: %s", what, notes)
				}
			})
		}
	}
}

// A libvirtd that is killed in the pause holds the guest up for no longer than is
// needed to see that it is not answering.
func TestSwapWithoutLibvirtInThePause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		v := p.visit()
		v.PointOfNoReturn = func(context.Context) error {
			p.home.down = true
			time.AfterFunc(20*time.Second, func() { p.home.down = false })
			return nil
		}
		p.book.Phase = PhaseOut
		if err := v.Out(t.Context(), t.Context(), p.book); err != nil {
			t.Fatal(err)
		}
		if p.longest > time.Second || p.away.state != "running" || p.home.state != "" {
			t.Errorf("it stood still for %s; %q in the twin, %q at home", p.longest, p.away.state, p.home.state)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.onCall = func(int) {
			if p.home.state == "postmigrate" && !p.home.down { // as soon as it has sent
				p.home.down = true
				time.AfterFunc(20*time.Second, func() { p.home.down = false })
				p.onCall = nil
			}
		}
		p.book.Phase = PhaseOut
		if err := p.visit().Out(t.Context(), t.Context(), p.book); err != nil {
			t.Fatal(err)
		}
		if p.longest > 10*time.Second || p.away.state != "running" || p.home.state != "" || p.spoilt != "" {
			t.Errorf("it stood still for %s; %q in the twin, %q at home; %s", p.longest, p.away.state, p.home.state, p.spoilt)
		}
	})
}

// An abort before the pause calls the crossing off without one.
func TestSwapAborted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		ctx, abort := context.WithCancel(t.Context())
		p.onCall = func(int) {
			if p.away.state == "inmigrate" {
				abort()
			}
		}
		err := p.phases(p.visit(), ctx, t.Context(), map[string]bool{}, false)
		var problem *maint.Problem
		if !errors.As(err, &problem) || problem.Code != maint.CodeAborted {
			t.Errorf("aborted: %v", err)
		}
		if p.longest != 0 {
			t.Errorf("it stood still for %s", p.longest)
		}
		p.isHome("aborted")
	})
}

// A second QEMU that is ended by somebody is not started over and over.
func TestSwapSecondQEMUVanishes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		vanished := 0
		p.onCall = func(int) {
			if p.away.state == "inmigrate" {
				p.away.set("")
				vanished++
			}
		}
		err := p.phases(p.visit(), t.Context(), t.Context(), map[string]bool{}, false)
		var stayed *stayedError
		if !errors.As(err, &stayed) || vanished != 1 {
			t.Errorf("it vanished %d times: %v", vanished, err)
		}
		p.isHome("vanished")
	})
}

// A QEMU that was left with its memory out of migrations is not migrated so.
func TestBounceOfAQEMUThatIgnoresMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.home.ignore = true
		v := p.visit()
		v.Method = maint.VMMBounce
		if err := p.phases(v, t.Context(), t.Context(), map[string]bool{}, false); err != nil {
			t.Fatal(err)
		}
		p.isHome("bounce")
	})
}
