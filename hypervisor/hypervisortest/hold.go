package hypervisortest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
)

// clock is a guest's wall clock: it stands while the guest's vCPUs do, and goes
// on from there.
type clock struct {
	offset time.Duration // the guest's less the host's, while it goes
	stood  time.Time     // since when it stands; zero while it goes
}

func (c *clock) follow(running bool) {
	switch {
	case running && !c.stood.IsZero():
		c.offset -= time.Since(c.stood)
		c.stood = time.Time{}
	case !running && c.stood.IsZero():
		c.stood = time.Now()
	}
}

// ClockOffset is a running guest's wall clock less the host's.
func (h *Host) ClockOffset(t testing.TB, uuid string) (offset time.Duration) {
	t.Helper()
	h.change(t, uuid, func(g *guest) { offset = g.clock.offset })
	return offset
}

// SetClock puts a guest's wall clock off the host's.
func (h *Host) SetClock(t testing.TB, uuid string, offset time.Duration) {
	t.Helper()
	h.change(t, uuid, func(g *guest) { g.clock.offset = offset })
}

// SetAgentDelay says what a call to a guest's agent takes before and after it
// has its effect. Longer than the call's context is an agent that hangs.
func (h *Host) SetAgentDelay(t testing.TB, uuid string, there, back time.Duration) {
	t.Helper()
	h.change(t, uuid, func(g *guest) { g.there, g.back = there, back })
}

// TakeLease has somebody else hold the lease of a guest's disk: a paused guest
// cannot be resumed. FreeLease ends it.
func (h *Host) TakeLease(t testing.TB, uuid string) {
	t.Helper()
	h.change(t, uuid, func(g *guest) { g.rival = true })
}

// FreeLease is the reverse of TakeLease.
func (h *Host) FreeLease(t testing.TB, uuid string) {
	t.Helper()
	h.change(t, uuid, func(g *guest) { g.rival = false })
}

// Lag has libvirt, restarted, not know what became of a guest: State wraps
// hypervisor.ErrBusy, and the guest has the job "catching up", until it is ended.
func (h *Host) Lag(t testing.TB, uuid string, on bool) {
	t.Helper()
	h.change(t, uuid, func(g *guest) { g.lag = on })
}

// Answer answers a command to an agent or to a QEMU, or leaves it (handled
// false) to the host. An error is returned as it is: *hypervisor.AgentError or
// *hypervisor.QMPError for a refusal. It is called without locks held.
type Answer func(uuid, command string, args json.RawMessage) (value any, handled bool, err error)

// OnAgent has f answer commands to agents. By itself an agent knows guest-ping,
// guest-sync, guest-get-time, guest-set-time, guest-fsfreeze-status and
// guest-fsfreeze-thaw.
func (h *Host) OnAgent(f Answer) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.onAgent = f
}

// Warm has nothing to open.
func (h *Host) Warm(ctx context.Context, _ int) error {
	_, err := locked(ctx, h, "Warm", func() (struct{}, error) { return struct{}{}, nil })
	return err
}

// notRunning is libvirt's refusal of what needs a QEMU.
func (h *Host) notRunning(op string, causes ...error) error {
	return h.failed(op, codeOperationInvalid, "Requested operation is not valid: domain is not running", causes...)
}

// Suspend stops a guest's vCPUs, also when ctx has ended meanwhile.
func (h *Host) Suspend(ctx context.Context, uuid string) error {
	ctx, cancel := withDefault(ctx)
	defer cancel()
	if err := h.afterLate(ctx, uuid); err != nil {
		return err
	}
	late := make(chan struct{})
	h.w.mu.Lock()
	if g := h.guests[uuid]; g != nil {
		g.late = late
	}
	h.w.mu.Unlock()
	return outlive(ctx, h, "Suspend", late, func() error {
		return h.with(uuid, func(g *guest) error {
			switch {
			case !g.State.Active():
				return h.notRunning("DomainSuspend")
			case g.State == maint.GuestSuspended:
				return h.failed("DomainSuspend", codeOperationInvalid, "Requested operation is not valid: domain is pmsuspended")
			case g.State == maint.GuestPaused:
				return nil
			}
			h.pause(g)
			return nil
		})
	}, func() { // an error is what a real one logs
		_ = h.with(uuid, func(g *guest) error { _, err := h.resume(g); return err })
	})
}

