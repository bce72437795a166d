package hypervisortest

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
)

// wantQuick checks a guest's state by State.
func wantQuick(t *testing.T, s Site, uuid string, state maint.GuestState, reason string) {
	t.Helper()
	got, why, err := s.Hypervisor().State(t.Context(), uuid)
	must(t, err)
	if got != state || why != reason {
		t.Errorf("State says %s (%s), want %s (%s)", got, why, state, reason)
	}
}

func testHold(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "hold")
	others := []string{newGuest(t, env, "hold-2"), newGuest(t, env, "hold-3")}
	w := watch(t, env, uuid)
	for _, n := range []int{0, 3, 100} {
		must(t, h.Warm(ctx, n))
	}
	must(t, h.Resume(ctx, uuid)) // it runs
	wantQuick(t, env.A, uuid, maint.GuestRunning, "booted")
	for range 2 {
		must(t, h.Suspend(ctx, uuid))
		wantQuick(t, env.A, uuid, maint.GuestPaused, "user")
	}
	wantState(t, env.A, uuid, maint.GuestPaused, "user")
	for range 2 {
		must(t, h.Resume(ctx, uuid))
		wantQuick(t, env.A, uuid, maint.GuestRunning, "unpaused")
	}
	wantState(t, env.A, uuid, maint.GuestRunning, "unpaused")
	for _, other := range others {
		wantQuick(t, env.A, other, maint.GuestRunning, "booted")
	}

	// all at once
	for _, call := range []func(context.Context, string) error{h.Suspend, h.Resume} {
		var calls sync.WaitGroup
		for _, uuid := range append(others, uuid) {
			calls.Go(func() {
				if err := call(ctx, uuid); err != nil {
					t.Error(err)
				}
			})
		}
		calls.Wait()
	}

	env.A.DestroyGuest(t, uuid)
	wantQuick(t, env.A, uuid, maint.GuestShutoff, "destroyed")
	wantIs(t, "Suspend of a guest that is off", asInvalid(h.Suspend(ctx, uuid)), errInvalid)
	wantIs(t, "Resume of a guest that is off", asInvalid(h.Resume(ctx, uuid)), errInvalid)
	w.want(t, "a suspended paused", "a resumed unpaused", "a suspended paused", "a resumed unpaused", "a stopped destroyed")
}

func testHoldWithoutLibvirt(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "without")
	must(t, h.Warm(ctx, 16))
	must(t, h.Suspend(ctx, uuid))
	env.A.KillLibvirt(t)
	for op, call := range map[string]func() error{
		"Warm":    func() error { return h.Warm(ctx, 1) },
		"Suspend": func() error { return h.Suspend(ctx, uuid) },
		"Resume":  func() error { return h.Resume(ctx, uuid) },
		"State":   func() error { _, _, err := h.State(ctx, uuid); return err },
		"QMP":     func() error { _, err := h.QMP(ctx, uuid, "query-status", nil); return err },
		"Restore": func() error { return h.Restore(ctx, "/nowhere", true) },
	} {
		wantIs(t, op+" without libvirt", call(), maint.ErrHypervisorDown)
	}
	env.A.RestartLibvirt(t)
	// The first call after it finds a connection, and the guest still held.
	wantQuick(t, env.A, uuid, maint.GuestPaused, "user")
	must(t, h.Resume(ctx, uuid))
	wantQuick(t, env.A, uuid, maint.GuestRunning, "unpaused")

	must(t, h.Warm(ctx, 16))
	env.A.FreezeLibvirt(t)
	t.Cleanup(func() { env.A.ThawLibvirt(t) })
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	err := h.Suspend(short, uuid)
	wantIs(t, "Suspend with libvirt frozen", err, maint.ErrHypervisorDown)
	wantIs(t, "Suspend with libvirt frozen", err, context.DeadlineExceeded)
	env.A.ThawLibvirt(t)
	must(t, h.Resume(ctx, uuid))
}

