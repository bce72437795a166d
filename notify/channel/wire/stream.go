package wire

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Stream is a connection inside a session: a net.Conn that can be closed for
// writing alone. All its fields are under the session's mu.
type Stream struct {
	s       *Session
	id      uint32
	changed sync.Cond // any of what follows, or the session is over

	in     bytes.Buffer
	room   int // bytes that the other side may send
	owed   int // bytes that were read, and are not credited yet
	credit int // bytes that may be sent

	sentFin  bool
	gotFin   bool // nothing more comes
	gotClose bool // nor does anybody read what is sent
	closed   bool // here

	read, write deadline
}

var _ net.Conn = (*Stream)(nil)

// told takes a frame that is for the stream.
func (st *Stream) told(kind byte, n int) error {
	if kind == frameCredit {
		if n > window-st.credit {
			return fmt.Errorf("the other side has room for %d bytes in stream %d, which is more than it may have", st.credit+n, st.id)
		}
		st.credit += n
	} else {
		st.gotFin, st.gotClose = true, st.gotClose || kind == frameClose
		st.forget()
	}
	st.changed.Broadcast()
	return nil
}

// forget removes the stream when both sides have said their last.
func (st *Stream) forget() {
	if _, there := st.s.streams[st.id]; !there || !st.sentFin || !st.gotFin {
		return
	}
	delete(st.s.streams, st.id)
	if !st.s.host {
		<-st.s.turns
	}
}

// Read implements net.Conn. When the session ends so do its streams, with why.
func (st *Stream) Read(p []byte) (int, error) {
	s := st.s
	s.mu.Lock()
	for {
		switch {
		case st.closed:
			s.mu.Unlock()
			return 0, net.ErrClosed
		case st.read.passed():
			s.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case st.in.Len() > 0 || len(p) == 0:
			n, _ := st.in.Read(p)
			st.owed += n
			give := st.owed >= window/2 && !st.gotFin
			s.mu.Unlock()
			if give {
				s.send(st.repay) // its error is for who reads next
			}
			return n, nil
		case st.gotFin:
			s.mu.Unlock()
			return 0, io.EOF
		case s.err != nil:
			defer s.mu.Unlock()
			return 0, s.err
		}
		st.changed.Wait()
	}
}

// repay tells the other side how much more it may send.
func (st *Stream) repay(b []byte) []byte {
	n := st.owed
	if n == 0 || st.gotFin || st.closed {
		return nil
	}
	st.owed = 0
	st.room += n
	return header(b, frameCredit, st.id, n)
}

// Write implements net.Conn. syscall.EPIPE: the other side has closed the stream.
func (st *Stream) Write(p []byte) (written int, err error) {
	for len(p) > 0 {
		if err := st.writable(); err != nil {
			return written, err
		}
		n := 0
		err := st.s.send(func(b []byte) []byte {
			// Somebody else may have taken the credit, or closed the stream.
			n = min(len(p), maxData, st.credit)
			if n == 0 || st.closed || st.sentFin {
				n = 0
				return nil
			}
			st.credit -= n
			return append(header(b, frameData, st.id, n), p[:n]...)
		})
		if err != nil {
			return written, err
		}
		written, p = written+n, p[n:]
	}
	return written, nil
}

// writable waits until something can be sent.
func (st *Stream) writable() error {
	s := st.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.err != nil:
			return s.err
		case st.closed || st.sentFin:
			return net.ErrClosed
		case st.gotClose:
			return syscall.EPIPE
		case st.write.passed():
			return os.ErrDeadlineExceeded
		case st.credit > 0:
			return nil
		}
		st.changed.Wait()
	}
}

// CloseWrite says that nothing more will be written; the other side reads EOF.
func (st *Stream) CloseWrite() error {
	return st.s.send(func(b []byte) []byte {
		if st.sentFin || st.closed {
			return nil
		}
		st.sentFin = true
		st.forget()
		st.changed.Broadcast()
		return header(b, frameFin, st.id, 0)
	})
}

// Close implements net.Conn. What was written before arrives.
func (st *Stream) Close() error {
	s := st.s
	s.mu.Lock()
	first := !st.closed
	st.closed = true
	st.in = bytes.Buffer{}
	st.read.set(st, time.Time{})
	st.write.set(st, time.Time{})
	st.changed.Broadcast()
	s.mu.Unlock()
	if !first {
		return nil
	}
	s.send(func(b []byte) []byte { // a session that is over has closed it
		if st.sentFin && st.gotFin {
			return nil
		}
		st.sentFin = true
		st.forget()
		return header(b, frameClose, st.id, 0)
	})
	return nil
}

// LocalAddr implements net.Conn.
func (st *Stream) LocalAddr() net.Addr { return addr{} }

// RemoteAddr implements net.Conn. It says nothing of who is there.
func (st *Stream) RemoteAddr() net.Addr { return addr{} }

// SetDeadline implements net.Conn.
func (st *Stream) SetDeadline(t time.Time) error { return st.setDeadlines(t, &st.read, &st.write) }

// SetReadDeadline implements net.Conn.
func (st *Stream) SetReadDeadline(t time.Time) error { return st.setDeadlines(t, &st.read) }

// SetWriteDeadline implements net.Conn. It bounds the wait for the other side to
// read, not that for the channel, which has a bound of its own.
func (st *Stream) SetWriteDeadline(t time.Time) error { return st.setDeadlines(t, &st.write) }

func (st *Stream) setDeadlines(t time.Time, which ...*deadline) error {
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	if st.closed {
		return net.ErrClosed
	}
	for _, d := range which {
		d.set(st, t)
	}
	return nil
}

// deadline wakes who waits when it has passed.
type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) set(st *Stream, at time.Time) {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.at = at
	if wait := time.Until(at); wait > 0 {
		d.timer = time.AfterFunc(wait, st.wake)
	}
	st.changed.Broadcast()
}

// wake has who waits look again.
func (st *Stream) wake() {
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	st.changed.Broadcast()
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// addr is the address of either end.
type addr struct{}

func (addr) Network() string { return "virtio-serial" }
func (addr) String() string  { return Name }
