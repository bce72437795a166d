package channel

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"belay/notify"
	"belay/notify/channel/wire"
)

// served is a Listener whose server says who asks.
type served struct {
	*Listener
	parked  chan string   // guests that poll long
	release chan struct{} // ends long polls
}

func serve(t *testing.T) *served {
	t.Helper()
	s := &served{Listener: NewListener(slog.New(slog.DiscardHandler)), parked: make(chan string, 100), release: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("/who", func(w http.ResponseWriter, r *http.Request) {
		guest, _ := notify.GuestOf(r.Context())
		fmt.Fprint(w, guest)
	})
	mux.HandleFunc("/wait", func(w http.ResponseWriter, r *http.Request) {
		guest, _ := notify.GuestOf(r.Context())
		s.parked <- guest
		select {
		case <-s.release:
			fmt.Fprint(w, guest)
		case <-r.Context().Done():
			s.parked <- "gone"
		}
	})
	server := &http.Server{Handler: mux, ConnContext: ConnContext, ReadHeaderTimeout: time.Minute}
	go server.Serve(s.Listener)
	t.Cleanup(func() { server.Close() })
	return s
}

// connect has the guest served as long as the test lasts.
func (s *served) connect(t *testing.T, guest, socket string) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Connect(ctx, guest, socket)
	}()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

// qemu is a guest's socket, with whoever is in the guest behind it.
type qemu struct {
	t      *testing.T
	socket string
	in     net.Listener
}

func newQEMU(t *testing.T, socket string) *qemu {
	t.Helper()
	in, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	return &qemu{t: t, socket: socket, in: in}
}

// guest is belay-guest's end, once belayd has connected.
func (q *qemu) guest() (*wire.Session, net.Conn) {
	q.t.Helper()
	c, err := q.in.Accept()
	if err != nil {
		q.t.Fatal(err)
	}
	q.t.Cleanup(func() { c.Close() })
	return q.dial(c), c
}

func (q *qemu) dial(c net.Conn) *wire.Session {
	q.t.Helper()
	s, err := wire.NewPort(c).Dial()
	if err != nil {
		q.t.Fatal(err)
	}
	return s
}

// client asks by sessions' streams.
func client(t *testing.T, s *wire.Session) *http.Client {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Open(ctx) }}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func get(c *http.Client, path string) (string, error) {
	r, err := c.Get("http://169.254.169.254" + path)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return string(b), err
}

func is(t *testing.T, c *http.Client, guest string) {
	t.Helper()
	if got, err := get(c, "/who"); err != nil || got != guest {
		t.Errorf("%s is taken for %q, %v", guest, got, err)
	}
}

func TestThreeGuestsAtOnce(t *testing.T) {
	t.Parallel()
	s, dir := serve(t), t.TempDir()
	var all sync.WaitGroup
	for i := range 3 {
		guest := fmt.Sprintf("guest-%d", i)
		q := newQEMU(t, filepath.Join(dir, guest))
		s.connect(t, guest, q.socket)
		session, _ := q.guest()
		c := client(t, session)
		for range 8 {
			all.Go(func() {
				for range 20 {
					is(t, c, guest)
				}
			})
		}
	}
	all.Wait()
}

func TestLongPollAndPipelining(t *testing.T) {
	t.Parallel()
	s := serve(t)
	q := newQEMU(t, filepath.Join(t.TempDir(), "socket"))
	s.connect(t, "guest-1", q.socket)
	session, _ := q.guest()
	c := client(t, session)
	answers := make(chan string, 3)
	for range 3 {
		go func() {
			got, err := get(c, "/wait")
			answers <- fmt.Sprint(got, err)
		}()
		<-s.parked
	}
	is(t, c, "guest-1") // long polls are in nobody's way

	st, err := session.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	io.WriteString(st, strings.Repeat("GET /who HTTP/1.1\r\nHost: x\r\n\r\n", 5))
	for r := bufio.NewReader(st); len(answers) < 5-3; {
		a, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		got, _ := io.ReadAll(a.Body)
		if string(got) != "guest-1" {
			t.Errorf("an answer is %q", got)
		}
		answers <- "guest-1<nil>"
	}
	close(s.release)
	for range 5 {
		if got := <-answers; got != "guest-1<nil>" {
			t.Errorf("an answer is %q", got)
		}
	}
}

// TestGuestRestarts: the requests of a guest whose belay-guest began anew are
// over on the host too.
func TestGuestRestarts(t *testing.T) {
	t.Parallel()
	s := serve(t)
	q := newQEMU(t, filepath.Join(t.TempDir(), "socket"))
	s.connect(t, "guest-1", q.socket)
	session, c := q.guest()
	go get(client(t, session), "/wait")
	<-s.parked
	session.Close() // which says nothing to the host
	again := q.dial(c)
	is(t, client(t, again), "guest-1")
	if got := <-s.parked; got != "gone" {
		t.Errorf("the old request is %s", got)
	}
}

// TestSocketComesAndGoes, as with a guest that is started, migrated, or has a new
// QEMU, and with a belayd that is stopped and started.
func TestSocketComesAndGoes(t *testing.T) {
	t.Parallel()
	s := serve(t)
	socket := filepath.Join(t.TempDir(), "socket")
	stop := s.connect(t, "guest-1", socket)
	for range 3 {
		q := newQEMU(t, socket)
		session, c := q.guest()
		is(t, client(t, session), "guest-1")
		c.Close()
		q.in.Close()
	}
	q := newQEMU(t, socket)
	session, _ := q.guest()
	polls := client(t, session)
	failed := make(chan error)
	go func() {
		_, err := get(polls, "/wait")
		failed <- err
	}()
	<-s.parked
	stop()
	if err := <-failed; err == nil {
		t.Error("a request outlived the host's end")
	}
	s.connect(t, "guest-1", socket)
	session, _ = q.guest()
	is(t, client(t, session), "guest-1")
}

// TestNoBusyLoop, also when somebody accepts and hangs up.
func TestNoBusyLoop(t *testing.T) {
	t.Parallel()
	q := newQEMU(t, filepath.Join(t.TempDir(), "socket"))
	var n atomic.Int32
	go func() {
		for {
			c, err := q.in.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			c.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	NewListener(slog.New(slog.DiscardHandler)).Connect(ctx, "guest-1", q.socket)
	if n := n.Load(); n < 1 || n > 3 { // at 0, 0.25 and 0.75 s
		t.Errorf("connected %d times in 1.5 s", n)
	}
}

// TestListenerCloses: nobody is accepted, and what a guest opens is closed.
func TestListenerCloses(t *testing.T) {
	t.Parallel()
	s := serve(t)
	q := newQEMU(t, filepath.Join(t.TempDir(), "socket"))
	s.connect(t, "guest-1", q.socket)
	session, _ := q.guest()
	is(t, client(t, session), "guest-1")
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Accept(); err != net.ErrClosed {
		t.Errorf("accepted: %v", err)
	}
	if got, err := get(client(t, session), "/who"); err == nil {
		t.Errorf("a closed listener answers %q", got)
	}
}
