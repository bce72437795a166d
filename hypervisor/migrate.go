package hypervisor

import (
	"context"
	"errors"
	"math"
	"regexp"
	"time"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// DryRun has the source's libvirt check everything it checks at the beginning
// of a migration (blocked reasons of QEMU, snapshots, block jobs, host devices,
// unsafe cache modes, …) and begins nothing. It does not speak to the
// destination. It wraps maint.ErrNoGuest; a refusal is an *Error with libvirt's
// words, which wraps maint.ErrUnsafeStorage where it is one. It wraps ErrBusy while the domain has a job.
//
// Source: virDomainMigrateBegin3Params without
// VIR_MIGRATE_CHANGE_PROTECTION, which would leave a job behind.
func (h *Host) DryRun(ctx context.Context, uuid string, p maint.MoveParams) error {
	return h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) error {
		if err := s.idle(d); err != nil {
			return err
		}
		_, err := call(s, "DomainMigrateBegin3Params", func(l *libvirt.Libvirt) (struct{}, error) {
			_, _, err := l.DomainMigrateBegin3Params(d, moveParams(p), uint32(moveFlags(p)&^libvirt.MigrateChangeProtection))
			return struct{}{}, err
		})
		return err
	})
}

// Migrate moves a running guest to p.DestURI, peer to peer, and returns when
// libvirt says how it ended.
//
// When ctx ends first, Migrate closes its connection and returns the context's
// error, and the migration GOES ON: it belongs to libvirtd, which runs it
// without us. That is intended; it is what lets the daemon be restarted in the
// middle of a copy. To end a migration, call AbortJob. For the same reason no
// error tells where the guest is. A context's error, maint.ErrHypervisorDown, or
// libvirt's own may each come with the guest on either host: look at both. The one
// exception is maint.ErrParameter: libvirt has done nothing. It wraps
// maint.ErrCertificate where libvirt or QEMU says that TLS failed.
//
// The connection is Migrate's alone, since calls on one connection queue
// behind each other and this one may last for hours. No deadline is set for it.
//
// Source: virDomainMigrateToURI3, that is virDomainMigratePerform3Params with
// VIR_MIGRATE_PEER2PEER.
func (h *Host) Migrate(ctx context.Context, uuid string, p maint.MoveParams) error {
	return h.perform(ctx, uuid, p, moveFlags(p))
}

// migratePostcopyResume is VIR_MIGRATE_POSTCOPY_RESUME, which go-libvirt does not have
// (libvirt 8.5).
const migratePostcopyResume libvirt.DomainMigrateFlags = 1 << 19

// ResumePostCopy takes a migration up again that was in post-copy when the way between
// the hosts broke, and returns as Migrate does. p is what Migrate was given. libvirt
// refuses it, and nothing changes, while either QEMU still believes that the way stands,
// or where the destination cannot be reached.
//
// Source: virDomainMigrateToURI3 with VIR_MIGRATE_POSTCOPY_RESUME.
func (h *Host) ResumePostCopy(ctx context.Context, uuid string, p maint.MoveParams) error {
	p.PostCopy = true
	return h.perform(ctx, uuid, p, moveFlags(p)|migratePostcopyResume)
}

func (h *Host) perform(ctx context.Context, uuid string, p maint.MoveParams, flags libvirt.DomainMigrateFlags) error {
	const op = "DomainMigratePerform3Params"
	return h.alone(ctx, op, "given up; a migration that has begun goes on", func(ctx context.Context, c *conn) error {
		d, err := (&session{ctx: ctx, conn: c}).handle(uuid)
		if err != nil {
			return err
		}
		_, err = invoke(ctx, c, op, func(l *libvirt.Libvirt) (struct{}, error) {
			_, err := l.DomainMigratePerform3Params(d, opt(p.DestURI), moveParams(p), nil, flags)
			return struct{}{}, err
		})
		return refusedMove(err)
	})
}

// aboutTLS finds what libvirt and QEMU say of a certificate, or of TLS, that keeps
// them from each other: neither has an error of its own for it.
var aboutTLS = regexp.MustCompile(`(?i)certificate|TLS handshake|TLS credentials|TLS session`)

// refusedMove has the error of a migration wrap what it is about.
func refusedMove(err error) error {
	var e *Error
	switch {
	case !errors.As(err, &e):
		return err
	case e.Code == int(libvirt.ErrInvalidArg), e.Code == int(libvirt.ErrArgumentUnsupported):
		return because(err, maint.ErrParameter)
	case e.Code != 0 && aboutTLS.MatchString(e.Message):
		return because(err, maint.ErrCertificate)
	}
	return err
}

// migrateZeroCopy is VIR_MIGRATE_ZEROCOPY, which go-libvirt does not have.
const migrateZeroCopy libvirt.DomainMigrateFlags = 1 << 20

