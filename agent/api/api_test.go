package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
)

// endpoints is the whole API a second time, written down independently of
// routes: who may call it, and what the agent is asked then.
var endpoints = []struct {
	method, path string
	body         string
	may          string // roles
	call         string
}{
	{"GET", "/v1/status", "", "viewer operator", "Status"},
	{"GET", "/v1/guests", "", "viewer operator", "Inventory"},
	{"GET", "/v1/doctor", "", "viewer operator", "Doctor"},
	{"GET", "/v1/ops", "", "viewer operator", "Ops"},
	{"GET", "/v1/ops/{id}", "", "viewer operator", "Op ID"},
	{"GET", "/v1/ops/{id}/records", "", "viewer operator", "Records ID"},
	{"GET", "/v1/ops/{id}/report", "", "viewer operator", "Report ID"},
	{"GET", "/v1/ops/{id}/watch", "", "viewer operator", "Watch ID"},
	{"POST", "/v1/migrations", `{"guest":"web-1","to":"host-b"}`, "operator", "Migrate me"},
	{"POST", "/v1/holds", `{"all":true,"step":{"command":["true"]}}`, "operator", "Hold me"},
	{"POST", "/v1/replacements", `{"guest":"web-1"}`, "operator", "Replace me"},
	{"GET", "/v1/guests/{guest}/replacements", "", "operator", "ReplaceChoices GUEST"},
	{"POST", "/v1/kexecs", `{"kernel":"/boot/k"}`, "operator", "Kexec /boot/k me"},
	{"POST", "/v1/kexecs/plan", `{"kernel":"/boot/k"}`, "operator", "PlanKexec /boot/k me"},
	{"POST", "/v1/drains", `{"to":["b"]}`, "operator", "Drain me"},
	{"POST", "/v1/drains/plan", `{"to":["b","c"]}`, "operator", "PlanDrain b,c"},
	{"POST", "/v1/restores", `{"drain":"D"}`, "operator", "Restore D me"},
	{"GET", "/v1/moves", "", "operator", "Moves  "},
	{"GET", "/v1/ladder", "", "operator", "Rungs "},
	{"GET", "/v1/events", "", "viewer operator", "Events false"},
	{"GET", "/v1/events/{id}", "", "viewer operator", "Event ID"},
	{"POST", "/v1/events/{id}/approve", `{"reason":"why"}`, "operator", "ApproveEvent ID why me"},
	{"POST", "/v1/events/{id}/cancel", `{"reason":"why"}`, "operator", "CancelEvent ID why me"},
	{"GET", "/v1/campaigns", "", "viewer operator", "Campaigns"},
	{"POST", "/v1/campaigns", `{"id":"ID"}`, "operator", "CreateCampaign ID me"},
	{"GET", "/v1/campaigns/{id}", "", "viewer operator", "Campaign ID"},
	{"POST", "/v1/campaigns/{id}/book", `{"guest":"web-1","at":"2026-12-01T02:00:00Z"}`, "operator", "BookCampaign ID web-1 false me"},
	{"POST", "/v1/campaigns/{id}/defer", `{"guest":"web-1"}`, "operator", "DeferCampaign ID web-1"},
	{"POST", "/v1/campaigns/{id}/close", "", "operator", "CloseCampaign ID"},
	{"GET", "/v1/patches", "", "viewer operator", "Patches"},
	{"POST", "/v1/patches", `{"action":"revert","name":"fix_1"}`, "operator", "Patch revert fix_1 me"},
	{"POST", "/v1/patches/inspect", `{"file":"/root/fix.ko"}`, "operator", "InspectPatch /root/fix.ko"},
	{"GET", "/v1/patches/coverage", "", "viewer operator", "Coverage "},
	{"POST", "/v1/plans", `{"manifest":"id = 'u'"}`, "operator", "Plan id = 'u'"},
	{"GET", "/v1/updates/pending", "", "operator", "ProposeUpdate"},
	{"GET", "/v1/policies", "", "viewer operator", "Policies"},
	{"GET", "/v1/guests/{guest}/policy", "", "viewer operator", "Policy GUEST"},
	{"PUT", "/v1/guests/{guest}/policy", `{"refuse":["D"]}`, "operator", "SetPolicy GUEST [D] me"},
	{"POST", "/v1/applies", `{"plan":{"hash":"h"}}`, "operator", "Apply h me"},
	{"POST", "/v1/applies/check", `{"plan":{"hash":"h"}}`, "operator", "CheckPlan h"},
	{"PUT", "/v1/cordon", `{"reason":"disk"}`, "operator", "Cordon disk me"},
	{"DELETE", "/v1/cordon", "", "operator", "Uncordon me"},
	{"GET", "/v1/clocks", "", "viewer operator", "Clock "},
	{"POST", "/v1/clocks", "", "operator", "SyncClock  me"},
	{"POST", "/v1/ops/{id}/abort", "", "operator", "Abort ID me"},
	{"GET", "/v1/peer/greeting", "", "peer", "Greeting"},
	{"POST", "/v1/peer/checks", `{"op":"ID"}`, "peer", "Check me"},
	{"PUT", "/v1/peer/reservations/{id}", `{"op":"ID"}`, "peer", "Reserve ID me"},
	{"DELETE", "/v1/peer/reservations/{id}", "", "peer", "Release ID me"},
	{"PUT", "/v1/peer/reservations/{id}/connections", `{"all":[],"end":true}`, "peer", "Connections ID true me"},
	{"POST", "/v1/peer/files", `{"files":[]}`, "peer", "CheckFiles"},
	{"PUT", "/v1/peer/disks/{id}", "", "peer", "MakeDisks ID me"},
	{"DELETE", "/v1/peer/disks/{id}", "", "peer", "RemoveDisks ID me"},
	{"GET", "/v1/peer/moves/{id}", "", "peer", "MoveEnd ID me"},
	{"GET", "/v1/peer/guests/{uuid}", "", "peer", "View UUID"},
	{"GET", "/v1/peer/guests/{uuid}/job", "", "peer", "CompletedJob UUID"},
	{"GET", "/v1/peer/arrivals/{id}", "", "peer", "Arrival ID me"},
	{"GET", "/v1/peer/room", "", "peer", "Room"},
	{"POST", "/v1/peer/returns", `{"token":"T"}`, "peer", "Return T me"},
	{"GET", "/v1/peer/returns/{id}/watch", "", "peer", "WatchReturn ID me"},
	{"POST", "/v1/peer/returns/{id}/abort", "", "peer", "AbortReturn ID me"},
	{"POST", "/v1/peer/settlements", `{"op":"ID"}`, "peer", "Settle ID me"},
}

