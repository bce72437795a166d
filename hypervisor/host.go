package hypervisor

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
	"belay/hypervisor/internal/feed"
)

// Config says how to reach libvirt. The zero value is the local system daemon.
type Config struct {
	// Socket is the daemon's unix socket. When empty, /run/libvirt is
	// searched at each connection: virtqemud-sock (modular daemons) first,
	// then libvirt-sock (monolithic libvirtd).
	Socket string
	// URI is the libvirt connection URI, qemu:///system when empty.
	URI string
	// Timeout bounds an operation whose context has no deadline; 10 s when
	// zero. Migrate has none but its context's.
	Timeout time.Duration
	// Log gets changes of the events connection's state; slog.Default() when nil.
	Log *slog.Logger
}

// Host is libvirt on this host. It is safe for concurrent use.
type Host struct {
	sockets []string // where to look, best first
	uri     string
	timeout time.Duration
	log     *slog.Logger

	pool  *pool                 // for all calls but those that come for many guests at once
	fan   *pool                 // for those
	late  unanswered            // calls of Suspend
	fixed atomic.Pointer[fixed] // see Info; nil when not known
	hub   feed.Hub

	base context.Context // ends with Close
	end  context.CancelFunc
}

// New makes a Host. It does no I/O: libvirt need not be up.
func New(cfg Config) *Host {
	h := &Host{
		sockets: sockets(cfg.Socket),
		uri:     cmp.Or(cfg.URI, string(libvirt.QEMUSystem)),
		timeout: cmp.Or(cfg.Timeout, 10*time.Second),
		log:     cmp.Or(cfg.Log, slog.Default()),
	}
	h.base, h.end = context.WithCancel(context.Background())
	h.pool, h.fan = newPool(poolSize, h.dial), newPool(fanSize, h.dial)
	return h
}

// Close drops all connections, which ends calls in flight with
// context.Canceled, makes Run return, and closes the channels of subscribers. A
// migration whose Migrate call is cut off by it goes on.
func (h *Host) Close() error {
	h.end()
	h.pool.close()
	h.fan.close()
	h.hub.Close()
	return nil
}

// Ping returns nil if libvirt answers (virConnectGetLibVersion). Every other
// outcome wraps maint.ErrHypervisorDown and names the socket and the reason,
// except that of a context cancelled by the caller.
func (h *Host) Ping(ctx context.Context) error {
	return h.do(ctx, func(s *session) error {
		_, err := call(s, "ConnectGetLibVersion", (*libvirt.Libvirt).ConnectGetLibVersion)
		return err
	})
}

// session is a control connection held for one operation of Host.
type session struct {
	ctx  context.Context
	conn *conn
}

// do runs fn with a control connection of its own, within the context's
// deadline or else the default one.
func (h *Host) do(ctx context.Context, fn func(*session) error) error {
	return h.lend(ctx, h.pool, fn)
}

// lend runs fn with a connection of the pool.
func (h *Host) lend(ctx context.Context, p *pool, fn func(*session) error) error {
	ctx, cancel := h.bounded(ctx)
	defer cancel()
	c, err := p.get(ctx)
	if err != nil {
		return err
	}
	defer p.put(c)
	return fn(&session{ctx: ctx, conn: c})
}

// bounded gives a context that ends with the Host, and by the default timeout
// if it has no deadline.
func (h *Host) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, end := h.untilClosed(ctx)
	if _, ok := ctx.Deadline(); ok {
		return ctx, end
	}
	ctx, cancel := context.WithTimeout(ctx, h.timeout)
	return ctx, func() { cancel(); end() }
}

// untilClosed gives a context that also ends when the Host is closed.
func (h *Host) untilClosed(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(h.base, cancel)
	return ctx, func() { stop(); cancel() }
}

// handle makes libvirt's handle of a domain without asking libvirt, which finds
// a domain by the UUID alone. The name in it is for libvirt's messages.
func (s *session) handle(uuid string) (libvirt.Domain, error) {
	raw, ok := parseUUID(uuid)
	if !ok {
		return libvirt.Domain{}, &Error{
			Op: "DomainLookupByUUID", Socket: s.conn.socket,
			Message: "not a UUID: " + uuid, cause: maint.ErrNoGuest,
		}
	}
	return libvirt.Domain{Name: "-", UUID: raw, ID: -1}, nil
}

// domain resolves a UUID in its text form (virDomainLookupByUUID).
func (s *session) domain(uuid string) (libvirt.Domain, error) {
	d, err := s.handle(uuid)
	if err != nil {
		return d, err
	}
	return call(s, "DomainLookupByUUID", func(l *libvirt.Libvirt) (libvirt.Domain, error) {
		return l.DomainLookupByUUID(d.UUID)
	})
}

// onDomain runs fn with a control connection and the domain of that UUID.
func (h *Host) onDomain(ctx context.Context, uuid string, fn func(*session, libvirt.Domain) error) error {
	return h.do(ctx, func(s *session) error {
		d, err := s.domain(uuid)
		if err != nil {
			return err
		}
		return fn(s, d)
	})
}

// direct makes one libvirt call on the domain of that UUID, in one round trip,
// on a connection of the pool.
func direct[T any](ctx context.Context, h *Host, p *pool, uuid, op string, fn func(*libvirt.Libvirt, libvirt.Domain) (T, error)) (v T, err error) {
	err = h.lend(ctx, p, func(s *session) error {
		d, err := s.handle(uuid)
		if err != nil {
			return err
		}
		v, err = call(s, op, func(l *libvirt.Libvirt) (T, error) { return fn(l, d) })
		return err
	})
	return v, err
}

// alone makes one libvirt call that may last for hours, on a connection that is
// its own: calls on one connection queue behind each other. It has no deadline
// but its context's. When that ends, what libvirt has begun goes on, and going
// says so.
func (h *Host) alone(ctx context.Context, op, going string, fn func(context.Context, *conn) error) error {
	ctx, cancel := h.untilClosed(ctx)
	defer cancel()
	open, cancelOpen := context.WithTimeout(ctx, h.timeout)
	defer cancelOpen()
	c, err := h.dial(open)
	if err != nil {
		return err
	}
	defer c.close()
	if err := fn(ctx, c); err != nil {
		if ctxErr := ctx.Err(); ctxErr != nil {
			// Even a deadline says nothing about libvirt here.
			return NewError(op, c.socket, 0, going, ctxErr)
		}
		return err
	}
	return nil
}

// isCode reports whether err carries that libvirt error code.
func isCode(err error, code libvirt.ErrorNumber) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == int(code)
}