// afterLate waits until the guest's last Suspend is answered.
func (h *Host) afterLate(ctx context.Context, uuid string) error {
	h.w.mu.Lock()
	var late <-chan struct{}
	if g := h.guests[uuid]; g != nil {
		late = g.late
	}
	h.w.mu.Unlock()
	if late == nil {
		return nil
	}
	select {
	case <-late:
		return nil
	case <-ctx.Done():
		return h.unanswered("DomainSuspend", ctx.Err())
	}
}

// Resume starts a guest's vCPUs.
func (h *Host) Resume(ctx context.Context, uuid string) error {
	ctx, cancel := withDefault(ctx)
	defer cancel()
	if err := h.afterLate(ctx, uuid); err != nil {
		return err
	}
	_, err := onGuest(ctx, h, "Resume", uuid, h.resume)
	return err
}

func (h *Host) resume(g *guest) (struct{}, error) {
	switch {
	case !g.State.Active():
		return struct{}{}, h.notRunning("DomainResume")
	case g.State == maint.GuestSuspended:
		return struct{}{}, h.failed("DomainResume", codeOperationInvalid, "Requested operation is not valid: domain is pmsuspended")
	case g.State == maint.GuestRunning:
		return struct{}{}, nil
	case g.rival:
		return struct{}{}, h.leaseTaken("DomainResume", g)
	}
	g.become(maint.GuestRunning, "unpaused")
	h.lifecycle(g, "resumed", "unpaused")
	return struct{}{}, nil
}

func (h *Host) leaseTaken(op string, g *guest) error {
	return h.failed(op, codeResourceBusy, fmt.Sprintf("resource busy: Lockspace resource '%s' is locked", g.Name), maint.ErrLocked)
}

// State gives a guest's state and its reason.
func (h *Host) State(ctx context.Context, uuid string) (maint.GuestState, string, error) {
	ctx, cancel := withDefault(ctx)
	defer cancel()
	if err := h.afterLate(ctx, uuid); err != nil {
		return "", "", err
	}
	g, err := onGuest(ctx, h, "State", uuid, func(g *guest) (maint.Guest, error) {
		if g.lag && g.State.Active() {
			return maint.Guest{}, h.failed("DomainGetControlInfo", 0,
				"libvirt has not caught up with the guest's QEMU, or a job of its does not end", hypervisor.ErrBusy)
		}
		return g.Guest, nil
	})
	return g.State, g.Reason, err
}

// GuestTime gives a guest's wall clock.
func (h *Host) GuestTime(ctx context.Context, uuid string) (time.Time, error) {
	return agentCall(ctx, h, "GuestTime", uuid, func() (at time.Time, err error) {
		err = h.with(uuid, func(g *guest) error {
			at = g.now()
			return nil
		})
		return at, err
	})
}

// SetGuestTime sets it.
func (h *Host) SetGuestTime(ctx context.Context, uuid string, to time.Time) error {
	_, err := agentCall(ctx, h, "SetGuestTime", uuid, func() (struct{}, error) {
		return struct{}{}, h.with(uuid, func(g *guest) error {
			g.clock.offset = time.Until(to)
			return nil
		})
	})
	return err
}

func (g *guest) now() time.Time { return time.Now().Round(0).Add(g.clock.offset) }

// AgentCommand passes a command to a guest's agent: see OnAgent.
func (h *Host) AgentCommand(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	refused := func(err error) error { return fmt.Errorf("cannot run %s in guest %s: %w", command, uuid, err) }
	if hypervisor.EndsGuest(command, args) {
		return nil, refused(hypervisor.ErrEndsGuest)
	}
	text, err := json.Marshal(args)
	if err != nil {
		return nil, refused(err)
	}
	h.w.mu.Lock()
	answer := h.onAgent
	h.w.mu.Unlock()
	value, err := agentCall(ctx, h, "AgentCommand", uuid, func() (value any, err error) {
		if answer != nil {
			if value, handled, err := answer(uuid, command, text); handled || err != nil {
				return value, err
			}
		}
		err = h.with(uuid, func(g *guest) (err error) {
			value, err = g.agent(command, text)
			return err
		})
		return value, err
	})
	if _, refusal := errors.AsType[*hypervisor.AgentError](err); refusal {
		return nil, refused(err)
	}
	if err != nil {
		return nil, err
	}
	return json.Marshal(value)
}

