package views

import (
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

const azureNow = azureEventsPath + "?api-version=2020-07-01"

func TestAzureDocument(t *testing.T) {
	w := newWorld()
	h := handler(t, w)
	want(t, ask(h, "GET", azureNow, "", "Metadata: true"), 200, `{"DocumentIncarnation":1,"Events":[]}`)

	e := freeze()
	e.Guests = append(e.Guests, maint.EventGuest{UUID: "c", Name: "web-2"})
	w.show(guestA, e)
	const tail = `"Description":"new \u003ckernel\u003e \u0026 \"friends\"","EventSource":"Platform","DurationInSeconds":3}]}`
	const head = `"Events":[{"EventId":"` + string(eventA) + `","EventStatus":`
	r := ask(h, "GET", azureNow, "", "Metadata: true")
	want(t, r, 200, `{"DocumentIncarnation":2,`+head+`"Scheduled","EventType":"Freeze","ResourceType":"VirtualMachine","Resources":["web-1","web-2"],`+
		`"NotBefore":"Sun, 22 Nov 2026 12:00:00 GMT",`+tail)
	if got := r.Header.Get("Content-Type"); got != typeJSON {
		t.Errorf("the type is %q", got)
	}
	w.show(guestA, started(e))
	want(t, ask(h, "GET", azureNow, "", "Metadata: TRUE"), 200, `{"DocumentIncarnation":3,`+head+
		`"Started","EventType":"Freeze","ResourceType":"VirtualMachine","Resources":["web-1","web-2"],"NotBefore":"",`+tail)

	// A source that gives what is over, or of somebody else, is not believed.
	over, foreign := freeze(), freeze()
	over.State = maint.EventCompleted
	foreign.Guests = []maint.EventGuest{{UUID: guestB, Name: "other-9"}}
	w.show(guestA, over, foreign)
	want(t, ask(h, "GET", azureNow, "", "Metadata: true"), 200, `{"DocumentIncarnation":4,"Events":[]}`)
}

func TestAzureVersions(t *testing.T) {
	w := newWorld()
	h := handler(t, w)
	w.show(guestA, with(freeze(), maint.ImpactReboot), with(freeze(), maint.ImpactPreempt), with(freeze(), maint.ImpactTerminate))
	first := []string{"EventId", "EventStatus", "EventType", "NotBefore", "ResourceType", "Resources"}
	for _, test := range []struct {
		version string
		types   string
		more    []string
	}{
		{"2017-08-01", "Reboot", nil},
		{"2017-11-01", "Reboot Preempt", nil},
		{"2019-01-01", "Reboot Preempt Terminate", nil},
		{"2019-04-01", "Reboot Preempt Terminate", []string{"Description"}},
		{"2019-08-01", "Reboot Preempt Terminate", []string{"Description", "EventSource"}},
		{"2020-07-01", "Reboot Preempt Terminate", []string{"Description", "EventSource", "DurationInSeconds"}},
	} {
		r := ask(h, "GET", azureEventsPath+"?api-version="+test.version, "", "Metadata: true")
		var doc struct{ Events []json.RawMessage }
		if err := json.Unmarshal([]byte(bodyOf(t, r)), &doc); err != nil {
			t.Fatal(err)
		}
		var types []string
		for _, e := range doc.Events {
			var one struct{ EventType string }
			if err := json.Unmarshal(e, &one); err != nil {
				t.Fatal(err)
			}
			types = append(types, one.EventType)
			if fields := slices.Sorted(slices.Values(slices.Concat(first, test.more))); !slices.Equal(keys(t, e), fields) {
				t.Errorf("%s has the fields %v, want %v", test.version, keys(t, e), fields)
			}
		}
		if got := strings.Join(types, " "); got != test.types {
			t.Errorf("%s shows %s, want %s", test.version, got, test.types)
		}
	}
}

func TestAzureRules(t *testing.T) {
	h := handler(t, newWorld())
	for _, test := range []struct {
		name, method, target string
		status               int
		headers              []string
	}{
		{"header without case", "GET", azureNow, 200, []string{"metadata: True"}},
		{"no header", "GET", azureNow, 400, nil},
		{"other value", "GET", azureNow, 400, []string{"Metadata: yes"}},
		{"header twice", "GET", azureNow, 400, []string{"Metadata: true", "Metadata: true"}},
		{"forwarded", "GET", azureNow, 400, []string{"Metadata: true", "X-Forwarded-For: 10.0.0.9"}},
		{"forwarded for nobody", "GET", azureNow, 400, []string{"Metadata: true", "X-Forwarded-For: "}},
		{"forwarded POST", "POST", azureNow, 400, []string{"Metadata: true", "X-Forwarded-For: 10.0.0.9"}},
		{"version twice", "GET", azureNow + "&api-version=2020-07-01", 400, []string{"Metadata: true"}},
		{"version twice, encoded", "GET", azureNow + "&api%2Dversion=2020-07-01", 400, []string{"Metadata: true"}},
		{"other parameter twice", "GET", azureNow + "&x=1&x=2", 400, []string{"Metadata: true"}},
		{"other parameter", "GET", azureNow + "&x=1", 200, []string{"Metadata: true"}},
		{"encoding", "GET", azureNow + "&x=%zz", 400, []string{"Metadata: true"}},
		{"unknown version", "GET", azureEventsPath + "?api-version=2099-01-01", 404, []string{"Metadata: true"}},
		{"empty version", "GET", azureEventsPath + "?api-version=", 404, []string{"Metadata: true"}},
		{"wait", "GET", azureNow + "&wait=long", 400, []string{"Metadata: true"}},
		{"negative wait", "GET", azureNow + "&wait=-1s", 400, []string{"Metadata: true"}},
		{"incarnation", "GET", azureNow + "&wait=1s&incarnation=x", 400, []string{"Metadata: true"}},
		{"method", "PUT", azureNow, 405, []string{"Metadata: true"}},
		{"HEAD", "HEAD", azureNow, 405, []string{"Metadata: true"}},
		{"slash", "GET", azureEventsPath + "/?api-version=2020-07-01", 404, []string{"Metadata: true"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			want(t, ask(h, test.method, test.target, "", test.headers...), test.status, "*")
		})
	}
	r := ask(h, "GET", azureEventsPath, "", "Metadata: true")
	var no struct {
		Newest []string `json:"newest-versions"`
	}
	if err := json.Unmarshal([]byte(bodyOf(t, r)), &no); err != nil || r.StatusCode != 400 || !slices.Equal(no.Newest, []string{"2020-07-01", "2019-08-01", "2019-04-01"}) {
		t.Errorf("without a version: %d, %v, %v", r.StatusCode, no, err)
	}
	if got := ask(h, "DELETE", azureNow, "").Header.Get("Allow"); got != "GET, POST" {
		t.Errorf("allowed is %q", got)
	}
}

func TestAzureETag(t *testing.T) {
	w := newWorld()
	w.show(guestA, freeze())
	h := handler(t, w)
	if got := ask(h, "GET", azureNow, "", "Metadata: true").Header.Get("ETag"); got != `"2"` {
		t.Fatalf("the ETag is %s", got)
	}
	for tag, status := range map[string]int{`"2"`: 304, `2`: 304, `W/"2"`: 304, `"1", "2"`: 304, `*`: 304, `"1"`: 200, `1`: 200, `"22"`: 200, `x`: 200} {
		r := ask(h, "GET", azureNow, "", "Metadata: true", "If-None-Match: "+tag)
		if got := bodyOf(t, r); r.StatusCode != status || (status == 304) != (got == "") || r.Header.Get("ETag") != `"2"` {
			t.Errorf("If-None-Match %s: %d %s %v", tag, r.StatusCode, got, r.Header)
		}
	}
	want(t, ask(h, "POST", azureNow, start(eventA), "Metadata: true", `If-None-Match: "2"`), 200, "")
}

func start(ids ...maint.EventID) string {
	var parts []string
	for _, id := range ids {
		parts = append(parts, `{"EventId":`+strconv.Quote(string(id))+`}`)
	}
	return `{"StartRequests":[` + strings.Join(parts, ",") + `]}`
}

func TestAzureApprove(t *testing.T) {
	old := freeze()
	old.ID, old.State = "old", maint.EventCompleted
	many := make([]maint.EventID, maxStarts+1)
	for i := range many {
		many[i] = maint.EventID(strconv.Itoa(i))
	}
	for _, test := range []struct {
		name, body string
		status     int
		approved   []maint.EventID
	}{
		{"plain", start(eventA), 200, []maint.EventID{eventA}},
		{"finished", start("old"), 200, []maint.EventID{"old"}},
		{"two, one given twice", start(eventA, "old", eventA), 200, []maint.EventID{eventA, "old"}},
		{"more fields", `{"DocumentIncarnation":2,"StartRequests":[{"EventId":"` + string(eventA) + `","x":1}]}`, 200, []maint.EventID{eventA}},
		{"byte order mark, spaces", "\xef\xbb\xbf " + start(eventA) + "\r\n", 200, []maint.EventID{eventA}},
		{"unknown", start("nil"), 400, nil},
		{"another guest's", start(eventB), 400, nil},
		{"one unknown", start("nil", eventA), 400, []maint.EventID{eventA}},
		{"no body", "", 400, nil},
		{"no object", "[]", 400, nil},
		{"null", "null", 400, nil},
		{"none", `{"StartRequests":[]}`, 400, nil},
		{"no id", `{"StartRequests":[{}]}`, 400, nil},
		{"id a number", `{"StartRequests":[{"EventId":7}]}`, 400, nil},
		{"form", "StartRequests=1", 400, nil},
		{"something follows", start(eventA) + "x", 400, nil},
		{"too long", `{"x":"` + strings.Repeat("x", maxBody) + `",` + start(eventA)[1:], 400, nil},
		{"too many", start(many...), 400, nil},
		{"deep", strings.Repeat("[", 15000), 400, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, ctype := range []string{"application/json", "application/x-www-form-urlencoded", "text/plain", ""} {
				w := newWorld()
				w.guests[guestA].history = []maint.ScheduledEvent{old}
				w.show(guestA, freeze())
				// Clients ask with one version and approve with another.
				r := request("POST", azureEventsPath+"?api-version=2017-08-01", test.body, "Metadata: true")
				if ctype != "" {
					r.Header.Set("Content-Type", ctype)
				}
				want(t, serve(handler(t, w), r), test.status, "*")
				var noted []string
				for _, id := range test.approved {
					noted = append(noted, guestA+" approve "+string(id))
				}
				if !slices.Equal(w.done, noted) {
					t.Errorf("done: %v, want %v", w.done, noted)
				}
			}
		})
	}
}