// moveFlags are the flags of virDomainMigrateToURI3. CHANGE_PROTECTION keeps
// the domain from being redefined or undefined under the copy.
func moveFlags(p maint.MoveParams) libvirt.DomainMigrateFlags {
	flags := libvirt.MigrateLive | libvirt.MigratePeer2peer | libvirt.MigrateChangeProtection
	if p.Persist {
		flags |= libvirt.MigratePersistDest | libvirt.MigrateUndefineSource
	}
	if p.SameHost { // both QEMUs see the same files, however local
		flags |= libvirt.MigrateUnsafe
	}
	if p.TLS {
		flags |= libvirt.MigrateTLS
	}
	if p.Parallel > 0 {
		flags |= libvirt.MigrateParallel
	}
	if p.Slow {
		flags |= libvirt.MigrateAutoConverge
	}
	if p.Compression != "" {
		flags |= libvirt.MigrateCompressed
	}
	if p.ZeroCopy {
		flags |= migrateZeroCopy
	}
	if p.PostCopy {
		flags |= libvirt.MigratePostcopy
	}
	return flags | copyFlags(p)
}

// moveParams are the typed parameters of virDomainMigrateToURI3.
func moveParams(p maint.MoveParams) []libvirt.TypedParam {
	params := []libvirt.TypedParam{}
	text := func(field, value string) {
		if value != "" {
			params = append(params, libvirt.TypedParam{Field: field, Value: *libvirt.NewTypedParamValueString(value)})
		}
	}
	text(libvirt.MigrateParamURI, p.MigrateURI)
	text(libvirt.MigrateParamListenAddress, p.Listen)
	text(libvirt.MigrateParamTLSDestination, p.TLSName)
	text(libvirt.MigrateParamCompression, p.Compression)
	if p.BandwidthMiBs > 0 {
		params = append(params, libvirt.TypedParam{
			Field: libvirt.MigrateParamBandwidth,
			Value: *libvirt.NewTypedParamValueUllong(p.BandwidthMiBs),
		})
		if p.PostCopy {
			params = append(params, libvirt.TypedParam{
				Field: libvirt.MigrateParamBandwidthPostcopy,
				Value: *libvirt.NewTypedParamValueUllong(p.BandwidthMiBs),
			})
		}
	}
	if p.Parallel > 0 {
		params = append(params, libvirt.TypedParam{
			Field: libvirt.MigrateParamParallelConnections,
			Value: *libvirt.NewTypedParamValueInt(int32(p.Parallel)),
		})
	}
	return append(params, copyParams(p)...)
}

// SetMaxDowntime lets the domain's running migration end with a pause of so long, in
// whole milliseconds, at least one. libvirt puts back what was before when that has
// ended. It wraps maint.ErrNoGuest.
//
// Source: virDomainMigrateSetMaxDowntime.
func (h *Host) SetMaxDowntime(ctx context.Context, uuid string, d time.Duration) error {
	return h.onDomain(ctx, uuid, func(s *session, dom libvirt.Domain) error {
		_, err := call(s, "DomainMigrateSetMaxDowntime", func(l *libvirt.Libvirt) (struct{}, error) {
			return struct{}{}, l.DomainMigrateSetMaxDowntime(dom, uint64(max(1, d.Milliseconds())), 0)
		})
		return err
	})
}

// maxSpeed is the greatest bandwidth that libvirt takes, MiB/s.
const maxSpeed = math.MaxInt64 >> 20

// LiftBandwidth takes the limit off the bandwidth of the domain's running migration, also
// for post-copy where it can come to that. It wraps maint.ErrNoGuest.
//
// Source: virDomainMigrateSetMaxSpeed, with VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY and without.
func (h *Host) LiftBandwidth(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, uuid, func(s *session, dom libvirt.Domain) error {
		lift := func(flags libvirt.DomainMigrateMaxSpeedFlags) error {
			_, err := call(s, "DomainMigrateSetMaxSpeed", func(l *libvirt.Libvirt) (struct{}, error) {
				return struct{}{}, l.DomainMigrateSetMaxSpeed(dom, maxSpeed, uint32(flags))
			})
			return err
		}
		if err := lift(0); err != nil {
			return err
		}
		return lift(libvirt.DomainMigrateMaxSpeedPostcopy)
	})
}

// StartPostCopy has the domain's running migration, begun with PostCopy, go on as
// post-copy: the guest is stopped, and started on the destination, which fetches the
// memory that it does not have yet. There is no way back from there. It returns when QEMU
// has taken it in, which is before the guest is stopped; to ask twice does no harm. It
// wraps maint.ErrNoGuest, and maint.ErrNoJob where libvirt or QEMU refuses: the migration
// is over, or is none that can go on like this, and has not been told to.
//
// Source: virDomainMigrateStartPostCopy.
func (h *Host) StartPostCopy(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, uuid, func(s *session, dom libvirt.Domain) error {
		_, err := call(s, "DomainMigrateStartPostCopy", func(l *libvirt.Libvirt) (struct{}, error) {
			return struct{}{}, l.DomainMigrateStartPostCopy(dom, 0)
		})
		if e := new(Error); errors.As(err, &e) && e.Code != 0 && e.cause == nil {
			return because(err, maint.ErrNoJob)
		}
		return err
	})
}
