package views

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// What is not about events is another service's, which is told who asks and cannot
// be lied to.
func TestUpstream(t *testing.T) {
	t.Parallel()
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %q by %v %v for %v", r.Method, r.URL, body, r.Header[upstreamUUID], r.Header[upstreamName], r.Header["X-Forwarded-For"])
	}))
	defer other.Close()
	to, err := url.Parse(other.URL)
	if err != nil {
		t.Fatal(err)
	}
	h := handler(t, newWorld(), func(c *Config) { c.Upstream = to })
	for _, c := range []struct {
		method, path, body string
		want               string // of the other; "": it is ours
	}{
		{"GET", "/latest/user-data", "", `GET /latest/user-data ""`},
		{"GET", "/openstack/latest/meta_data.json?x=1&x=2", "", `GET /openstack/latest/meta_data.json?x=1&x=2 ""`},
		{"POST", "/openstack/password", "secret", `POST /openstack/password "secret"`},
		{"GET", "/", "", `GET / ""`},
		{"GET", "/latest/meta-data/eventsx", "", `GET /latest/meta-data/eventsx ""`},
		{"GET", "/computeMetadata/v1/instance/attributes/ssh-keys", "", `GET /computeMetadata/v1/instance/attributes/ssh-keys ""`},
		{"GET", "/metadata/scheduledevents?api-version=2020-07-01", "", ""},
		{"GET", "/computeMetadata/v1/instance/maintenance-event", "", ""},
		{"PUT", "/latest/api/token", "", ""},
		{"GET", "/latest/meta-data/events/maintenance/scheduled", "", ""},
		{"GET", "/belay/v1/events", "", ""},
	} {
		w := ask(h, c.method, c.path, c.body, upstreamUUID+": "+guestB, upstreamName+": evil", "Metadata: true")
		text, err := io.ReadAll(w.Body)
		if err != nil {
			t.Fatal(err)
		}
		got := string(text)
		switch {
		case c.want == "" && strings.Contains(got, " by "):
			t.Errorf("%s %s went to the other: %s", c.method, c.path, got)
		case c.want != "" && (w.StatusCode != http.StatusOK || !strings.HasPrefix(got, c.want+" by ["+guestA+"] [web-1] for [")):
			t.Errorf("%s %s: %d %s", c.method, c.path, w.StatusCode, got)
		}
	}
	if w := ask(h, "POST", "/openstack/password", strings.Repeat("x", 2*upstreamBody)); w.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("a giant body: %d", w.StatusCode)
	}
	other.Close()
	if w := ask(h, "GET", "/latest/user-data", ""); w.StatusCode != http.StatusBadGateway {
		t.Errorf("when the other is away: %d", w.StatusCode)
	}
}
