package wire

import (
	"bufio"
	"context"
	"crypto/rand"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// socketpair is a stream with room in it, as between belayd and QEMU.
func socketpair(t testing.TB) (host, guest net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
		t.Cleanup(func() { ends[i].Close() })
	}
	return ends[0], ends[1]
}

// told is a session or an error.
type told struct {
	s   *Session
	err error
}

// begin calls Accept or Dial in the background.
func begin(f func() (*Session, error)) <-chan told {
	c := make(chan told, 1)
	go func() {
		s, err := f()
		c <- told{s, err}
	}()
	return c
}

func (r told) session(t testing.TB) *Session {
	t.Helper()
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.s
}

// sessions has both ends of a transport begin one. The host may begin others
// before, with what old guests have said.
func sessions(t testing.TB, host, guest *Port) (h, g *Session) {
	t.Helper()
	dialled := begin(guest.Dial)
	for {
		h = (<-begin(host.Accept)).session(t)
		if g == nil {
			select {
			case r := <-dialled:
				g = r.session(t)
			case <-h.Done():
				continue
			}
		}
		if h.mask == g.mask {
			return h, g
		}
		<-h.Done()
	}
}

// works checks that a connection can be opened and used.
func works(t testing.TB, h, g *Session) {
	t.Helper()
	st, err := g.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if _, err := io.WriteString(st, "are you there?"); err != nil {
		t.Fatal(err)
	}
	st.CloseWrite()
	at, err := h.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	if got, err := io.ReadAll(at); err != nil || string(got) != "are you there?" {
		t.Fatalf("read %q, %v", got, err)
	}
}

// rogue is a guest that writes frames as it likes.
type rogue struct {
	t testing.TB
	net.Conn
	r    reader
	mask number
	pos  int
}

// newRogue begins a session.
func newRogue(t testing.TB, c net.Conn) *rogue {
	t.Helper()
	g := &rogue{t: t, Conn: c, r: reader{buf: bufio.NewReader(c)}}
	rand.Read(g.mask[:])
	c.SetDeadline(time.Time{})
	g.Write(greeting{hello, g.mask}.encode())
	for {
		said, err := g.r.greeting()
		if err != nil {
			t.Fatal(err)
		}
		if said == (greeting{answer, g.mask}) {
			g.r.begin(g.mask)
			return g
		}
	}
}

// frame writes a frame. Its error is that of a host that has had enough.
func (g *rogue) frame(kind byte, id uint32, n int, data string) error {
	b := append(header(nil, kind, id, n), data...)
	g.pos = g.mask.apply(b, g.pos)
	_, err := g.Write(b)
	return err
}

// over waits for a session to end.
func over(t testing.TB, s *Session) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	select {
	case <-s.Done():
		return s.Err()
	case <-ctx.Done():
		t.Fatal("the session does not end")
		return nil
	}
}

// echo answers whatever comes on streams until the session is over.
func echo(s *Session) {
	for {
		st, err := s.Accept()
		if err != nil {
			return
		}
		go func() {
			defer st.Close()
			io.Copy(st, st)
		}()
	}
}
