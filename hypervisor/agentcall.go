package hypervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// Numbers of virErrorNumber that go-libvirt does not have.
const (
	errAgentCommandTimeout libvirt.ErrorNumber = 112
	errAgentCommandFailed  libvirt.ErrorNumber = 113
)

// AgentError is the guest agent's own refusal of a command.
type AgentError struct {
	// Class is "CommandNotFound" when the agent does not have the command, or
	// it is disabled; else mostly "GenericError".
	Class string
	Desc  string
}

// Error implements error.
func (e *AgentError) Error() string { return "guest agent: " + e.Desc }

// GuestTime asks a guest's agent for the guest's wall clock. It wraps
// maint.ErrNoGuest, maint.ErrNoAgent and *AgentError.
//
// Source: virDomainGetTime.
func (h *Host) GuestTime(ctx context.Context, uuid string) (time.Time, error) {
	t, err := agentCall(ctx, h, uuid, "DomainGetTime", "guest-get-time", func(l *libvirt.Libvirt, d libvirt.Domain) (time.Time, error) {
		seconds, nanoseconds, err := l.DomainGetTime(d, 0)
		return time.Unix(seconds, int64(nanoseconds)), err
	})
	if err != nil {
		return time.Time{}, err
	}
	return t, nil
}

// SetGuestTime has a guest's agent set the guest's wall clock, to the
// nanosecond, and its hardware clock by it. An error does not say that nothing
// was set: the agent reports one when only the hardware clock could not be set.
// It wraps maint.ErrNoGuest, maint.ErrNoAgent and *AgentError.
//
// Source: virDomainSetTime.
func (h *Host) SetGuestTime(ctx context.Context, uuid string, to time.Time) error {
	_, err := agentCall(ctx, h, uuid, "DomainSetTime", "guest-set-time", func(l *libvirt.Libvirt, d libvirt.Domain) (struct{}, error) {
		return struct{}{}, l.DomainSetTime(d, to.Unix(), uint32(to.Nanosecond()), 0)
	})
	return err
}

// AgentCommand passes a command to a guest's agent and gives the content of
// "return". args is marshalled to "arguments"; nil is none. The agent's own
// refusal is an *AgentError. It wraps maint.ErrNoGuest and maint.ErrNoAgent, and
// refuses commands that end or suspend the guest with ErrEndsGuest.
//
// Source: virDomainQemuAgentCommand, which waits in whole seconds: as many as
// the context has left, at least one.
func (h *Host) AgentCommand(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	if EndsGuest(command, args) {
		return nil, fmt.Errorf("cannot run %s in guest %s: %w", command, uuid, ErrEndsGuest)
	}
	text, err := request(command, args)
	if err != nil {
		return nil, err
	}
	ctx, cancel := h.bounded(ctx)
	defer cancel()
	reply, err := agentCall(ctx, h, uuid, "DomainQemuAgentCommand", command, func(l *libvirt.Libvirt, d libvirt.Domain) (string, error) {
		reply, err := l.QEMUDomainAgentCommand(d, text, seconds(ctx), 0)
		if err != nil || len(reply) == 0 {
			return "", err
		}
		return reply[0], nil
	})
	if err != nil {
		return nil, err
	}
	value, class, desc, err := response(reply)
	if class != "" { // libvirt makes an error of its own of it, see refusal
		return nil, fmt.Errorf("cannot run %s in guest %s: %w", command, uuid, &AgentError{class, desc})
	}
	return value, err
}

// seconds is the time that a context has left, as libvirt takes it.
func seconds(ctx context.Context) int32 {
	deadline, ok := ctx.Deadline()
	if !ok {
		return math.MaxInt32
	}
	left := time.Until(deadline) / time.Second
	return int32(min(max(left, 1), math.MaxInt32))
}

// agentCall makes a call that libvirt passes on to a guest's agent, as a
// command.
func agentCall[T any](ctx context.Context, h *Host, uuid, op, command string, fn func(*libvirt.Libvirt, libvirt.Domain) (T, error)) (T, error) {
	asked := false
	v, err := direct(ctx, h, h.fan, uuid, op, func(l *libvirt.Libvirt, d libvirt.Domain) (T, error) {
		asked = true
		return fn(l, d)
	})
	var e *Error
	if !errors.As(err, &e) {
		return v, err
	}
	switch libvirt.ErrorNumber(e.Code) {
	case libvirt.ErrAgentUnresponsive, // not connected, lost, or in disorder
		libvirt.ErrAgentUnsynced,
		libvirt.ErrArgumentUnsupported, // "QEMU guest agent is not configured"
		libvirt.ErrOperationInvalid,    // "domain is not running": nor does its agent
		libvirt.ErrOperationTimeout,    // somebody else's call to the agent does not end
		errAgentCommandTimeout:
		return v, because(err, maint.ErrNoAgent)
	case libvirt.ErrOperationUnsupported:
		// virDomainSetTime asks for QEMU's abilities first, which a guest
		// that is off has none of.
		if state, _, stateErr := h.State(ctx, uuid); stateErr == nil && !state.Active() {
			return v, because(err, maint.ErrNoAgent)
		}
	case libvirt.ErrInternalError, errAgentCommandFailed:
		if refused := refusal(command, e.Message); refused != nil {
			return v, because(err, refused)
		}
	}
	if asked && errors.Is(err, context.DeadlineExceeded) {
		// libvirt waits for the agent, for ever if need be.
		return v, NewError(op, e.Socket, 0, "no answer from the guest agent in time", maint.ErrNoAgent, context.DeadlineExceeded)
	}
	return v, err
}

// refusal finds an agent's own refusal in libvirt's message, which is all that
// libvirt passes on: "unable to execute QEMU agent command 'guest-ping': …". nil:
// it is something else.
func refusal(command, message string) error {
	_, desc, found := strings.Cut(message, command+"': ")
	if !found {
		return nil
	}
	e := &AgentError{Class: "GenericError", Desc: desc}
	if strings.Contains(desc, command+" has not been found") || strings.Contains(desc, command+" has been disabled") {
		e.Class = "CommandNotFound"
	}
	return e
}
