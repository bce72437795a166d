package views

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"belay/notify"
)

// everything are a good request for each view.
func everything() []*http.Request {
	return []*http.Request{
		request("GET", azureNow, "", ours),
		request("POST", azureNow, start(eventA), ours),
		request("GET", azureInstancePath+"?api-version=2021-02-01", "", ours),
		request("GET", "/computeMetadata/v1/instance/maintenance-event", "", google),
		request("PUT", "/latest/api/token", "", ec2TTLHeader+": 60"),
		request("GET", "/latest/meta-data/events/maintenance/scheduled", ""),
		request("GET", "/belay/v1/events", "", ours),
		request("POST", "/belay/v1/approve", `{"event":"`+string(eventA)+`"}`, ours),
	}
}

func TestNobody(t *testing.T) {
	w := newWorld()
	w.show(guestA, freeze())
	h := handler(t, w, func(c *Config) { c.EC2.IMDSv1 = true })
	for _, r := range everything() {
		if got := serve(h, r.Clone(r.Context())).StatusCode; got >= 300 {
			t.Fatalf("%s %s was answered %d", r.Method, r.URL, got)
		}
		for _, ctx := range []func(*http.Request) *http.Request{
			func(r *http.Request) *http.Request { return r.WithContext(t.Context()) },
			func(r *http.Request) *http.Request { return r.WithContext(notify.WithGuest(t.Context(), "")) },
		} {
			anon := ctx(r.Clone(r.Context()))
			for _, name := range []string{"X-Guest", "X-Real-Ip", "Forwarded", "Authorization", "X-Azure-Instance"} {
				anon.Header.Set(name, guestA)
			}
			want(t, serve(h, anon), 404, "not found\n")
		}
	}
	if len(w.done) != 2 {
		t.Errorf("done: %v, want what the guest did", w.done)
	}
	// A guest that is known to the front, and not (any more) to the source.
	for _, r := range everything() {
		a := serve(h, r.WithContext(notify.WithGuest(t.Context(), "cccccccc-0000-4000-8000-000000000003")))
		if got := bodyOf(t, a); a.StatusCode == 500 || len(got) > 200 {
			t.Errorf("%s: %d %s", r.URL, a.StatusCode, got)
		}
	}
}

// Whoever asks was heard of, whatever the answer is; others were not.
func TestHeard(t *testing.T) {
	now := time.Unix(1e9, 0)
	h := handler(t, newWorld(), func(c *Config) { c.Now = func() time.Time { return now } })
	for _, path := range []string{"/belay/v1/events", "/nowhere"} {
		now = now.Add(time.Second)
		serve(h, request("GET", path, "", ours))
		if got := h.Heard(guestA); !got.Equal(now) {
			t.Errorf("%s: heard at %s, want %s", path, got, now)
		}
	}
	last := now
	for range 60 {
		now = now.Add(time.Second)
		if got := h.Heard(guestA); !got.Equal(last) || !h.Heard(guestB).IsZero() {
			t.Fatalf("at %s: heard at %s", now, got)
		}
	}
}

func TestHost(t *testing.T) {
	h := handler(t, newWorld(), func(c *Config) { c.EC2.IMDSv1 = true })
	for host, ours := range map[string]bool{
		"169.254.169.254": true, "169.254.169.254:80": true, "metadata.google.internal": true, "metadata.google.internal.:80": true,
		"Metadata": true, "instance-data": true, "instance-data:80": true,
		"": false, "evil.example": false, "169.254.169.254:8080": false, "169.254.169.254.evil.example": false,
		"metadata.evil.example": false, "127.0.0.1": false, "[::1]": false, "metadata@evil": false, "169.254.169.254:80:80": false,
	} {
		for _, r := range everything()[2:7] {
			r.Host = host
			if got := serve(h, r).StatusCode; ours != (got < 300) || !ours && got != 403 {
				t.Errorf("%s asked of %q was answered %d", r.URL, host, got)
			}
		}
	}
}

