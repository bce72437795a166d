package wire

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"
)

// TestConn: a stream is a net.Conn in all respects.
func TestConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		a, b := socketpair(t)
		h, g := sessions(t, NewPort(a), NewPort(b))
		if c1, err = g.Open(t.Context()); err != nil {
			return nil, nil, nil, err
		}
		if c2, err = h.Accept(); err != nil {
			return nil, nil, nil, err
		}
		return c1, c2, func() { h.Close(); g.Close() }, nil
	})
}

func TestCarriesMuchBothWays(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t)
	h, g := sessions(t, NewPort(a), NewPort(b))
	go echo(h)
	var all sync.WaitGroup
	for range MaxStreams {
		all.Go(func() {
			st, err := g.Open(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			defer st.Close()
			sent := make([]byte, 4*window+1)
			rand.Read(sent)
			go func() {
				st.Write(sent)
				st.CloseWrite()
			}()
			if got, err := io.ReadAll(st); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%d bytes came back of %d, %v", len(got), len(sent), err)
			}
		})
	}
	all.Wait()
}

// TestTenThousandStreams that want to be open at once take turns.
func TestTenThousandStreams(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t)
	h, g := sessions(t, NewPort(a), NewPort(b))
	go echo(h)
	var all sync.WaitGroup
	var good atomic.Int64
	for i := range 10_000 {
		all.Go(func() {
			st, err := g.Open(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			defer st.Close()
			sent := fmt.Sprint("stream ", i)
			io.WriteString(st, sent)
			st.CloseWrite()
			if got, err := io.ReadAll(st); err == nil && string(got) == sent {
				good.Add(1)
			}
		})
	}
	all.Wait()
	if good.Load() != 10_000 {
		t.Errorf("%d of 10000 streams worked", good.Load())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.streams) > MaxStreams {
		t.Errorf("the host has %d streams", len(h.streams))
	}
}

// TestSlowReader: who does not read stops its own stream only.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t)
	h, g := sessions(t, NewPort(a), NewPort(b))
	slow, err := g.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	at, err := h.Accept()
	if err != nil {
		t.Fatal(err)
	}
	at.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := at.Write(make([]byte, 10*window)); n != window || !isTimeout(err) {
		t.Errorf("wrote %d bytes, %v; the window is %d", n, err, window)
	}
	works(t, h, g)
	at.SetWriteDeadline(time.Time{})
	go func() {
		at.Write([]byte("the rest"))
		at.Close()
	}()
	if got, err := io.ReadAll(slow); err != nil || len(got) != window+len("the rest") {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
}

// TestMarkInData: a program in the guest cannot end a session by what it sends.
func TestMarkInData(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t)
	h, g := sessions(t, NewPort(a), NewPort(b))
	go echo(h)
	st, err := g.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	sent := strings.Repeat(mark, 100) + string(greeting{kind: hello}.encode())
	io.WriteString(st, sent)
	st.CloseWrite()
	if got, err := io.ReadAll(st); err != nil || string(got) != sent {
		t.Errorf("%d bytes came back of %d, %v", len(got), len(sent), err)
	}
}

func TestCloseTellsTheWriter(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t)
	h, g := sessions(t, NewPort(a), NewPort(b))
	st, err := g.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	at, err := h.Accept()
	if err != nil {
		t.Fatal(err)
	}
	st.Close()
	if _, err := at.Write(make([]byte, 2*window)); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("wrote to who has closed: %v", err)
	}
	if _, err := at.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read from who has closed: %v", err)
	}
}

