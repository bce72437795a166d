package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
)

func TestUnreachable(t *testing.T) {
	t.Parallel()
	absent := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refusing := l.Addr().String()
	l.Close()
	for _, c := range []struct {
		client *Client
		want   maint.Problem
	}{
		{NewUnix(absent), maint.Problem{Subject: "belayd at " + absent, Remedy: "systemctl status belayd", Reason: "no such file"}},
		{NewTLS("host-b", refusing, nil), maint.Problem{Subject: "peer host-b", Remedy: refusing, Reason: "refused"}},
	} {
		_, err := c.client.Status(t.Context())
		p := problemOf(t, err)
		if p.Code != maint.CodePeerDown || p.Subject != c.want.Subject || !strings.Contains(p.Remedy, c.want.Remedy) || !strings.Contains(p.Reason, c.want.Reason) {
			t.Errorf("%+v", p)
		}
		if !errors.Is(err, maint.ErrPeerDown) {
			t.Errorf("errors.Is does not find ErrPeerDown in %v", err)
		}
	}
}

// TestNotBelayd: whatever else answers is not mistaken for a belayd.
func TestNotBelayd(t *testing.T) {
	t.Parallel()
	for name, h := range map[string]http.HandlerFunc{
		"a web page":         func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"half an answer":     func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"version":"1`) },
		"nothing":            func(http.ResponseWriter, *http.Request) {},
		"a proxy's error":    func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "bad gateway", http.StatusBadGateway) },
		"error without one":  func(w http.ResponseWriter, _ *http.Request) { reply(w, 409, failure{}) },
		"error without text": func(w http.ResponseWriter, _ *http.Request) { reply(w, 409, failure{&maint.Refusal{}}) },
		"an endless answer":  func(w http.ResponseWriter, _ *http.Request) { endless(w, `{"version":"`) },
		"an endless error":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(409); endless(w, `{"error":{"what":"`) },
		"another place": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/v1/other", http.StatusTemporaryRedirect)
		},
		"hanging up": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		s := httptest.NewServer(h)
		t.Cleanup(s.Close)
		client := NewUnix("")
		client.base, client.most, client.http.Transport = s.URL, maxBody, s.Client().Transport
		if _, err := client.Status(t.Context()); problemOf(t, err).Code != maint.CodePeerDown {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// endless writes until nobody reads any more.
func endless(w io.Writer, begin string) {
	_, err := io.WriteString(w, begin)
	for junk := strings.Repeat("x", 1<<16); err == nil; {
		_, err = io.WriteString(w, junk)
	}
}

// TestNoRedirect: what is meant for a peer, a guest's definition too, goes
// nowhere else because that peer says so.
func TestNoRedirect(t *testing.T) {
	t.Parallel()
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("%s %s went elsewhere", r.Method, r.URL)
	}))
	defer elsewhere.Close()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere.URL+r.URL.Path, http.StatusTemporaryRedirect)
	}))
	defer s.Close()
	client := NewTLS("b", strings.TrimPrefix(s.URL, "http://"), nil)
	defer client.Close()
	client.base = s.URL
	if err := client.Settle(t.Context(), maint.Settlement{XML: "secret"}); problemOf(t, err).Code != maint.CodePeerDown {
		t.Error(err)
	}
}

