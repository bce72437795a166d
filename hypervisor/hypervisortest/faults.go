package hypervisortest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
)

// Fault is what goes wrong with a call.
type Fault struct {
	// Err is returned in place of the call's result; nil leaves that as it is.
	Err error
	// Delay is how long the call takes first. If its context ends meanwhile
	// it has no effect; Suspend has it all the same, when the time is over.
	Delay time.Duration
	// After has the call take its full effect first. Otherwise it has none.
	After bool
	// Hang has the call wait for its context to end, for 10 s if that has no
	// deadline, or for libvirt to be killed; Err is then ignored.
	Hang bool
	// Times is how many calls meet the fault; 0 is all, until Heal.
	Times int
}

// Fault has calls of an operation ("Migrate", "Guest", …: the method's name)
// fail. Several faults of one operation apply one after the other.
func (h *Host) Fault(op string, f Fault) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.faults[op] = append(h.faults[op], &f)
}

// Heal removes all faults of an operation.
func (h *Host) Heal(op string) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	delete(h.faults, op)
}

// fault takes the fault that the next call of op meets, if any.
func (h *Host) fault(op string) *Fault {
	fs := h.faults[op]
	if len(fs) == 0 {
		return nil
	}
	f := *fs[0]
	if f.Times > 0 {
		if fs[0].Times--; fs[0].Times == 0 {
			h.faults[op] = fs[1:]
		}
	}
	return &f
}

// KillLibvirt ends libvirt on this host as SIGKILL does: calls in flight and
// later ones give maint.ErrHypervisorDown, subscribers get EventDown, and guests
// run on. Migrations from and to this host end as the package's documentation
// says.
func (h *Host) KillLibvirt() {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if !h.up {
		return
	}
	h.disconnect()
	h.up = false
	for _, g := range h.guests {
		if m := g.out; m != nil {
			m.end(h.connectionLost(opPerform))
		}
		g.completed = nil
	}
	for _, src := range h.w.hosts {
		for _, g := range src.guests {
			if m := g.out; m != nil && m.dst == h {
				m.end(src.failed(opPerform, codeInternal, "internal error: client socket is closed"))
			}
		}
	}
}

// RestartLibvirt starts libvirt again; subscribers get EventResync.
func (h *Host) RestartLibvirt() {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if !h.up {
		h.up = true
		h.publish(maint.Event{Kind: maint.EventResync})
	}
}

// Reboot is a crash of the host, and its next start: all QEMUs are gone, transient guests
// with them, and migrations end as a killed host's do. libvirt is back at once, and starts
// the guests that start with the host.
func (h *Host) Reboot() {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.disconnect()
	h.up = false
	for _, g := range slices.Collect(maps.Values(h.guests)) {
		if g.State.Active() {
			h.stop(g, "unknown")
		}
	}
	h.up = true
	for _, g := range h.guests {
		if g.Autostart {
			h.boot(g)
		}
	}
	h.publish(maint.Event{Kind: maint.EventResync})
}

// Freeze stops libvirt as SIGSTOP does: connections stand, and calls wait until
// their context ends (10 s if that has no deadline), until Thaw, or until
// libvirt is killed. Running migrations go on. A Suspend that was given up is
// carried out at Thaw.
func (h *Host) Freeze() {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if h.frozen == nil {
		h.frozen = make(chan struct{})
	}
}

// Thaw is the reverse of Freeze.
func (h *Host) Thaw() {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if h.frozen != nil {
		close(h.frozen)
		h.frozen = nil
	}
}

// DropConnections cuts everyone's connections to libvirt, which itself lives
// on: calls in flight give maint.ErrHypervisorDown while what they began goes
// on; subscribers get EventDown and EventResync.
func (h *Host) DropConnections() {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if h.up {
		h.disconnect()
		h.publish(maint.Event{Kind: maint.EventResync})
	}
}

func (h *Host) disconnect() {
	close(h.interrupt)
	h.interrupt = make(chan struct{})
	h.dropCPUs()
	h.publish(maint.Event{Kind: maint.EventDown})
}

// CutLAN takes the host off the LAN: no migration to or from it can begin, and
// running ones stand still and fail after 30 s, when libvirt's keepalive would.
func (h *Host) CutLAN() { h.setCut(true) }

// RestoreLAN is the reverse of CutLAN.
func (h *Host) RestoreLAN() { h.setCut(false) }

func (h *Host) setCut(cut bool) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.cut = cut
}

// defaultTimeout is hypervisor.Config's.
const defaultTimeout = 10 * time.Second

