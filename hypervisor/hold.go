package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// The calls in this file come for many guests at once, while guests stand
// still. They go by the fan, and each is one round trip, save for what is said of
// State. (Resume needs another to tell a guest that runs from one that is off:
// libvirt refuses both alike.)

// Warm opens connections until n of the fan's 24 stand and answer, so that none
// has to be opened within a pause. One that is lost afterwards is replaced by the
// next call that needs it. It wraps maint.ErrHypervisorDown.
//
// Source: virConnectGetLibVersion on each.
func (h *Host) Warm(ctx context.Context, n int) error {
	ctx, cancel := h.bounded(ctx)
	defer cancel()
	return h.fan.warm(ctx, n, func(ctx context.Context, c *conn) error {
		_, err := invoke(ctx, c, "ConnectGetLibVersion", (*libvirt.Libvirt).ConnectGetLibVersion)
		return err
	})
}

// Suspend stops a guest's vCPUs; its memory stays, and with virtlockd its disk
// leases are given up. Suspending a guest that is paused, by whomever, succeeds
// and changes nothing. It wraps maint.ErrNoGuest.
//
// When ctx ends first, libvirt has the call all the same, and a libvirt or a QEMU
// that was hung stops the guest when it is itself again. Nobody waits for that any
// more: the guest is resumed at once then. State, Resume and the next Suspend of
// this Host wait until that is over, or the connection is; another process's do not.
//
// Source: virDomainSuspend, virDomainResume.
func (h *Host) Suspend(ctx context.Context, uuid string) error {
	const op = "DomainSuspend"
	ctx, cancel := h.bounded(ctx)
	defer cancel()
	if err := h.late.wait(ctx, uuid); err != nil {
		return err
	}
	c, err := h.fan.get(ctx)
	if err != nil {
		return err
	}
	d, err := (&session{ctx: ctx, conn: c}).handle(uuid)
	if err != nil {
		h.fan.put(c)
		return err
	}
	over := h.late.begin(uuid)
	answer, gone := make(chan error), make(chan struct{})
	go func() {
		defer over()
		_, err := invoke(h.base, c, op, func(l *libvirt.Libvirt) (struct{}, error) {
			return struct{}{}, l.DomainSuspend(d)
		})
		select {
		case answer <- err:
		case <-gone:
			defer c.close()
			if err != nil {
				return
			}
			if err := (&session{ctx: h.base, conn: c}).resume(d); err != nil {
				h.log.Error("a guest may be paused by a call that was given up, and cannot be resumed", "guest", uuid, "err", err)
				return
			}
			h.log.Warn("a guest was paused late, by a call that was given up, and is resumed", "guest", uuid)
		}
	}()
	select {
	case err := <-answer:
		h.fan.put(c)
		return err
	case <-ctx.Done():
		h.fan.forget()
		close(gone)
		return fmt.Errorf("%w; it may yet be carried out", c.abandoned(op, context.Cause(ctx)))
	}
}

// Resume starts a guest's vCPUs, whoever stopped them. Resuming a guest that
// runs succeeds and changes nothing. It wraps maint.ErrNoGuest, and
// maint.ErrLocked when a disk's lease, given up while the guest was paused, has
// been taken by somebody else: the guest is left paused then. Where it is the
// guest itself that still holds the lease, which is what a libvirtd leaves that
// dies in the middle of Suspend or Resume, the lease is given up first.
//
// Source: virDomainResume.
func (h *Host) Resume(ctx context.Context, uuid string) error {
	ctx, cancel := h.bounded(ctx)
	defer cancel()
	if err := h.late.wait(ctx, uuid); err != nil {
		return err
	}
	return h.lend(ctx, h.fan, func(s *session) error {
		d, err := s.handle(uuid)
		if err != nil {
			return err
		}
		err = s.resume(d)
		if errors.Is(err, maint.ErrLocked) {
			freed, ownErr := h.giveUpOwn(s, d)
			switch {
			case freed:
				return s.resume(d)
			case ownErr != nil:
				h.log.Warn("cannot tell whether a lease is the guest's own", "guest", uuid, "err", ownErr)
			}
		}
		return err
	})
}

