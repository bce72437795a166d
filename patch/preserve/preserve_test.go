package preserve_test

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/internal/scratchtest"
	"belay/patch/preserve"
	"belay/patch/preserve/preservetest"
)

// bed is a host in memory with what a hold needs.
type bed struct {
	*testing.T
	world   *hypervisortest.World
	host    *hypervisortest.Host
	leashes *preservetest.Leashes
	steps   *preservetest.Steps
	scratch *scratchtest.Notebook
	hold    *preserve.Hold
	uuids   map[string]string

	out *preserve.Outcome
}

// hold runs f in a bubble, on a host with the guests named.
func hold(t *testing.T, r maint.HoldRequest, f func(*bed), guests ...string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := &bed{T: t, world: hypervisortest.NewWorld(), steps: &preservetest.Steps{}, uuids: make(map[string]string),
			scratch: scratchtest.New()}
		defer b.world.Close()
		b.host = b.world.AddHost("a", hypervisortest.HostOptions{})
		b.leashes = &preservetest.Leashes{Host: b.host}
		for _, g := range guests {
			b.uuids[g] = b.host.PutGuest(g)
		}
		if r.Step.Command == nil {
			r.Step.Command = []string{"sleep", "1s"}
		}
		b.hold = &preserve.Hold{Op: "hold-1", Request: r, MaxPause: 10 * time.Second, Host: b.host, Leash: b.leashes,
			Steps: b.steps, Clocks: preservetest.Clocks{}, Log: slog.New(slog.DiscardHandler)}
		f(b)
		for _, op := range b.leashes.Armed() {
			line, err := b.leashes.Attach(b.Context(), op)
			if err == nil {
				_, err = line.Disarm(b.Context())
			}
			if err != nil {
				t.Error(err)
			}
		}
	})
}

// perform takes the hold through its phases.
func (b *bed) perform() error {
	b.Helper()
	if err := b.preflight(); err != nil {
		return err
	}
	b.scratch.Phase = preserve.PhaseHold
	return b.hold.Perform(b.Context(), b.scratch, b.record)
}

func (b *bed) preflight() error {
	b.scratch.Phase = preserve.PhasePreflight
	return b.hold.Preflight(b.Context(), b.scratch)
}

func (b *bed) record(o preserve.Outcome) error {
	b.out = &o
	return nil
}

func (b *bed) state(guest string) maint.GuestState {
	b.Helper()
	s, _, err := b.host.State(b.Context(), b.uuids[guest])
	if err != nil {
		b.Fatal(err)
	}
	return s
}

func (b *bed) allRun(guests ...string) {
	b.Helper()
	for _, g := range guests {
		if s := b.state(g); s != maint.GuestRunning {
			b.Errorf("guest %s is %s", g, s)
		}
	}
}

func (b *bed) result(guest string) maint.HeldGuest {
	b.Helper()
	i := slices.IndexFunc(b.out.Result.Guests, func(g maint.HeldGuest) bool { return g.Guest == guest })
	if i < 0 {
		b.Fatalf("nothing is said of guest %s: %+v", guest, b.out.Result)
	}
	return b.out.Result.Guests[i]
}

// codes are those of a refusal or a problem.
func codes(err error) (cs []maint.Code) {
	var r *maint.Refusal
	var p *maint.Problem
	switch {
	case errors.As(err, &r):
		for _, p := range r.Problems {
			cs = append(cs, p.Code)
		}
	case errors.As(err, &p):
		cs = append(cs, p.Code)
	}
	return cs
}

var all = maint.HoldRequest{All: true}

func TestGuestsAreHeldForTheStep(t *testing.T) {
	hold(t, all, func(b *bed) {
		b.steps.Did = func(string) {
			for _, g := range []string{"web-1", "web-2"} {
				if s := b.state(g); s != maint.GuestPaused {
					b.Errorf("guest %s is %s while the step runs", g, s)
				}
			}
		}
		if err := b.perform(); err != nil {
			b.Fatal(err)
		}
		b.allRun("web-1", "web-2")
		for _, name := range []string{"web-1", "web-2"} {
			g := b.result(name)
			if g.Pause != time.Second || g.ReleasedBy != "belayd" || g.Clock == nil || g.Problem != nil {
				b.Errorf("%+v", g)
			}
		}
		if armed := b.leashes.Armed(); len(armed) > 0 {
			b.Errorf("still armed: %v", armed)
		}
		if ps := preserve.Verify(b.out.Result, b.out.Leash, b.hold.MaxPause); len(ps) > 0 {
			b.Error(ps)
		}
	}, "web-1", "web-2")
}

