package views

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/notify"
)

// token gets a guest a token.
func token(t testing.TB, h http.Handler, guest string) string {
	t.Helper()
	r := request("PUT", "/latest/api/token", "", ec2TTLHeader+": 60")
	a := serve(h, r.WithContext(notify.WithGuest(r.Context(), guest)))
	if a.StatusCode != 200 || a.Header.Get(ec2TTLHeader) != "60" {
		t.Fatalf("no token: %d %v", a.StatusCode, a.Header)
	}
	return bodyOf(t, a)
}

func TestEC2Token(t *testing.T) {
	now := noon
	h := handler(t, newWorld(), func(c *Config) { c.Now = func() time.Time { return now } })
	for ttl, status := range map[string]int{"": 400, "0": 400, "-1": 400, "x": 400, "21601": 400, "99999999999": 400, "1": 200, "21600": 200} {
		want(t, ask(h, "PUT", "/latest/api/token", "", ec2TTLHeader+": "+ttl), status, "*")
	}
	want(t, ask(h, "GET", "/latest/api/token", ""), 405, "*")
	want(t, ask(h, "PUT", "/latest/api/token", "", ec2TTLHeader+": 60", "X-Forwarded-For: 10.0.0.9"), 403, "*")

	const path = "/latest/meta-data/instance-id"
	good := token(t, h, guestA)
	want(t, ask(h, "GET", path, "", ec2TokenHeader+": "+good), 200, guestA)
	want(t, ask(h, "PUT", path, "", ec2TokenHeader+": "+good), 405, "*")
	want(t, ask(h, "GET", path, "", ec2TokenHeader+": "+good, "X-Forwarded-For: 10.0.0.9"), 403, "*")
	for name, bad := range map[string]string{
		"none": "", "junk": "%%%", "short": "AAAA", "changed": "B" + good[1:], "another guest's": token(t, h, guestB),
		"longer": good[:len(good)-1] + "A=", "another process's": token(t, handler(t, newWorld()), guestA),
	} {
		if bad == good {
			t.Fatalf("the token %s is the good one", name)
		}
		want(t, ask(h, "GET", path, "", ec2TokenHeader+": "+bad), 401, "*")
	}
	now = now.Add(time.Minute)
	want(t, ask(h, "GET", path, "", ec2TokenHeader+": "+good), 401, "*")

	old := handler(t, newWorld(), func(c *Config) { c.EC2.IMDSv1 = true })
	want(t, ask(old, "GET", path, ""), 200, guestA)
	want(t, ask(old, "GET", path, "", ec2TokenHeader+": junk"), 401, "*")
}