func (s *session) resume(d libvirt.Domain) error {
	_, err := call(s, "DomainResume", func(l *libvirt.Libvirt) (struct{}, error) {
		return struct{}{}, l.DomainResume(d)
	})
	if isCode(err, libvirt.ErrOperationInvalid) { // it is off, or runs already
		if state, _, _ := s.state(d); state == maint.GuestRunning {
			return nil
		}
	}
	return locked(err)
}

// locked has an error of a lease that is taken wrap maint.ErrLocked.
func locked(err error) error {
	if isCode(err, libvirt.ErrResourceBusy) {
		return because(err, maint.ErrLocked)
	}
	return err
}

// State gives a guest's state and its reason, in virsh's words. It is what
// libvirt knows, asks no QEMU, and waits for no job of the guest's. It wraps
// maint.ErrNoGuest, and ErrBusy where libvirt itself has just started and does
// not know yet.
//
// Source: virDomainGetState; on each connection, the first time, after
// virDomainGetControlInfo.
func (h *Host) State(ctx context.Context, uuid string) (state maint.GuestState, reason string, err error) {
	ctx, cancel := h.bounded(ctx)
	defer cancel()
	if err := h.late.wait(ctx, uuid); err != nil {
		return "", "", err
	}
	err = h.lend(ctx, h.fan, func(s *session) error {
		d, err := s.handle(uuid)
		if err != nil {
			return err
		}
		if err := s.settle(d); err != nil {
			return err
		}
		state, reason, err = s.state(d)
		return err
	})
	return state, reason, err
}

func (s *session) state(d libvirt.Domain) (state maint.GuestState, reason string, err error) {
	_, err = call(s, "DomainGetState", func(l *libvirt.Libvirt) (struct{}, error) {
		number, why, err := l.DomainGetState(d, 0)
		if err == nil {
			state, reason = domainState(number, why)
		}
		return struct{}{}, err
	})
	return state, reason, err
}

// settleGrace is how long settle waits. libvirt needs some tens of milliseconds
// for each guest when it starts.
const settleGrace = time.Second

// settle waits until libvirt knows what became of a domain while there was no
// libvirt. One that has just started has the states that its predecessor wrote
// down, answers with them, and asks the QEMUs meanwhile: a guest may be "running"
// whose vCPUs the predecessor had stopped. While it asks, the domain has a
// job. Once seen without one, a domain is settled for the life of the connection,
// which is libvirt's at most. It wraps ErrBusy when the job does not end.
//
// Source: virDomainGetControlInfo, which waits for nothing.
func (s *session) settle(d libvirt.Domain) error {
	const op = "DomainGetControlInfo"
	giveUp := time.Now().Add(settleGrace)
	for wait := 2 * time.Millisecond; !s.conn.settled[d.UUID]; wait *= 2 {
		control, err := call(s, op, func(l *libvirt.Libvirt) (libvirt.DomainControlState, error) {
			control, _, _, err := l.DomainGetControlInfo(d, 0)
			return libvirt.DomainControlState(control), err
		})
		switch {
		case isCode(err, libvirt.ErrOperationInvalid), // it is off
			isCode(err, libvirt.ErrNoSupport), // the test driver
			err == nil && control != libvirt.DomainControlJob && control != libvirt.DomainControlOccupied:
			s.conn.settled[d.UUID] = true
			return nil
		case err != nil:
			return err
		case time.Now().After(giveUp):
			return NewError(op, s.conn.socket, 0, "libvirt has not caught up with the guest's QEMU, or a job of its does not end", ErrBusy)
		}
		select {
		case <-time.After(wait):
		case <-s.ctx.Done():
			return s.conn.abandoned(op, context.Cause(s.ctx))
		}
	}
	return nil
}