func TestAzureFailures(t *testing.T) {
	w := newWorld()
	w.show(guestA, freeze())
	h := handler(t, w)
	w.fail = errDisk
	r := ask(h, "POST", azureNow, start(eventA), "Metadata: true")
	if got := bodyOf(t, r); r.StatusCode != 500 || strings.Contains(got, "other-9") {
		t.Errorf("an error of the host is told: %d %s", r.StatusCode, got)
	}
	w.fail = maint.Problemf(maint.CodeForbidden, "event", "ask the host's owner", "is for the host's owner to start")
	want(t, ask(h, "POST", azureNow, start(eventA), "Metadata: true"), 403,
		`{"error":"event: is for the host's owner to start (ask the host's owner)"}`)
}

func TestAzureSeconds(t *testing.T) {
	for d, want := range map[time.Duration]int64{0: 0, maint.DurationUnknown: -1, 1: 1, time.Second: 1, 1001 * time.Millisecond: 2} {
		if got := azureSeconds(d); got != want {
			t.Errorf("%v is %d, want %d", d, got, want)
		}
	}
}

func TestAzureInstance(t *testing.T) {
	h := handler(t, newWorld())
	const q = "?api-version=2021-02-01"
	const nic = `{"ipv4":{"ipAddress":[{"privateIpAddress":"10.0.0.1","publicIpAddress":""}]},"ipv6":{"ipAddress":[{"privateIpAddress":"fe80::1"}]},"macAddress":"525400AAAAAA"}`
	for _, test := range []struct {
		target string
		status int
		body   string
	}{
		{q, 200, `{"compute":{"name":"web-1","vmId":"` + guestA + `"},"network":{"interface":[` + nic + `]}}`},
		{"/" + q + "&format=json", 200, "*"},
		{"?api-version=2021-08-01&extended=true", 200, "*"}, // cloud-init 22.4
		{"/compute" + q, 200, `{"name":"web-1","vmId":"` + guestA + `"}`},
		{"/compute/" + q + "&format=text", 200, "name\nvmId"},
		{"/compute/name" + q + "&format=text", 200, "web-1"},
		{"/compute/vmId" + q + "&format=TEXT", 200, guestA},
		{"/compute/name" + q, 200, `"web-1"`},
		{"/network/interface" + q + "&format=text", 200, "0/"},
		{"/network/interface/0/macAddress" + q + "&format=text", 200, "525400AAAAAA"},
		{"/network/interface/0/ipv4/ipAddress/0/privateIpAddress" + q + "&format=text", 200, "10.0.0.1"},
		{q + "&format=text", 200, "compute/\nnetwork/"},
		{"/network/interface/1" + q, 404, "*"},
		{"/network/interface/x" + q, 404, "*"},
		{"/compute/name/x" + q, 404, "*"},
		{"//compute" + q, 404, "*"},
		{"/nothing" + q, 404, "*"},
		{q + "&format=xml", 400, "*"},
		{"?api-version=2099-01-01", 400, "*"},
		{"", 400, "*"},
	} {
		want(t, ask(h, "GET", azureInstancePath+test.target, "", "Metadata: true"), test.status, test.body)
	}
	want(t, ask(h, "GET", azureInstancePath+q, ""), 400, "*")
	want(t, ask(h, "POST", azureInstancePath+q, "", "Metadata: true"), 405, "*")
	r := request("GET", azureInstancePath+q, "", "Metadata: true")
	tag := serve(h, r).Header.Get("ETag")
	r.Header.Set("If-None-Match", tag)
	if got := serve(h, r).StatusCode; got != http.StatusNotModified {
		t.Errorf("what is known was answered %d", got)
	}
}
