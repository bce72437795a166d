package hypervisor

import (
	"context"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// The calls in this file come for many guests at once, while guests stand
// still. They go by the fan, and each is one round trip. (Resume needs another
// to tell a guest that runs from one that is off: libvirt refuses both alike.)

// Warm opens connections until n of the fan's 16 stand, so that none has to be
// opened within a pause. One that is lost afterwards is replaced by the next
// call that needs it.
func (h *Host) Warm(ctx context.Context, n int) error {
	ctx, cancel := h.bounded(ctx)
	defer cancel()
	return h.fan.warm(ctx, n)
}

// Suspend stops a guest's vCPUs; its memory stays, and with virtlockd its disk
// leases are given up. Suspending a guest that is paused, by whomever, succeeds
// and changes nothing. It wraps maint.ErrNoGuest. An error, of a deadline or a
// lost connection above all, does not say that the guest runs: see State.
//
// Source: virDomainSuspend.
func (h *Host) Suspend(ctx context.Context, uuid string) error {
	_, err := direct(ctx, h, h.fan, uuid, "DomainSuspend", func(l *libvirt.Libvirt, d libvirt.Domain) (struct{}, error) {
		return struct{}{}, l.DomainSuspend(d)
	})
	return err
}

// Resume starts a guest's vCPUs, whoever stopped them. Resuming a guest that
// runs succeeds and changes nothing. It wraps maint.ErrNoGuest, and
// maint.ErrLocked when a disk's lease, given up while the guest was paused, has
// been taken by somebody else: the guest is left paused then.
//
// Source: virDomainResume.
func (h *Host) Resume(ctx context.Context, uuid string) error {
	return h.lend(ctx, h.fan, func(s *session) error {
		d, err := s.handle(uuid)
		if err != nil {
			return err
		}
		_, err = call(s, "DomainResume", func(l *libvirt.Libvirt) (struct{}, error) {
			return struct{}{}, l.DomainResume(d)
		})
		if isCode(err, libvirt.ErrOperationInvalid) { // it is off, or runs already
			if state, _, _ := s.state(d); state == maint.GuestRunning {
				return nil
			}
		}
		return locked(err)
	})
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
// maint.ErrNoGuest.
//
// Source: virDomainGetState.
func (h *Host) State(ctx context.Context, uuid string) (state maint.GuestState, reason string, err error) {
	err = h.lend(ctx, h.fan, func(s *session) error {
		d, err := s.handle(uuid)
		if err == nil {
			state, reason, err = s.state(d)
		}
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
