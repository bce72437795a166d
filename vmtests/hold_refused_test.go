package vmtests

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/maint"
)

// events is what libvirt tells of guests' lives, as virsh prints it.
type events struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (e *events) Write(b []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.text.Write(b)
}

// suspended counts the times that guests were paused.
func (e *events) suspended() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.Count(e.text.String(), "Suspended")
}

// follow has virsh follow events, and returns when it does.
func (w *ward) follow(ctx context.Context) *events {
	w.t.Helper()
	e := new(events)
	cmd := w.Command(ctx, "stdbuf", "-oL", "virsh", "event", "--all", "--loop")
	cmd.Stdout = e
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for e.suspended() == 0 {
		w.flick(ctx)
		sleep(ctx, 100*time.Millisecond)
		if ctx.Err() != nil {
			w.t.Fatal("virsh hears of no event")
		}
	}
	return e
}

// flick has somebody else resume and pause their guest.
func (w *ward) flick(ctx context.Context) {
	w.t.Helper()
	for _, what := range []string{"resume", "suspend"} {
		if _, err := w.Virsh(ctx, what, theirs); err != nil {
			w.t.Fatal(err)
		}
	}
}

// configure starts belayd anew with other settings.
func (w *ward) configure(ctx context.Context, settings string) {
	w.t.Helper()
	if err := w.Stop(); err != nil {
		w.t.Fatal(err)
	}
	w.Settings = settings
	if err := w.Start(ctx); err != nil {
		w.t.Fatal(err)
	}
}

// TestHoldRefused asks for holds that cannot be, or cannot be whole. What is
// refused is refused before any guest is paused.
func TestHoldRefused(t *testing.T) {
	t.Parallel()
	w := newWard(t, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	tiny := filepath.Join(w.Dir, "tiny") // run_dirs on file systems of their own
	inside := func(name string, args ...string) {
		t.Helper()
		if out, err := w.Command(ctx, name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	sealed := filepath.Join(w.Dir, "sealed")
	for dir, option := range map[string]string{tiny: "size=64k", sealed: "ro"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		inside("mount", "-t", "tmpfs", "-o", option, "run", dir)
	}
	seen := w.follow(ctx)

	// asks has belay hold be refused, for a reason that says one of the words.
	asks := func(name string, code int, words string, args ...string) {
		t.Run(name, func(t *testing.T) {
			trail := filepath.Join(w.Dir, "refused")
			before, mark, late := seen.suspended(), w.obs.Mark(), lateness()
			r, err := w.Belay(ctx, append(append([]string{"hold", "--max-pause", "3s"}, args...), "--", "touch", trail)...)
			if err != nil {
				t.Fatal(err)
			}
			noise := late()
			t.Logf("exit code %d: %s", r.Code, r.Stderr)
			if r.Code != code || !strings.Contains(r.Stderr, words) {
				t.Errorf("exit code %d, want %d, and %q", r.Code, code, words)
			}
			if _, err := os.Stat(trail); err == nil {
				t.Error("the command was run")
			}
			w.flick(ctx) // events come in order
			for end := time.Now().Add(time.Minute); seen.suspended() == before && time.Now().Before(end); {
				sleep(ctx, 10*time.Millisecond)
			}
			if n := seen.suspended() - before; n != 1 { // ours
				t.Errorf("%d guests were paused", n-1)
			}
			if gap := w.obs.Since(mark, "web-1").LargestGap; gap.Length > 500*time.Millisecond+noise {
				t.Errorf("web-1 stood still for %s", gap.Length)
			}
		})
	}

	if out, err := w.Virsh(ctx, "qemu-agent-command", "web-1", `{"execute":"guest-fsfreeze-freeze"}`); err != nil {
		t.Errorf("the agent does not freeze: %s %v", out, err)
	}
	status, err := w.Virsh(ctx, "qemu-agent-command", "web-1", `{"execute":"guest-fsfreeze-status"}`)
	if err != nil {
		t.Error(err)
	}
	if strings.Contains(status, "frozen") {
		asks("frozen file systems", 3, "frozen", "--all")
		if _, err := w.Virsh(ctx, "qemu-agent-command", "web-1", `{"execute":"guest-fsfreeze-thaw"}`); err != nil {
			t.Error(err)
		}
	} else {
		t.Logf("this guest's agent says %s with nothing mounted that could be frozen: package preserve's own tests have that", strings.TrimSpace(status))
	}
	asks("an unknown guest", 3, "web-9", "--guest", "web-9")
	asks("a guest that somebody else paused, alone", 3, "no guest to hold runs here", "--guest", theirs)
	asks("a guest in two groups", 3, "more than one release group", "--all", "--group", "web-1", "--group", "web-1")

	w.configure(ctx, "[hold]\nleash = \"/nonexistent/belay-leash\"\n")
	asks("without the leash's program", 3, "/nonexistent/belay-leash", "--all")
	w.configure(ctx, "run_dir = \""+tiny+"\"\n")
	inside("sh", "-c", "head -c 1000000 /dev/zero >"+tiny+"/fill || true")
	asks("no room in run_dir", 3, "no space left", "--all")
	w.configure(ctx, "run_dir = \""+sealed+"\"\n")
	asks("run_dir is read-only", 3, "read-only", "--all")
	w.configure(ctx, "")

	t.Run("no agent", func(t *testing.T) {
		w.create(ctx, t, "bare")
		var op maint.Op
		if err := w.BelayJSON(ctx, &op, "hold", "--guest", "bare", "--max-pause", "3s", "--", "true"); err != nil {
			t.Fatal(err)
		}
		g := op.Held.Guests[0]
		if op.Outcome != maint.OutcomeDone || g.Pause == 0 || g.ReleasedBy != "belayd" || g.Clock == nil || g.Clock.State != maint.ClockUnsynchronised || g.Clock.Reason == "" {
			t.Errorf("%s: %+v, clock %+v", op.Outcome, g, g.Clock)
		}
		if got := w.state(ctx, "bare"); got != "running (unpaused)" {
			t.Error(got)
		}
	})
	t.Run("no guests", func(t *testing.T) {
		for _, name := range []string{"web-1", "bare", theirs} {
			if _, err := w.Virsh(ctx, "destroy", name); err != nil {
				t.Fatal(err)
			}
		}
		r, err := w.Belay(ctx, "hold", "--all", "--", "true")
		if err != nil || r.Code != 70 || !strings.Contains(r.Stderr, "runs no guest") {
			t.Errorf("%+v %v", r, err)
		}
	})
}
