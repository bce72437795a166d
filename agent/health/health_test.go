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
	"testing/synctest"
	"time"

	"belay/agent/health"
)

// agent answers as a guest's agent whose command ends in a way, after it was asked for twice.
type agent struct {
	status string
	asked  int
	args   map[string]any
	silent bool // does not answer a ping
	heard  func() time.Time
}

func (a *agent) Heard(string) time.Time { return a.heard() }

func (a *agent) AgentCommand(_ context.Context, _, command string, args any) (json.RawMessage, error) {
	switch command {
	case "guest-ping":
		if a.silent {
			return nil, errors.New("guest agent is not responding")
		}
		return json.RawMessage(`{}`), nil
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

func TestPing(t *testing.T) {
	t.Parallel()
	c := health.Check{Agent: true}
	if err := health.Once(t.Context(), &agent{}, "u", c); err != nil {
		t.Error(err)
	}
	if err := health.Once(t.Context(), &agent{silent: true}, "u", c); err == nil || !strings.Contains(err.Error(), "not responding") {
		t.Error(err)
	}
}

// A heartbeat is one that comes while the try lasts; what was heard before says nothing.
func TestHeartbeat(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		every time.Duration // how often the guest asks
		until time.Duration // and for how long
		want  string
	}{
		"every second": {time.Second, time.Hour, ""},
		"too seldom":   {10 * time.Second, time.Hour, "has not asked for its events for 9s"},
		"no more":      {time.Second, time.Minute, "has not asked for its events for 9s"},
		"never":        {time.Hour, 0, "has never asked"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				a := &agent{heard: func() time.Time {
					d := min(time.Since(began), c.until).Truncate(c.every)
					if d == 0 {
						return time.Time{}
					}
					return began.Add(d)
				}}
				time.Sleep(66 * time.Second)
				err := health.Once(t.Context(), a, "u", health.Check{Heartbeat: true})
				if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v, want %q", err, c.want)
				}
			})
		})
	}
}

// A guest may take its time, and no longer than it is given. The servers are real, and outside
// of the bubble: while one is asked, time stands still.
func TestUntil(t *testing.T) {
	t.Parallel()
	pace := health.Pace{WarmUp: 20 * time.Second, Every: time.Second, Within: 30 * time.Second, Failures: 10}
	for name, c := range map[string]struct {
		pace    func(*health.Pace)
		touched time.Duration // so long ago
		bad     int           // so many times in a row the server says no
		healthy bool
		tries   int
		waited  time.Duration // for it to be warm
		took    time.Duration
	}{
		"well at once":            {nil, time.Hour, 0, true, 1, 0, 0},
		"nine failures":           {nil, time.Hour, 9, true, 10, 0, 9 * time.Second},
		"ten failures":            {nil, time.Hour, 10, false, 10, 0, 9 * time.Second},
		"three are too many":      {func(p *health.Pace) { p.Failures = 3 }, time.Hour, 3, false, 3, 0, 2 * time.Second},
		"its time is up":          {func(p *health.Pace) { p.Every = 7 * time.Second }, time.Hour, 1000, false, 5, 0, 30 * time.Second},
		"just touched":            {nil, 0, 0, true, 1, 20 * time.Second, 0},
		"touched a moment ago":    {nil, 15 * time.Second, 2, true, 3, 5 * time.Second, 2 * time.Second},
		"cold, and ill":           {nil, 0, 10, false, 10, 20 * time.Second, 9 * time.Second},
		"one failure is too many": {func(p *health.Pace) { p.Failures = 0 }, time.Hour, 1, false, 1, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int32
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if int(asked.Add(1)) <= c.bad {
					w.WriteHeader(503)
				}
			}))
			defer s.Close()
			synctest.Test(t, func(t *testing.T) {
				p := pace
				if c.pace != nil {
					c.pace(&p)
				}
				began := time.Now()
				r := p.Until(t.Context(), began.Add(-c.touched), func(ctx context.Context) error {
					return health.Once(ctx, nil, "", health.Check{HTTP: s.URL})
				})
				if r.Healthy != c.healthy || r.Tries != c.tries || int(asked.Load()) != c.tries || r.Took != c.took || time.Since(began) != c.waited+c.took {
					t.Errorf("%+v, asked %d times, in %s", r, asked.Load(), time.Since(began))
				}
				if (r.Reason == "") != c.healthy || !c.healthy && !strings.Contains(r.Reason, "503") {
					t.Errorf("reason %q", r.Reason)
				}
			})
		})
	}
}

// A server that takes a connection and says nothing is not waited for.
func TestSilent(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := health.Pace{Every: time.Millisecond, Within: 50 * time.Millisecond, Failures: 10}
	r := p.Until(t.Context(), time.Time{}, func(ctx context.Context) error {
		return health.Once(ctx, nil, "", health.Check{HTTP: "http://" + l.Addr().String()})
	})
	if r.Healthy || r.Tries != 1 || r.Took < p.Within || !strings.Contains(r.Reason, "deadline exceeded") {
		t.Errorf("%+v", r)
	}
}
