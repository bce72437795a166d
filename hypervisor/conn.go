package hypervisor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync/atomic"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// conn is one connection to the daemon. It is used once: when it is lost or
// closed, a new one is made.
type conn struct {
	l      *libvirt.Libvirt
	wire   *wire
	socket string
	// settled are domains of which this libvirt, since its start, has been
	// seen to know the state; see settle.
	settled map[libvirt.UUID]bool
}

// sockets are where a daemon that serves QEMU listens, best first: at the one
// configured, or where modular and monolithic daemons do by default.
func sockets(configured string) []string {
	if configured != "" {
		return []string{configured}
	}
	return []string{"/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"}
}

// dial connects to the daemon and opens the URI (virConnectOpen). Every
// failure wraps maint.ErrHypervisorDown, save a caller's cancellation.
func (h *Host) dial(ctx context.Context) (*conn, error) {
	var socket, reason string
	for _, socket = range h.sockets {
		nc, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		if err == nil {
			return open(ctx, nc, socket, h.uri)
		}
		if ctx.Err() != nil {
			return nil, gaveUp("connect", socket, context.Cause(ctx))
		}
		reason = dialReason(err)
		if !errors.Is(err, fs.ErrNotExist) {
			// This daemon is the one, and down: do not mistake another for it.
			return nil, NewError("connect", socket, 0, reason, maint.ErrHypervisorDown)
		}
	}
	return nil, NewError("connect", strings.Join(h.sockets, " or "), 0, reason, maint.ErrHypervisorDown)
}

// dialReason is the system's reason alone: the socket is named already.
func dialReason(err error) string {
	var sys *os.SyscallError
	if errors.As(err, &sys) {
		return sys.Err.Error()
	}
	return err.Error()
}

// open makes the libvirt connection on nc.
func open(ctx context.Context, nc net.Conn, socket, uri string) (*conn, error) {
	c := &conn{wire: newWire(nc), socket: socket, settled: make(map[libvirt.UUID]bool)}
	c.l = libvirt.NewWithDialer(c)
	_, err := invoke(ctx, c, "ConnectOpen", func(l *libvirt.Libvirt) (struct{}, error) {
		return struct{}{}, l.ConnectToURI(libvirt.ConnectURI(uri))
	})
	if err != nil {
		c.close()
		var e *Error
		if errors.As(err, &e) && e.Code != 0 {
			// The daemon answers but does not serve this URI, or not to us.
			err = NewError(e.Op, e.Socket, e.Code, e.Message, maint.ErrHypervisorDown)
		}
		return nil, err
	}
	return c, nil
}

// Dial implements go-libvirt's socket.Dialer: the connection is there already.
func (c *conn) Dial() (net.Conn, error) { return c.wire, nil }

// close ends the connection and with it every call and subscription on it.
// go-libvirt's Disconnect is not used: it asks the daemon first, and waits.
func (c *conn) close() { _ = c.wire.Close() }

// unusable reports whether the connection has been closed by either side.
func (c *conn) unusable() bool {
	select {
	case <-c.wire.lost:
		return true
	default:
		return c.wire.closed.Load()
	}
}

// call makes one libvirt call on a session's connection. All calls pass here.
func call[T any](s *session, op string, fn func(*libvirt.Libvirt) (T, error)) (T, error) {
	return invoke(s.ctx, s.conn, op, fn)
}

// invoke makes one libvirt call. When the context ends the connection is
// closed, which makes go-libvirt return, and the error is the context's. op is
// the libvirt function.
func invoke[T any](ctx context.Context, c *conn, op string, fn func(*libvirt.Libvirt) (T, error)) (v T, err error) {
	if ctx.Err() != nil {
		return v, c.abandoned(op, context.Cause(ctx))
	}
	stop := context.AfterFunc(ctx, c.close)
	defer stop()
	// Replies are decoded by reflection on this goroutine. Bytes that make
	// that panic are a reason to drop the connection, not the daemon.
	defer func() {
		if p := recover(); p != nil {
			c.close()
			err = NewError(op, c.socket, 0, fmt.Sprintf("undecodable reply: %v", p), maint.ErrHypervisorDown)
		}
	}()
	v, err = fn(c.l)
	if err != nil {
		return v, c.wrap(ctx, op, err)
	}
	return v, nil
}

// wire is the socket below go-libvirt. It tells when the connection is over,
// which go-libvirt's own Disconnected cannot be relied on for (the channel is
// replaced while connecting), and refuses packets of absurd length, for which
// go-libvirt's reader would panic in a goroutine where nothing recovers it.
type wire struct {
	net.Conn
	lost   chan struct{} // closed by the reading goroutine at the end of input
	closed atomic.Bool   // closed from our side

	header []byte // of the packet being read: its length, as far as it is in
	body   int    // bytes of that packet still to come

	// tap, unless nil, is given packets without their length, up to tapMost bytes
	// of each. It is called by the reading goroutine.
	tap    atomic.Pointer[func(packet []byte)]
	packet []byte // what is in of the one being read
}

const (
	packetMin = 28       // length word and header
	packetMax = 64 << 20 // libvirt's own limit (VIR_NET_MESSAGE_MAX) is 32 MiB
	tapMost   = 64 << 10
)

func newWire(nc net.Conn) *wire {
	return &wire{Conn: nc, lost: make(chan struct{})}
}

// Read is called by go-libvirt's one reading goroutine only, which ends after
// the first error.
func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if err == nil {
		err = w.follow(p[:n])
	}
	if err != nil {
		select {
		case <-w.lost:
		default:
			close(w.lost)
		}
		_ = w.Conn.Close()
		return 0, net.ErrClosed
	}
	return n, nil
}

// follow keeps account of packet boundaries, and taps packets.
func (w *wire) follow(p []byte) error {
	for len(p) > 0 {
		if w.body == 0 {
			take := min(4-len(w.header), len(p))
			w.header = append(w.header, p[:take]...)
			p = p[take:]
			if len(w.header) < 4 {
				continue
			}
			length := binary.BigEndian.Uint32(w.header)
			w.header = w.header[:0]
			if length < packetMin || length > packetMax {
				return fmt.Errorf("packet of %d bytes", length)
			}
			w.body, w.packet = int(length)-4, w.packet[:0]
			continue
		}
		take := min(w.body, len(p))
		w.body -= take
		if tap := w.tap.Load(); tap != nil {
			w.packet = append(w.packet, p[:min(take, max(0, tapMost-len(w.packet)))]...)
			if w.body == 0 {
				(*tap)(w.packet)
			}
		}
		p = p[take:]
	}
	return nil
}

// Write may be the first to notice that the other side is gone.
func (w *wire) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	if err != nil {
		_ = w.Close()
	}
	return n, err
}

// Close ends the connection from our side.
func (w *wire) Close() error {
	w.closed.Store(true)
	return w.Conn.Close()
}