// filled puts values into a path's wildcards.
func filled(path string) string {
	return strings.NewReplacer("{id}", "ID", "{uuid}", "UUID", "{guest}", "GUEST").Replace(path)
}

func TestEveryRouteForEveryRole(t *testing.T) {
	t.Parallel()
	for _, e := range endpoints {
		for _, role := range []maint.Role{maint.RoleNone, maint.RoleViewer, maint.RoleOperator, maint.RolePeer} {
			t.Run(fmt.Sprintf("%s %s as %q", e.method, e.path, role), func(t *testing.T) {
				t.Parallel()
				f := &fakeAgent{}
				w := ask(Handler(f, as("me", role), quiet), e.method, filled(e.path), e.body)
				if slices.Contains(strings.Fields(e.may), string(role)) {
					if w.Code != http.StatusOK {
						t.Errorf("refused with %d: %s", w.Code, w.Body)
					}
					if d := cmp.Diff([]string{e.call}, f.taken()); d != "" {
						t.Error(d)
					}
					return
				}
				if p := refused(t, w, http.StatusForbidden); p.Code != maint.CodeForbidden || !strings.Contains(p.Subject, "me") || p.Remedy == "" {
					t.Errorf("the refusal is %+v", p)
				}
				if calls := f.taken(); len(calls) > 0 {
					t.Errorf("forbidden, and yet the agent was asked for %v", calls)
				}
			})
		}
	}
}

