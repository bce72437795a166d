package channel

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"belay/notify"
	"belay/notify/channel/wire"
)

// MaxConns is how many connections a guest has at once, by all ways together:
// twice what belay-guest opens, which sees the end of one before the host does.
const MaxConns = 2 * wire.MaxStreams

// Listener gives the connections of guests, by whichever way they come. It is a
// net.Listener for an http.Server with ConnContext.
type Listener struct {
	log   *slog.Logger
	queue chan *conn
	done  chan struct{}

	mu     sync.Mutex
	closed bool
	conns  map[string]map[*conn]struct{} // by guest
	cids   map[uint32]string
	vsocks []net.Listener
}

var _ net.Listener = (*Listener)(nil)

// NewListener has nobody to listen to yet: see Connect, ServeVsock.
func NewListener(log *slog.Logger) *Listener {
	return &Listener{log: log, queue: make(chan *conn), done: make(chan struct{}), conns: make(map[string]map[*conn]struct{})}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener: connections that were accepted stay, those that
// guests open later are closed at once. Connect goes on until its context ends.
func (l *Listener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return net.ErrClosed
	}
	l.closed = true
	close(l.done)
	for _, in := range l.vsocks {
		in.Close()
	}
	return nil
}

func (l *Listener) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

// Addr implements net.Listener. It is of no use: guests come by several ways.
func (l *Listener) Addr() net.Addr { return guestAddr("all") }

// ConnContext is for http.Server: requests are on behalf of the connection's guest.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	if c, ours := c.(*conn); ours {
		return notify.WithGuest(ctx, c.guest)
	}
	return ctx
}

// offer has somebody accept the guest's connection, or closes it.
func (l *Listener) offer(c *conn) {
	if err := l.admit(c); err != nil {
		l.log.Debug("connection refused", "guest", c.guest, "err", err)
		c.Conn.Close()
		return
	}
	select {
	case l.queue <- c:
	case <-l.done:
		c.Close()
	}
}

// admit counts the connection. Its guest, if it has a CID, is known only now.
func (l *Listener) admit(c *conn) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.cid != 0 {
		c.guest = l.cids[c.cid]
	}
	switch {
	case l.closed:
		return net.ErrClosed
	case c.guest == "":
		return fmt.Errorf("vsock: no guest has the CID %d", c.cid)
	case len(l.conns[c.guest]) >= MaxConns:
		return fmt.Errorf("the guest has %d connections already", MaxConns)
	}
	if l.conns[c.guest] == nil {
		l.conns[c.guest] = make(map[*conn]struct{})
	}
	l.conns[c.guest][c] = struct{}{}
	return nil
}

// forget no longer counts the connection.
func (l *Listener) forget(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns[c.guest], c)
	if len(l.conns[c.guest]) == 0 {
		delete(l.conns, c.guest)
	}
}

// conn is a connection of a guest.
type conn struct {
	net.Conn
	l     *Listener
	guest string // UUID
	cid   uint32 // 0: not by vsock
}

func (c *conn) Close() error {
	c.l.forget(c)
	return c.Conn.Close()
}

// RemoteAddr is the guest.
func (c *conn) RemoteAddr() net.Addr { return guestAddr(c.guest) }

// guestAddr is a guest's UUID.
type guestAddr string

func (guestAddr) Network() string  { return "guest" }
func (a guestAddr) String() string { return string(a) }