func TestEC2Events(t *testing.T) {
	w := newWorld()
	h := handler(t, w)
	shy := ec2TokenHeader + ": " + token(t, h, guestA)
	const scheduled, history = "/latest/meta-data/events/maintenance/scheduled", "/latest/meta-data/events/maintenance/history"
	want(t, ask(h, "GET", scheduled, "", shy), 200, "[]")
	want(t, ask(h, "GET", history, "", shy), 200, "[]")

	reboot := with(freeze(), maint.ImpactReboot)
	reboot.Duration = maint.DurationUnknown
	w.show(guestA, reboot, freeze(), with(freeze(), maint.ImpactPreempt))
	const one = `"NotBefore":"22 Nov 2026 12:00:00 GMT","NotAfter":"22 Nov 2026 13:00:00 GMT","Code":"system-reboot",` +
		`"Description":"new \u003ckernel\u003e \u0026 \"friends\"","EventId":"` + string(eventA) + `","State":"active"`
	want(t, ask(h, "GET", scheduled, "", shy), 200, `[{`+one+`}]`)
	want(t, ask(h, "GET", "/latest/meta-data/spot/instance-action", "", shy), 200, `{"action":"terminate","time":"2026-11-22T12:00:00Z"}`)
	want(t, ask(h, "GET", "/latest/meta-data/spot/termination-time", "", shy), 200, "2026-11-22T12:00:00Z")

	for i, code := range map[maint.Impact]string{maint.ImpactRedeploy: "instance-stop", maint.ImpactTerminate: "instance-retirement", maint.ImpactFreeze: "system-maintenance"} {
		w.show(guestA, started(with(freeze(), i)))
		open := handler(t, w, func(c *Config) { c.EC2.ShowFreeze = true })
		got := bodyOf(t, ask(open, "GET", scheduled, "", ec2TokenHeader+": "+token(t, open, guestA)))
		if !strings.Contains(got, `"Code":"`+code+`"`) || !strings.Contains(got, `"State":"active"`) {
			t.Errorf("%s is shown as %s", i, got)
		}
	}

	done, called := with(started(freeze()), maint.ImpactReboot), with(freeze(), maint.ImpactReboot)
	done.State, done.Ended, done.Description = maint.EventCompleted, noon.Add(3*time.Minute), "a"
	called.State, called.Ended, called.Description = maint.EventCancelled, noon.Add(-time.Minute), "b"
	foreign := done
	foreign.Guests = []maint.EventGuest{{UUID: guestB, Name: "other-9"}}
	w.guests[guestA].history = []maint.ScheduledEvent{done, called, freeze(), foreign}
	want(t, ask(h, "GET", history, "", shy), 200,
		`[{"NotBefore":"22 Nov 2026 12:01:00 GMT","NotAfter":"22 Nov 2026 12:03:00 GMT","Code":"system-reboot","Description":"[Completed] a","EventId":"`+string(eventA)+`","State":"completed"},`+
			`{"NotBefore":"22 Nov 2026 12:00:00 GMT","NotAfter":"22 Nov 2026 12:00:02 GMT","Code":"system-reboot","Description":"[Canceled] b","EventId":"`+string(eventA)+`","State":"canceled"}]`)
}

// TestEC2Crawl does as cloud-init does: all that is listed exists.
func TestEC2Crawl(t *testing.T) {
	w := newWorld()
	h := handler(t, w)
	auth := ec2TokenHeader + ": " + token(t, h, guestA)
	crawl := func() (leaves []string) {
		for todo := []string{""}; len(todo) > 0; todo = todo[1:] {
			r := ask(h, "GET", "/latest/"+todo[0], "", auth)
			body := bodyOf(t, r)
			if r.StatusCode != 200 {
				t.Fatalf("%s is listed, and answered %d", todo[0], r.StatusCode)
			}
			if todo[0] != "" && !strings.HasSuffix(todo[0], "/") {
				leaves = append(leaves, strings.TrimPrefix(todo[0], "meta-data/"))
				continue
			}
			for name := range strings.SplitSeq(body, "\n") {
				todo = append(todo, todo[0]+name)
			}
		}
		slices.Sort(leaves)
		return leaves
	}
	always := []string{"events/maintenance/history", "events/maintenance/scheduled", "instance-id", "local-hostname", "local-ipv4", "mac"}
	if got := crawl(); !slices.Equal(got, always) {
		t.Errorf("it has %v, want %v", got, always)
	}
	w.show(guestA, with(freeze(), maint.ImpactPreempt))
	if got := crawl(); !slices.Equal(got, append(always, "spot/instance-action", "spot/termination-time")) {
		t.Errorf("when taken away, it has %v", got)
	}
	w.show(guestA)
	for _, path := range []string{"spot/instance-action", "spot/", "events/recommendations/rebalance", "iam/", "instance-id/", "/instance-id", "../meta-data/instance-id"} {
		want(t, ask(h, "GET", "/latest/meta-data/"+path, "", auth), 404, "*")
	}
	for _, version := range []string{"latest", "2009-04-04", "2021-03-23"} {
		want(t, ask(h, "GET", "/"+version+"/meta-data", "", auth), 200, "events/\ninstance-id\nlocal-hostname\nlocal-ipv4\nmac")
		want(t, ask(h, "GET", "/"+version+"/meta-data", ""), 401, "*")
	}
	for _, version := range []string{"", "1.0", "2021-03-32", "2021-03-23x", "latestx", "/2021-03-23"} {
		want(t, ask(h, "GET", "/"+version+"/meta-data", "", auth), 404, "*")
	}
}