// Who is paused by somebody else stays so, and who is off stays off.
func TestOthersStayAsTheyAre(t *testing.T) {
	hold(t, all, func(b *bed) {
		if err := b.host.Suspend(b.Context(), b.uuids["theirs"]); err != nil {
			b.Fatal(err)
		}
		// This one is paused by somebody else at the last moment.
		if err := b.preflight(); err != nil {
			b.Fatal(err)
		}
		if err := b.host.Suspend(b.Context(), b.uuids["late"]); err != nil {
			b.Fatal(err)
		}
		b.scratch.Phase = preserve.PhaseHold
		if err := b.hold.Perform(b.Context(), b.scratch, b.record); err != nil {
			b.Fatal(err)
		}
		b.allRun("web-1")
		for _, g := range []string{"theirs", "late"} {
			if s := b.state(g); s != maint.GuestPaused {
				b.Errorf("guest %s is %s", g, s)
			}
			if r := b.result(g); r.Left == "" || r.Pause != 0 || r.ReleasedBy != "" {
				b.Errorf("%+v", r)
			}
		}
	}, "web-1", "theirs", "late")
}

func TestStepFails(t *testing.T) {
	for _, c := range []struct {
		name string
		r    maint.HoldRequest
		ran  []string
		code maint.Code
	}{
		{"without undo", maint.HoldRequest{All: true, Step: command("false")}, []string{"hold-1-step"}, maint.CodeStep},
		{"with undo", maint.HoldRequest{All: true, Step: command("false"), Undo: ptr(command("sleep 1s"))}, []string{"hold-1-step", "hold-1-undo"}, maint.CodeStep},
		{"hangs", maint.HoldRequest{All: true, Step: command("sleep 1h"), Undo: ptr(command("sleep 1s"))}, []string{"hold-1-step", "hold-1-undo"}, maint.CodeStep},
		{"cannot be ended", maint.HoldRequest{All: true, Step: command("stuck 1m"), Verify: ptr(command("false")), Undo: ptr(command("true"))},
			[]string{"hold-1-step", "hold-1-undo", "hold-1-verify"}, maint.CodeStep},
		{"and its undo hangs", maint.HoldRequest{All: true, Step: command("false"), Undo: ptr(command("sleep 1h"))}, []string{"hold-1-step", "hold-1-undo"}, maint.CodeStep},
		{"is found not to have worked", maint.HoldRequest{All: true, Step: command("true"), Verify: ptr(command("false")), Undo: ptr(command("true"))},
			[]string{"hold-1-step", "hold-1-undo", "hold-1-verify"}, maint.CodeStep},
	} {
		t.Run(c.name, func(t *testing.T) {
			hold(t, c.r, func(b *bed) {
				err := b.perform()
				if !slices.Equal(codes(err), []maint.Code{c.code}) {
					b.Errorf("failed with %v", err)
				}
				b.allRun("web-1")
				if ran := b.steps.Ran(); !slices.Equal(ran, c.ran) {
					b.Errorf("ran %v", ran)
				}
				if g := b.result("web-1"); g.Pause > 10*time.Second || g.ReleasedBy != "belayd" {
					b.Errorf("%+v", g)
				}
				if slices.ContainsFunc(b.out.Leash, func(e maint.LeashEvent) bool { return e.Kind == maint.LeashFired }) {
					b.Error("the leash had to release it")
				}
			}, "web-1")
		})
	}
}

func command(words string) maint.HostStep { return maint.HostStep{Command: strings.Fields(words)} }
func ptr[T any](v T) *T                   { return &v }

