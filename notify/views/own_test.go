package views

import (
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

const ours = "Metadata: true"

func TestOwnEvents(t *testing.T) {
	w := newWorld()
	h := handler(t, w)
	want(t, ask(h, "GET", "/belay/v1/events", "", ours), 200, `{"incarnation":1,"events":[]}`)

	e := started(freeze())
	e.Approval = &maint.EventApproval{By: "cert:ops-laptop", At: noon}
	e.Listeners = []maint.EventWait{{Guest: guestA, Name: "db", Until: noon, Ready: noon}, {Guest: "c", Name: "secret", Until: noon}}
	e.Campaign, e.Op = "autumn", "hold-77"
	w.show(guestA, e)
	const common = `"id":"` + string(eventA) + `","impact":"Freeze","state":"started","source":"Platform","guests":["web-1"],` +
		`"description":"new \u003ckernel\u003e \u0026 \"friends\"","duration_seconds":2.5,"announced":"2026-11-22T11:45:00Z","not_before":"2026-11-22T13:00:00+01:00",` +
		`"approved":"2026-11-22T12:00:00Z","started":"2026-11-22T12:01:00Z"`
	const tail = `"campaign":"autumn","listeners":[{"name":"db","until":"2026-11-22T12:00:00Z","ready":"2026-11-22T12:00:00Z"}]}`
	r := ask(h, "GET", "/belay/v1/events", "", ours)
	want(t, r, 200, `{"incarnation":2,"events":[{`+common+`,`+tail+`]}`)
	if got := r.Header.Get("ETag"); got != `"2"` {
		t.Errorf("the ETag is %s", got)
	}
	want(t, ask(h, "GET", "/belay/v1/events", "", ours, `If-None-Match: "2"`), 304, "")

	done := e
	done.State, done.Ended, done.Note = maint.EventCompleted, noon.Add(2*time.Minute), "shorter than announced"
	done.Pauses = map[string]time.Duration{guestA: 250 * time.Millisecond, "c": time.Hour}
	foreign := done
	foreign.Guests = []maint.EventGuest{{UUID: guestB, Name: "other-9"}}
	w.guests[guestA].history = []maint.ScheduledEvent{done, foreign}
	want(t, ask(h, "GET", "/belay/v1/history", "", ours), 200,
		`[{`+strings.Replace(common, `"started"`, `"completed"`, 1)+`,"ended":"2026-11-22T12:02:00Z","pause_seconds":0.25,"note":"shorter than announced",`+tail+`]`)
}

func TestOwnMaintenance(t *testing.T) {
	w := newWorld()
	h := handler(t, w)
	want(t, ask(h, "GET", "/belay/v1/maintenance", "", ours), 200, "[]")
	w.guests[guestA].campaigns = []maint.Campaign{{
		ID: "autumn", Description: "firmware", Impact: maint.ImpactReboot, Duration: maint.DurationUnknown, By: "cert:ops-laptop",
		Opens: noon, Deadline: noon.Add(time.Hour), MaxDefers: 3,
		Guests: map[string]maint.GuestCampaign{
			guestA: {Guest: "web-1", State: maint.CampaignBooked, At: noon.Add(time.Minute), Defers: 1, By: "root"},
			guestB: {Guest: "other-9", State: maint.CampaignDue},
		},
	}, {ID: "not-its", Guests: map[string]maint.GuestCampaign{guestB: {Guest: "other-9"}}}}
	want(t, ask(h, "GET", "/belay/v1/maintenance", "", ours), 200,
		`[{"id":"autumn","description":"firmware","impact":"Reboot","duration_seconds":-1,"opens":"2026-11-22T12:00:00Z","deadline":"2026-11-22T13:00:00Z",`+
			`"state":"booked","at":"2026-11-22T12:01:00Z","defers":1,"max_defers":3}]`)
}

func TestOwnDo(t *testing.T) {
	const id = string(eventA)
	long := strings.Repeat("n", 65)
	for _, test := range []struct {
		path, body string
		status     int
		done       string
	}{
		{"approve", `{"event":"` + id + `"}`, 204, "approve " + id},
		{"approve", `{"event":"` + string(eventB) + `"}`, 404, ""},
		{"approve", `{}`, 400, ""},
		{"approve", ``, 400, ""},
		{"approve", `{"event":"` + id + `","force":true}`, 400, ""},
		{"approve", `{"event":"` + id + `"}{}`, 400, ""},
		{"approve", `{"event":"` + id + strings.Repeat(" ", maxBody) + `"}`, 400, ""},
		{"listeners/register", `{"name":"db.1_x-Y","timeout":"90s"}`, 204, "listen db.1_x-Y 1m30s"},
		{"listeners/register", `{"name":"","timeout":"90s"}`, 400, ""},
		{"listeners/register", `{"name":"a b","timeout":"90s"}`, 400, ""},
		{"listeners/register", `{"name":"<x>","timeout":"90s"}`, 400, ""},
		{"listeners/register", `{"name":"ä","timeout":"90s"}`, 400, ""},
		{"listeners/register", `{"name":"` + long + `","timeout":"90s"}`, 400, ""},
		{"listeners/register", `{"name":"db"}`, 400, ""},
		{"listeners/register", `{"name":"db","timeout":"0s"}`, 400, ""},
		{"listeners/register", `{"name":"db","timeout":90}`, 400, ""},
		{"listeners/unregister", `{"name":"db"}`, 204, "unlisten db"},
		{"listeners/unregister", `{"name":"d/b"}`, 400, ""},
		{"listeners/ready", `{"name":"db","event":"` + id + `"}`, 204, "ready db " + id},
		{"listeners/ready", `{"name":"db","event":"x"}`, 404, ""},
		{"listeners/ready", `{"name":"db"}`, 400, ""},
		{"listeners/ready", `{"name":"","event":"` + id + `"}`, 400, ""},
		{"maintenance/book", `{"campaign":"autumn","at":"2026-11-23T02:00:00Z"}`, 204, "book autumn 2026-11-23T02:00:00Z"},
		{"maintenance/book", `{"campaign":"autumn"}`, 400, ""},
		{"maintenance/book", `{"at":"2026-11-23T02:00:00Z"}`, 400, ""},
		{"maintenance/book", `{"campaign":"autumn","at":"tonight"}`, 400, ""},
		{"maintenance/book", `{"campaign":"spring","at":"2026-11-23T02:00:00Z"}`, 404, ""},
		{"maintenance/start", `{"campaign":"autumn"}`, 204, "start autumn"},
		{"maintenance/start", `{}`, 400, ""},
		{"maintenance/defer", `{"campaign":"autumn"}`, 204, "defer autumn"},
		{"maintenance/defer", `{"campaign":"spring"}`, 404, ""},
	} {
		t.Run(test.path+test.body[:min(40, len(test.body))], func(t *testing.T) {
			w := newWorld()
			w.guests[guestA].campaigns = []maint.Campaign{{ID: "autumn"}}
			w.show(guestA, freeze())
			want(t, ask(handler(t, w), "POST", "/belay/v1/"+test.path, test.body, ours), test.status, "*")
			var done []string
			if test.done != "" {
				done = []string{guestA + " " + test.done}
			}
			if !slices.Equal(w.done, done) {
				t.Errorf("done: %v, want %v", w.done, done)
			}
		})
	}
}

func TestOwnRefusals(t *testing.T) {
	w := newWorld()
	h := handler(t, w)
	const body = `{"name":"db"}`
	for _, test := range []struct {
		fail   error
		status int
		body   string
	}{
		{maint.Problemf(maint.CodeBadRequest, "s", "r", "why"), 400, `{"code":"bad-request","subject":"s","reason":"why","remedy":"r"}`},
		{maint.Problemf(maint.CodeForbidden, "s", "r", "why"), 403, "*"},
		{maint.Problemf(maint.CodeShuttingDown, "s", "r", "why"), 503, "*"},
		{maint.Problemf(maint.CodeBusy, "s", "r", "why"), 409, "*"},
		{maint.Refuse("cannot book", []maint.Problem{{Code: maint.CodeBusy, Reason: "a"}, {Code: maint.CodeBusy, Reason: "b"}}), 409,
			`{"code":"guest-busy","subject":"","reason":"cannot book: a; b"}`},
		{errDisk, 500, `{"code":"internal","subject":"","reason":"the host could not do it","remedy":"try again later"}`},
	} {
		w.fail = test.fail
		want(t, ask(h, "POST", "/belay/v1/listeners/unregister", body, ours), test.status, test.body)
	}
	w.fail = nil
	want(t, ask(h, "POST", "/belay/v1/listeners/unregister", body), 400, "*")
	want(t, ask(h, "POST", "/belay/v1/listeners/unregister", body, ours, "X-Forwarded-For: 10.0.0.9"), 400, "*")
	want(t, ask(h, "GET", "/belay/v1/events?wait=x", "", ours), 400, "*")
	want(t, ask(h, "GET", "/belay/v1/nothing", "", ours), 404, "*")
	for path, allow := range map[string]string{"approve": "POST", "events": "GET", "history": "GET", "maintenance": "GET", "listeners/ready": "POST"} {
		if r := ask(h, "PUT", "/belay/v1/"+path, "", ours); r.StatusCode != 405 || r.Header.Get("Allow") != allow {
			t.Errorf("PUT %s: %d, allowed is %s", path, r.StatusCode, r.Header.Get("Allow"))
		}
	}
	if len(w.done) > 0 {
		t.Errorf("done: %v", w.done)
	}
}
