package views

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"belay/notify"
)

// listen serves guest A on a loopback address.
func listen(t testing.TB, h *Handler, change ...func(*Server)) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(h)
	s.ConnContext = func(ctx context.Context, _ net.Conn) context.Context { return notify.WithGuest(ctx, guestA) }
	for _, f := range change {
		f(s)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := s.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// clientOf reaches the server whatever host it asks for, as a guest does.
func clientOf(t testing.TB, addr string) *http.Client {
	tr := &http.Transport{MaxIdleConnsPerHost: 1000, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// raw sends bytes and reads the answers to them.
func raw(t *testing.T, addr, request string) (*http.Response, *bufio.Reader) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	b := bufio.NewReader(c)
	r, err := http.ReadResponse(b, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r, b
}

const rawGet = "GET " + azureNow + " HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n"

func TestConnectionClose(t *testing.T) {
	addr := listen(t, handler(t, newWorld()))
	r, rest := raw(t, addr, rawGet+"Connection: close\r\n\r\n")
	want(t, r, 200, "*")
	if !r.Close { // ReadResponse moves the header there
		t.Error("Connection: close is not echoed")
	}
	if _, err := rest.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("the connection stays: %v", err)
	}
	r, _ = raw(t, addr, rawGet+"\r\n")
	if want(t, r, 200, "*"); r.Close {
		t.Error("a connection is closed that should stay")
	}
}

func TestServerRefuses(t *testing.T) {
	var log bytes.Buffer
	h := handler(t, newWorld(), func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	addr := listen(t, h)
	for name, test := range map[string]struct {
		request string
		status  int
	}{
		"headers too large": {rawGet + "X: " + strings.Repeat("x", 16<<10) + "\r\n\r\n", 431},
		"no host":           {"GET / HTTP/1.1\r\n\r\n", 400},
		"two hosts":         {"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400},
		"host of the URL":   {"GET http://evil.example" + azureNow + " HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n\r\n", 403},
		"options":           {"OPTIONS * HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", 404},
		"connect":           {"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: 169.254.169.254:80\r\n\r\n", 404},
		"smuggled":          {"POST " + azureNow + " HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\nContent-Length: 5\r\nTransfer-Encoding: x\r\n\r\nabcde", 501},
		"large body": {"POST " + azureNow + " HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\nContent-Length: 100000\r\n\r\n" +
			strings.Repeat(" ", 100000), 400},
	} {
		r, _ := raw(t, addr, test.request)
		if r.StatusCode != test.status {
			t.Errorf("%s: answered %d, want %d", name, r.StatusCode, test.status)
		}
	}
	// What the server says by itself has a guest's bytes escaped.
	NewServer(h).full.ErrorLog.Print("a\nlevel=ERROR msg=forged")
	if got := strings.Count(log.String(), "\n"); got != 1 {
		t.Errorf("the log has %d lines: %s", got, &log)
	}
}

// TestLongPollOutlivesTimeouts: those of the server are for other requests.
func TestLongPollOutlivesTimeouts(t *testing.T) {
	addr := listen(t, handler(t, newWorld()), func(s *Server) {
		s.full.ReadTimeout, s.full.WriteTimeout = 50*time.Millisecond, 50*time.Millisecond
	})
	begun := time.Now()
	r, err := clientOf(t, addr).Do(fromOutside(t, "GET", azureNow+"&wait=200ms&incarnation=1", ours))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if d := time.Since(begun); d < 200*time.Millisecond {
		t.Errorf("it was answered after %v", d)
	}
	want(t, r, 200, "*")
}

// fromOutside is a request for a client.
func fromOutside(t testing.TB, method, target, header string) *http.Request {
	r, err := http.NewRequestWithContext(t.Context(), method, "http://"+notify.Address+target, nil)
	if err != nil {
		t.Fatal(err)
	}
	if name, value, there := strings.Cut(header, ": "); there {
		r.Header.Set(name, value)
	}
	return r
}

// TestDrainOverTCP: when Drain returns, the answer has been sent.
func TestDrainOverTCP(t *testing.T) {
	h := handler(t, newWorld())
	addr := listen(t, h)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, strings.Replace(rawGet, " HTTP/1.1", "&wait=1m HTTP/1.1", 1)+"\r\n")
	awaitParked(t, h, guestA, 1)
	if err := h.Drain(t.Context(), guestA, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(c)
	if err != nil || !strings.Contains(string(all), "200 OK") || !strings.Contains(string(all), "Connection: close") || !strings.Contains(string(all), "Content-Length: 37") {
		t.Errorf("it ended with %v: %s", err, all)
	}
}

// awaitParked waits until a guest's long polls wait.
func awaitParked(t testing.TB, h *Handler, guest string, n int) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		h.mu.Lock()
		cl := h.clients[guest]
		there := cl != nil && cl.parked == n
		h.mu.Unlock()
		if there {
			return
		}
	}
	t.Fatalf("%d long polls of %s do not come", n, guest)
}

// TestShutdownEndsLongPolls is with a client that would wait for minutes.
func TestShutdownEndsLongPolls(t *testing.T) {
	w := newWorld()
	h := handler(t, w)
	s := NewServer(h)
	s.ConnContext = func(ctx context.Context, _ net.Conn) context.Context { return notify.WithGuest(ctx, guestA) }
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	answered := make(chan int, 1)
	go func() {
		r, err := clientOf(t, l.Addr().String()).Do(fromOutside(t, "GET", azureNow+"&wait=5m", ours))
		if err != nil {
			answered <- 0
			return
		}
		r.Body.Close()
		answered <- r.StatusCode
	}()
	awaitParked(t, h, guestA, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if got := <-answered; got != 200 {
		t.Errorf("the long poll was answered %d", got)
	}
}