// The groups come back in order; a guest that cannot does not hold up the rest.
func TestReleaseOrder(t *testing.T) {
	r := maint.HoldRequest{All: true, Groups: [][]string{{"db-1"}, {"app-1", "app-2"}}}
	hold(t, r, func(b *bed) {
		b.host.TakeLease(b.T, b.uuids["db-1"])
		time.AfterFunc(5*time.Second, func() { b.host.FreeLease(b.T, b.uuids["db-1"]) })
		if err := b.perform(); err != nil {
			b.Fatal(err)
		}
		b.allRun("db-1", "app-1", "app-2", "web-1")
		if g := b.result("db-1"); g.Pause < 4*time.Second || g.Problem != nil {
			b.Errorf("%+v", g)
		}
		for _, name := range []string{"app-1", "app-2", "web-1"} {
			if g := b.result(name); g.Pause > 1100*time.Millisecond {
				b.Errorf("%s waited for db-1: %+v", name, g)
			}
		}
	}, "web-1", "app-1", "app-2", "db-1")
	hold(t, r, func(b *bed) {
		if err := b.perform(); err != nil {
			b.Fatal(err)
		}
		var last time.Time
		for _, name := range []string{"db-1", "app-1", "web-1"} {
			g := b.result(name)
			if g.Released.Before(last) {
				b.Errorf("%s was released before the group in front of it", name)
			}
			last = g.Released
		}
	}, "web-1", "app-1", "app-2", "db-1")
}

// A guest whose lease somebody took stays paused, the leash stays at it, and
// the record says so.
func TestLeaseLostForGood(t *testing.T) {
	hold(t, all, func(b *bed) {
		b.host.TakeLease(b.T, b.uuids["web-1"])
		if err := b.perform(); err != nil {
			b.Fatal(err)
		}
		b.allRun("web-2")
		g := b.result("web-1")
		if g.Problem == nil || g.Problem.Code != maint.CodePaused || len(b.leashes.Armed()) != 1 {
			b.Fatalf("%+v, armed %v", g, b.leashes.Armed())
		}
		if ps := preserve.Verify(b.out.Result, b.out.Leash, b.hold.MaxPause); len(ps) == 0 {
			b.Error("all is said to be well")
		}
		b.host.FreeLease(b.T, b.uuids["web-1"])
		time.Sleep(2 * time.Second)
		b.allRun("web-1")
	}, "web-1", "web-2")
}

// libvirt dies under the step, and comes back before or after the deadline.
func TestLibvirtDies(t *testing.T) {
	for _, back := range []time.Duration{2 * time.Second, 12 * time.Second} {
		t.Run(back.String(), func(t *testing.T) {
			hold(t, all, func(b *bed) {
				b.steps.Did = func(string) {
					b.host.KillLibvirt()
					time.AfterFunc(back, b.host.RestartLibvirt)
				}
				if err := b.perform(); err != nil {
					b.Fatal(err)
				}
				b.allRun("web-1", "web-2")
				if g := b.result("web-1"); g.Pause > back+time.Second {
					b.Errorf("%+v", g)
				}
			}, "web-1", "web-2")
		})
	}
}

func TestAGuestThatCannotBePausedHoldsNobody(t *testing.T) {
	hold(t, all, func(b *bed) {
		b.host.Fault("Suspend", hypervisortest.Fault{Err: errors.New("no"), Times: 1})
		if err := b.perform(); err == nil || !strings.Contains(err.Error(), "cannot be paused") {
			b.Errorf("%v", err)
		}
		b.allRun("web-1", "web-2", "web-3")
		if ran := b.steps.Ran(); len(ran) > 0 {
			b.Errorf("ran %v", ran)
		}
		paused := 0
		for _, name := range []string{"web-1", "web-2", "web-3"} {
			switch g := b.result(name); {
			case g.Left == "" && g.ReleasedBy == "belayd":
				paused++
			case g.Left == "" || g.Pause != 0 || g.ReleasedBy != "":
				b.Errorf("one that was not paused: %+v", g)
			}
		}
		if paused != 2 {
			b.Errorf("%d of 3 are said to have been paused", paused)
		}
	}, "web-1", "web-2", "web-3")
}

