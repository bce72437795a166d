package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
	"belay/patch/preserve"
	"belay/patch/preserve/preservetest"
)

// oneGuest is a hypervisor with one guest.
type oneGuest struct {
	Hypervisor
	state maint.GuestState
	err   error
}

func (h *oneGuest) Guest(context.Context, string) (maint.Guest, error) {
	return maint.Guest{UUID: "u1", Name: "web-1", State: h.state}, h.err
}

func (h *oneGuest) State(context.Context, string) (maint.GuestState, string, error) {
	return h.state, "user", h.err
}

func (h *oneGuest) Resume(context.Context, string) error {
	if h.err == nil {
		h.state = maint.GuestRunning
	}
	return h.err
}

func (h *oneGuest) Suspend(context.Context, string) error { return errors.New("not asked for") }

// leashed is a replacement whose leash is armed, and whose belayd is alive.
func leashed(t *testing.T) (l *pauseLeash, all *preservetest.Leashes, h *oneGuest, alive *bool) {
	t.Helper()
	h, alive = &oneGuest{state: maint.GuestRunning}, new(bool)
	*alive = true
	all = &preservetest.Leashes{Host: h, Alive: func() bool { return *alive }}
	l = again(all, h)
	l.a.cfg.Hold.MaxPause.Duration = time.Hour
	if err := l.arm(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.state = maint.GuestPaused
	return l, all, h, alive
}

// again is the same replacement under the next belayd, or in its next step.
func again(all *preservetest.Leashes, h *oneGuest) *pauseLeash {
	a := &Agent{log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	return &pauseLeash{a: a, op: maint.Op{ID: "vmm-1", Guest: "web-1", GuestUUID: "u1"}, leash: all, hyp: h}
}

func armed(all *preservetest.Leashes) bool { return slices.Contains(all.Armed(), "vmm-1") }

// What fails with the guest paused leaves the leash with it, which resumes it
// when belayd has ended; the next belayd takes its leash away once it runs.
func TestLeashStaysWithAPausedGuest(t *testing.T) {
	for name, strike := range map[string]func(h *oneGuest){
		"paused":               func(*oneGuest) {},
		"libvirt is not there": func(h *oneGuest) { h.err = maint.ErrHypervisorDown },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, all, h, alive := leashed(t)
				strike(h)
				if events := l.rest(t.Context(), errors.New("it cannot be resumed")); len(events) != 1 || !armed(all) {
					t.Fatalf("armed: %t, %v", armed(all), events)
				}
				// The undo, which does not get on either.
				l = again(all, h)
				if err := l.takeUp(t.Context()); err != nil || l.line == nil || !armed(all) {
					t.Fatalf("taken up: %v, %v, armed: %t", l.line, err, armed(all))
				}
				l.rest(t.Context(), errors.New("it still cannot be resumed"))
				if err := l.takeUp(t.Context()); err != nil {
					t.Fatal(err)
				}
				if events := l.rest(t.Context(), errors.New("it still cannot be resumed")); len(events) > 0 {
					t.Errorf("it tells again: %v", events)
				}
				*alive = false
				time.Sleep(time.Minute)
				h.err = nil
				time.Sleep(time.Minute)
				if h.state != maint.GuestRunning {
					t.Errorf("the guest is %s", h.state)
				}
				l = again(all, h)
				if err := l.takeUp(t.Context()); err != nil || l.line != nil || armed(all) {
					t.Errorf("in the end: %v, %v, armed: %t", l.line, err, armed(all))
				}
			})
		})
	}
}

// A leash that there is no more need for is disarmed, however it ended.
func TestLeashIsDisarmed(t *testing.T) {
	for name, c := range map[string]struct {
		state   maint.GuestState
		err     error
		failure error
	}{
		"it has crossed":            {maint.GuestShutoff, nil, nil},
		"it runs on":                {maint.GuestRunning, nil, errors.New("called off")},
		"it has ended":              {maint.GuestShutoff, nil, errors.New("it is off")},
		"it has ended, a transient": {"", maint.ErrNoGuest, errors.New("it is off")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, all, h, _ := leashed(t)
				h.state, h.err = c.state, c.err
				if events := l.rest(t.Context(), c.failure); armed(all) || len(events) != 2 {
					t.Errorf("armed: %t, %v", armed(all), events)
				}
			})
		})
	}
}

// deaf is a line to a leash that does not let go.
type deaf struct{ preserve.Line }

func (deaf) Disarm(context.Context) ([]maint.LeashEvent, error) {
	return nil, errors.New("no answer in time")
}

// A leash that does not let go at the point of no return has the guest as before.
func TestLeashDoesNotLetGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, all, h, alive := leashed(t)
		l.line = deaf{l.line}
		if err := l.pass(t.Context()); err == nil || l.line.Marks()["u1"] != preserve.Paused {
			t.Errorf("let go: %v, marks %v", err, l.line.Marks())
		}
		l.rest(t.Context(), errors.New("called off"))
		*alive = false
		time.Sleep(time.Minute)
		if h.state != maint.GuestRunning {
			t.Errorf("the guest is %s", h.state)
		}
		_ = again(all, h).takeUp(t.Context())
	})
}

// A leash that has resumed the guest in its old QEMU calls the rest off.
func TestLeashHasResumed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _, h, alive := leashed(t)
		*alive = false
		time.Sleep(time.Minute)
		if err := l.pass(t.Context()); err == nil || h.state != maint.GuestRunning {
			t.Errorf("%v, the guest is %s", err, h.state)
		}
	})
}