// agent is what a guest's agent answers by itself.
func (g *guest) agent(command string, args json.RawMessage) (any, error) {
	var a struct {
		ID   int64  `json:"id"`
		Time *int64 `json:"time"`
	}
	if err := json.Unmarshal(args, &a); err != nil {
		return nil, &hypervisor.AgentError{Class: "GenericError", Desc: "QMP input member 'arguments' must be an object"}
	}
	switch command {
	case "guest-ping":
	case "guest-sync":
		return a.ID, nil
	case "guest-get-time":
		return g.now().UnixNano(), nil
	case "guest-set-time":
		g.clock.offset = 0 // what the hardware clock says
		if a.Time != nil {
			g.clock.offset = time.Until(time.Unix(0, *a.Time))
		}
	case "guest-fsfreeze-status":
		return "thawed", nil
	case "guest-fsfreeze-thaw":
		return 0, nil
	default:
		return nil, &hypervisor.AgentError{Class: "CommandNotFound", Desc: "The command " + command + " has not been found"}
	}
	return struct{}{}, nil
}

// agentCall makes a call that a guest's agent answers, in its time.
func agentCall[T any](ctx context.Context, h *Host, op, uuid string, effect func() (T, error)) (T, error) {
	return do(ctx, h, op, true, func(ctx context.Context) (v T, err error) {
		var there, back time.Duration
		var interrupt <-chan struct{}
		reach := func() error {
			return h.with(uuid, func(g *guest) error {
				there, back, interrupt = g.there, g.back, h.interrupt
				return h.canAsk(op, g)
			})
		}
		if err := reach(); err != nil {
			return v, err
		}
		if err := h.agentWait(ctx, op, there, interrupt); err != nil {
			return v, err
		}
		if err := reach(); err != nil {
			return v, err
		}
		if v, err = effect(); err != nil {
			return v, err
		}
		return v, h.agentWait(ctx, op, back, interrupt)
	})
}

// with runs f on a guest under the lock.
func (h *Host) with(uuid string, f func(*guest) error) error {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	g, err := h.find(uuid)
	if err != nil {
		return err
	}
	return f(g)
}

// canAsk refuses a call to an agent that cannot be reached.
func (h *Host) canAsk(op string, g *guest) error {
	switch {
	case g.State != maint.GuestRunning:
		return h.notRunning(op, maint.ErrNoAgent)
	case g.Agent == maint.AgentNone:
		return h.failed(op, codeArgument, "argument unsupported: QEMU guest agent is not configured", maint.ErrNoAgent)
	case g.Agent != maint.AgentConnected:
		return h.failed(op, codeAgent, "Guest agent is not responding: QEMU guest agent is not connected", maint.ErrNoAgent)
	}
	return nil
}

// agentWait lets time pass that is the agent's.
func (h *Host) agentWait(ctx context.Context, op string, d time.Duration, interrupt <-chan struct{}) error {
	err := h.wait(ctx, op, d, interrupt)
	if errors.Is(err, context.DeadlineExceeded) {
		return h.failed(op, 0, "no answer from the guest agent in time", maint.ErrNoAgent, context.DeadlineExceeded)
	}
	return err
}

// qemuVersion is the answer to query-version.
func qemuVersion(text string) any {
	var n [3]int
	_, _ = fmt.Sscanf(text, "%d.%d.%d", &n[0], &n[1], &n[2]) // what is missing is 0
	return map[string]any{
		"qemu":    map[string]int{"major": n[0], "minor": n[1], "micro": n[2]},
		"package": "",
	}
}
