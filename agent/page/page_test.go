package page

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/html"

	"belay/agent/maint"
)

// evil is a name that wants to be more than one.
const evil = "</td><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'\u202e&lt;{{.}}"

// agent is one that has everything to show.
type agent struct {
	mu     sync.Mutex
	calls  map[string]int
	err    error
	report maint.Report
	block  chan struct{} // Status waits for it
}

func (a *agent) called(what string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.calls == nil {
		a.calls = make(map[string]int)
	}
	a.calls[what]++
	return a.err
}

func (a *agent) Status(ctx context.Context) (maint.Status, error) {
	if a.block != nil {
		select {
		case <-a.block:
		case <-ctx.Done():
			return maint.Status{}, ctx.Err()
		}
	}
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	return maint.Status{Version: "1.2.3", Since: now.Add(-time.Hour), Now: now, Host: maint.Host{Name: "host-a", LibvirtVersion: "9.0.0", QEMUVersion: "7.2.9", MemoryBytes: 64 << 30, FreeMemoryBytes: 12 << 30},
		Operations: []maint.Op{{ID: "mig-1", Kind: maint.OpMigrate, Guest: evil, Peer: "host-b", By: "root", Started: now.Add(-90 * time.Second), State: maint.OpRunning, Step: "perform",
			Progress: &maint.Job{MemoryTotal: 100 << 20, MemoryLeft: 25 << 20, Iteration: 1}, Trouble: maint.Problemf(maint.CodePostCopy, "guest "+evil, "mend it", "is broken")}},
		Peers:      []maint.PeerStatus{{Name: "host-b", OK: true, Checked: now, Latency: 2 * time.Millisecond, Cordoned: true}, {Name: "host-c", Checked: now, Error: "no route to host"}, {Name: "host-d"}},
		Cordon:     &maint.Cordon{Since: now, By: "root", Reason: evil},
		Conditions: []maint.Condition{{Text: "libvirt cannot be asked: " + evil, Remedy: "systemctl status libvirtd"}}}, a.called("Status")
}

func (a *agent) Inventory(context.Context) (maint.Inventory, error) {
	return maint.Inventory{Stale: "connection refused", Guests: []maint.Guest{{Name: "web-2", State: maint.GuestShutoff, Reason: "shutdown"}, {Name: evil, State: maint.GuestRunning, Reason: "booted", MemoryBytes: 2 << 30, VCPUs: 4, Agent: maint.AgentConnected, Job: "migration out"}}}, a.called("Inventory")
}

func (a *agent) Doctor(context.Context) ([]maint.Check, error) {
	return []maint.Check{{Rung: "host", Name: "libvirt", Result: maint.CheckOK, Text: "libvirt 9.0.0"}, {Rung: "host", Name: "certificate", Result: maint.CheckWarn, Text: "expires on 2026-12-01", Remedy: "renew it"},
		{Rung: "A", Name: "kernel", Result: maint.CheckFail, Text: evil}, {Rung: "C", Name: "events", Result: maint.CheckNA, Text: "off"}}, a.called("Doctor")
}

func (a *agent) Ops(context.Context) (ops []maint.Op, err error) {
	at := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	for i := range recent + 3 {
		ops = append(ops, maint.Op{ID: maint.OpID(fmt.Sprintf("patch-%02d", i)), Kind: maint.OpPatch, Patch: &maint.PatchRequest{Action: maint.PatchRestart, Name: evil}, By: "root",
			State: maint.OpEnded, Outcome: maint.OutcomePartly, Started: at, Ended: at.Add(3 * time.Second)})
	}
	return append(ops, maint.Op{ID: "mig-1", State: maint.OpRunning}), a.called("Ops")
}

func (a *agent) Events(_ context.Context, all bool) ([]maint.ScheduledEvent, error) {
	return []maint.ScheduledEvent{{Impact: maint.ImpactFreeze, State: maint.EventScheduled, Guests: []maint.EventGuest{{Name: evil}, {Name: "db-1"}}, NotBefore: time.Date(2026, 11, 22, 12, 15, 0, 0, time.UTC),
		Approval: &maint.EventApproval{By: "guest " + evil}, Op: "mig-1"}}, a.called(fmt.Sprint("Events ", all))
}

