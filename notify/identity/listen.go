package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"belay/notify"
)

// acceptAgain is how long to wait where the kernel gives out no connections, as
// without a file descriptor left.
const acceptAgain = 100 * time.Millisecond

// door is who may come in, and who is inside.
type door struct {
	max  int
	mask uint32
	log  *slog.Logger

	mu     sync.Mutex
	guests map[uint32]string // by mark
	inside map[uint32]map[*conn]bool
	count  map[string]int // connections of a guest
	ln     *listener      // while it is open
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

// listener is the open one, nil if there is none.
func (d *door) listener() *listener {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ln
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

// listener accepts only guests, by a socket for each bridge: the kernel tells
// connections apart by addresses and ports, and by the device of the socket, so
// that guests with the same address on two bridges need not know of each other.
type listener struct {
	gate     *Gate
	claim    net.Listener // keeps the port ours, also without bridges; nobody gets there
	accepted chan net.Conn
	closed   context.Context
	cancel   context.CancelFunc

	mu sync.Mutex
	on map[int]net.Listener // by the bridge's ifindex
}

// Listen gives a listener on 169.254.169.254:80 that accepts known guests and
// nobody else. It is an error that wraps ErrTaken if somebody else listens there.
// The listener is closed with the gate.
func (g *Gate) Listen(ctx context.Context) (net.Listener, error) {
	g.change.Lock()
	defer g.change.Unlock()
	const loopback = 1 // LOOPBACK_IFINDEX of include/net/flow.h
	claim, err := g.listenOn(ctx, loopback)
	if err != nil {
		return nil, fmt.Errorf("cannot listen for guests: %w", err)
	}
	l := &listener{gate: g, claim: claim, accepted: make(chan net.Conn), on: make(map[int]net.Listener)}
	l.closed, l.cancel = context.WithCancel(context.Background())
	if err := l.open(g.bridges); err != nil {
		_ = l.Close()
		return nil, err
	}
	g.who.mu.Lock()
	g.who.ln = l
	g.who.mu.Unlock()
	return l, nil
}

// listenOn opens a socket that gets connections by one device only.
func (g *Gate) listenOn(ctx context.Context, ifindex int) (ln net.Listener, err error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		// The address is on no device: IP_TRANSPARENT (ip(7)) lets a socket have
		// it, and answer from it.
		if ctlErr := raw.Control(func(fd uintptr) {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, ifindex))
		}); ctlErr != nil {
			return ctlErr
		}
		return err
	}}
	lc.SetMultipathTCP(false) // its subflows would be marked one by one
	err = g.inside(func() (err error) {
		ln, err = lc.Listen(ctx, "tcp4", net.JoinHostPort(notify.Address, "80"))
		return err
	})
	if errors.Is(err, unix.EADDRINUSE) {
		err = g.listening(err)
	}
	return ln, err
}

// open listens on these bridges too.
func (l *listener) open(bridges map[int]bridge) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for index, b := range bridges {
		if l.on[index] != nil || l.closed.Err() != nil {
			continue
		}
		ln, err := l.gate.listenOn(l.closed, index)
		if err != nil {
			return fmt.Errorf("cannot listen for guests on bridge %s: %w", b.name, err)
		}
		l.on[index] = ln
		go l.serve(ln)
	}
	return nil
}

// leave listens on no other bridges than these any more.
func (l *listener) leave(but map[int]bridge) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for index, ln := range l.on {
		if _, keep := but[index]; !keep {
			_ = ln.Close()
			delete(l.on, index)
		}
	}
}

// serve lets guests of one bridge in, until its socket is closed.
func (l *listener) serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil { // as "too many open files", which passes
			l.gate.log.Warn("cannot accept a guest's connection", "err", err)
			select {
			case <-time.After(acceptAgain):
			case <-l.closed.Done():
			}
			continue
		}
		t := c.(*net.TCPConn)
		known := l.gate.who.enter(t)
		if known == nil {
			abort(t)
			continue
		}
		select {
		case l.accepted <- known:
		case <-l.closed.Done():
			_ = known.Close()
		}
	}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.closed.Done():
		return nil, net.ErrClosed
	}
}

func (l *listener) Addr() net.Addr { return l.claim.Addr() }

func (l *listener) Close() error {
	d := &l.gate.who
	d.mu.Lock()
	if d.ln == l {
		d.ln = nil
	}
	d.mu.Unlock()
	l.cancel()
	l.leave(nil)
	return l.claim.Close()
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
