package hypervisor

import (
	"context"
	"fmt"

	"github.com/digitalocean/go-libvirt"
)

// SetAutostart says whether the domain starts with the host. It wraps
// maint.ErrNoGuest, and ErrBusy while the domain has a job; libvirt refuses it
// for a transient domain.
//
// Source: virDomainSetAutostart, virDomainGetAutostart.
func (h *Host) SetAutostart(ctx context.Context, uuid string, on bool) error {
	return h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) error {
		err := s.idle(d)
		if err != nil && !isCode(err, libvirt.ErrNoSupport) { // the test driver has no jobs
			return err
		}
		var value int32
		if on {
			value = 1
		}
		_, err = call(s, "DomainSetAutostart", func(l *libvirt.Libvirt) (struct{}, error) {
			return struct{}{}, l.DomainSetAutostart(d, value)
		})
		if err != nil {
			return err
		}
		// libvirt 9.0 reports success also where it could not make the link, on a full disk.
		is, err := call(s, "DomainGetAutostart", func(l *libvirt.Libvirt) (int32, error) { return l.DomainGetAutostart(d) })
		if err == nil && (is != 0) != on {
			err = fmt.Errorf("libvirt has not set the autostart of domain %s to %t, and says why in its log only: is there room in /etc/libvirt/qemu?", uuid, on)
		}
		return err
	})
}

// Define makes a domain persistent, or replaces the definition that its next
// start uses. It starts nothing and changes no running guest.
//
// Source: virDomainDefineXMLFlags.
func (h *Host) Define(ctx context.Context, xml string) error {
	return h.do(ctx, func(s *session) error {
		_, err := call(s, "DomainDefineXMLFlags", func(l *libvirt.Libvirt) (libvirt.Domain, error) {
			return l.DomainDefineXMLFlags(xml, 0)
		})
		return err
	})
}

// Launch starts a domain that is defined and shut off, as libvirt starts those with
// autostart when the host boots. One that is active it leaves as it is. It wraps
// maint.ErrNoGuest, and maint.ErrLocked when a disk's lease is somebody else's. When ctx
// ends first the start goes on.
//
// Source: virDomainCreateWithFlags, virDomainIsActive.
func (h *Host) Launch(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) error {
		_, err := call(s, "DomainCreateWithFlags", func(l *libvirt.Libvirt) (libvirt.Domain, error) {
			return l.DomainCreateWithFlags(d, 0)
		})
		if isCode(err, libvirt.ErrOperationInvalid) {
			is, lookErr := call(s, "DomainIsActive", func(l *libvirt.Libvirt) (int32, error) { return l.DomainIsActive(d) })
			if lookErr == nil && is != 0 {
				return nil
			}
		}
		return locked(err)
	})
}

// keepTPM is VIR_DOMAIN_UNDEFINE_KEEP_TPM, of libvirt 8.9.
const keepTPM libvirt.DomainUndefineFlagsValues = 1 << 6

// UndefineInactive removes the definition of a domain that is not running and
// nothing else. It wraps ErrActive and does nothing while the domain is active,
// and maint.ErrNoGuest if there is none.
//
// What a guest leaves in files is kept, since on shared storage its other,
// running copy uses the same ones: firmware variables (KEEP_NVRAM) and the state
// of a TPM (KEEP_TPM). A saved image or a snapshot makes libvirt refuse.
//
// Source: virDomainIsActive, virDomainUndefineFlags.
func (h *Host) UndefineInactive(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) error {
		active, err := call(s, "DomainIsActive", func(l *libvirt.Libvirt) (int32, error) {
			return l.DomainIsActive(d)
		})
		if err != nil {
			return err
		}
		if active != 0 {
			return fmt.Errorf("cannot undefine %s: %w", d.Name, ErrActive)
		}
		// Should it be started at this very moment it goes on running, as a
		// transient domain.
		undefine := func(flags libvirt.DomainUndefineFlagsValues) error {
			_, err := call(s, "DomainUndefineFlags", func(l *libvirt.Libvirt) (struct{}, error) {
				return struct{}{}, l.DomainUndefineFlags(d, flags)
			})
			return err
		}
		err = undefine(libvirt.DomainUndefineKeepNvram | keepTPM)
		if isCode(err, libvirt.ErrInvalidArg) { // libvirt before 8.9
			err = undefine(libvirt.DomainUndefineKeepNvram)
		}
		if isCode(err, libvirt.ErrInvalidArg) { // the test driver
			err = undefine(0)
		}
		return err
	})
}
