package twin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/internal/scratchtest"
)

// fakeSecond is a twin whose daemons are the fakes of package hypervisortest.
type fakeSecond struct {
	t          *testing.T
	home, away *hypervisortest.Host
	running    bool
	problems   []maint.Problem
	noRoom     []maint.Problem
	lent       map[string][]string
	sinks      int
	startErr   error
	names      []string // of guests in it, where away is nil
}

func (f *fakeSecond) Start(ctx context.Context) error {
	if f.startErr != nil {
		return f.startErr
	}
	f.running = true
	return ctx.Err()
}

func (f *fakeSecond) Stop(context.Context) error {
	if f.away != nil {
		guests, err := f.away.Guests(context.Background())
		if err != nil || len(guests) > 0 {
			f.t.Errorf("the twin is stopped with %v in it (%v)", guests, err)
		}
	}
	f.running = false
	return nil
}

func (f *fakeSecond) Route(_ string, out bool) maint.MoveParams {
	if f.away == nil {
		return maint.MoveParams{DestURI: "twin"}
	}
	if out {
		return maint.MoveParams{DestURI: f.away.URI(), SameHost: true}
	}
	return maint.MoveParams{DestURI: f.home.URI(), SameHost: true}
}

func (f *fakeSecond) Incoming(uuid string) string { return "/in/" + uuid }

func (f *fakeSecond) Fit(n Need) (Guard, []maint.Problem, error) {
	if n.Portable == "" {
		f.t.Error("Fit is asked without XML")
	}
	return Guard{By: []string{"the test"}}, f.problems, nil
}

func (f *fakeSecond) Room(string, uint64, bool) ([]maint.Problem, error) { return f.noRoom, nil }

func (f *fakeSecond) Guests() (names []string, err error) {
	if f.away == nil {
		return f.names, nil
	}
	guests, err := f.away.Guests(context.Background())
	for _, g := range guests {
		names = append(names, g.Name)
	}
	return names, err
}

func (f *fakeSecond) Lend(uuid string, home bool, token string, files []string) error {
	side := fmt.Sprint(uuid, home)
	if f.lent[side] = files; len(files) == 0 {
		delete(f.lent, side)
	}
	return nil
}

func (f *fakeSecond) Sink(string) (string, func(), error) {
	f.sinks++
	return "/sink", func() { f.sinks-- }, nil
}

// fakeSide is a fake host as a visit needs it.
type fakeSide struct{ *hypervisortest.Host }

func (s fakeSide) Describe(ctx context.Context, uuid string) (Description, error) {
	x, err := s.GuestXML(ctx, uuid)
	return Description{Portable: x.Migratable, Inactive: x.Inactive}, err
}

func (s fakeSide) QuitIncoming(context.Context, string) error {
	return errors.New("a bounce starts no QEMU by itself")
}

// site is a home and a twin with one guest, in a bubble's time.
type site struct {
	t          *testing.T
	world      *hypervisortest.World
	home, away *hypervisortest.Host
	second     *fakeSecond
	uuid       string
	definition string
	book       *scratchtest.Notebook
}

func newSite(t *testing.T) *site {
	w := hypervisortest.NewWorld()
	t.Cleanup(w.Close)
	s := &site{t: t, world: w, home: w.AddHost("host-a", hypervisortest.HostOptions{}), away: w.AddHost("host-a.belay-twin", hypervisortest.HostOptions{}), book: scratchtest.New()}
	s.second = &fakeSecond{t: t, home: s.home, away: s.away, lent: map[string][]string{}}
	for _, h := range []*hypervisortest.Host{s.home, s.away} {
		h.OnQMP(func(_, command string, _ json.RawMessage) (any, bool, error) {
			switch command {
			case "query-migrate-capabilities":
				return []any{}, true, nil
			case "migrate-set-parameters", "query-migrate":
				return map[string]any{}, true, nil
			}
			return nil, false, nil
		})
	}
	s.uuid = s.home.PutGuest("web-1", func(g *maint.Guest) { g.Persistent, g.Autostart = true, true })
	s.definition = s.inactive()
	return s
}

