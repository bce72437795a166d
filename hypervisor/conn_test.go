package hypervisor

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// serve listens on a unix socket and hands each connection to f.
func serve(t *testing.T, f func(net.Conn)) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				f(c)
			}()
		}
	}()
	return socket
}

// readCall reads one RPC packet and gives its header after the length.
func readCall(c net.Conn) ([]byte, error) {
	head := make([]byte, packetMin)
	if _, err := io.ReadFull(c, head); err != nil {
		return nil, err
	}
	_, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head))-packetMin)
	return head[4:], err
}

// reply answers every call with the payload that f gives for the call's number.
func reply(f func(call int) []byte) func(net.Conn) {
	return func(c net.Conn) {
		for i := 0; ; i++ {
			head, err := readCall(c)
			if err != nil {
				return
			}
			binary.BigEndian.PutUint32(head[12:], 1) // type: reply
			payload := f(i)
			packet := binary.BigEndian.AppendUint32(nil, uint32(packetMin+len(payload)))
			packet = append(append(packet, head...), payload...)
			if _, err := c.Write(packet); err != nil {
				return
			}
		}
	}
}

func TestUnusableDaemons(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		name   string
		socket string
		also   error  // beside ErrHypervisorDown
		says   string // in the error's text
	}{
		{name: "missing", socket: filepath.Join(dir, "none"), says: "no such file"},
		{name: "hangs up", socket: serve(t, func(net.Conn) {}), says: "connection lost"},
		{
			name:   "says nothing",
			socket: serve(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }),
			also:   context.DeadlineExceeded, says: "no answer in time",
		},
		{
			name: "sends a packet too long to be true",
			socket: serve(t, func(c net.Conn) {
				_, _ = readCall(c)
				_, _ = c.Write([]byte{0xFF, 0xFF, 0xFF, 0xFF, 1, 2, 3, 4})
				_, _ = io.Copy(io.Discard, c)
			}),
			says: "connection lost",
		},
		{
			name: "sends a packet too short for its header",
			socket: serve(t, func(c net.Conn) {
				_, _ = readCall(c)
				_, _ = c.Write(make([]byte, 64))
				_, _ = io.Copy(io.Discard, c)
			}),
			says: "connection lost",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := New(Config{Socket: tt.socket, Timeout: 200 * time.Millisecond})
			defer func() { _ = h.Close() }()
			for range poolSize + 1 { // failures give their place in the pool back
				err := h.Ping(t.Context())
				if !errors.Is(err, maint.ErrHypervisorDown) {
					t.Fatalf("error %v does not wrap ErrHypervisorDown", err)
				}
				if tt.also != nil && !errors.Is(err, tt.also) {
					t.Errorf("error %v does not wrap %v", err, tt.also)
				}
				for _, want := range []string{tt.says, tt.socket} {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("error %q does not say %q", err, want)
					}
				}
			}
		})
	}
}

// A daemon that answers the opening of the connection, and then with what
// cannot be decoded, makes calls fail and nothing else.
func TestUndecodableReplies(t *testing.T) {
	for name, payload := range map[string][]byte{
		"empty":           nil,
		"short":           {0, 0},
		"string too long": {0, 0, 0x10, 0, 'x'},
	} {
		t.Run(name, func(t *testing.T) {
			h := New(Config{Timeout: time.Second, Socket: serve(t, reply(func(call int) []byte {
				if call < 2 { // auth list (none), open
					return make([]byte, 4)
				}
				return payload
			}))})
			defer func() { _ = h.Close() }()
			for op, call := range map[string]func() error{
				"Ping":   func() error { return h.Ping(t.Context()) },
				"Info":   func() error { _, err := h.Info(t.Context()); return err },
				"Guests": func() error { _, err := h.Guests(t.Context()); return err },
				"Guest":  func() error { _, err := h.Guest(t.Context(), "x"); return err },
			} {
				if err := call(); err == nil {
					t.Errorf("%s takes it for an answer", op)
				}
			}
		})
	}
}

func TestPanicInDecoding(t *testing.T) {
	client, server := net.Pipe()
	defer func() { _ = server.Close() }()
	c := &conn{wire: newWire(client), socket: "pipe"}
	_, err := call(&session{ctx: t.Context(), conn: c}, "Test", func(*libvirt.Libvirt) (int, error) { panic("index out of range") })
	if !errors.Is(err, maint.ErrHypervisorDown) || !strings.Contains(err.Error(), "index out of range") {
		t.Errorf("error %v", err)
	}
	if !c.unusable() {
		t.Error("the connection is kept")
	}
}

