package vmtests

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

// update is felt by nobody, then by those that stay for a second, and never by those that
// their policy has move away.
const update = `
id = "storage-2"
[[changes]]
name = "marker"
kind = "sysctl"
rungs = ["A"]
apply = { command = ["/usr/bin/touch", "/run/updated"] }
undo = { command = ["/usr/bin/rm", "/run/updated"] }
[[changes]]
name = "storage"
kind = "network"
apply = { command = ["/usr/bin/sleep", "1"], expected = "1s" }
verify = { command = ["/usr/bin/test", "-e", "/run/updated"] }
undo = { command = ["/usr/bin/touch", "/run/undone"] }
[[checks]]
name = "fit"
when = ["before", "after"]
command = ["/usr/bin/test", "!", "-e", "/run/bad"]
failures = 1
`

// turnsBad is one more change, with which the host does not pass its check.
const turnsBad = `
[[changes]]
name = "bad"
kind = "sysctl"
rungs = ["A"]
apply = { command = ["/usr/bin/touch", "/run/bad"] }
undo = { command = ["/usr/bin/rm", "/run/bad"] }
`

// A host is updated by its plan: one guest is held, another, which must not be, moves away
// and comes back, with belayd killed in the middle. An update after which the host is not
// well is taken back.
func TestApply(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 2, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	a := f.Cluster.Nodes[0]
	var view maint.PolicyView
	if err := a.BelayJSON(ctx, &view, "policy", "set", "web-2", "--refuse", "B1"); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	manifest, plan := filepath.Join(dir, "update.toml"), filepath.Join(dir, "update.plan")
	if err := os.WriteFile(manifest, []byte(update), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := a.Belay(ctx, "plan", manifest, "--return", "--out", plan); err != nil || r.Code != 0 {
		t.Fatalf("%v: %s%s", err, r.Stdout, r.Stderr)
	}
	var op maint.Op
	if err := a.BelayJSON(ctx, &op, "apply", plan, "--detach"); err != nil {
		t.Fatal(err)
	}
	watch, seen := context.WithCancel(ctx)
	_, _ = a.Client().Watch(watch, op.ID, func(op maint.Op) {
		if strings.HasSuffix(op.Step, "-move") { // which takes a second and more
			seen()
		}
	})
	seen()
	if err := a.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if op = ended(t, ctx, a, op.ID); op.Outcome != maint.OutcomeDone || op.Resumed != 1 {
		t.Fatalf("%s, resumed %d times: %v", op.Outcome, op.Resumed, op.Problems)
	}
	if _, err := os.Stat(a.Path("/run/updated")); err != nil {
		t.Error(err)
	}
	felt := func(apply maint.OpID) map[string]int {
		ops, err := a.Client().Ops(ctx)
		if err != nil {
			t.Fatal(err)
		}
		n := make(map[string]int)
		for _, o := range ops {
			if o.Part != apply {
				continue
			}
			if n[string(o.Kind)+" "+string(o.Outcome)]++; o.Held == nil {
				continue
			}
			for _, g := range o.Held.Guests {
				if n[g.Guest]++; g.Pause < time.Second || g.Guest == "web-2" {
					t.Errorf("%+v", g)
				}
			}
		}
		return n
	}
	if n := felt(op.ID); n["migrate done"] != 1 || n["hold done"] != 1 || n["restore done"] != 1 || n["web-1"] != 1 {
		t.Errorf("%v", n)
	}
	if err := f.Prove(ctx, nil); err != nil {
		t.Error(err)
	}

	// It turns bad: the last step of the change makes it so.
	if err := os.WriteFile(manifest, []byte(update+turnsBad), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := a.Belay(ctx, "apply", manifest); err != nil || r.Code != 1 {
		t.Errorf("%v: exit code %d: %s%s", err, r.Code, r.Stdout, r.Stderr)
	}
	for name, want := range map[string]bool{"/run/updated": false, "/run/bad": false, "/run/undone": true} {
		if _, err := os.Stat(a.Path(name)); err == nil != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := f.Prove(ctx, nil); err != nil {
		t.Error(err)
	}
}
