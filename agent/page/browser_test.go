package page_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image/color"
	"image/png"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/agent/page"
	"belay/hypervisor/hypervisortest"
)

// evil is a guest's name that wants to be more than one.
const evil = `<script>document.title="owned";new Image().src="/owned"</script><img src=/owned onerror="document.title='owned'">`

// TestInABrowser looks at the pages of a whole agent as people do.
func TestInABrowser(t *testing.T) {
	b := newChromium(t, "--host-resolver-rules=MAP evil.example 127.0.0.1")
	w := agenttest.New(t, slog.New(slog.DiscardHandler), func(c *config.Config) { c.Events = config.Events{Enabled: true, Policy: "all"} }, "a", "b")
	n := w.Nodes[0]
	n.Host.PutGuest(evil)
	n.Host.PutGuest("web-1")
	// One operation has ended, one waits for its guest's notice, and one runs.
	ctx := t.Context()
	hold, err := n.Client.Hold(ctx, maint.HoldRequest{Guests: []string{evil}, Step: maint.HostStep{Command: []string{"true"}}, Emergency: "a test", Reason: evil})
	must(t, err)
	_, err = n.Client.Watch(ctx, hold.ID, func(maint.Op) {})
	must(t, err)
	copying := make(chan struct{}, 1)
	w.OnPhase(func(_ string, ph hypervisortest.Phase) {
		if ph == hypervisortest.PhaseCopying {
			copying <- struct{}{}
		}
	})
	w.Nodes[0].Host.HoldCopies()
	move, err := n.Client.Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: "b", Emergency: "a test"})
	must(t, err)
	<-copying
	progressing, seen := context.WithCancel(ctx)
	_, _ = n.Client.Watch(progressing, move.ID, func(op maint.Op) {
		if op.Progress != nil && op.Progress.MemoryTotal > 0 {
			seen()
		}
	})
	seen()
	_, err = n.Client.Migrate(ctx, maint.MigrateRequest{Guest: evil, To: "b"})
	must(t, err)
	found := errors.New("found")
	if err := n.Client.WatchEvents(ctx, false, func(all []maint.ScheduledEvent) error {
		for _, e := range all {
			if e.State == maint.EventScheduled {
				return found
			}
		}
		return nil
	}); !errors.Is(err, found) {
		t.Fatal(err)
	}

	var asked, owned atomic.Int64
	h := page.Handler(n.Agent, slog.New(slog.DiscardHandler))
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/owned":
			owned.Add(1)
		case "/":
			asked.Add(1)
		case "/control": // says whether scripts run
			fmt.Fprint(w, `<p id=x>no script ran</p><script>document.getElementById("x").textContent="a script ran"</script>`)
			return
		}
		h.ServeHTTP(w, r)
	}))
	defer site.Close()

	const name = "&lt;script&gt;document.title="
	for _, run := range []bool{true, false} {
		b.scripts(run)
		if got := b.see(site.URL + "/control"); strings.Contains(got, ">a script ran<") != run {
			t.Fatalf("scripts are to run: %v; %s", run, got)
		}
		host, report, ladder := b.see(site.URL+"/"), b.see(site.URL+"/ops/"+string(hold.ID)), b.see(site.URL+"/ladder")
		for page, wants := range map[string][]string{
			host:   {"<title>a - Belay</title>", "<h1>a</h1>", name, string(hold.ID), string(move.ID), "moves guest web-1 to b", "running: perform", "scheduled", "Freeze", "The ladder", "<progress "},
			report: {"<title>" + string(hold.ID) + " on a - Belay</title>", name, ">done</span>", "released by belayd", "pause ", "Timeline", "the leash is armed"},
			ladder: {"<h1>The ladder</h1>", "Rung D: ", "peer"},
		} {
			for _, want := range wants {
				if !strings.Contains(page, want) {
					t.Errorf("scripts run: %v; no %s in\n%s", run, want, page)
				}
			}
		}
	}
	if owned.Load() > 0 {
		t.Error("a guest's name had the browser do something")
	}

	// It is drawn, and loaded again by itself.
	b.load(site.URL + "/")
	drawn(t, b.picture())
	asked.Store(0)
	b.loaded()
	if asked.Load() != 1 {
		t.Errorf("it was asked for %d times", asked.Load())
	}

	// Another site's name that leads here is told nothing.
	other := strings.Replace(site.URL, "127.0.0.1", "evil.example", 1)
	if got := b.see(other + "/"); !strings.Contains(got, "served to its own host only") || strings.Contains(got, "web-1") {
		t.Errorf("evil.example is told %s", got)
	}
	w.Nodes[0].Host.ReleaseCopies()
	_, err = n.Client.Watch(ctx, move.ID, func(maint.Op) {})
	must(t, err)
}

// drawn sees that a picture of the page has the colours of its style sheet, and leaves it with
// what the tests leave.
func drawn(t *testing.T, picture []byte) {
	t.Helper()
	if dir := os.Getenv("BELAY_ARTIFACTS"); dir != "" {
		must(t, os.MkdirAll(dir, 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "status-page.png"), picture, 0o644))
	}
	shot, err := png.Decode(bytes.NewReader(picture))
	must(t, err)
	green := color.RGBA{R: 0x17, G: 0x80, B: 0x3d, A: 0xff} // .good, of which there is much
	for y := range shot.Bounds().Dy() {
		for x := range shot.Bounds().Dx() {
			if color.RGBAModel.Convert(shot.At(x, y)) == green {
				return
			}
		}
	}
	t.Error("nothing is in the style sheet's green")
}