func TestSearchesSockets(t *testing.T) {
	h := New(Config{})
	defer func() { _ = h.Close() }()
	dir := t.TempDir()
	first, second := filepath.Join(dir, "virtqemud-sock"), filepath.Join(dir, "libvirt-sock")
	h.sockets = []string{first, second}
	err := h.Ping(t.Context())
	if !errors.Is(err, maint.ErrHypervisorDown) || !strings.Contains(err.Error(), first) || !strings.Contains(err.Error(), second) {
		t.Errorf("error %v does not name both sockets", err)
	}
	good := serve(t, reply(func(int) []byte { return make([]byte, 8) }))
	h.sockets = []string{first, good}
	if err := h.Ping(t.Context()); err != nil {
		t.Errorf("the socket that is there is not found: %v", err)
	}
}

// counted is a daemon that answers every call with zeros, and counts
// connections and calls. Each connection's first two calls open it.
func counted(t *testing.T) (h *Host, conns, calls *atomic.Int32) {
	t.Helper()
	conns, calls = new(atomic.Int32), new(atomic.Int32)
	h = New(Config{Socket: serve(t, func(c net.Conn) {
		conns.Add(1)
		reply(func(int) []byte {
			calls.Add(1)
			return make([]byte, 16)
		})(c)
	})})
	t.Cleanup(func() { _ = h.Close() })
	return h, conns, calls
}

// Nothing is opened, and nothing asked twice, while guests stand still.
func TestOneRoundTrip(t *testing.T) {
	const uuid = "10000000-0000-4000-8000-000000000000"
	h, conns, calls := counted(t)
	if err := h.Warm(t.Context(), fanSize); err != nil {
		t.Fatal(err)
	}
	if got := conns.Load(); got != fanSize {
		t.Fatalf("%d connections after Warm", got)
	}
	if _, _, err := h.State(t.Context(), uuid); err != nil { // settled now
		t.Fatal(err)
	}
	for op, call := range map[string]func() error{
		"Suspend":      func() error { return h.Suspend(t.Context(), uuid) },
		"Resume":       func() error { return h.Resume(t.Context(), uuid) },
		"State":        func() error { _, _, err := h.State(t.Context(), uuid); return err },
		"GuestTime":    func() error { _, err := h.GuestTime(t.Context(), uuid); return err },
		"SetGuestTime": func() error { return h.SetGuestTime(t.Context(), uuid, time.Now()) },
	} {
		before := calls.Load()
		if err := call(); err != nil {
			t.Errorf("%s: %v", op, err)
		}
		if after := calls.Load(); after != before+1 {
			t.Errorf("%s makes %d calls", op, after-before)
		}
	}
	if err := h.Warm(t.Context(), 1000); err != nil {
		t.Errorf("Warm of what is warm: %v", err)
	}
	if got := conns.Load(); got != fanSize {
		t.Errorf("%d connections at the end", got)
	}
}

// Connections that are lost are replaced, by Warm or by who needs one.
func TestFanReplacesLost(t *testing.T) {
	h, conns, _ := counted(t)
	if err := h.Warm(t.Context(), 3); err != nil {
		t.Fatal(err)
	}
	lose := func() {
		h.fan.mu.Lock()
		defer h.fan.mu.Unlock()
		for _, c := range h.fan.idle {
			_ = c.wire.Conn.Close() // as the other side would
			<-c.wire.lost
		}
	}
	lose()
	if err := h.Suspend(t.Context(), "10000000-0000-4000-8000-000000000000"); err != nil || conns.Load() != 4 {
		t.Errorf("Suspend: %v, %d connections so far; want 4", err, conns.Load())
	}
	lose()
	if err := h.Warm(t.Context(), 2); err != nil || conns.Load() != 6 {
		t.Errorf("Warm: %v, %d connections so far; want 6", err, conns.Load())
	}
}