// TestGivingUpIsNotTheirFault: who stops waiting has not learnt that the other
// side is down.
func TestGivingUpIsNotTheirFault(t *testing.T) {
	t.Parallel()
	client := NewUnix(serveUnix(t, &fakeAgent{}, Access{}))
	defer client.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := client.Status(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, maint.ErrPeerDown) {
		t.Errorf("%v", err)
	}
	if _, err := client.Watch(ctx, "mig-1", func(maint.Op) {}); !errors.Is(err, context.Canceled) || errors.Is(err, maint.ErrPeerDown) {
		t.Errorf("%v", err)
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	f := &fakeAgent{watched: []maint.Op{
		{ID: "mig-1", State: maint.OpRunning, Step: "preflight", Steps: []maint.Step{}},
		{ID: "mig-1", State: maint.OpRunning, Step: "perform", Steps: []maint.Step{}, Progress: &maint.Job{MemoryLeft: 5}},
		{ID: "mig-1", State: maint.OpEnded, Outcome: maint.OutcomeDone, Steps: []maint.Step{}},
	}}
	client := NewUnix(serveUnix(t, f, Access{}))
	defer client.Close()
	var seen []maint.Op
	last, err := client.Watch(t.Context(), "mig-1", func(op maint.Op) { seen = append(seen, op) })
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(f.watched, seen); d != "" {
		t.Errorf("what is seen is not what was told:\n%s", d)
	}
	if d := cmp.Diff(f.watched[2], last); d != "" {
		t.Errorf("the end is another:\n%s", d)
	}
}

// TestWatchIsLive: a change is seen when it happens, not when all is over.
func TestWatchIsLive(t *testing.T) {
	t.Parallel()
	f := &liveAgent{next: make(chan maint.Op)}
	client := NewUnix(serveUnix(t, f, Access{}))
	defer client.Close()
	seen := make(chan maint.Op)
	ended := make(chan error, 1)
	go func() {
		_, err := client.Watch(t.Context(), "mig-1", func(op maint.Op) { seen <- op })
		ended <- err
	}()
	for _, op := range []maint.Op{{State: maint.OpRunning, Step: "reserve"}, {State: maint.OpUndoing, Step: "reserve"}, {State: maint.OpEnded}} {
		f.next <- op
		if got := <-seen; got.State != op.State || got.Step != op.Step {
			t.Errorf("told %+v, seen %+v", op, got)
		}
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// liveAgent tells a watcher of each operation on next.
type liveAgent struct {
	fakeAgent
	next chan maint.Op
}

func (f *liveAgent) Watch(ctx context.Context, _ maint.OpID, tell func(maint.Op) error) error {
	for {
		select {
		case op := <-f.next:
			if err := tell(op); err != nil || op.State == maint.OpEnded {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func TestWatchCut(t *testing.T) {
	t.Parallel()
	running := maint.Op{ID: "mig-1", State: maint.OpRunning}
	shuttingDown := &fakeAgent{watched: []maint.Op{running}, cut: errors.New("belayd is shutting down")}
	atOnce := &fakeAgent{cut: maint.Problemf(maint.CodeShuttingDown, "belayd", "", "is shutting down")}
	client := NewUnix(serveUnix(t, shuttingDown, Access{}))
	defer client.Close()
	told := 0
	op, err := client.Watch(t.Context(), "mig-1", func(maint.Op) { told++ })
	if told != 1 || !errors.Is(err, maint.ErrPeerDown) || op.State == maint.OpEnded {
		t.Errorf("cut after a whole line: told %d times, state %q, %v", told, op.State, err)
	}
	early := NewUnix(serveUnix(t, atOnce, Access{}))
	defer early.Close()
	if _, err := early.Watch(t.Context(), "mig-1", func(maint.Op) { t.Error("told") }); problemOf(t, err).Code != maint.CodeShuttingDown {
		t.Errorf("cut before the first line: %v", err)
	}

	half := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, `{"id":"mig-1","state":"running"}`)
		fmt.Fprint(w, `{"id":"mig-1","state":"ended","outco`)
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}))
	defer half.Close()
	cut := &Client{base: half.URL, name: "it", most: maxBody, http: half.Client()}
	told = 0
	if op, err := cut.Watch(t.Context(), "mig-1", func(maint.Op) { told++ }); told != 1 || !errors.Is(err, maint.ErrPeerDown) || op.State == maint.OpEnded {
		t.Errorf("cut in a line: told %d times, state %q, %v", told, op.State, err)
	}
}

// TestSocketInTheWay: the socket of a killed belayd is taken over, that of a
// live one is not.
func TestSocketInTheWay(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "run", "sock")
	first := NewServers(quiet)
	if err := first.ListenUnix(path, &fakeAgent{}, Access{}); err != nil {
		t.Fatal(err)
	}
	second := NewServers(quiet)
	if err := second.ListenUnix(path, &fakeAgent{}, Access{}); err == nil || !strings.Contains(err.Error(), "another belayd answers there") {
		t.Errorf("a live belayd's socket: %v", err)
	}
	// A killed belayd leaves the file behind.
	first.all[0].listener.(*net.UnixListener).SetUnlinkOnClose(false)
	first.all[0].listener.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatal("the test is wrong: the socket has gone:", err)
	}
	if err := second.ListenUnix(path, &fakeAgent{}, Access{}); err != nil {
		t.Errorf("a dead belayd's socket: %v", err)
	}
	second.Close(t.Context())
}

// TestNotOursToRemove: only a dead belayd's socket is removed.
func TestNotOursToRemove(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, folder, link := filepath.Join(dir, "file"), filepath.Join(dir, "folder"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(file, []byte("precious"), 0o600), os.Mkdir(folder, 0o700), os.Symlink(link, link)); err != nil {
		t.Fatal(err)
	}
	s := NewServers(quiet)
	for _, path := range []string{file, folder, link} {
		if err := s.ListenUnix(path, &fakeAgent{}, Access{}); err == nil || !strings.Contains(err.Error(), path+": something that is not a socket is there (move it away") {
			t.Errorf("%s: %v", path, err)
		}
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
	}
	long := filepath.Join(dir, strings.Repeat("x", 108))
	if err := s.ListenUnix(long, &fakeAgent{}, Access{}); err == nil || !strings.Contains(err.Error(), "unix sockets take 107") {
		t.Errorf("a long path: %v", err)
	}
}

// TestBadAddresses: what cannot be listened on is named with its setting.
func TestBadAddresses(t *testing.T) {
	t.Parallel()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, addr := NewServers(quiet), busy.Addr().String()
	for want, err := range map[string]error{
		"api.listen " + addr:                 s.ListenTLS(addr, Identity{}, &fakeAgent{}, Access{}),
		"api.metrics " + addr:                s.ListenMetrics(addr, http.NotFoundHandler()),
		"page.listen " + addr:                s.ListenPage(addr, http.NotFoundHandler()),
		"api.socket " + file + "/belay/sock": s.ListenUnix(file+"/belay/sock", &fakeAgent{}, Access{}),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q in: %v", want, err)
		}
	}
	s.Close(t.Context())
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	s := NewServers(quiet)
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "belay_up 1") })
	if err := s.ListenMetrics("127.0.0.1:0", metrics); err != nil {
		t.Fatal(err)
	}
	serve(t, s)
	base := "http://" + s.all[0].listener.Addr().String()
	for path, want := range map[string]int{"/metrics": 200, "/": 404, "/v1/status": 404} {
		resp, err := http.Get(base + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("GET %s: %s", path, resp.Status)
		}
	}
}
