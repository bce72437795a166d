package views

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/notify"
)

// FuzzPlainRequest: what the fast path takes for a plain request is read by net/http
// in the same way, to the end.
func FuzzPlainRequest(f *testing.F) {
	for _, s := range []string{
		rawGet + "\r\n",
		rawGet + "If-None-Match: \"7\"\r\nUser-Agent:curl/8\r\nConnection: Keep-Alive\r\n\r\n",
		"GET /computeMetadata/v1/instance/preempted HTTP/1.1\r\nhost: metadata\r\nMetadata-Flavor: Google \r\n\r\n",
		"GET /belay/v1/?a=b&&c?d= HTTP/1.1\r\nHOST: metadata:80\r\nx: \r\n\r\n",
		rawGet + "Content-Length: 1\r\n\r\nx",
		rawGet + "Host: other\r\n\r\n",
		strings.Replace(rawGet, "Host: ", "Host: \r\nHost: ", 1) + "\r\n",
		rawGet + " folded: yes\r\n\r\n",
		"GET //metadata/scheduledevents HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		c := plainConn{header: make(http.Header), r: new(http.Request)}
		c.n = copy(c.buf[:], sent)
		end := c.end()
		if end < 0 || !c.understand(c.buf[:end]) {
			return
		}
		in := bufio.NewReader(bytes.NewReader(sent[:end]))
		want, err := http.ReadRequest(in)
		if err != nil {
			t.Fatalf("net/http cannot read it: %v", err)
		}
		if in.Buffered() > 0 {
			t.Errorf("net/http leaves %d bytes", in.Buffered())
		}
		r := c.r
		if r.Method != want.Method || r.URL.Path != want.URL.Path || want.URL.RawPath != "" || r.URL.RawQuery != want.URL.RawQuery ||
			want.URL.Host != "" || r.Host != want.Host || r.RequestURI != want.RequestURI || r.Proto != want.Proto {
			t.Errorf("it is %+v, want %+v", r, want)
		}
		if !maps.EqualFunc(r.Header, want.Header, slices.Equal[[]string]) {
			t.Errorf("its headers are %q, want %q", r.Header, want.Header)
		}
		if want.Close || want.ContentLength != 0 || len(want.TransferEncoding) > 0 {
			t.Errorf("it closes, or has a body: %+v", want)
		}
	})
}

// paths says on which path connections are.
func (s *Server) fast() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// talk is a connection to a server whose Server can be looked at.
func talk(t *testing.T, h *Handler, change ...func(*Server)) (*Server, net.Conn, *bufio.Reader) {
	t.Helper()
	var s *Server
	addr := listen(t, h, append(change, func(is *Server) { s = is })...)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return s, c, bufio.NewReader(c)
}

// answered reads an answer, with everything that matters of it.
func answered(t *testing.T, in *bufio.Reader) (status int, said string) {
	t.Helper()
	r, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	if date, err := http.ParseTime(r.Header.Get("Date")); err != nil || time.Since(date).Abs() > time.Minute {
		t.Errorf("it is dated %q", r.Header.Get("Date"))
	}
	r.Header.Del("Date")
	return r.StatusCode, fmt.Sprintf("%s %v %v %q %d %v", r.Status, r.Close, r.Header, body, r.ContentLength, r.TransferEncoding)
}

// TestBothPaths: who asks does not see on which path the answer comes. A header that
// the views do not look at leads off the fast one.
func TestBothPaths(t *testing.T) {
	for _, request := range []string{
		rawGet,
		rawGet + "If-None-Match: 2\r\n",
		strings.Replace(rawGet, "Metadata: true\r\n", "", 1),
		strings.Replace(rawGet, "169.254.169.254", "evil.example", 1),
		strings.Replace(rawGet, "2020-07-01", "1999-01-01", 1),
		strings.Replace(rawGet, azureNow, azureNow+"&"+strings.TrimPrefix(azureNow, azureEventsPath+"?"), 1),
		"GET /belay/v1/history HTTP/1.1\r\nHost: metadata\r\nMetadata: true\r\n",
		"GET /belay/v1/nothing HTTP/1.1\r\nHost: metadata\r\nMetadata: true\r\n",
		"GET /computeMetadata/v1/instance/upcoming-maintenance?alt=json HTTP/1.1\r\nHost: metadata\r\nMetadata-Flavor: Google\r\n",
		"GET /latest/meta-data/events/maintenance/scheduled HTTP/1.1\r\nHost: metadata\r\n",
	} {
		s, c, in := talk(t, handler(t, busyWorld()))
		fmt.Fprint(c, request+"\r\n")
		status, fast := answered(t, in)
		fmt.Fprint(c, request+"\r\n")
		if _, again := answered(t, in); again != fast {
			t.Errorf("%s: answered\n%s\nand then\n%s", request, fast, again)
		}
		if s.fast() != 1 {
			t.Errorf("it has left the fast path: %s", request)
		}
		fmt.Fprint(c, request+"X: a\tb\r\n\r\n")
		_, full := answered(t, in)
		if s.fast() != 0 {
			t.Errorf("it is on the fast path: %s", request)
		}
		if fast != full {
			t.Errorf("%s: answered\n%s\nand\n%s", request, fast, full)
		}
		t.Log(status)
	}
}