// TestNoRouteForgotten: a new route needs its line above.
func TestNoRouteForgotten(t *testing.T) {
	t.Parallel()
	var got, want []string
	for _, r := range routes(&fakeAgent{}) {
		got = append(got, r.method+" "+r.path)
	}
	for _, e := range endpoints {
		want = append(want, e.method+" "+e.path)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestWrongMethod(t *testing.T) {
	t.Parallel()
	allowed := make(map[string][]string)
	for _, e := range endpoints {
		allowed[e.path] = append(allowed[e.path], e.method)
	}
	for path, methods := range allowed {
		f := &fakeAgent{}
		w := ask(Handler(f, as("me", maint.RoleOperator), quiet), "PATCH", filled(path), "{}")
		if p := refused(t, w, http.StatusMethodNotAllowed); p.Code != maint.CodeMethodNotAllowed {
			t.Errorf("PATCH %s: %+v", path, p)
		}
		if got := w.Header().Values("Allow"); !slices.Equal(got, methods) {
			t.Errorf("PATCH %s: Allow is %v, want %v", path, got, methods)
		}
		if calls := f.taken(); len(calls) > 0 {
			t.Errorf("PATCH %s: the agent was asked for %v", path, calls)
		}
	}
}

func TestUnknownPath(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"/", "/v1", "/v1/", "/v2/status", "/v1/status/", "/v1/ops/ID/undo", "/v1/peer/guests/U/job/now"} {
		w := ask(Handler(&fakeAgent{}, as("me", maint.RoleOperator), quiet), "GET", path, "")
		if p := refused(t, w, http.StatusNotFound); p.Code != maint.CodeNotFound {
			t.Errorf("GET %s: %+v", path, p)
		}
	}
}

// withBody are the calls that read one.
var withBody = []struct{ method, path, good string }{
	{"POST", "/v1/migrations", `{"guest":"web-1","to":"host-b"}`},
	{"POST", "/v1/peer/checks", `{"op":"ID","guest":"web-1"}`},
	{"PUT", "/v1/peer/reservations/ID", `{"op":"ID","guest":"web-1"}`},
	{"POST", "/v1/peer/settlements", `{"op":"ID","guest_uuid":"U"}`},
	{"POST", "/v1/kexecs", `{"kernel":"/boot/k"}`},
	{"POST", "/v1/kexecs/plan", `{"kernel":"/boot/k"}`},
	{"POST", "/v1/drains", `{"to":["host-b"]}`},
	{"POST", "/v1/drains/plan", `{}`},
	{"POST", "/v1/restores", `{"drain":"drain-1"}`},
	{"PUT", "/v1/cordon", `{"reason":"memory"}`},
	{"POST", "/v1/patches", `{"action":"reload","reason":"x"}`},
	{"POST", "/v1/patches/inspect", `{"file":"/a.ko"}`},
	{"POST", "/v1/peer/files", `{"files":[]}`},
	{"POST", "/v1/peer/returns", `{"token":"T"}`},
}

func TestWrongBodies(t *testing.T) {
	t.Parallel()
	for _, c := range withBody {
		role := maint.RoleOperator
		if strings.HasPrefix(c.path, "/v1/peer/") {
			role = maint.RolePeer
		}
		f := &fakeAgent{}
		h := Handler(f, as("me", role), quiet)
		most := maxBody
		if c.path == "/v1/applies" {
			most = maxPlanBody
		}
		for name, body := range map[string]string{
			"empty":            "",
			"blank":            " \n",
			"not JSON":         "guest=web-1",
			"cut":              c.good[:len(c.good)-1],
			"unknown field":    `{"op":"ID","frobnicate":true}`,
			"trailing garbage": c.good + "x",
			"two objects":      c.good + c.good,
			"a list":           "[" + c.good + "]",
			"a text":           `"web-1"`,
			"wrong type":       `{"op":5,"guest":5,"timeout_ns":"1h","reason":5}`,
			"too big":          c.good + strings.Repeat(" ", most),
			"endless nesting":  strings.Repeat(`{"op":`, 20000),
		} {
			w := ask(h, c.method, c.path, body)
			if p := refused(t, w, http.StatusBadRequest); p.Code != maint.CodeBadRequest {
				t.Errorf("%s %s, %s: %+v", c.method, c.path, name, p)
			}
			if calls := f.taken(); len(calls) > 0 {
				t.Errorf("%s %s, %s: the agent was asked for %v", c.method, c.path, name, calls)
			}
		}
		largest := c.good + strings.Repeat(" ", most-len(c.good))
		if w := ask(h, c.method, c.path, largest); w.Code != http.StatusOK {
			t.Errorf("%s %s, %d bytes: refused with %d: %s", c.method, c.path, len(largest), w.Code, w.Body)
		}
	}
}

func TestReservationOfAnotherOperation(t *testing.T) {
	t.Parallel()
	f := &fakeAgent{}
	w := ask(Handler(f, as("host-b", maint.RolePeer), quiet), "PUT", "/v1/peer/reservations/mine", `{"op":"another"}`)
	if p := refused(t, w, http.StatusBadRequest); p.Code != maint.CodeBadRequest {
		t.Errorf("%+v", p)
	}
	if calls := f.taken(); len(calls) > 0 {
		t.Errorf("the agent was asked for %v", calls)
	}
}

// TestErrorsTravel: what an agent's method returns is what the client's
// returns, as far as callers can tell.
func TestErrorsTravel(t *testing.T) {
	t.Parallel()
	refusal := &maint.Refusal{What: "cannot migrate guest web-1 to host-b", Problems: []maint.Problem{
		*maint.Problemf(maint.CodeGuestPaused, "guest web-1", "resume it first", "is paused"),
		*maint.Problemf(maint.CodeNoRoom, "host host-b", "choose another", "is full")}}
	problem := maint.Problemf(maint.CodeUnknownOp, "operation x", "see 'belay ops list'", "is not in the journal")
	for _, c := range []struct {
		name   string
		given  error
		status int
		want   error // nil: only is and code count
		is     error
		code   maint.Code
	}{
		{"refusal", refusal, 409, refusal, nil, ""},
		{"wrapped refusal", fmt.Errorf("peer host-b: %w", refusal), 409, refusal, nil, ""},
		{"problem", problem, 404, problem, nil, ""},
		{"wrapped problem", fmt.Errorf("so: %w", problem), 404, problem, nil, ""},
		{"no guest", fmt.Errorf("libvirt says: %w", maint.ErrNoGuest), 404, nil, maint.ErrNoGuest, maint.CodeUnknownGuest},
		{"libvirt down", fmt.Errorf("dial: %w", maint.ErrHypervisorDown), 503, nil, maint.ErrHypervisorDown, maint.CodeHypervisorDown},
		{"peer down", fmt.Errorf("dial: %w", maint.ErrPeerDown), 503, nil, maint.ErrPeerDown, maint.CodePeerDown},
		{"no job", fmt.Errorf("stats: %w", maint.ErrNoJob), 404, nil, maint.ErrNoJob, maint.CodeNoJob},
		{"shutting down", maint.Problemf(maint.CodeShuttingDown, "belayd", "try again", "is shutting down"), 503, nil, nil, maint.CodeShuttingDown},
		{"journal", maint.Problemf(maint.CodeJournal, "host", "make room", "is full"), 507, nil, nil, maint.CodeJournal},
		{"busy", maint.Problemf(maint.CodeBusy, "guest", "wait", "is busy"), 409, nil, nil, maint.CodeBusy},
		{"anything else", errors.New("out of luck"), 500, nil, nil, maint.CodeInternal},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			f := &fakeAgent{err: c.given}
			if w := ask(Handler(f, as("me", maint.RoleViewer), quiet), "GET", "/v1/status", ""); w.Code != c.status {
				t.Errorf("HTTP status is %d, want %d", w.Code, c.status)
			}
			client := NewUnix(serveUnix(t, f, Access{}))
			defer client.Close()
			_, status := client.Status(t.Context())
			_, watch := client.Watch(t.Context(), "mig-1", func(maint.Op) { t.Error("an operation was told of") })
			for _, err := range []error{status, watch} {
				if c.want != nil {
					if d := cmp.Diff(c.want, err); d != "" {
						t.Error(d)
					}
					continue
				}
				if p := problemOf(t, err); p.Code != c.code || !strings.Contains(p.Reason, problemReason(c.given)) {
					t.Errorf("%v has become %+v", c.given, p)
				}
				if c.is != nil && !errors.Is(err, c.is) {
					t.Errorf("errors.Is does not find %v in %v", c.is, err)
				}
				for _, other := range []error{maint.ErrNoGuest, maint.ErrHypervisorDown, maint.ErrPeerDown, maint.ErrNoJob} {
					if other != c.is && errors.Is(err, other) {
						t.Errorf("errors.Is finds %v in %v", other, err)
					}
				}
			}
		})
	}
}