// Warm does not take connections for good that are dead and do not know it.
func TestWarmAsks(t *testing.T) {
	var up atomic.Bool
	up.Store(true)
	h := New(Config{Timeout: 5 * time.Second, Socket: serve(t, func(c net.Conn) {
		reply(func(int) []byte {
			if !up.Load() {
				_ = c.Close() // noticed by who asks next
			}
			return make([]byte, 16)
		})(c)
	})})
	defer func() { _ = h.Close() }()
	if err := h.Warm(t.Context(), fanSize); err != nil {
		t.Fatal(err)
	}
	up.Store(false)
	if err := h.Warm(t.Context(), 1); !errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("Warm with a daemon that hangs up: %v", err)
	}
	up.Store(true)
	if err := h.Warm(t.Context(), fanSize); err != nil {
		t.Error(err)
	}
}

// A libvirt that has just started is waited for, and not believed.
func TestStateIsSettled(t *testing.T) {
	const uuid = "10000000-0000-4000-8000-000000000000"
	word := func(n uint32) []byte { return append(binary.BigEndian.AppendUint32(nil, n), make([]byte, 12)...) }
	var asked atomic.Int32
	h := New(Config{Socket: serve(t, reply(func(call int) []byte {
		switch {
		case call < 2: // auth list, open
			return word(0)
		case call < 5: // control info: a job
			asked.Add(1)
			return word(uint32(libvirt.DomainControlJob))
		case call == 5:
			return word(uint32(libvirt.DomainControlOk))
		default:
			return word(uint32(libvirt.DomainPaused))
		}
	}))})
	defer func() { _ = h.Close() }()
	state, _, err := h.State(t.Context(), uuid)
	if err != nil || state != maint.GuestPaused || asked.Load() != 3 {
		t.Errorf("%s, %v, after %d questions", state, err, asked.Load())
	}

	busy := New(Config{Socket: serve(t, reply(func(call int) []byte {
		return word(uint32(min(call/2, 1))) // after the opening: a job, always
	}))})
	defer func() { _ = busy.Close() }()
	if _, _, err := busy.State(t.Context(), uuid); !errors.Is(err, ErrBusy) || errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("with a job that does not end: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := busy.State(ctx, uuid); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("past the deadline: %v", err)
	}
}

func TestCloseEndsCalls(t *testing.T) {
	h := New(Config{Socket: serve(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })})
	events, cancel := h.Subscribe()
	defer cancel()
	results := make(chan error, 3)
	go func() { results <- h.Ping(t.Context()) }()
	go func() { results <- h.Migrate(t.Context(), "10000000-0000-4000-8000-000000000000", maint.MoveParams{}) }()
	go func() { results <- h.Run(t.Context()) }()
	time.Sleep(50 * time.Millisecond)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	for range cap(results) {
		select {
		case err := <-results: // nil is Run's
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("something outlives Close")
		}
	}
	if _, ok := <-events; ok {
		t.Error("a subscription outlives Close")
	}
	if err := h.Ping(t.Context()); !errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("Ping after Close: %v", err)
	}
}

// A connection's end may be noticed by who writes to it, before the reader does.
func TestWriteToLostConnection(t *testing.T) {
	client, server := net.Pipe()
	c := &conn{wire: newWire(client), socket: "pipe"}
	_ = server.Close()
	_, err := invoke(t.Context(), c, "Test", func(*libvirt.Libvirt) (int, error) { return c.wire.Write([]byte("call")) })
	if !errors.Is(err, maint.ErrHypervisorDown) || !c.unusable() {
		t.Errorf("error %v, unusable %t", err, c.unusable())
	}
}

func TestWireFollowsPackets(t *testing.T) {
	var stream []byte
	for _, size := range []int{packetMin, 100, packetMin + 1, 5000} {
		packet := make([]byte, size)
		binary.BigEndian.PutUint32(packet, uint32(size))
		for i := 4; i < size; i++ {
			packet[i] = 0xFF // would be a length if taken for one
		}
		stream = append(stream, packet...)
	}
	for chunk := 1; chunk < 300; chunk++ {
		w := &wire{}
		for at := 0; at < len(stream); at += chunk {
			if err := w.follow(stream[at:min(at+chunk, len(stream))]); err != nil {
				t.Fatalf("in chunks of %d: %v", chunk, err)
			}
		}
		if w.body != 0 || len(w.header) != 0 {
			t.Fatalf("in chunks of %d: out of step", chunk)
		}
	}
}