// TestPathsInOneWrite: requests that come at once are answered in turn, up to one that
// the fast path does not know, and after.
func TestPathsInOneWrite(t *testing.T) {
	w := newWorld()
	w.show(guestA, freeze())
	_, c, in := talk(t, handler(t, w))
	post := `{"StartRequests":[{"EventId":"` + string(eventA) + `"}]}`
	fmt.Fprintf(c, "%s\r\n%s\r\nPOST %s HTTP/1.1\r\nHost: metadata\r\nMetadata: true\r\nContent-Length: %d\r\n\r\n%s%s\r\n",
		rawGet, strings.Replace(rawGet, azureEventsPath, "/nowhere", 1), azureNow, len(post), post, rawGet)
	for i, want := range []int{200, 404, 200, 200} {
		if status, said := answered(t, in); status != want {
			t.Errorf("request %d: answered %s, want %d", i, said, want)
		}
	}
	if want := guestA + " approve " + string(eventA); !slices.Equal(w.done, []string{want}) {
		t.Errorf("done: %q, want %q", w.done, want)
	}
}

// TestLateHead: a head may come in pieces, at any place.
func TestLateHead(t *testing.T) {
	head := rawGet + "\r\n"
	for _, at := range []int{1, 3, 20, len(head) - 3, len(head) - 1} {
		_, c, in := talk(t, handler(t, newWorld()))
		fmt.Fprint(c, head+head[:at]) // the first is answered when both have been read
		if status, said := answered(t, in); status != 200 {
			t.Errorf("cut at %d: answered %s", at, said)
		}
		fmt.Fprint(c, head[at:])
		if status, said := answered(t, in); status != 200 {
			t.Errorf("cut at %d: answered %s", at, said)
		}
	}
}

// TestDrainedPlain: a guest that moves gets its answer, and the connection ends also
// if more has been asked by it.
func TestDrainedPlain(t *testing.T) {
	h := handler(t, newWorld())
	if err := h.Drain(t.Context(), guestA, time.Minute); err != nil {
		t.Fatal(err)
	}
	_, c, in := talk(t, h)
	fmt.Fprint(c, rawGet+"\r\n"+rawGet+"\r\n"+strings.Repeat(rawGet+"\r\n", 100))
	if status, said := answered(t, in); status != 200 || !strings.Contains(said, "200 OK true") {
		t.Errorf("answered %s", said)
	}
	if rest, err := io.ReadAll(in); err != nil || len(rest) > 0 {
		t.Errorf("the connection goes on with %q, %v", rest, err)
	}
}

// TestPanicOnFastPath: it costs the guest's connection, and is logged.
func TestPanicOnFastPath(t *testing.T) {
	var mu sync.Mutex
	var log bytes.Buffer
	h := handler(t, newWorld(), func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(lockedWriter{&mu, &log}, nil))
	})
	_, c, in := talk(t, h, func(s *Server) {
		s.Handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("no guest has this") })
	})
	fmt.Fprint(c, rawGet+"\r\n")
	if b, err := in.ReadByte(); err == nil {
		t.Errorf("it goes on with %q", b)
	}
	mu.Lock()
	defer mu.Unlock()
	if !strings.Contains(log.String(), "no guest has this") {
		t.Errorf("the log says %q", log.String())
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// TestEndOnFastPath: Shutdown has who is being answered get the answer, and ends who
// waits for nothing; Close ends all.
func TestEndOnFastPath(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(*Server) error
		gets bool
	}{
		{"shutdown", func(s *Server) error { return s.Shutdown(context.Background()) }, true},
		{"close", (*Server).Close, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			in, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			entered, leave := make(chan struct{}), make(chan struct{})
			s := NewServer(handler(t, newWorld()))
			s.ConnContext = func(ctx context.Context, _ net.Conn) context.Context { return notify.WithGuest(ctx, guestA) }
			inner := s.Handler
			s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				close(entered)
				<-leave
				inner.ServeHTTP(w, r)
			})
			served := make(chan error, 1)
			go func() { served <- s.Serve(in) }()
			var conns [2]net.Conn
			for i := range conns {
				if conns[i], err = net.Dial("tcp", in.Addr().String()); err != nil {
					t.Fatal(err)
				}
				defer conns[i].Close()
			}
			fmt.Fprint(conns[0], rawGet+"\r\n")
			<-entered
			for s.fast() < 2 {
				time.Sleep(time.Millisecond)
			}
			ended := make(chan error, 1)
			go func() { ended <- test.end(s) }()
			if b, err := io.ReadAll(conns[1]); err != nil || len(b) > 0 {
				t.Errorf("who is idle gets %q, %v", b, err)
			}
			if !test.gets { // it waits for nobody
				if err := <-ended; err != nil {
					t.Error(err)
				}
				close(ended)
			}
			close(leave)
			got, _ := io.ReadAll(conns[0]) // closed, or reset
			if gets := strings.HasPrefix(string(got), "HTTP/1.1 200 OK\r\n"); gets != test.gets {
				t.Errorf("who is being answered gets %q", got)
			}
			if err := <-ended; err != nil {
				t.Error(err)
			}
			if err := <-served; !errors.Is(err, http.ErrServerClosed) {
				t.Error(err)
			}
			if err := s.Serve(in); !errors.Is(err, http.ErrServerClosed) {
				t.Errorf("it serves once more: %v", err)
			}
		})
	}
}

