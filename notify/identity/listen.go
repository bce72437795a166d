package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"belay/notify"
)

// door is who may come in, and who is inside.
type door struct {
	max  int
	mask uint32
	log  *slog.Logger

	mu     sync.Mutex
	guests map[uint32]string // by mark
	inside map[uint32]map[*conn]bool
	count  map[string]int // connections of a guest
	ln     net.Listener   // while it is open
}

func newDoor(cfg Config) door {
	return door{max: cfg.MaxConns, mask: cfg.Mask, log: cfg.Log,
		guests: make(map[uint32]string), inside: make(map[uint32]map[*conn]bool), count: make(map[string]int)}
}

// admit lets guests in by their marks.
func (d *door) admit(taps []tap) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, t := range taps {
		d.guests[t.mark] = t.Guest
	}
}

// expel lets nobody in any more by a mark, and closes the connections of who is.
func (d *door) expel(mark uint32) {
	d.mu.Lock()
	delete(d.guests, mark)
	conns := d.inside[mark]
	delete(d.inside, mark)
	for c := range conns {
		d.left(c)
	}
	d.mu.Unlock()
	for c := range conns {
		abort(c.TCPConn)
	}
}

// left counts a connection no longer.
func (d *door) left(c *conn) {
	if d.count[c.guest]--; d.count[c.guest] == 0 {
		delete(d.count, c.guest)
	}
}

// enter tells whose a connection is, nil if nobody's or one too many.
func (d *door) enter(t *net.TCPConn) *conn {
	mark, err := markOfConn(t)
	mark &= d.mask
	d.mu.Lock()
	defer d.mu.Unlock()
	guest, known := d.guests[mark]
	switch {
	case err != nil:
		d.log.Warn("a connection's mark cannot be read", "err", err)
		return nil
	case !known:
		return nil
	case d.count[guest] >= d.max:
		d.log.Debug("a guest has too many connections", "guest", guest)
		return nil
	}
	c := &conn{TCPConn: t, door: d, mark: mark, guest: guest}
	if d.inside[mark] == nil {
		d.inside[mark] = make(map[*conn]bool)
	}
	d.inside[mark][c] = true
	d.count[guest]++
	return c
}

// shut closes the listener.
func (d *door) shut() error {
	d.mu.Lock()
	ln := d.ln
	d.mu.Unlock()
	if ln == nil {
		return nil
	}
	return listener{ln, d}.Close()
}

// conn is a guest's connection.
type conn struct {
	*net.TCPConn
	door  *door
	mark  uint32
	guest string
}

func (c *conn) Close() error {
	c.door.mu.Lock()
	if c.door.inside[c.mark][c] {
		delete(c.door.inside[c.mark], c)
		c.door.left(c)
	}
	c.door.mu.Unlock()
	return c.TCPConn.Close()
}

// markOfConn is SO_MARK of a socket, which tcp_fwmark_accept made that of the
// packet that opened the connection.
func markOfConn(t *net.TCPConn) (mark uint32, err error) {
	raw, err := t.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	if ctlErr := raw.Control(func(fd uintptr) {
		n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK)
	}); ctlErr != nil {
		return 0, ctlErr
	}
	return uint32(n), err
}

// abort resets a connection: what is on its way is nobody's any more.
func abort(t *net.TCPConn) {
	_ = t.SetLinger(0)
	_ = t.Close()
}

// listener accepts only guests.
type listener struct {
	net.Listener
	door *door
}

func (l listener) Close() error {
	l.door.mu.Lock()
	if l.door.ln == l.Listener {
		l.door.ln = nil
	}
	l.door.mu.Unlock()
	return l.Listener.Close()
}

func (l listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		t := c.(*net.TCPConn)
		if known := l.door.enter(t); known != nil {
			return known, nil
		}
		abort(t)
	}
}

// Listen gives a listener on 169.254.169.254:80 that accepts known guests and
// nobody else. It is an error that wraps ErrTaken if somebody else listens there.
// The listener is closed with the gate.
func (g *Gate) Listen(ctx context.Context) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		// The address is on no device: IP_TRANSPARENT (ip(7)) lets a socket have
		// it, and answer from it.
		if ctlErr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		}); ctlErr != nil {
			return ctlErr
		}
		return err
	}}
	lc.SetMultipathTCP(false) // its subflows would be marked one by one
	var ln net.Listener
	err := g.inside(func() (err error) {
		ln, err = lc.Listen(ctx, "tcp4", net.JoinHostPort(notify.Address, "80"))
		return err
	})
	if errors.Is(err, unix.EADDRINUSE) {
		err = g.listening(err)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot listen for guests: %w", err)
	}
	g.who.mu.Lock()
	g.who.ln = ln
	g.who.mu.Unlock()
	return listener{ln, &g.who}, nil
}

// Guest is whose connection it is, by UUID; false: nobody's, or no longer.
func (g *Gate) Guest(c net.Conn) (uuid string, known bool) {
	ours, ok := c.(*conn)
	if !ok {
		return "", false
	}
	g.who.mu.Lock()
	defer g.who.mu.Unlock()
	if !g.who.inside[ours.mark][ours] {
		return "", false
	}
	return ours.guest, true
}

// ConnContext is for http.Server: requests carry their guest (notify.GuestOf).
func (g *Gate) ConnContext(ctx context.Context, c net.Conn) context.Context {
	if uuid, known := g.Guest(c); known {
		return notify.WithGuest(ctx, uuid)
	}
	return ctx
}
