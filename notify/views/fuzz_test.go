package views

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"belay/agent/maint"
	"belay/notify"
)

// busyWorld has events, history and campaigns of two guests. What is guest B's
// alone says "other-9" or "secret", or is in secrets.
func busyWorld() *world {
	w := newWorld()
	shared := freeze()
	shared.ID = "shared"
	shared.Guests = append(shared.Guests, maint.EventGuest{UUID: "d", Name: "web-2"})
	theirs := with(freeze(), maint.ImpactReboot)
	theirs.ID, theirs.Description, theirs.Campaign = eventB, "secret-plan", "secret-campaign"
	theirs.Guests = []maint.EventGuest{{UUID: guestB, Name: "other-9"}}
	over := func(e maint.ScheduledEvent) maint.ScheduledEvent {
		e.ID, e.State, e.Started, e.Ended = "past-"+e.ID, maint.EventCompleted, noon, noon
		return e
	}
	both := maint.Campaign{ID: "autumn", Guests: map[string]maint.GuestCampaign{
		guestA: {Guest: "web-1", State: maint.CampaignPending}, guestB: {Guest: "other-9", State: maint.CampaignBooked, By: "secret-person"},
	}}
	w.show(guestA, freeze(), shared, with(freeze(), maint.ImpactPreempt))
	w.show(guestB, theirs)
	w.guests[guestA].history = []maint.ScheduledEvent{over(freeze()), over(shared)}
	w.guests[guestB].history = []maint.ScheduledEvent{over(theirs)}
	w.guests[guestA].campaigns = []maint.Campaign{both}
	w.guests[guestB].campaigns = []maint.Campaign{both, {ID: "secret-campaign", Guests: map[string]maint.GuestCampaign{guestB: {}}}}
	return w
}

var secrets = []string{"other-9", "secret", guestB, string(eventB), "52:54:00:bb", "525400BB", "10.9.9.9"}

// brief are limits with which nothing waits for long.
func brief(c *Config) { c.Limits.Wait = time.Microsecond }

// harmless checks any answer to guest A: it has nothing of guest B's that was not
// in the request, its JSON is JSON, and nothing was done for anybody else.
func harmless(t rapid.TB, w *world, r *http.Request, sent string, a *http.Response) {
	t.Helper()
	body := bodyOf(t, a)
	var headers strings.Builder
	if err := a.Header.Write(&headers); err != nil {
		t.Fatal(err)
	}
	said := body + headers.String()
	for _, s := range secrets {
		if strings.Contains(said, s) && !strings.Contains(sent, s) {
			t.Fatalf("%s %s with %q is told %q: %s", r.Method, r.URL, sent, s, said)
		}
	}
	if a.Header.Get("Content-Type") == typeJSON && !json.Valid([]byte(body)) {
		t.Fatalf("%s %s is answered with what is no JSON: %s", r.Method, r.URL, body)
	}
	if a.StatusCode >= 500 && !(a.StatusCode == 503 && strings.HasSuffix(r.URL.Path, gceUpcoming)) {
		t.Fatalf("%s %s with %q is answered %d", r.Method, r.URL, sent, a.StatusCode)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range w.done {
		if !strings.HasPrefix(d, guestA+" ") || strings.Contains(d, string(eventB)) || strings.Contains(d, "secret") && !strings.Contains(d, "isten ") {
			t.Fatalf("%s %s with %q has done: %s", r.Method, r.URL, sent, d)
		}
	}
	w.done = nil
}

func FuzzStartRequests(f *testing.F) {
	for _, s := range []string{
		start(eventA), start(eventB), start(eventA, "shared", "past-shared"), "", "null", "[]", `{"StartRequests":null}`, `{"StartRequests":[null]}`,
		`{"startrequests":[{"eventid":"x"}]}`, "\xef\xbb\xbf{}", `{"StartRequests":[{"EventId":"\u0000\ud800"}]}`, "StartRequests=1", strings.Repeat("[", 9999),
	} {
		f.Add(s)
	}
	w := busyWorld()
	h := handler(f, w)
	f.Fuzz(func(t *testing.T, body string) {
		r := request("POST", azureNow, body, ours)
		a := serve(h, r)
		if a.StatusCode != 200 && a.StatusCode != 400 {
			t.Fatalf("%q is answered %d", body, a.StatusCode)
		}
		var sent any
		if json.Unmarshal([]byte(strings.TrimPrefix(body, "\xef\xbb\xbf")), &sent) != nil && a.StatusCode == 200 {
			t.Fatalf("%q is no JSON and was taken", body)
		}
		harmless(t, w, r, body, a)
	})
}

func FuzzOwnBody(f *testing.F) {
	paths := []string{"approve", "listeners/register", "listeners/unregister", "listeners/ready", "maintenance/book", "maintenance/start", "maintenance/defer"}
	for i, s := range []string{
		`{"event":"` + string(eventA) + `"}`, `{"name":"db","timeout":"30s"}`, `{"name":"db"}`, `{"name":"db","event":"shared"}`,
		`{"campaign":"autumn","at":"2026-11-23T02:00:00Z"}`, `{"campaign":"secret-campaign"}`, `{"campaign":"autumn"}`,
	} {
		f.Add(uint8(i), s)
	}
	w := busyWorld()
	h := handler(f, w)
	f.Fuzz(func(t *testing.T, path uint8, body string) {
		r := request("POST", ownPath+paths[int(path)%len(paths)], body, ours)
		harmless(t, w, r, body, serve(h, r))
	})
}

func FuzzQuery(f *testing.F) {
	for _, s := range []string{"", "a=b&c=d", "a&a", "a=%zz", "a=%41&A", "a;b=c", "&&&", "=&=", "a=b=c", "a=1&b=2&c=3&d=4&e=5&f=6&g=7&h=8&i=9"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		q, err := parseQuery(raw)
		if err != nil {
			return
		}
		// Where both read it, the standard library reads the same.
		std, err := url.ParseQuery(raw)
		if err != nil {
			return // it refuses semicolons
		}
		if len(std) != q.n {
			t.Fatalf("%q has %d parameters, want %d", raw, q.n, len(std))
		}
		for name := range std {
			if v, there := q.get(name); !there || v != std.Get(name) || len(std[name]) != 1 {
				t.Fatalf("%q: %q is %q, want %q", raw, name, v, std[name])
			}
		}
	})
}