func (s *site) inactive() string {
	x, err := s.home.GuestXML(s.t.Context(), s.uuid)
	if err != nil {
		s.t.Fatal(err)
	}
	return x.Inactive
}

func (s *site) visit() *Visit {
	return &Visit{Op: "op", Guest: "web-1", UUID: s.uuid, Method: maint.VMMBounce, Home: fakeSide{s.home}, Away: fakeSide{s.away},
		Twin: s.second, Log: slog.New(slog.DiscardHandler)}
}

// run does the phases that are not done, as package run would; undo says that Out
// is to be undone rather than done again.
func (s *site) run(v *Visit, ctx, life context.Context, done map[string]bool, undo bool) error {
	for _, p := range []string{PhasePreflight, PhaseOut, PhaseBack, PhaseFinish} {
		if done[p] || undo && p == PhaseOut {
			continue
		}
		s.book.Phase = p
		var err error
		switch p {
		case PhasePreflight:
			err = v.Preflight(ctx, s.book)
		case PhaseOut:
			err = v.Out(ctx, life, s.book)
		case PhaseBack:
			err = v.Back(life, s.book)
		case PhaseFinish:
			_, err = v.Finish(life, s.book)
		}
		if err != nil {
			return err
		}
		if life.Err() != nil {
			return life.Err()
		}
		done[p] = true
	}
	return nil
}

// isHome checks that the guest runs at home and nowhere else, as it was defined.
func (s *site) isHome() {
	s.t.Helper()
	g, err := s.home.Guest(s.t.Context(), s.uuid)
	if err != nil || g.State != maint.GuestRunning || !g.Persistent || !g.Autostart {
		s.t.Errorf("at home: %+v, %v", g, err)
	}
	if now := s.inactive(); now != s.definition {
		s.t.Errorf("its definition is\n%s\nwas\n%s", now, s.definition)
	}
	if guests, err := s.away.Guests(s.t.Context()); err != nil || len(guests) != 0 {
		s.t.Errorf("in the twin: %v, %v", guests, err)
	}
}

// isAway checks that it runs in the twin and nowhere else.
func (s *site) isAway() {
	s.t.Helper()
	g, err := s.away.Guest(s.t.Context(), s.uuid)
	if err != nil || g.State != maint.GuestRunning {
		s.t.Errorf("in the twin: %+v, %v", g, err)
	}
	if g, err := s.home.Guest(s.t.Context(), s.uuid); err != nil || g.State.Active() {
		s.t.Errorf("at home: %+v, %v", g, err)
	}
}

func TestBounce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.home.SetQEMU("10.0.2")
		if err := s.run(s.visit(), t.Context(), t.Context(), map[string]bool{}, false); err != nil {
			t.Fatal(err)
		}
		s.isHome()
		if s.second.running {
			t.Error("the twin was not stopped")
		}
		s.book.Phase = PhaseFinish
		r, err := s.visit().Finish(t.Context(), s.book)
		if err != nil || r.Pauses != 2 || r.Pause == 0 || r.Attempts != 2 || r.OldQEMU == r.NewQEMU || r.NewQEMU != "10.0.2" {
			t.Errorf("result %+v, %v", r, err)
		}
	})
}

// belayd dies at every call that a visit makes, before it and after it, and is
// started again; or it is started and undoes what it had begun.
func TestBounceKilledAtEveryCall(t *testing.T) {
	for _, undo := range []bool{false, true} {
		for n := 1; ; n++ {
			survived := false
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				life, die := context.WithCancel(t.Context())
				calls := 0
				s.world.OnCall(func(hypervisortest.Call) {
					if calls++; calls == n {
						die()
					}
				})
				done := map[string]bool{}
				err := s.run(s.visit(), life, life, done, false)
				survived = calls < n
				if survived && err != nil {
					t.Fatal(err)
				}
				if !survived && done[PhasePreflight] {
					time.Sleep(time.Duration(n%7) * 100 * time.Millisecond) // a copy goes on meanwhile
					if err := s.run(s.visit(), t.Context(), t.Context(), done, undo); err != nil {
						t.Fatalf("killed at call %d, undo %t: %v", n, undo, err)
					}
				}
				s.isHome()
				if done[PhaseFinish] && s.second.running {
					t.Errorf("killed at call %d: the twin was not stopped", n)
				}
			})
			if survived {
				if n < 40 {
					t.Errorf("only %d calls were there to be killed at", n)
				}
				break
			}
		}
	}
}