func (a *agent) Campaigns(context.Context) ([]maint.Campaign, error) {
	at := time.Date(2026, 12, 1, 2, 0, 0, 0, time.UTC)
	return []maint.Campaign{{ID: "old-1", Closed: at}, {ID: "qemu-10", Description: evil, Deadline: at.AddDate(0, 0, 7), Guests: map[string]maint.GuestCampaign{
		"u1": {Guest: evil, State: maint.CampaignBooked, At: at}, "u2": {Guest: "db-1", State: maint.CampaignPending}}}}, a.called("Campaigns")
}

func (a *agent) Report(_ context.Context, id maint.OpID) (maint.Report, error) {
	if id != "mig-1" {
		return maint.Report{}, maint.Problemf(maint.CodeUnknownOp, "operation "+string(id), "see 'belay ops list'", "is not in the journal of host-a")
	}
	return a.report, a.called("Report")
}

// told is a report with something in every place.
func told() maint.Report {
	at := time.Date(2026, 11, 22, 12, 0, 0, 123e6, time.UTC)
	same := true
	return maint.Report{Host: "host-a", Op: "mig-1", What: "moves guest " + evil + " to host-b", By: "root", Reason: evil, State: maint.OpEnded, Outcome: maint.OutcomePartly, Started: at, Ended: at, Took: 2 * time.Second, Resumed: 1,
		Guests: []maint.GuestReport{{Guest: evil, Fate: "moved to host-b", Felt: &maint.Standstill{Blackout: true, Longest: 41 * time.Millisecond, Times: 1}, Limit: 300 * time.Millisecond,
			Expected: &maint.Estimate{Low: 20 * time.Millisecond, Typical: 35 * time.Millisecond, High: 80 * time.Millisecond}, SameBoot: &same,
			Clock: &maint.ClockReport{State: maint.ClockUnsynchronised, Reason: evil}, Remarks: []string{evil}}},
		HostDone: []string{"kernel 6.1 → 6.12"}, Problems: []maint.Problem{{Subject: evil, Reason: "is not well"}},
		Decisions: []maint.ReportLine{{Text: "bandwidth is not limited"}, {Time: at, Step: "perform", Text: evil}}, Timeline: []maint.ReportLine{{Time: at, Step: "perform", Text: "begins"}},
		Steps: []maint.StepReport{{Name: "perform", Status: "done", Took: time.Second}}, Parts: []maint.OpID{"mig-2", "../" + evil}}
}

func handler(a *agent) http.Handler { return Handler(a, slog.New(slog.DiscardHandler)) }

