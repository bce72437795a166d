package hypervisor

import (
	"cmp"
	"context"
	"fmt"

	"github.com/digitalocean/go-libvirt"
)

// CreatePaused starts a domain from XML, with its vCPUs stopped. If the domain
// has a definition that stays as it is; if not it is transient. It wraps
// ErrActive if the domain is active already, and does nothing then.
//
// It has no deadline but its context's. When that ends first the start goes on:
// look before you try again.
//
// Source: virDomainCreateXML with VIR_DOMAIN_START_PAUSED.
func (h *Host) CreatePaused(ctx context.Context, xml string) error {
	const op = "DomainCreateXML"
	return h.alone(ctx, op, "given up; a start that has begun goes on", func(ctx context.Context, c *conn) error {
		_, err := invoke(ctx, c, op, func(l *libvirt.Libvirt) (struct{}, error) {
			_, err := l.DomainCreateXML(xml, libvirt.DomainStartPaused)
			return struct{}{}, err
		})
		return active(&session{ctx: ctx, conn: c}, xml, err)
	})
}

// active has libvirt's refusal to start a domain wrap ErrActive if the domain
// is active: the code alone has other meanings.
func active(s *session, xml string, err error) error {
	if !isCode(err, libvirt.ErrOperationInvalid) && !isCode(err, libvirt.ErrOperationFailed) {
		return err
	}
	g, parseErr := ParseGuest(xml)
	if parseErr != nil {
		return err
	}
	d, lookErr := s.lookup(cmp.Or(g.UUID, g.Name))
	if lookErr != nil {
		return err
	}
	is, lookErr := call(s, "DomainIsActive", func(l *libvirt.Libvirt) (int32, error) { return l.DomainIsActive(d) })
	if lookErr != nil || is == 0 {
		return err
	}
	return because(err, ErrActive)
}

// Save writes a guest, memory and all, to a file, and ends its QEMU once it is
// written. The file is new: one that is there is overwritten. It wraps
// maint.ErrNoGuest.
//
// It has no deadline but its context's. When that ends, or the caller dies, the
// save GOES ON: it belongs to libvirtd. For the same reason no error tells
// whether the guest runs or is in the file: look at the guest. A save that
// fails leaves it as it was.
//
// Source: virDomainSaveFlags.
func (h *Host) Save(ctx context.Context, uuid, path string) error {
	const op = "DomainSaveFlags"
	return h.alone(ctx, op, "given up; a save that has begun goes on", func(ctx context.Context, c *conn) error {
		d, err := (&session{ctx: ctx, conn: c}).handle(uuid)
		if err != nil {
			return err
		}
		_, err = invoke(ctx, c, op, func(l *libvirt.Libvirt) (struct{}, error) {
			return struct{}{}, l.DomainSaveFlags(d, path, nil, 0)
		})
		return err
	})
}

// Restore starts a guest from the file that Save wrote, paused or running,
// whichever it was. (A paused one's reason is "migrating", libvirt's word for
// state that came from elsewhere.) The file stays, and is out of date once the guest runs:
// restored a second time, it would be an old guest on newer disks. It wraps
// ErrActive if the guest is active already, and maint.ErrLocked when a disk's
// lease is somebody else's.
//
// It has no deadline but its context's. When that ends, or the caller dies, the
// start goes on.
//
// Source: virDomainRestoreFlags with VIR_DOMAIN_SAVE_PAUSED or
// VIR_DOMAIN_SAVE_RUNNING.
func (h *Host) Restore(ctx context.Context, path string, paused bool) error {
	const op = "DomainRestoreFlags"
	flags := libvirt.DomainSaveRunning
	if paused {
		flags = libvirt.DomainSavePaused
	}
	return h.alone(ctx, op, "given up; a restore that has begun goes on", func(ctx context.Context, c *conn) error {
		_, err := invoke(ctx, c, op, func(l *libvirt.Libvirt) (struct{}, error) {
			return struct{}{}, l.DomainRestoreFlags(path, nil, uint32(flags))
		})
		if err == nil || ctx.Err() != nil {
			return err
		}
		xml, xmlErr := savedXML(ctx, c, path)
		if xmlErr != nil {
			return err
		}
		return locked(active(&session{ctx: ctx, conn: c}, xml, err))
	})
}

// SavedXML gives the domain XML in a file that Save wrote, without secrets.
//
// Source: virDomainSaveImageGetXMLDesc.
func (h *Host) SavedXML(ctx context.Context, path string) (xml string, err error) {
	err = h.do(ctx, func(s *session) (err error) {
		xml, err = savedXML(s.ctx, s.conn, path)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("cannot read the saved guest in %s: %w", path, err)
	}
	return xml, nil
}

func savedXML(ctx context.Context, c *conn, path string) (string, error) {
	return invoke(ctx, c, "DomainSaveImageGetXMLDesc", func(l *libvirt.Libvirt) (string, error) {
		return l.DomainSaveImageGetXMLDesc(path, 0)
	})
}