func TestPaths(t *testing.T) {
	h := handler(t, newWorld(), func(c *Config) { c.EC2.IMDSv1 = true })
	for _, target := range []string{
		"/", "//", "/metadata", "/metadata/", "//metadata/scheduledevents", "/metadata//scheduledevents", "/metadata/./scheduledevents",
		"/metadata/x/../scheduledevents", "/metadata%2Fscheduledevents", "/%6Detadata/scheduledevents", "/Metadata/ScheduledEvents",
		"/metadata/scheduledevents/", "/metadata/scheduledevents/x", "/metadata/scheduledevents;x", "/metadata/scheduledeventsx", "/metadata/instancex",
		"/latestx", "/latest/../metadata/scheduledevents", "/latest/meta-data/%69nstance-id", "/computeMetadata/v1x", "/computeMetadata/v1beta1/",
		"/belay/v1", "/belay/v1/", "/belay/v1/events/", "/belay/v1//events", "/belay/v1/../v1/events", "/belay/v1/%65vents", "/debug/pprof/", "/metrics",
	} {
		r := ask(h, "GET", target+"?api-version=2020-07-01", "", ours, google)
		if r.StatusCode != 404 || r.Header.Get("Location") != "" {
			t.Errorf("%s was answered %d %v", target, r.StatusCode, r.Header)
		}
	}
	star := request("OPTIONS", "/", "", ours)
	star.URL.Path = "*"
	want(t, serve(h, star), 404, "*")
}

func TestRates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := handler(t, newWorld(), func(c *Config) {
			c.Limits = Limits{Get: Rate{5, 5}, Post: Rate{5, 3}, Poll: Rate{5, 2}, Wait: time.Millisecond}
		})
		count := func(r func() *http.Request) (ok int) {
			for {
				switch a := serve(h, r()); a.StatusCode {
				case 200:
					ok++
				case 429:
					if a.Header.Get("Retry-After") == "" {
						t.Error("it is not said when to ask again")
					}
					return ok
				default:
					t.Fatalf("answered %d", a.StatusCode)
				}
			}
		}
		get := func() *http.Request { return request("GET", azureNow, "", ours) }
		put := func() *http.Request { return request("PUT", "/latest/api/token", "", ec2TTLHeader+": 60") }
		poll := func() *http.Request { return request("GET", azureNow+"&wait=1s&incarnation=9", "", ours) }
		gcePoll := func() *http.Request {
			return request("GET", "/computeMetadata/v1/instance/name?wait_for_change=true&last_etag=x", "", google)
		}
		if g, p, l := count(get), count(put), count(poll); g != 5 || p != 3 || l != 2 {
			t.Errorf("at once %d, %d and %d were answered, want 5, 3 and 2", g, p, l)
		}
		if got := count(gcePoll); got != 0 {
			t.Errorf("GCE's long polls are counted apart: %d", got)
		}
		want(t, serve(h, get().WithContext(notify.WithGuest(t.Context(), guestB))), 200, "*") // another is not held up
		time.Sleep(time.Second)
		if got := count(get); got != 5 {
			t.Errorf("after a second %d were answered, want 5", got)
		}
		time.Sleep(400*time.Millisecond - heldUp) // what was refused has waited
		if got := count(get); got != 2 {
			t.Errorf("after 400 ms %d were answered, want 2", got)
		}
		// What is refused counts, too.
		time.Sleep(time.Second)
		for range 5 {
			want(t, ask(h, "GET", azureNow, ""), 400, "*")
		}
		want(t, serve(h, get()), 429, "*")
		// What is not here is counted as well, apart from what is.
		time.Sleep(time.Second)
		for range 2 {
			want(t, ask(h, "GET", "/nowhere", ""), 404, "*")
			r := get()
			r.Host = "evil.example"
			want(t, serve(h, r), 403, "*")
		}
		want(t, ask(h, "PUT", "/nowhere", ""), 404, "*")
		begun := time.Now()
		want(t, ask(h, "GET", "/nowhere", ""), 429, "*")
		if time.Since(begun) != heldUp {
			t.Errorf("one too many for what is not here is answered after %s", time.Since(begun))
		}
		want(t, serve(h, get()), 200, "*")
	})
}