func ask(h http.Handler, method, path, host string) *http.Response {
	r := httptest.NewRequest(method, "http://127.0.0.1:9478"+path, nil)
	r.Host = host
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

// get gives a page's text as a browser shows it, and its elements.
func get(t *testing.T, h http.Handler, path string, status int) (shown string, elements map[string][]html.Attribute) {
	t.Helper()
	resp := ask(h, "GET", path, "127.0.0.1:9478")
	if resp.StatusCode != status {
		t.Fatalf("%s: %s", path, resp.Status)
	}
	elements = make(map[string][]html.Attribute)
	var b strings.Builder
	for z := html.NewTokenizer(resp.Body); ; {
		switch z.Next() {
		case html.ErrorToken:
			if !errors.Is(z.Err(), io.EOF) {
				t.Fatal(z.Err())
			}
			return strings.Join(strings.FieldsFunc(b.String(), func(r rune) bool { return r == '|' }), "|") + "|", elements
		case html.TextToken:
			b.WriteString(strings.Join(strings.Fields(z.Token().Data), " ") + "|")
		case html.StartTagToken:
			token := z.Token()
			elements[token.Data] = append(elements[token.Data], token.Attr...)
		}
	}
}

// shownEvil is evil as it is to be seen.
var shownEvil = strings.ReplaceAll(evil, "\u202e", `\u202e`)

func TestHostPage(t *testing.T) {
	t.Parallel()
	shown, elements := get(t, handler(&agent{}), "/", 200)
	for _, want := range []string{"|host-a|", "belayd 1.2.3, up 1h0m0s; libvirt 9.0.0, QEMU 7.2.9; 12.0 GiB of 64.0 GiB free|", "by root: " + shownEvil, "libvirt cannot be asked: " + shownEvil, "|systemctl status libvirtd|",
		"|mig-1|", "|moves guest " + shownEvil + " to host-b|", "|1m30s|", "|running: perform|", "|75 %|", "guest " + shownEvil + ": is broken (mend it)|",
		"|patch-22|", "|partly|", "|3 more: belay ops list --all|", "|Freeze|", "|" + shownEvil + ", db-1|", "|2026-11-22 12:15:00|", "|guest " + shownEvil + "|",
		"|libvirt does not answer, this is as of", "|running (booted)|", "|migration out|", "|web-2|", "|shut off (shutdown)|", "|answers in 2ms|", ", takes no guests in|", "|no route to host|", "|not asked yet|",
		"|qemu-10|", "|2026-12-08 02:00:00|", "|" + shownEvil + "|: booked, 2026-12-01 02:00:00|db-1|: pending|", "|A|", "|fail|", "|kernel: " + shownEvil + "|", "|certificate: expires on 2026-12-01|", "|C|", "|n/a|"} {
		if !strings.Contains(shown, strings.Join(strings.Fields(want), " ")) {
			t.Errorf("no %q in\n%s", want, shown)
		}
	}
	if strings.Contains(shown, "|patch-02|") {
		t.Error("all operations are listed")
	}
	if strings.Contains(shown, "old-1") {
		t.Error("a campaign that is over is listed")
	}
	if !strings.Contains(fmt.Sprint(elements["meta"]), "{ http-equiv refresh} { content 5}") {
		t.Errorf("it is not loaded again: %v", elements["meta"])
	}
}

func TestLadderPage(t *testing.T) {
	t.Parallel()
	shown, elements := get(t, handler(&agent{}), "/ladder", 200)
	for _, want := range []string{"|Host:|warn|", "|Rung A:|fail|", "|libvirt|", "|libvirt 9.0.0|", "|→ renew it|", "|Rung C:|n/a|", "|" + shownEvil + "|"} {
		if !strings.Contains(shown, want) {
			t.Errorf("no %q in\n%s", want, shown)
		}
	}
	if strings.Contains(fmt.Sprint(elements["meta"]), "refresh") {
		t.Error("it is loaded again while it is read")
	}
}

func TestOperationPage(t *testing.T) {
	t.Parallel()
	a := &agent{report: told()}
	shown, elements := get(t, handler(a), "/ops/mig-1", 200)
	for _, want := range []string{"|mig-1:|partly|", "|moves guest " + shownEvil + " to host-b|", "took 2s. Taken up again after a restart of belayd: 1.|", "|blackout 41ms|", "|about 35ms (20ms to 80ms), as expected|",
		"|300ms|", "|unsynchronised: " + shownEvil + "|", "|boot ID as before|", "|kernel 6.1 → 6.12|", "|" + shownEvil + ": is not well|", "|bandwidth is not limited|", "|2026-11-22 12:00:00.123, perform: " + shownEvil + "|",
		"|2026-11-22 12:00:00.123|perform|begins|", "|perform|done|1s|", "|mig-2|"} {
		if !strings.Contains(shown, want) {
			t.Errorf("no %q in\n%s", want, shown)
		}
	}
	if strings.Contains(fmt.Sprint(elements["meta"]), "refresh") {
		t.Error("it is loaded again though nothing changes")
	}
	a.report.State, a.report.Step, a.report.Outcome = maint.OpRunning, "perform", ""
	shown, elements = get(t, handler(a), "/ops/mig-1", 200)
	if !strings.Contains(shown, "|running: perform|") || !strings.Contains(shown, "took 2s so far.") || !strings.Contains(fmt.Sprint(elements["meta"]), "refresh") {
		t.Errorf("%s\n%v", shown, elements["meta"])
	}
	shown, _ = get(t, handler(a), "/ops/"+url.PathEscape(evil), 404)
	if !strings.Contains(shown, "is not in the journal of host-a|") || !strings.Contains(shown, shownEvil) {
		t.Error(shown)
	}
}

// TestNothingIsObeyed: no name becomes an element, an attribute or an address.
func TestNothingIsObeyed(t *testing.T) {
	t.Parallel()
	a := &agent{report: told()}
	ours := regexp.MustCompile(`^/(style\.css|ladder|ops/[-.%0-9A-Za-z&=]+)?$`)
	for _, path := range []string{"/", "/ladder", "/ops/mig-1"} {
		_, elements := get(t, handler(a), path, 200)
		for name, attributes := range elements {
			if name == "script" || name == "img" {
				t.Errorf("%s has an element %s", path, name)
			}
			for _, at := range attributes {
				if strings.HasPrefix(at.Key, "on") || at.Key == "style" || at.Key == "src" || at.Key == "href" && !ours.MatchString(at.Val) {
					t.Errorf("%s: <%s %s=%q>", path, name, at.Key, at.Val)
				}
			}
		}
	}
}

func TestGuard(t *testing.T) {
	t.Parallel()
	h := handler(&agent{report: told()})
	for host, status := range map[string]int{"127.0.0.1:9478": 200, "127.0.0.1": 200, "127.1.2.3:1": 200, "[::1]:9478": 200, "[::1]": 200, "localhost": 200, "localhost:8080": 200,
		"evil.example": 421, "evil.example:9478": 421, "127.0.0.1.evil.example:9478": 421, "localhost.evil.example": 421, "192.0.2.1:9478": 421, "[2001:db8::1]:9478": 421, "": 421,
		"127.0.0.1:9478@evil.example": 421, "0.0.0.0:9478": 421, "[::ffff:192.0.2.1]:9478": 421} {
		for _, path := range []string{"/", "/ladder", "/ops/mig-1", "/style.css"} {
			if got := ask(h, "GET", path, host).StatusCode; got != status {
				t.Errorf("GET %s of %q: %d, want %d", path, host, got, status)
			}
		}
	}
	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE"} {
		resp := ask(h, method, "/", "localhost")
		if resp.StatusCode != 405 || resp.Header.Get("Allow") != "GET, HEAD" {
			t.Errorf("%s: %s, %v", method, resp.Status, resp.Header)
		}
	}
	for _, path := range []string{"/x", "/ops/", "/ops/a/b", "/v1/status", "/metrics", "/index.html", "/page.html"} {
		if got := ask(h, "GET", path, "localhost").StatusCode; got != 404 {
			t.Errorf("GET %s: %d", path, got)
		}
	}
	for _, path := range []string{"/", "/style.css", "/x"} {
		header := ask(h, "HEAD", path, "localhost").Header
		for name, want := range map[string]string{"Content-Security-Policy": "default-src 'none'; style-src 'self'", "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff",
			"Referrer-Policy": "no-referrer", "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin"} {
			if !strings.HasPrefix(header.Get(name), want) {
				t.Errorf("HEAD %s: %s is %q", path, name, header.Get(name))
			}
		}
		if header.Get("Access-Control-Allow-Origin") != "" {
			t.Error("other sites may read it")
		}
	}
}

