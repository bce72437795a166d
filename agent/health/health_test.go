package health_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"belay/agent/health"
)

// agent answers as a guest's agent whose command ends in a way, after it was asked for twice.
type agent struct {
	status string
	asked  int
	args   map[string]any
}

func (a *agent) AgentCommand(_ context.Context, _, command string, args any) (json.RawMessage, error) {
	switch command {
	case "guest-exec":
		a.args = args.(map[string]any)
		return json.RawMessage(`{"pid":7}`), nil
	case "guest-exec-status":
		if a.asked++; a.asked < 2 {
			return json.RawMessage(`{"exited":false}`), nil
		}
		return json.RawMessage(a.status), nil
	}
	return nil, errors.New("unknown command " + command)
}

func TestCommand(t *testing.T) {
	t.Parallel()
	for status, want := range map[string]string{
		`{"exited":true,"exitcode":0}`: "",
		`{"exited":true,"exitcode":3}`: "exit code 3",
		`{"exited":true,"signal":9}`:   "ended by signal 9",
		`{"exited":true}`:              "does not say how",
		`{"exited":false}`:             "has not ended after 3s",
		`[]`:                           "cannot unmarshal",
	} {
		a := &agent{status: status}
		err := health.Once(t.Context(), a, "u", health.Check{Command: []string{"/bin/ok", "{guest}"}}.For("web-1"))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", status, err, want)
		}
		if arg := a.args["arg"].([]string); a.args["path"] != "/bin/ok" || len(arg) != 1 || arg[0] != "web-1" {
			t.Errorf("it was asked to run %v", a.args)
		}
	}
}

func TestTCP(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := health.Check{TCP: l.Addr().String()}
	if err := health.Once(t.Context(), nil, "", c); err != nil {
		t.Error(err)
	}
	l.Close()
	if err := health.Once(t.Context(), nil, "", c); err == nil {
		t.Error("a closed port is healthy")
	}
}

func TestHTTP(t *testing.T) {
	t.Parallel()
	for code, healthy := range map[int]bool{200: true, 204: true, 302: true, 404: false, 500: false, 503: false} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "http://127.0.0.1:1/")
			w.WriteHeader(code)
		}))
		if err := health.Once(t.Context(), nil, "", health.Check{HTTP: s.URL}); (err == nil) != healthy {
			t.Errorf("%d: %v", code, err)
		}
		s.Close()
	}
}

// A guest may take its time, and no longer than it is given.
func TestUntil(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) < 3 {
			w.WriteHeader(503)
		}
	}))
	defer s.Close()
	r := health.Until(t.Context(), nil, "", health.Check{HTTP: s.URL}, time.Minute)
	if !r.Healthy || r.Tries != 3 || r.Reason != "" || r.Took <= 0 || r.Check != "http "+s.URL {
		t.Errorf("%+v", r)
	}
	asked.Store(-1 << 20)
	r = health.Until(t.Context(), nil, "", health.Check{HTTP: s.URL}, 400*time.Millisecond)
	if r.Healthy || r.Tries < 1 || !strings.Contains(r.Reason, "503") || r.Took < 400*time.Millisecond || r.Took > 20*time.Second {
		t.Errorf("%+v", r)
	}
}