// belayd dies at any time, in the middle of a copy above all.
func TestBounceKilledAtAnyTime(t *testing.T) {
	for _, undo := range []bool{false, true} {
		for after := time.Duration(0); ; after += 37 * time.Millisecond {
			survived := false
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				life, die := context.WithTimeout(t.Context(), after)
				defer die()
				done := map[string]bool{}
				err := s.run(s.visit(), life, life, done, false)
				if survived = err == nil; !survived {
					if err := s.run(s.visit(), t.Context(), t.Context(), done, undo); err != nil {
						t.Fatalf("killed after %s, undo %t: %v", after, undo, err)
					}
				}
				s.isHome()
			})
			if survived {
				if after < 700*time.Millisecond {
					t.Errorf("a visit of two copies took %s", after)
				}
				break
			}
		}
	}
}

// What a forgotten visit has left in the twin is fetched, also when it is on its
// way.
func TestFetch(t *testing.T) {
	for after := time.Duration(0); after < 600*time.Millisecond; after += 50 * time.Millisecond {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t)
			v := s.visit()
			s.book.Phase = PhaseOut
			if err := v.Out(t.Context(), t.Context(), s.book); err != nil {
				t.Fatal(err)
			}
			life, die := context.WithTimeout(t.Context(), after)
			defer die()
			s.book.Phase = PhaseBack
			_ = v.Back(life, s.book)
			s.book = scratchtest.New()
			if err := s.visit().Fetch(t.Context(), s.book); err != nil {
				t.Fatalf("%s after it began to come home: %v", after, err)
			}
			s.isHome()
		})
	}
}

// A guest that writes faster than it is copied stays at home, and one that does
// so in the twin stays there until it can be brought home.
func TestBounceOfABusyGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		v := s.visit()
		v.Limit = time.Minute
		s.home.HoldCopies()
		done, begun := map[string]bool{}, time.Now()
		err := s.run(v, t.Context(), t.Context(), done, false)
		var stayed *stayedError
		if !errors.As(err, &stayed) || errors.Is(err, ErrStuck) || !strings.Contains(err.Error(), "runs at home as before") {
			t.Fatalf("it could not be copied: %v", err)
		}
		if took := time.Since(begun); took > 2*time.Minute {
			t.Errorf("that took %s", took)
		}
		s.isHome()

		s.home.ReleaseCopies()
		s.away.HoldCopies()
		s.book.Phase = PhaseOut
		if err := v.Out(t.Context(), t.Context(), s.book); err != nil {
			t.Fatal(err)
		}
		s.book.Phase = PhaseBack
		if err := v.Back(t.Context(), s.book); !errors.Is(err, ErrStuck) || !strings.Contains(err.Error(), "do not stop the twin") {
			t.Fatalf("it could not be brought home: %v", err)
		}
		s.isAway()
		if !s.second.running {
			t.Error("the twin was stopped")
		}
		s.away.ReleaseCopies()
		if err := v.Back(t.Context(), s.book); err != nil {
			t.Fatal(err)
		}
		s.isHome()
	})
}

