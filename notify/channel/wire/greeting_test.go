package wire

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestGuestRestarts wherever its old session was, a half-written frame
// included: a new one begins at once, and streams of the old end.
func TestGuestRestarts(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t)
	host := NewPort(a)
	accepted := begin(host.Accept)
	for _, left := range []string{
		"",
		string(header(nil, frameData, 1, maxData)),
		string(header(nil, frameData, 1, maxData)) + strings.Repeat("x", 100),
		string(header(nil, frameOpen, 2, 0))[:3],
	} {
		g := newRogue(t, b)
		h := (<-accepted).session(t)
		g.frame(frameOpen, 1, 0, "")
		at, err := h.Accept()
		if err != nil {
			t.Fatal(err)
		}
		cut := []byte(left)
		g.mask.apply(cut, g.pos)
		b.Write(cut)

		dialled := begin(NewPort(b).Dial) // nothing tells the host that the old one is gone
		if err := over(t, h); !errors.Is(err, errGreeting) {
			t.Errorf("left %q: the old session ended with %v", left, err)
		}
		if _, err := at.Read(make([]byte, 1)); !errors.Is(err, errGreeting) {
			t.Errorf("left %q: the old session's stream ended with %v", left, err)
		}
		h2, g2 := (<-begin(host.Accept)).session(t), (<-dialled).session(t)
		works(t, h2, g2)
		g2.Close()
		accepted = begin(func() (*Session, error) { <-h2.Done(); return host.Accept() })
	}
}

// TestHostRestarts: a guest in a session that the host has no more, as after a
// migration, begins anew when the host says that it is there.
func TestHostRestarts(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t)
	guest := NewPort(b)
	h, g := sessions(t, NewPort(a), guest)
	h.Close()
	accepted := begin(NewPort(a).Accept)
	if err := over(t, g); !errors.Is(err, errGreeting) {
		t.Errorf("the guest's session ended with %v", err)
	}
	g = (<-begin(guest.Dial)).session(t)
	works(t, (<-accepted).session(t), g)
}

// TestGarbageFirst: whatever is in the stream, both sides find each other.
func TestGarbageFirst(t *testing.T) {
	t.Parallel()
	noise := make([]byte, 50_000)
	rand.Read(noise)
	old := greeting{kind: hello}.encode()
	for name, first := range map[string][]byte{
		"noise":         noise,
		"marks":         []byte(strings.Repeat(mark, 100)),
		"half a mark":   []byte(mark[:8]),
		"an HTTP query": []byte("GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"),
		"old hellos":    bytes.Repeat(old, 300),
		"old answers":   bytes.Repeat(greeting{kind: answer}.encode(), 300),
		"a torn sum":    append(old[:len(old)-1:len(old)-1], old[len(old)-1]^1),
	} {
		t.Run(name, func(t *testing.T) {
			a, b := socketpair(t)
			a.Write(first)
			b.Write(first)
			h, g := sessions(t, NewPort(a), NewPort(b))
			works(t, h, g)
		})
	}
}

// TestOldHellos: the host does not begin a session for each.
func TestOldHellos(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t)
	last := greeting{kind: hello, number: number{1, 2, 3}}
	b.Write(append(bytes.Repeat(greeting{kind: hello}.encode(), 100), last.encode()...))
	h, err := NewPort(a).Accept()
	if err != nil {
		t.Fatal(err)
	}
	if h.mask != last.number {
		t.Errorf("session %v, want that of the last hello", h.mask)
	}
	h.Close()
}

// TestTornHello: a hello that is cut anywhere costs a repetition at most.
func TestTornHello(t *testing.T) {
	t.Parallel()
	whole := greeting{kind: hello}.encode()
	for cut := 1; cut < len(whole); cut++ {
		synctest.Test(t, func(t *testing.T) {
			a, b := net.Pipe()
			defer a.Close()
			accepted := begin(NewPort(a).Accept)
			if _, err := io.ReadFull(b, make([]byte, len(whole))); err != nil { // wake
				t.Fatal(err)
			}
			b.Write(whole[:cut])
			begun := time.Now()
			dialled := begin(NewPort(b).Dial)
			h, g := (<-accepted).session(t), (<-dialled).session(t)
			if took := time.Since(begun); took > helloFirst+helloMost {
				t.Errorf("cut at %d: took %s", cut, took)
			}
			h.Close()
			g.Close()
		})
	}
}

