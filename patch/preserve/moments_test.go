package preserve_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
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
		b.scratch.phase = "hold"
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
		b.scratch.phase = "hold"
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
		b.scratch.phase = "hold"
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
		b.scratch.phase = "hold"
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
