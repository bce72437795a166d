package preserve_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/preserve"
	"belay/patch/preserve/preservetest"
)

// slow is a host one of whose guests is hard to reach.
type slow struct {
	*hypervisortest.Host
	uuid           string
	state, suspend time.Duration // what its calls take
	looked         func()        // called before each look at it
}

func (s *slow) State(ctx context.Context, uuid string) (maint.GuestState, string, error) {
	if uuid == s.uuid {
		if s.looked != nil {
			s.looked()
		}
		if err := wait(ctx, s.state); err != nil {
			return "", "", err
		}
	}
	return s.Host.State(ctx, uuid)
}

func (s *slow) Suspend(ctx context.Context, uuid string) error {
	if uuid == s.uuid {
		if err := wait(ctx, s.suspend); err != nil {
			return err
		}
	}
	return s.Host.Suspend(ctx, uuid)
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A guest that somebody pauses while another one is still looked at is theirs.
func TestPausedWhileAnotherIsLookedAt(t *testing.T) {
	hold(t, all, func(b *bed) {
		if err := b.preflight(); err != nil {
			b.Fatal(err)
		}
		s := &slow{Host: b.host, uuid: b.uuids["slow"], state: 500 * time.Millisecond}
		b.hold.Host = s
		b.scratch.Phase = "hold"
		time.AfterFunc(400*time.Millisecond, func() {
			if err := b.host.Suspend(b.Context(), b.uuids["theirs"]); err != nil {
				b.Error(err)
			}
		})
		if err := b.hold.Perform(b.Context(), b.scratch, b.record); err != nil {
			b.Fatal(err)
		}
		b.allRun("web-1", "slow")
		if s := b.state("theirs"); s != maint.GuestPaused {
			b.Errorf("the guest that somebody paused is %s", s)
		}
		if r := b.result("theirs"); r.Left == "" || r.Pause != 0 {
			b.Errorf("%+v", r)
		}
	}, "web-1", "theirs", "slow")
}

// A guest that cannot be looked at does not keep the others from their release.
func TestOneThatCannotBeLookedAt(t *testing.T) {
	hold(t, all, func(b *bed) {
		if err := b.preflight(); err != nil {
			b.Fatal(err)
		}
		s := &slow{Host: b.host, uuid: b.uuids["slow"]}
		b.hold.Host = s
		b.steps.Did = func(string) { s.state = 900 * time.Millisecond }
		b.scratch.Phase = "hold"
		if err := b.hold.Perform(b.Context(), b.scratch, b.record); err != nil {
			b.Fatal(err)
		}
		b.allRun("web-1", "slow")
		if g := b.result("web-1"); g.Pause > 1250*time.Millisecond {
			b.Errorf("it waited for another one: %+v", g)
		}
		if g := b.result("slow"); g.ReleasedBy != "belayd" || g.Pause < 1900*time.Millisecond {
			b.Errorf("%+v", g)
		}
	}, "web-1", "slow")
}

// A QEMU that does not heed its monitor keeps the others no longer than the pause
// may take, and is released when it comes to itself, long after.
func TestOneThatStopsLate(t *testing.T) {
	hold(t, all, func(b *bed) {
		b.hold.MaxPause = 2 * time.Second
		if err := b.preflight(); err != nil {
			b.Fatal(err)
		}
		b.host.Fault("Suspend", hypervisortest.Fault{Delay: time.Minute, Times: 1})
		b.scratch.Phase = "hold"
		begun := time.Now()
		if err := b.hold.Perform(b.Context(), b.scratch, b.record); !slices.Equal(codes(err), []maint.Code{maint.CodeFailed}) {
			b.Errorf("%v", err)
		}
		if ran := b.steps.Ran(); len(ran) > 0 {
			b.Errorf("%v ran", ran)
		}
		var kept time.Duration
		for _, g := range b.out.Result.Guests {
			if g.ReleasedBy == "belayd" {
				kept = g.Pause
			}
		}
		if kept == 0 || kept > b.hold.MaxPause {
			b.Errorf("the other guest was kept for %s", kept)
		}
		time.Sleep(time.Until(begun.Add(2 * time.Minute)))
		b.allRun("web-1", "web-2")
	}, "web-1", "web-2")
}

// The step is not begun when the leash was lost while guests were being paused.
func TestLeashLostWhilePausing(t *testing.T) {
	hold(t, all, func(b *bed) {
		if err := b.preflight(); err != nil {
			b.Fatal(err)
		}
		b.hold.Host = &slow{Host: b.host, uuid: b.uuids["slow"], suspend: 500 * time.Millisecond}
		time.AfterFunc(250*time.Millisecond, func() { b.leashes.Lose(b.hold.Op) })
		b.scratch.Phase = "hold"
		err := b.hold.Perform(b.Context(), b.scratch, b.record)
		if !slices.Equal(codes(err), []maint.Code{maint.CodeLeash}) {
			b.Errorf("%v", err)
		}
		if ran := b.steps.Ran(); len(ran) > 0 {
			b.Errorf("%v ran", ran)
		}
		b.allRun("web-1", "slow")
	}, "web-1", "slow")
}

// A guest that somebody resumes in the middle of a hold is told of: the host was
// serviced under it.
func TestSomebodyResumesOne(t *testing.T) {
	hold(t, all, func(b *bed) {
		b.steps.Did = func(string) {
			time.AfterFunc(100*time.Millisecond, func() {
				if err := b.host.Resume(b.Context(), b.uuids["web-1"]); err != nil {
					b.Error(err)
				}
			})
		}
		if err := b.perform(); err != nil {
			b.Fatal(err)
		}
		problems := preserve.Verify(b.out.Result, b.out.Leash, b.hold.MaxPause)
		if len(problems) != 1 || problems[0].Code != maint.CodeReleased || problems[0].Subject != "guest web-1" {
			b.Errorf("%+v", problems)
		}
		if g := b.result("web-2"); g.ReleasedBy != "belayd" || g.Problem != nil {
			b.Errorf("%+v", g)
		}
	}, "web-1", "web-2")
}

// A release whose answer is lost is belayd's all the same.
func TestReleaseIsBelaydsOwn(t *testing.T) {
	hold(t, all, func(b *bed) {
		b.host.Fault("Resume", hypervisortest.Fault{Err: maint.ErrHypervisorDown, After: true, Times: 2})
		if err := b.perform(); err != nil {
			b.Fatal(err)
		}
		for _, name := range []string{"web-1", "web-2"} {
			if g := b.result(name); g.ReleasedBy != "belayd" {
				b.Errorf("%+v", g)
			}
		}
	}, "web-1", "web-2")
}

// behind are clocks that cannot be put right.
type behind struct {
	preservetest.Clocks
	report maint.ClockReport
}

func (c behind) Prepare(context.Context, maint.Guest) (preserve.Clock, *maint.Problem) { return c, nil }

func (c behind) Correct(context.Context, time.Time, time.Duration) maint.ClockReport { return c.report }

// A clock that a pause has left behind is a problem; one that was so before, or
// that a time service sees to, is not.
func TestClockLeftBehind(t *testing.T) {
	off := func(d time.Duration) *maint.ClockOffset { return &maint.ClockOffset{Offset: d} }
	for _, c := range []struct {
		report  maint.ClockReport
		problem bool
	}{
		{maint.ClockReport{State: maint.ClockSynchronised, After: off(0)}, false},
		{maint.ClockReport{State: maint.ClockUnsynchronised, Reason: "no answer"}, true},
		{maint.ClockReport{State: maint.ClockOff, Before: off(0), After: off(-time.Second)}, true},
		{maint.ClockReport{State: maint.ClockOff, Before: off(0), After: off(-20 * time.Millisecond)}, false},
		{maint.ClockReport{State: maint.ClockOff, Before: off(-time.Hour), After: off(-time.Hour)}, false},
	} {
		hold(t, all, func(b *bed) {
			b.host.SetAgent(b.T, b.uuids["web-1"], maint.AgentConnected)
			b.hold.Clocks = behind{report: c.report}
			if err := b.perform(); err != nil {
				b.Fatal(err)
			}
			problems := preserve.Verify(b.out.Result, b.out.Leash, b.hold.MaxPause)
			if got := len(problems) == 1 && problems[0].Code == maint.CodeClock; got != c.problem || len(problems) > 1 {
				b.Errorf("%+v: %+v", c.report, problems)
			}
		}, "web-1")
	}
}

// An undo that fails leaves the host half changed.
func TestUndone(t *testing.T) {
	step, undo := command("false"), command("exit 3")
	r := maint.HoldRequest{Step: step, Undo: &undo}
	failed, well := &maint.StepRun{ExitCode: 1}, &maint.StepRun{}
	for _, c := range []struct {
		held maint.HoldResult
		ok   bool
	}{
		{maint.HoldResult{}, true},
		{maint.HoldResult{Step: failed, Undo: well}, true},
		{maint.HoldResult{Step: failed, Undo: failed}, false},
		{maint.HoldResult{Step: failed}, false},
	} {
		if err := preserve.Undone(r, c.held); (err == nil) != c.ok {
			t.Errorf("%+v: %v", c.held, err)
		}
	}
}