// TestDoctorIsAskedNowAndThen, whoever asks for pages and how often.
func TestDoctorIsAskedNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agent{}
		h := handler(a)
		var all sync.WaitGroup
		begun := time.Now()
		for range 20 {
			all.Go(func() { ask(h, "GET", "/", "localhost") })
			all.Go(func() { ask(h, "GET", "/ladder", "localhost") })
		}
		all.Wait()
		if a.calls["Doctor"] != 1 || a.calls["Status"] != 40 {
			t.Errorf("asked for: %v", a.calls)
		}
		if d := time.Since(begun); d < 5*time.Second {
			t.Errorf("40 pages were made in %s", d)
		}
		time.Sleep(checkEvery)
		ask(h, "GET", "/", "localhost")
		if a.calls["Doctor"] != 2 {
			t.Errorf("asked for: %v", a.calls)
		}
	})
}

// TestOneAtATime: pages that cannot be made do not pile up.
func TestOneAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agent{block: make(chan struct{})}
		h := handler(a)
		var all sync.WaitGroup
		begun := time.Now()
		for range 3 {
			all.Go(func() {
				if got := ask(h, "GET", "/", "localhost").StatusCode; got != 503 {
					t.Errorf("%d", got)
				}
			})
		}
		all.Wait()
		if d := time.Since(begun); d != answerWithin {
			t.Errorf("it took %s", d)
		}
	})
}

func TestAgentThatFails(t *testing.T) {
	t.Parallel()
	a := &agent{err: maint.Problemf(maint.CodeHypervisorDown, "libvirt", "start it", "is not there: %s", evil)}
	shown, elements := get(t, handler(a), "/", 503)
	if !strings.Contains(shown, "is not there: "+shownEvil) || !strings.Contains(shown, "|start it|") || !strings.Contains(fmt.Sprint(elements["meta"]), "refresh") {
		t.Errorf("%s\n%v", shown, elements["meta"])
	}
}