// TestNobodyThere: the host waits without a word more, the guest with few.
func TestNobodyThere(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		accepted := begin(NewPort(a).Accept)
		said, err := io.ReadAll(io.LimitReader(b, int64(len(greeting{}.encode()))))
		if err != nil || !bytes.Equal(said, greeting{kind: wake}.encode()) {
			t.Fatalf("the host said %q, %v", said, err)
		}
		b.SetReadDeadline(time.Now().Add(24 * time.Hour))
		if n, err := b.Read(make([]byte, 1)); n > 0 || !isTimeout(err) {
			t.Errorf("the host spoke again, %v", err)
		}
		a.Close()
		if r := <-accepted; r.err == nil {
			t.Error("there is a session with nobody")
		}
	})
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		dialled := begin(NewPort(b).Dial)
		a.SetReadDeadline(time.Now().Add(time.Hour))
		said, _ := io.ReadAll(a)
		if n := len(said) / len(greeting{}.encode()); n < 700 || n > 730 {
			t.Errorf("the guest said hello %d times in an hour", n)
		}
		b.Close()
		if r := <-dialled; r.err == nil {
			t.Error("there is a session with nobody")
		}
	})
}

// FuzzGreeting: a whole greeting is found behind anything that is followed by
// a repetition, and what is found was said.
func FuzzGreeting(f *testing.F) {
	f.Add([]byte(mark), []byte("number"))
	f.Add([]byte(mark[:5]+mark), []byte{})
	f.Add(greeting{kind: wake}.encode(), []byte{0})
	f.Fuzz(func(t *testing.T, before, n []byte) {
		want := greeting{kind: hello}
		copy(want.number[:], n)
		// A mark in what is before takes a greeting's length with it: the one
		// after that stands.
		gap := make([]byte, saidLen)
		r := reader{buf: bufio.NewReader(io.MultiReader(bytes.NewReader(before), bytes.NewReader(gap), bytes.NewReader(want.encode())))}
		for {
			switch got, err := r.greeting(); {
			case err != nil:
				t.Fatalf("the greeting is not found behind %q: %v", before, err)
			case got == want:
				return
			case !bytes.Contains(before, got.encode()):
				t.Fatalf("nobody said %v", got)
			}
		}
	})
}

// FuzzHost: a host is not hurt by anything that a guest sends in a session, and
// serves it when it begins anew.
func FuzzHost(f *testing.F) {
	f.Add(header(nil, frameOpen, 1, 0))
	f.Add(append(header(header(nil, frameOpen, 1, 0), frameData, 1, 3), "abc"...))
	f.Add(append(header(header(nil, frameOpen, 1, 0), frameClose, 1, 0), header(nil, frameCredit, 1, 1)...))
	f.Fuzz(func(t *testing.T, sent []byte) {
		synctest.Test(t, func(t *testing.T) {
			a, b := net.Pipe()
			defer a.Close()
			defer b.Close()
			host := NewPort(a)
			accepted := begin(host.Accept)
			g := newRogue(t, b)
			h := (<-accepted).session(t)
			go echo(h)
			read := make(chan struct{})
			go func() { // all that the host says until it is silent
				defer close(read)
				b.SetReadDeadline(time.Now().Add(2 * silence))
				io.Copy(io.Discard, b)
			}()
			masked := bytes.Clone(sent)
			g.mask.apply(masked, g.pos)
			b.SetWriteDeadline(time.Now().Add(silence))
			b.Write(masked)
			<-h.Done()
			if len(h.streams) > MaxStreams {
				t.Errorf("the host has %d streams", len(h.streams))
			}
			<-read
			b.SetDeadline(time.Time{})
			h2, g2 := sessions(t, host, NewPort(b))
			works(t, h2, g2)
			h2.Close()
			g2.Close()
		})
	})
}
