package views

import (
	"net/url"
	"os"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// TestNothingOfAnother has a hostile guest ask for anything it can think of,
// knowing the other's ids: it learns nothing of it, does nothing to it, and breaks
// nothing.
func TestNothingOfAnother(t *testing.T) {
	requests := 2_000
	if os.Getenv("BELAY_LONG") != "" {
		requests = 100_000
	}
	const perRun, runs = 20, 100 // rapid makes a hundred runs of a property
	w := busyWorld()
	h := handler(t, w, brief, func(c *Config) { c.EC2.ShowFreeze = true })
	mine := token(t, h, guestA)
	theirs := token(t, h, guestB)
	for asked := 0; asked < requests; asked += perRun * runs {
		rapid.Check(t, func(rt *rapid.T) {
			for range perRun {
				one := hostile(rt, mine, theirs)
				r := request("GET", "/", one.body, one.headers...)
				r.Method, r.Host = one.method, one.host
				u, err := url.ParseRequestURI(one.target)
				if err != nil {
					continue
				}
				r.URL = u
				sent := one.target + u.Path + u.RawQuery + one.body + strings.Join(one.headers, "")
				if q, err := url.QueryUnescape(u.RawQuery); err == nil {
					sent += q
				}
				harmless(rt, w, r, sent, serve(h, r))
			}
		})
	}
}

type hostileRequest struct {
	method, target, host, body string
	headers                    []string
}

func hostile(t *rapid.T, mine, theirs string) (r hostileRequest) {
	pick := func(what string, from ...string) string { return rapid.SampledFrom(from).Draw(t, what) }
	maybe := func(what string) bool { return rapid.Bool().Draw(t, what) }
	id := func() string {
		return pick("id", string(eventA), string(eventB), "shared", "past-shared", "past-"+string(eventB), guestB, "autumn", "secret-campaign", "")
	}
	r.method = pick("method", "GET", "GET", "GET", "POST", "POST", "PUT", "DELETE", "HEAD", "PATCH", "X")
	r.host = pick("host", "169.254.169.254", "169.254.169.254", "metadata", "metadata.google.internal:80", "evil.example", "")
	r.target = pick("path",
		azureEventsPath, azureInstancePath, azureInstancePath+"/network/interface/0/macAddress", azureInstancePath+"/"+guestB,
		gcePath, gcePath+"/instance/", gcePath+"/instance/maintenance-event", gcePath+"/instance/upcoming-maintenance", gcePath+"/instance/"+guestB+"/name",
		"/latest/api/token", "/latest/meta-data/", "/latest/meta-data/events/maintenance/scheduled", "/latest/meta-data/events/maintenance/history", "/latest/meta-data/instance-id",
		"/belay/v1/events", "/belay/v1/history", "/belay/v1/maintenance", "/belay/v1/approve", "/belay/v1/listeners/register", "/belay/v1/listeners/unregister",
		"/belay/v1/listeners/ready", "/belay/v1/maintenance/book", "/belay/v1/maintenance/start", "/belay/v1/maintenance/defer")
	if rapid.IntRange(0, 9).Draw(t, "bent") == 0 {
		r.target += pick("bend", "/", "//", "/..", "%2e%2e/", "%00", ";x", "/%2F")
	}
	sep := "?"
	for range rapid.IntRange(0, 3).Draw(t, "parameters") {
		r.target += sep + pick("parameter",
			"api-version=2020-07-01", "api-version=2021-02-01", "api-version=2017-08-01", "api-version=x", "format=text", "recursive=true", "alt=json", "alt=text",
			"wait=1s", "wait=-1s", "incarnation=2", "incarnation=x", "wait_for_change=true", "timeout_sec=1", "last_etag=0", "guest="+guestB, "guest=other-9", "x=%zz")
		sep = "&"
	}
	for range rapid.IntRange(0, 4).Draw(t, "headers") {
		r.headers = append(r.headers, pick("header",
			ours, ours, google, google, ec2TokenHeader+": "+mine, ec2TokenHeader+": "+mine, ec2TokenHeader+": "+theirs, ec2TTLHeader+": 60",
			"X-Forwarded-For: 10.9.9.9", "X-Real-Ip: 10.9.9.9", "X-Guest: "+guestB, "If-None-Match: \"2\"", "If-None-Match: *", "Connection: close"))
	}
	if maybe("right headers") {
		r.headers = []string{ours, google, ec2TokenHeader + ": " + mine, ec2TTLHeader + ": 60"}
	}
	switch rapid.IntRange(0, 5).Draw(t, "body") {
	case 0:
		r.body = `{"StartRequests":[{"EventId":"` + id() + `"},{"EventId":"` + id() + `"}]}`
	case 1:
		r.body = `{"event":"` + id() + `"}`
	case 2:
		r.body = `{"name":"` + pick("name", "db", "other-9", "../x", "<script>", "") + `","event":"` + id() + `"}`
	case 3:
		r.body = `{"campaign":"` + id() + `"` + pick("at", "", `,"at":"2026-11-23T02:00:00Z"`, `,"at":7`) + `}`
	case 4:
		r.body = `{"name":"` + pick("name", "db", "other-9") + `","timeout":"` + pick("timeout", "30s", "-1s", "x") + `"}`
	case 5:
		r.body = rapid.String().Draw(t, "junk")
	}
	return r
}