// What can break while a guest is away breaks; it comes home.
func TestBounceFaults(t *testing.T) {
	refused := errors.New("home refuses")
	for name, strike := range map[string]func(s *site){
		"home refuses twice": func(s *site) {
			s.away.Fault("Migrate", hypervisortest.Fault{Err: refused, Times: 2})
		},
		"home's libvirt is away for a while": func(s *site) {
			s.home.KillLibvirt()
			time.AfterFunc(3*time.Minute, s.home.RestartLibvirt)
		},
		"the twin's libvirt is away for a while": func(s *site) {
			s.away.KillLibvirt()
			time.AfterFunc(3*time.Minute, s.away.RestartLibvirt)
		},
		"libvirt succeeds and says that it failed": func(s *site) {
			s.away.Fault("Migrate", hypervisortest.Fault{Err: refused, After: true, Times: 1})
		},
		"home's libvirt dies in the switch-over": func(s *site) {
			s.world.OnPhase(func(_ string, p hypervisortest.Phase) {
				if p == hypervisortest.PhaseSuspended {
					s.world.OnPhase(nil)
					go func() {
						s.home.KillLibvirt()
						time.Sleep(time.Second)
						s.home.RestartLibvirt()
					}()
				}
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				v := s.visit()
				s.book.Phase = PhasePreflight
				if err := v.Preflight(t.Context(), s.book); err != nil {
					t.Fatal(err)
				}
				s.book.Phase = PhaseOut
				if err := v.Out(t.Context(), t.Context(), s.book); err != nil {
					t.Fatal(err)
				}
				s.isAway()
				strike(s)
				s.book.Phase = PhaseBack
				if err := v.Back(t.Context(), s.book); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				s.isHome()
			})
		})
	}
}

// A guest that its owner shuts down in the twin is off, and no alarm.
func TestBounceOfAGuestThatIsShutDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		v := s.visit()
		done := map[string]bool{}
		s.book.Phase = PhaseOut
		if err := v.Out(t.Context(), t.Context(), s.book); err != nil {
			t.Fatal(err)
		}
		s.away.Stop(t, s.uuid, "shutdown")
		done[PhasePreflight], done[PhaseOut] = true, true
		err := s.run(v, t.Context(), t.Context(), done, false)
		if !errors.Is(err, errOff) || errors.Is(err, ErrStuck) {
			t.Fatalf("it was shut down: %v", err)
		}
	})
}

// Somebody else's copy is left alone.
func TestBounceDuringAMigration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		other := s.world.AddHost("host-b", hypervisortest.HostOptions{})
		s.home.HoldCopies()
		theirs := make(chan error, 1)
		go func() {
			theirs <- s.home.Migrate(t.Context(), s.uuid, maint.MoveParams{DestURI: other.URI(), Persist: true})
		}()
		time.Sleep(time.Second)
		s.book.Phase = PhaseOut
		err := s.visit().Out(t.Context(), t.Context(), s.book)
		var p *maint.Problem
		if !errors.As(err, &p) || p.Code != maint.CodeBusy {
			t.Fatalf("during somebody's migration: %v", err)
		}
		s.home.ReleaseCopies()
		if err := <-theirs; err != nil {
			t.Errorf("their migration: %v", err)
		}
	})
}

// An aborted copy leaves the guest at home.
func TestBounceAborted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.home.HoldCopies()
		ctx, abort := context.WithCancel(t.Context())
		time.AfterFunc(5*time.Second, abort)
		err := s.run(s.visit(), ctx, t.Context(), map[string]bool{}, false)
		var p *maint.Problem
		if !errors.As(err, &p) || p.Code != maint.CodeAborted {
			t.Fatalf("aborted: %v", err)
		}
		s.isHome()
	})
}

func TestPreflightRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.second.problems = []maint.Problem{*maint.Problemf(maint.CodeNoRoom, "guest web-1", "", "does not fit")}
		s.home.Pause(t, s.uuid)
		err := s.run(s.visit(), t.Context(), t.Context(), map[string]bool{}, false)
		var r *maint.Refusal
		if !errors.As(err, &r) || len(r.Problems) != 2 || r.Problems[0].Code != maint.CodeGuestPaused || r.Problems[1].Code != maint.CodeNoRoom {
			t.Fatalf("refusal: %v", err)
		}
		if s.second.running {
			t.Error("the twin was started")
		}
	})
}