// do makes one call of the operation: hooks, faults, deadline, and libvirt's
// being there, around the effect. bounded gives it the default deadline.
func do[T any](ctx context.Context, h *Host, op string, bounded bool, effect func(context.Context) (T, error)) (T, error) {
	h.w.called(Call{Host: h.info.Name, Op: op})
	defer h.w.called(Call{Host: h.info.Name, Op: op, Done: true})
	if bounded {
		var cancel context.CancelFunc
		ctx, cancel = withDefault(ctx)
		defer cancel()
	}
	return attempt(ctx, h, op, effect)
}

// withDefault gives a context without a deadline the default one.
func withDefault(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, defaultTimeout)
}

// outlive makes a call that is carried out also when its context has ended
// meanwhile, and is taken back then. late is closed when that is over.
func outlive(ctx context.Context, h *Host, op string, late chan struct{}, effect func() error, takeBack func()) error {
	h.w.called(Call{Host: h.info.Name, Op: op})
	defer h.w.called(Call{Host: h.info.Name, Op: op, Done: true})
	if ctx.Err() != nil {
		close(late)
		return h.unanswered(op, ctx.Err())
	}
	answer, gone := make(chan error), make(chan struct{})
	h.w.running.Go(func() {
		defer close(late)
		_, err := attempt(h.w.life, h, op, func(context.Context) (struct{}, error) { return struct{}{}, effect() })
		select {
		case answer <- err:
		case <-gone:
			if err == nil {
				takeBack()
			}
		}
	})
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		close(gone)
		return fmt.Errorf("%w; it may yet be carried out", h.unanswered(op, ctx.Err()))
	}
}

// attempt is a call from when libvirt has it.
func attempt[T any](ctx context.Context, h *Host, op string, effect func(context.Context) (T, error)) (T, error) {
	var none T
	h.w.mu.Lock()
	up, frozen, interrupt, f := h.up, h.frozen, h.interrupt, h.fault(op)
	h.w.mu.Unlock()
	if ctx.Err() != nil {
		return none, h.unanswered(op, ctx.Err())
	}
	if !up {
		return none, hypervisor.NewError("connect", h.socket(), 0, "connection refused", maint.ErrHypervisorDown)
	}
	if frozen != nil {
		select {
		case <-frozen:
		case <-ctx.Done():
			return none, h.unanswered(op, ctx.Err())
		case <-interrupt:
			return none, h.connectionLost(op)
		}
	}
	if f != nil {
		if err := h.wait(ctx, op, f.Delay, interrupt); err != nil {
			return none, err
		}
	}
	strikes := f != nil && (f.Hang || f.Err != nil)
	if strikes && !f.After {
		return none, h.strike(ctx, op, f, interrupt)
	}
	v, err := effect(ctx)
	if strikes {
		return none, h.strike(ctx, op, f, interrupt)
	}
	return v, err
}

// strike is the end of a call that meets a fault.
func (h *Host) strike(ctx context.Context, op string, f *Fault, interrupt <-chan struct{}) error {
	if !f.Hang {
		return f.Err
	}
	select {
	case <-ctx.Done():
		return h.unanswered(op, ctx.Err())
	case <-interrupt:
		return h.connectionLost(op)
	}
}

// wait lets time pass within a call.
func (h *Host) wait(ctx context.Context, op string, d time.Duration, interrupt <-chan struct{}) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return h.unanswered(op, ctx.Err())
	case <-interrupt:
		return h.connectionLost(op)
	}
}

func (h *Host) socket() string { return h.info.Name + ":libvirt-sock" }

func (h *Host) unanswered(op string, ctxErr error) error {
	if ctxErr == context.DeadlineExceeded {
		return hypervisor.NewError(op, h.socket(), 0, "no answer in time", maint.ErrHypervisorDown, ctxErr)
	}
	return hypervisor.NewError(op, h.socket(), 0, "given up", ctxErr)
}

func (h *Host) connectionLost(op string) error {
	return hypervisor.NewError(op, h.socket(), 0, "connection lost", maint.ErrHypervisorDown)
}

// failed is libvirt's refusal, or its account of a failure.
func (h *Host) failed(op string, code int, message string, causes ...error) error {
	return hypervisor.NewError(op, h.socket(), code, message, causes...)
}

// The libvirt error codes (virErrorNumber) and functions used here.
const (
	codeInternal         = 1
	codeInvalidArg       = 8
	codeOperationFailed  = 9
	codeSystem           = 38
	codeNoDomain         = 42
	codeNoPool           = 49
	codeOperationInvalid = 55
	codeArgument         = 74 // VIR_ERR_ARGUMENT_UNSUPPORTED
	codeOperationAborted = 78
	codeAgent            = 86 // VIR_ERR_AGENT_UNRESPONSIVE
	codeResourceBusy     = 87

	opPerform = "DomainMigratePerform3Params"
)