func problemReason(err error) string {
	var p *maint.Problem
	if errors.As(err, &p) {
		return p.Reason
	}
	return err.Error()
}

func TestRecordsKeepSecrets(t *testing.T) {
	t.Parallel()
	secret := json.RawMessage(`{"xml":"secret"}`)
	f := &fakeAgent{records: []maint.Record{
		{Seq: 1, Kind: maint.RecAccepted, Data: json.RawMessage(`{"guest":"web-1"}`)},
		{Seq: 2, Kind: maint.RecStepNote, Text: "for people", Data: secret},
		{Seq: 3, Kind: maint.RecEnded, Data: json.RawMessage(`{"outcome":"done"}`)},
	}}
	for role, want := range map[maint.Role]json.RawMessage{maint.RoleOperator: secret, maint.RoleViewer: nil} {
		w := ask(Handler(f, as("me", role), quiet), "GET", "/v1/ops/mig-1/records", "")
		var got []maint.Record
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || len(got) != 3 {
			t.Fatalf("%s gets %s, %v", role, w.Body, err)
		}
		if string(got[1].Data) != string(want) || got[1].Text != "for people" {
			t.Errorf("%s gets the note %+v", role, got[1])
		}
		if got[0].Data == nil || got[2].Data == nil {
			t.Errorf("%s does not get what is no secret: %+v", role, got)
		}
		if hidden := !strings.Contains(w.Body.String(), "secret"); hidden != (want == nil) {
			t.Errorf("%s: hidden is %t in %s", role, hidden, w.Body)
		}
	}
}