// An answer that is lost does not lose the guest.
func TestAnswersAreLost(t *testing.T) {
	for _, op := range []string{"Suspend", "Resume"} {
		t.Run(op, func(t *testing.T) {
			hold(t, all, func(b *bed) {
				b.host.Fault(op, hypervisortest.Fault{Err: maint.ErrHypervisorDown, After: true, Times: 1})
				_ = b.perform()
				b.allRun("web-1", "web-2")
			}, "web-1", "web-2")
		})
	}
}

func TestLeashLost(t *testing.T) {
	hold(t, maint.HoldRequest{All: true, Step: command("sleep 9s")}, func(b *bed) {
		b.steps.Did = func(string) { time.AfterFunc(time.Second, func() { b.leashes.Lose("hold-1") }) }
		if err := b.perform(); !slices.Equal(codes(err), []maint.Code{maint.CodeLeash}) {
			b.Errorf("%v", err)
		}
		b.allRun("web-1")
		if g := b.result("web-1"); g.Pause > 1100*time.Millisecond {
			b.Errorf("%+v", g)
		}
	}, "web-1")
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name  string
		r     maint.HoldRequest
		setup func(*bed)
		codes []maint.Code
	}{
		{"nobody there", all, func(b *bed) {
			for _, u := range b.uuids {
				b.host.KillQEMU(b.T, u)
			}
		}, []maint.Code{maint.CodeNothing}},
		{"unknown guest", maint.HoldRequest{Guests: []string{"web-1", "web-9"}}, nil, []maint.Code{maint.CodeUnknownGuest}},
		{"in two groups", maint.HoldRequest{All: true, Groups: [][]string{{"web-1"}, {"web-1"}}}, nil, []maint.Code{maint.CodeBadRequest}},
		{"in a group but not held", maint.HoldRequest{Guests: []string{"web-1"}, Groups: [][]string{{"web-2"}}}, nil, []maint.Code{maint.CodeBadRequest}},
		{"no such program", maint.HoldRequest{All: true, Step: command("frobnicate")}, nil, []maint.Code{maint.CodeBadRequest}},
		{"bad undo", maint.HoldRequest{All: true, Undo: ptr(command("frobnicate"))}, nil, []maint.Code{maint.CodeBadRequest}},
		{"frozen file systems", all, func(b *bed) { b.hold.Clocks = preservetest.Clocks{Frozen: "web-2"} }, []maint.Code{maint.CodeFrozen}},
		{"libvirt dies before the pause", all, func(b *bed) { b.host.Fault("Warm", hypervisortest.Fault{Err: maint.ErrHypervisorDown, Times: 1}) },
			[]maint.Code{maint.CodeHypervisorDown}},
		{"no leash", all, func(b *bed) { b.leashes.Refuse = errors.New("no") }, []maint.Code{maint.CodeLeash}},
	} {
		t.Run(c.name, func(t *testing.T) {
			hold(t, c.r, func(b *bed) {
				if c.setup != nil {
					c.setup(b)
				}
				events, stop := b.host.Subscribe()
				defer stop()
				if err := b.perform(); !slices.Equal(codes(err), c.codes) {
					b.Errorf("refused with %v", err)
				}
				synctest.Wait()
				for len(events) > 0 {
					if e := <-events; e.Change == "suspended" {
						b.Errorf("guest %s was paused", e.Name)
					}
				}
				if ran := b.steps.Ran(); len(ran) > 0 {
					b.Errorf("ran %v", ran)
				}
			}, "web-1", "web-2")
		})
	}
}

func TestTwoHundredGuests(t *testing.T) {
	var names []string
	for i := range 200 {
		names = append(names, fmt.Sprintf("web-%d", i))
	}
	hold(t, all, func(b *bed) {
		if err := b.perform(); err != nil {
			b.Fatal(err)
		}
		b.allRun(names...)
		if n := len(b.out.Result.Guests); n != 200 {
			b.Errorf("%d guests are told of", n)
		}
	}, names...)
}