// TestLongAnswerIsNotKept: what waits for the next request holds no room for such as
// the last.
func TestLongAnswerIsNotKept(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	go func() { _, _ = io.Copy(io.Discard, there) }()
	a := plainAnswer{header: make(http.Header)}
	for _, test := range []struct{ long, most int }{{100, plainKept}, {1 << 20, 0}} {
		refuse(http.StatusOK, strings.Repeat("x", test.long)).write(&a, new(http.Request))
		if err := a.send(here); err != nil {
			t.Fatal(err)
		}
		if kept := max(cap(a.body), a.out.Cap()); kept > test.most {
			t.Errorf("of an answer of %d bytes %d are kept", test.long, kept)
		}
	}
}

// unable is a listener that cannot accept.
type unable struct{ net.Listener }

func (unable) Accept() (net.Conn, error) { return nil, errors.ErrUnsupported }

// TestServeClosesListener: nobody waits for one that is served no longer.
func TestServeClosesListener(t *testing.T) {
	in, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := NewServer(handler(t, newWorld())).Serve(unable{in}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("it ends with %v", err)
	}
	if err := in.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener was open: %v", err)
	}
}

// TestAskedAgain: the same request has the same answer, until the document is another,
// and counts.
func TestAskedAgain(t *testing.T) {
	w := newWorld()
	now := noon
	h := handler(t, w, func(c *Config) {
		c.Limits.Get = Rate{PerSecond: 1e-9, Burst: 6}
		c.Now = func() time.Time { return now }
	})
	_, c, in := talk(t, h)
	var last string
	for i, test := range []struct {
		before  func()
		another bool
		status  int
	}{
		{func() {}, true, 200},
		{func() {}, false, 200},
		{func() { w.show(guestA, freeze()) }, true, 200},
		{func() {}, false, 200},
		{func() { w.show(guestB, with(freeze(), maint.ImpactReboot)) }, false, 200},
		{func() { w.show(guestA) }, true, 200},
		{func() {}, true, 429},
		{func() {}, false, 429},
	} {
		test.before()
		fmt.Fprint(c, rawGet+"\r\n")
		status, said := answered(t, in)
		if status != test.status || (said != last) != test.another {
			t.Errorf("request %d: %s, after %s", i, said, last)
		}
		last = said
	}
}

// TestDateOfTheSameAnswer: it is dated anew each second.
func TestDateOfTheSameAnswer(t *testing.T) {
	to, from := net.Pipe()
	defer from.Close()
	a := plainAnswer{header: http.Header{"Etag": {"Date: x"}}, status: 200, body: []byte("Date: y")}
	a.keep(func() bool { return true })
	read := make(chan string)
	go func() {
		in := bufio.NewReader(from)
		for range 2 {
			r, err := http.ReadResponse(in, nil)
			if err != nil {
				read <- err.Error()
				continue
			}
			body, _ := io.ReadAll(io.LimitReader(in, 7)) // no Content-Length was set
			read <- r.Header.Get("Date") + " " + r.Header.Get("Etag") + " " + string(body)
		}
	}()
	for _, want := range []time.Time{time.Now(), time.Now()} {
		if a.out.Len() > 0 {
			a.date = a.date.Add(-time.Hour) // it was sent then
			a.out.Reset()
			a.write(a.date)
		}
		sent := make(chan error)
		go func() { sent <- a.send(to) }()
		got := <-read
		if err := <-sent; err != nil {
			t.Error(err)
		}
		stamp, rest, _ := strings.Cut(got, " GMT ")
		date, err := http.ParseTime(stamp + " GMT")
		if err != nil || date.Sub(want).Abs() > 2*time.Second || rest != "Date: x Date: y" {
			t.Errorf("%q, %v", got, err)
		}
	}
}