// TestOddIDs: an ID arrives as it was sent, whatever is in it.
func TestOddIDs(t *testing.T) {
	t.Parallel()
	f := &fakeAgent{}
	client := NewUnix(serveUnix(t, f, Access{}))
	defer client.Close()
	for _, id := range []maint.OpID{"mig-20261122-023145-k3f9a", "a/b", "a b", "a?b#c", "%2e", "ünïcode", "a%00b"} {
		op, err := client.Op(t.Context(), id)
		if err != nil || op.ID != id {
			t.Errorf("%q arrives as %q, %v", id, op.ID, err)
		}
	}
}

// FuzzBodies: no request can make the API fail, and nothing reaches the agent
// that is not one valid JSON value.
func FuzzBodies(f *testing.F) {
	for i, e := range endpoints {
		if e.body == "" {
			f.Add(i, "..", []byte(nil))
			continue
		}
		for _, body := range []string{"", "null", "{}", e.body, e.body + e.body, `{"op":5}`, "[", `{"op":"ID","op":"ID"}`, "\xff", `{"memory_bytes":-1}`, `{"memory_bytes":1e99}`, `{"OP":"ID"}`,
			`{"parallel":1e400,"to":[null],"allow":null}`, `{"disks":[{"bytes":18446744073709551616}]}`, `{"files":[{"path":"/\u0000"}]}`, `{"token":"\ud800","max_pause_ns":-9223372036854775809}`} {
			f.Add(i, "ID", []byte(body))
		}
	}
	f.Fuzz(func(t *testing.T, i int, id string, body []byte) {
		if i < 0 || i >= len(endpoints) {
			return
		}
		e := endpoints[i]
		path := strings.NewReplacer("{id}", url.PathEscape(id), "{uuid}", url.PathEscape(id)).Replace(e.path)
		agent := &fakeAgent{}
		role, _, _ := strings.Cut(e.may, " ")
		w := ask(Handler(agent, as("me", maint.Role(role)), quiet), e.method, path, string(body))
		if w.Code >= 500 {
			t.Errorf("%s %s: %d %s", e.method, path, w.Code, w.Body)
		}
		if calls := agent.taken(); e.body != "" && len(calls) > 0 && !json.Valid(body) {
			t.Errorf("%s %s with %q: the agent was asked for %v", e.method, path, body, calls)
		}
	})
}

// ask makes one request without a network.
func ask(h http.Handler, method, path, body string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, "http://belayd"+path, strings.NewReader(body)))
	return w
}

// refused gives the one problem that a request was refused for.
func refused(t *testing.T, w *httptest.ResponseRecorder, status int) maint.Problem {
	t.Helper()
	var f failure
	if err := json.Unmarshal(w.Body.Bytes(), &f); w.Code != status || err != nil || f.Error == nil || len(f.Error.Problems) != 1 {
		t.Fatalf("want a refusal with status %d for one problem; there is status %d: %s", status, w.Code, w.Body)
	}
	if got := w.Header().Get("Content-Type"); got != "application/json" {
		t.Errorf("the refusal's content type is %q", got)
	}
	return f.Error.Problems[0]
}