// fuzzView asks for anything below a view's path, with its headers right.
func fuzzView(f *testing.F, prefix string, seeds []string, headers ...string) {
	for _, s := range seeds {
		f.Add("GET", s, "")
		f.Add("POST", s, "{}")
	}
	w := busyWorld()
	h := handler(f, w, brief, func(c *Config) { c.EC2 = EC2{IMDSv1: true, ShowFreeze: true} })
	f.Fuzz(func(t *testing.T, method, target, body string) {
		u, err := url.ParseRequestURI(prefix + target)
		if err != nil {
			return
		}
		r := request("GET", "/", body, headers...)
		r.Method, r.URL = method, u
		a := serve(h, r)
		if a.StatusCode >= 300 && a.StatusCode < 400 && a.StatusCode != 304 {
			t.Fatalf("%s is redirected", u)
		}
		harmless(t, w, r, target+body+u.Path, a)
	})
}

func FuzzAzure(f *testing.F) {
	fuzzView(f, "/metadata/", []string{
		"scheduledevents?api-version=2020-07-01", "scheduledevents?api-version=2017-08-01&wait=1s&incarnation=7", "scheduledevents", "scheduledevents/",
		"instance?api-version=2021-02-01", "instance/network/interface/0/ipv4?api-version=2021-02-01&format=text", "instance/compute/name?api-version=2017-04-02",
	}, ours)
}

func FuzzGCE(f *testing.F) {
	fuzzView(f, "/computeMetadata/", []string{
		"v1/", "v1/instance/?recursive=true", "v1/instance/maintenance-event?wait_for_change=true&last_etag=0&timeout_sec=1", "v1/?recursive=true&alt=text",
		"v1/instance/upcoming-maintenance?alt=json", "v1/instance/network-interfaces/0/", "v1//instance", "v1/instance/id?alt=json",
	}, google)
}

func FuzzEC2(f *testing.F) {
	fuzzView(f, "/latest", []string{
		"/meta-data/", "/", "", "/api/token", "/meta-data/events/maintenance/history", "/meta-data/events/maintenance/scheduled?wait=1s", "/meta-data/spot/instance-action", "/meta-data//mac",
	}, ec2TTLHeader+": 60")
}

func FuzzOwn(f *testing.F) {
	fuzzView(f, "/belay/", []string{
		"v1/events?wait=1s&incarnation=3", "v1/history", "v1/maintenance", "v1/approve", "v1/listeners/register", "v1/maintenance/book", "v1/",
	}, ours)
}

// FuzzServe asks for anything at all, as somebody or as nobody.
func FuzzServe(f *testing.F) {
	f.Add("GET", azureNow, notify.Address, "Metadata", "true", true)
	f.Add("GET", azureNow, "evil.example", "Metadata", "true", true)
	f.Add("GET", "//metadata/../latest", "metadata", "X-Forwarded-For", guestB, false)
	w := busyWorld()
	h := handler(f, w, brief, func(c *Config) { c.EC2.IMDSv1 = true })
	f.Fuzz(func(t *testing.T, method, target, host, name, value string, known bool) {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			return
		}
		r := httptest.NewRequest("GET", "/", http.NoBody)
		r.Method, r.URL, r.Host = method, u, host
		r.Header.Set(name, value)
		if known {
			r = r.WithContext(notify.WithGuest(r.Context(), guestA))
		}
		a := serve(h, r)
		if !known && a.StatusCode != 404 || known && !ourHost(host) && a.StatusCode != 403 {
			t.Fatalf("%s of %q, known %v, is answered %d", u, host, known, a.StatusCode)
		}
		harmless(t, w, r, target+u.Path+value, a)
	})
}