// TestRogueGuests: breaking a rule ends the session, whatever has been sent, and
// the host has kept no more than it says.
func TestRogueGuests(t *testing.T) {
	t.Parallel()
	for name, misbehave := range map[string]func(g *rogue){
		"ten thousand streams": func(g *rogue) {
			for id := range uint32(10_000) {
				if g.frame(frameOpen, id+1, 0, "") != nil {
					return
				}
			}
		},
		"streams that are closed and not": func(g *rogue) {
			for id := range uint32(10_000) {
				if g.frame(frameOpen, id+1, 0, "") != nil || g.frame(frameClose, id+1, 0, "") != nil {
					return
				}
			}
		},
		"a stream twice":         func(g *rogue) { g.frame(frameOpen, 1, 0, ""); g.frame(frameOpen, 1, 0, "") },
		"an old stream's number": func(g *rogue) { g.frame(frameOpen, 7, 0, ""); g.frame(frameOpen, 6, 0, "") },
		"data for no stream":     func(g *rogue) { g.frame(frameData, 9, 4, "data") },
		"data after the end": func(g *rogue) {
			g.frame(frameOpen, 1, 0, "")
			g.frame(frameFin, 1, 0, "")
			g.frame(frameData, 1, 1, "x")
		},
		"a huge frame":                func(g *rogue) { g.frame(frameOpen, 1, 0, ""); g.frame(frameData, 1, 65535, "") },
		"room for more than there is": func(g *rogue) { g.frame(frameOpen, 1, 0, ""); g.frame(frameCredit, 1, 1, "") },
		"a kind that is none":         func(g *rogue) { g.frame(200, 0, 0, "") },
		"zeros":                       func(g *rogue) { g.Write(make([]byte, 1<<20)) },
		"more than there is room for": func(g *rogue) {
			g.frame(frameOpen, 1, 0, "")
			for range window/maxData + 1 {
				g.frame(frameData, 1, maxData, strings.Repeat("x", maxData))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := socketpair(t)
			host := NewPort(a)
			accepted := begin(host.Accept)
			g := newRogue(t, b)
			h := (<-accepted).session(t)
			misbehaved := make(chan struct{})
			go func() {
				misbehave(g)
				close(misbehaved)
			}()
			err := over(t, h)
			if err == nil || strings.Contains(err.Error(), "cannot read") {
				t.Errorf("the session ended with %v", err)
			}
			if n := len(h.streams); n > MaxStreams {
				t.Errorf("the host has %d streams", n)
			}
			// A guest that is well again is served.
			accepted = begin(host.Accept)
			<-misbehaved
			dialled := begin(NewPort(b).Dial)
			works(t, (<-accepted).session(t), (<-dialled).session(t))
		})
	}
}

// TestFloodOfFrames: frames that need no answer start nothing on the host, also
// when the guest reads nothing.
func TestFloodOfFrames(t *testing.T) {
	a, b := socketpair(t)
	accepted := begin(NewPort(a).Accept)
	g := newRogue(t, b)
	h := (<-accepted).session(t)
	before := runtime.NumGoroutine()
	g.frame(frameOpen, 1, 0, "")
	for range 100_000 {
		if err := g.frame(frameAlive, 0, 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	if n := runtime.NumGoroutine(); n > before+2 {
		t.Errorf("there are %d goroutines, and were %d", n, before)
	}
	at, err := h.Accept()
	if err != nil {
		t.Fatal(err)
	}
	at.Close()
	if h.Err() != nil {
		t.Error(h.Err())
	}
}

// TestTime: sessions of those who are there last; of others they end.
func TestTime(t *testing.T) {
	t.Parallel()
	t.Run("idle for a day", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, b := net.Pipe()
			h, g := sessions(t, NewPort(a), NewPort(b))
			time.Sleep(24 * time.Hour)
			works(t, h, g)
			g.Close()
			if begun := time.Now(); over(t, h) == nil || time.Since(begun) > silence {
				t.Errorf("after %s: %v", time.Since(begun), h.Err())
			}
		})
	})
	t.Run("silent", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, b := net.Pipe()
			accepted := begin(NewPort(a).Accept)
			g := newRogue(t, b)
			h := (<-accepted).session(t)
			go io.Copy(io.Discard, g.Conn)
			begun := time.Now()
			if err := over(t, h); !isTimeout(err) || time.Since(begun) != silence {
				t.Errorf("after %s: %v", time.Since(begun), err)
			}
			b.Close()
		})
	})
	t.Run("never reads", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, b := net.Pipe()
			accepted := begin(NewPort(a).Accept)
			g := newRogue(t, b)
			h := (<-accepted).session(t)
			g.frame(frameOpen, 1, 0, "")
			at, err := h.Accept()
			if err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			if _, err := at.Write([]byte("x")); !isTimeout(err) || time.Since(begun) != writeTimeout {
				t.Errorf("after %s: %v", time.Since(begun), err)
			}
			over(t, h)
		})
	})
}