// What is kept for long cannot be changed without end, and holds up nothing else.
func TestKeptRates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := handler(t, newWorld(), func(c *Config) { c.Limits = Limits{} })
		post := func(path, body string) int {
			return ask(h, "POST", ownPath+path, body, ours).StatusCode
		}
		begun, kept := time.Now(), 0
		for time.Since(begun) < time.Hour {
			for _, path := range []string{"listeners/register", "listeners/unregister"} {
				if post(path, `{"name":"db","timeout":"90s"}`) != 429 {
					kept++
				}
			}
			time.Sleep(time.Second)
		}
		if kept < 90 || kept > 110 {
			t.Errorf("in an hour %d changes were taken", kept)
		}
		post("maintenance/defer", `{"campaign":"nic"}`) // takes what has come by now
		if got := post("maintenance/defer", `{"campaign":"nic"}`); got != 429 {
			t.Errorf("another change was answered %d", got)
		}
		for _, path := range []string{"approve", "listeners/ready"} {
			if got := post(path, `{"name":"db","event":"`+string(eventA)+`"}`); got == 429 {
				t.Errorf("%s was held up", path)
			}
		}
	})
}

// A guest that asks too often is held up, others are not, and Stop holds up nobody.
func TestHeldUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := handler(t, newWorld(), func(c *Config) { c.Limits.Get = Rate{5, 1} })
		get := func(guest string) (*http.Response, time.Duration) {
			begun := time.Now()
			r := request("GET", azureNow, "", ours)
			return serve(h, r.WithContext(notify.WithGuest(r.Context(), guest))), time.Since(begun)
		}
		for i, test := range []struct {
			guest  string
			status int
			took   time.Duration
		}{{guestA, 200, 0}, {guestA, 429, heldUp}, {guestB, 200, 0}} {
			if a, took := get(test.guest); a.StatusCode != test.status || took != test.took {
				t.Errorf("request %d was answered %d after %s, want %+v", i+1, a.StatusCode, took, test)
			}
		}
		go func() {
			time.Sleep(heldUp / 4)
			h.Stop()
		}()
		if a, took := get(guestB); a.StatusCode != 429 || took != heldUp/4 {
			t.Errorf("it was answered %d after %s", a.StatusCode, took)
		}
	})
}

func TestDefaultLimits(t *testing.T) {
	l := (Limits{Parked: 3}).orDefault()
	if l.Get != (Rate{5, 20}) || l.Poll != l.Get || l.Post != l.Get || l.Keep != (Rate{1. / 60, 40}) || l.Parked != 3 || l.Wait != 5*time.Minute {
		t.Errorf("the defaults are %+v", l)
	}
}

// TestForgetting: guests that have gone leave nothing behind.
func TestForgetting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := handler(t, newWorld(), func(c *Config) { c.Limits = Limits{} })
		as := func(guest string) *http.Request {
			r := request("GET", azureNow, "", ours)
			return r.WithContext(notify.WithGuest(r.Context(), guest))
		}
		for i := range 1000 {
			serve(h, as(string(rune('a'+i))))
		}
		time.Sleep(2 * time.Minute)
		ctx, gone := httptest.NewRecorder(), make(chan struct{})
		go func() { h.ServeHTTP(ctx, request("GET", azureNow+"&wait=5m", "", ours)); close(gone) }()
		synctest.Wait()
		if len(h.clients) != 1 {
			t.Errorf("%d clients are remembered, want the one that waits", len(h.clients))
		}
		// One that waits, or has its long polls finished, is not forgotten.
		time.Sleep(2 * time.Minute)
		serve(h, as("x"))
		if h.clients[guestA] == nil {
			t.Error("the client that waits was forgotten")
		}
		if err := h.Drain(t.Context(), guestA, 3*time.Minute); err != nil {
			t.Fatal(err)
		}
		<-gone
		time.Sleep(2 * time.Minute)
		serve(h, as("x"))
		if h.clients[guestA] == nil {
			t.Error("the client that is drained was forgotten")
		}
		time.Sleep(2 * time.Minute)
		serve(h, as("x"))
		if h.clients[guestA] != nil {
			t.Error("the client that has gone was not forgotten")
		}
	})
}
