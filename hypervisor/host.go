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

	pool  *pool
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
	h.pool = newPool(h.dial)
	return h
}

// Close drops all connections, which ends calls in flight with
// context.Canceled, makes Run return, and closes the channels of subscribers. A
// migration whose Migrate call is cut off by it goes on.
func (h *Host) Close() error {
	h.end()
	h.pool.close()
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
	ctx, cancel := h.untilClosed(ctx)
	defer cancel()
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, h.timeout)
		defer cancel()
	}
	c, err := h.pool.get(ctx)
	if err != nil {
		return err
	}
	defer h.pool.put(c)
	return fn(&session{ctx: ctx, conn: c})
}

// untilClosed gives a context that also ends when the Host is closed.
func (h *Host) untilClosed(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(h.base, cancel)
	return ctx, func() { stop(); cancel() }
}

// domain resolves a UUID in its text form (virDomainLookupByUUID).
func (s *session) domain(uuid string) (libvirt.Domain, error) {
	raw, ok := parseUUID(uuid)
	if !ok {
		return libvirt.Domain{}, &Error{
			Op: "DomainLookupByUUID", Socket: s.conn.socket,
			Message: "not a UUID: " + uuid, cause: maint.ErrNoGuest,
		}
	}
	return call(s, "DomainLookupByUUID", func(l *libvirt.Libvirt) (libvirt.Domain, error) {
		return l.DomainLookupByUUID(raw)
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

// isCode reports whether err carries that libvirt error code.
func isCode(err error, code libvirt.ErrorNumber) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == int(code)
}