func testLease(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := env.A.NewLeasedGuest(t, "lease")
	t.Cleanup(func() { env.A.RemoveGuest(t, uuid) })
	must(t, h.Suspend(ctx, uuid))
	env.A.TakeLease(t, uuid)
	for range 2 {
		wantIs(t, "Resume with a rival", h.Resume(ctx, uuid), maint.ErrLocked)
		wantQuick(t, env.A, uuid, maint.GuestPaused, "user")
	}
	env.A.FreeLease(t, uuid)
	must(t, h.Resume(ctx, uuid))
	wantQuick(t, env.A, uuid, maint.GuestRunning, "unpaused")
}

// offset is a guest's wall clock less the host's.
func offset(t *testing.T, s Site, uuid string) time.Duration {
	t.Helper()
	before := time.Now()
	at, err := s.Hypervisor().GuestTime(t.Context(), uuid)
	must(t, err)
	return at.Sub(before.Add(time.Since(before) / 2))
}

func testClock(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := env.A.NewAgentGuest(t, "clock")
	t.Cleanup(func() { env.A.RemoveGuest(t, uuid) })
	eventually(t, "agent connected", func() bool { return look(t, env.A, uuid).Agent == maint.AgentConnected })

	const far, tolerance = -time.Hour - 250*time.Millisecond, 200 * time.Millisecond
	must(t, h.SetGuestTime(ctx, uuid, time.Now().Add(far)))
	if off := offset(t, env.A, uuid); (off - far).Abs() > tolerance {
		t.Errorf("clock is off by %v after it was set to %v", off, far)
	}
	value, err := h.AgentCommand(ctx, uuid, "guest-get-time", nil)
	must(t, err)
	var ns int64
	must(t, json.Unmarshal(value, &ns))
	if off := time.Until(time.Unix(0, ns)); (off - far).Abs() > tolerance {
		t.Errorf("the agent says that it is off by %v", off)
	}
	_, err = h.AgentCommand(ctx, uuid, "guest-set-time", map[string]any{"time": time.Now().UnixNano()})
	must(t, err)

	before := offset(t, env.A, uuid)
	start := time.Now()
	must(t, h.Suspend(ctx, uuid))
	_, err = h.GuestTime(ctx, uuid)
	wantIs(t, "GuestTime of a guest that is held", err, maint.ErrNoAgent)
	time.Sleep(600 * time.Millisecond) // what a hold costs is time
	must(t, h.Resume(ctx, uuid))
	if lost := before - offset(t, env.A, uuid); (lost - time.Since(start)).Abs() > tolerance {
		t.Errorf("the guest has lost %v in a hold of up to %v", lost, time.Since(start))
	}

	_, err = h.AgentCommand(ctx, uuid, "no-such-command", nil)
	if e, ok := errors.AsType[*hypervisor.AgentError](err); !ok || e.Class != "CommandNotFound" || e.Desc == "" || errors.Is(err, maint.ErrNoAgent) {
		t.Errorf("error %v, want the agent's own", err)
	}
	_, err = h.AgentCommand(ctx, uuid, "guest-set-time", map[string]string{"time": "noon"})
	if e, ok := errors.AsType[*hypervisor.AgentError](err); !ok || e.Class != "GenericError" || e.Desc == "" {
		t.Errorf("error %v, want the agent's own", err)
	}
	_, err = h.AgentCommand(ctx, uuid, "guest-shutdown", nil)
	wantIs(t, "guest-shutdown", err, hypervisor.ErrEndsGuest)
	wantQuick(t, env.A, uuid, maint.GuestRunning, "unpaused")
}

func testNoAgent(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "no-agent")
	for _, change := range []func(){
		func() {},
		func() { env.A.PauseGuest(t, uuid) },
		func() { env.A.DestroyGuest(t, uuid) },
	} {
		change()
		_, err := h.GuestTime(ctx, uuid)
		wantIs(t, "GuestTime", err, maint.ErrNoAgent)
		wantIs(t, "SetGuestTime", h.SetGuestTime(ctx, uuid, time.Now()), maint.ErrNoAgent)
		_, err = h.AgentCommand(ctx, uuid, "guest-ping", nil)
		wantIs(t, "AgentCommand", err, maint.ErrNoAgent)
		if errors.Is(err, maint.ErrHypervisorDown) {
			t.Errorf("a guest without agent is taken for libvirt's being down: %v", err)
		}
	}
}
