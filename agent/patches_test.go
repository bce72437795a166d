package agent_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/patch/live/livetest"
)

// patchBed is one host, and livepatches whose vendor it trusts.
type patchBed struct {
	*agenttest.Node
	w      *agenttest.World
	t      *testing.T
	ctx    context.Context
	vendor *livetest.Vendor
	dir    string
}

func newPatchBed(t *testing.T, edit func(*config.Config)) *patchBed {
	t.Helper()
	w := agenttest.New(t, quiet(t), edit, "a")
	b := &patchBed{Node: w.Nodes[0], w: w, t: t, ctx: ctxFor(t, patience), vendor: livetest.NewVendor(t), dir: t.TempDir()}
	b.vendor.Trust(b.Kernel.Keys)
	b.Host.PutGuest("web-1", func(*maint.Guest) {})
	return b
}

// file is a livepatch's.
func (b *patchBed) file(name string) string {
	return livetest.Write(b.t, b.dir, name, b.vendor.Make(name, b.Kernel.Release, b.Kernel.Version, func(s *livetest.Spec) { s.Covers = []string{"CVE-" + name} }))
}

func (b *patchBed) patch(r maint.PatchRequest) maint.Op {
	b.t.Helper()
	op, err := b.Client.Patch(b.ctx, r)
	if err != nil {
		b.t.Fatal(err)
	}
	return await(b.t, b.ctx, b.Node, op.ID)
}

func (b *patchBed) apply(name string) maint.Op {
	b.t.Helper()
	return b.patch(maint.PatchRequest{Action: maint.PatchApply, File: b.file(name)})
}

func (b *patchBed) must(op maint.Op, want maint.Outcome) {
	b.t.Helper()
	if op.Outcome != want {
		b.t.Fatalf("%s ended %q, want %q: %v", op.ID, op.Outcome, want, op.Problems)
	}
}

// settled is what the host shows when nothing is to be done any more.
func (b *patchBed) settled() (maint.PatchView, string) {
	b.t.Helper()
	for {
		v, err := b.Client.Patches(b.ctx)
		ops, err2 := b.Client.Ops(b.ctx)
		open := false
		for _, op := range ops {
			open = open || op.State != maint.OpEnded
		}
		loaded := b.Kernel.Loaded()
		if err == nil && err2 == nil && !open && (v.AutoOff != "" || v.Active == nil || strings.Contains(loaded, v.Active.Name)) {
			return v, loaded
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-b.ctx.Done():
			b.t.Fatalf("it does not settle: %+v, %q, %v", v, loaded, errors.Join(err, err2))
		}
	}
}

func TestPatchApplyAndRevert(t *testing.T) {
	t.Parallel()
	b := newPatchBed(t, nil)
	op := b.apply("fix_0")
	b.must(op, maint.OutcomeDone)
	if op.Patched == nil || op.Patched.Transition <= 0 || op.Patch.Boot == "" {
		t.Errorf("%+v", op)
	}
	b.must(b.apply("fix_1"), maint.OutcomeDone)
	for change, want := range map[string]maint.CoverageVerdict{"CVE-fix_1": maint.Covered, "CVE-fix_0": maint.CoverageUnsure} {
		if c, err := b.Client.Coverage(b.ctx, change); err != nil || c.Verdict != want || c.Reason == "" {
			t.Errorf("%s: %+v, %v", change, c, err)
		}
	}
	f, err := b.Client.InspectPatch(b.ctx, b.file("fix_1"))
	if err != nil || f.Name != "fix_1" || len(f.Problems) != 1 || f.Problems[0].Code != maint.CodePatchLoaded {
		t.Errorf("%+v, %v", f, err)
	}
	b.must(b.apply("fix_1"), maint.OutcomeBlocked)
	b.must(b.patch(maint.PatchRequest{Action: maint.PatchRevert, Name: "fix_0"}), maint.OutcomeBlocked)
	b.must(b.patch(maint.PatchRequest{Action: maint.PatchRevert, Name: "fix_1"}), maint.OutcomeDone)
	if v, loaded := b.settled(); loaded != "" || v.Active != nil {
		t.Errorf("loaded %q, kept %+v", loaded, v.Active)
	}
}

// TestPatchHealth: a health command that says no has the livepatch taken back.
func TestPatchHealth(t *testing.T) {
	t.Parallel()
	b := newPatchBed(t, func(c *config.Config) { c.Patch.Health = []string{"false"} })
	op := b.apply("fix_0")
	b.must(op, maint.OutcomeFailed)
	if len(op.Problems) != 1 || op.Problems[0].Code != maint.CodeUnwell {
		t.Errorf("%v", op.Problems)
	}
	if v, loaded := b.settled(); loaded != "" || v.Active != nil {
		t.Errorf("loaded %q, kept %+v", loaded, v.Active)
	}
}

// TestPatchAbort: Ctrl-C's 'belay ops abort' turns a transition round.
func TestPatchAbort(t *testing.T) {
	t.Parallel()
	b := newPatchBed(t, nil)
	b.must(b.apply("fix_0"), maint.OutcomeDone)
	b.Kernel.Hold(120, "worker_thread")
	loaded := make(chan struct{})
	b.Kernel.OnLoad = func(string) { close(loaded) }
	op, err := b.Client.Patch(b.ctx, maint.PatchRequest{Action: maint.PatchApply, File: b.file("fix_1")})
	if err != nil {
		t.Fatal(err)
	}
	<-loaded
	b.Kernel.OnLoad = nil
	if v, err := b.Client.Patches(b.ctx); err != nil || len(v.Loaded) != 2 || !v.Loaded[1].Transition || len(v.Waiting) != 1 || v.Waiting[0].TID != 120 {
		t.Errorf("%+v, %v", v, err)
	}
	if _, err := b.Client.Patch(b.ctx, maint.PatchRequest{Action: maint.PatchRevert, Name: "fix_0"}); !isCode(err, maint.CodeBusy) {
		t.Errorf("another one meanwhile: %v", err)
	}
	if _, err := b.Client.Abort(b.ctx, op.ID); err != nil {
		t.Fatal(err)
	}
	b.must(await(t, b.ctx, b.Node, op.ID), maint.OutcomeAborted)
	if v, loaded := b.settled(); loaded != "fix_0" || v.Active.Name != "fix_0" {
		t.Errorf("loaded %q, kept %+v", loaded, v.Active)
	}
}

func isCode(err error, code maint.Code) bool {
	var r *maint.Refusal
	return errors.As(err, &r) && r.Problems[0].Code == code
}

// TestPatchAfterBoot: what was active is loaded again after a boot, unless the kernel is
// another, the command line says no, or the host went down while one was being loaded.
func TestPatchAfterBoot(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, want string
		do         func(*patchBed)
	}{
		{"same kernel", "fix_0", func(b *patchBed) {}},
		{"same kernel, and libvirt comes later", "fix_0", func(b *patchBed) {
			b.Host.KillLibvirt()
			time.AfterFunc(500*time.Millisecond, b.Host.RestartLibvirt)
		}},
		{"same kernel, and cannot be looked at yet", "fix_0", func(b *patchBed) {
			file := filepath.Join(b.Kernel.Root(), "proc/sys/kernel/tainted")
			if err := os.Rename(file, file+"~"); err != nil {
				b.t.Fatal(err)
			}
			time.AfterFunc(500*time.Millisecond, func() { _ = os.Rename(file+"~", file) })
		}},
		{"another kernel", "", func(b *patchBed) { b.Kernel.Release = "6.1.0-26-amd64"; b.Kernel.Boot() }},
		{"switched off", "", func(b *patchBed) { b.Kernel.SetCommandLine("ro belay.nolivepatch quiet") }},
		{"not configured", "", func(b *patchBed) { b.Config.Patch.AutoLoad = false }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newPatchBed(t, nil)
			b.must(b.apply("fix_0"), maint.OutcomeDone)
			b.Stop()
			b.Kernel.Boot()
			c.do(b)
			reloaded := make(chan struct{})
			b.Kernel.OnLoad = func(string) { close(reloaded) }
			b.Start(nil)
			if c.want != "" {
				<-reloaded
				if _, loaded := b.settled(); loaded != c.want {
					t.Errorf("loaded %q, want %q", loaded, c.want)
				}
				return
			}
			// It would be begun at once: an operation that comes after that ends first.
			b.must(b.patch(maint.PatchRequest{Action: maint.PatchMicrocode}), maint.OutcomeBlocked)
			v, err := b.Client.Patches(b.ctx)
			if err != nil || v.Active == nil || b.Kernel.Loaded() != "" {
				t.Errorf("%+v, %v, loaded %q", v, err, b.Kernel.Loaded())
			}
			if ops, err := b.Client.Ops(b.ctx); err != nil || len(ops) != 2 {
				t.Errorf("operations %v, %v", ops, err)
			}
		})
	}
}

// TestPatchBootLoop: a host that goes down while the livepatch is loaded at boot loads none
// at the next, and says so; by hand it does.
func TestPatchBootLoop(t *testing.T) {
	t.Parallel()
	b := newPatchBed(t, nil)
	b.must(b.apply("fix_0"), maint.OutcomeDone)
	b.Stop()
	b.Kernel.Boot()
	b.Kernel.Hold(120, "worker_thread")
	died := make(chan struct{})
	b.Kernel.OnLoad = func(string) { b.Kill(); close(died) }
	b.Start(nil)
	<-died
	b.Kernel.OnLoad = nil
	b.Kernel.LetGo(120)
	b.Kernel.Boot()
	b.Restart()
	v, loaded := b.settled()
	if loaded != "" || !strings.Contains(v.NoReload, "fix_0") || v.Active == nil {
		t.Fatalf("loaded %q, %+v", loaded, v)
	}
	if s, err := b.Client.Status(b.ctx); err != nil || len(s.Conditions) == 0 {
		t.Errorf("conditions %v, %v", s.Conditions, err)
	}
	b.must(b.patch(maint.PatchRequest{Action: maint.PatchReload}), maint.OutcomeDone)
	if v, loaded := b.settled(); loaded != "fix_0" || v.NoReload != "" {
		t.Errorf("loaded %q, %+v", loaded, v)
	}
	b.must(b.patch(maint.PatchRequest{Action: maint.PatchRevert, Name: "fix_0"}), maint.OutcomeDone)
	if v, loaded := b.settled(); loaded != "" || v.Active != nil {
		t.Errorf("loaded %q, %+v", loaded, v)
	}
}

// TestPatchKilledAnywhere kills the agent at every single thing that it does for a livepatch,
// starts it again, perhaps after a boot, and looks: the host is patched and that is recorded,
// or it is as it was.
func TestPatchKilledAnywhere(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name        string
		before      bool // fix_0 is active
		stall, boot bool
		revert      bool
	}{
		{name: "the first"},
		{name: "in another's place", before: true},
		{name: "a transition that stalls, in another's place", before: true, stall: true},
		{name: "revert", before: true, revert: true},
		{name: "the host goes down", before: true, boot: true},
		{name: "the host goes down in a revert", before: true, revert: true, boot: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			points := 0
			for n := 0; ; n++ {
				at := patchKilledAt(t, n, c.before, c.stall, c.revert, c.boot)
				if at == "" {
					break
				}
				points++
			}
			if points < 6 {
				t.Fatalf("only %d points were met", points)
			}
			t.Logf("killed at %d points", points)
		})
	}
}

func patchKilledAt(t *testing.T, n int, before, stall, revert, boot bool) (at string) {
	t.Helper()
	b := newPatchBed(t, nil)
	was := ""
	if before {
		was = "fix_0"
		b.must(b.apply(was), maint.OutcomeDone)
	}
	r := maint.PatchRequest{Action: maint.PatchApply, File: b.file("fix_1")}
	if revert {
		r = maint.PatchRequest{Action: maint.PatchRevert, Name: "fix_0"}
	}
	if stall {
		b.Kernel.Hold(120, "worker_thread")
		b.Kernel.OnLoad = func(name string) {
			if name == was {
				b.Kernel.LetGo(120)
			}
		}
	}
	k := &killer{node: b.Node, left: n, dead: make(chan struct{})}
	b.Stop()
	if stall {
		b.Timing.Limit = 500 * time.Millisecond
	}
	b.Start(k.hook)
	op, err := b.Client.Patch(b.ctx, r)
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		select {
		case <-k.dead:
			if boot {
				b.Kernel.Boot()
			}
			b.Restart()
		case <-b.ctx.Done():
		}
	}()
	if err != nil { // killed while it was being admitted
		k.cut(t, err)
		<-restarted
		ops, err := b.Client.Ops(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range ops {
			if o.Patch.Action == r.Action && o.Patch.Name != was || revert && o.Patch.Action == maint.PatchRevert {
				op = o
			}
		}
	}
	if op.ID != "" {
		op = await(t, b.ctx, b.Node, op.ID)
	}
	k.mu.Lock()
	at, k.off = k.at, true
	k.mu.Unlock()
	if at != "" {
		<-restarted
	}
	v, loaded := b.settled()
	story := fmt.Sprintf("killed %s (n=%d): operation %q ended %q, problems %v; loaded %q, kept %+v, no reload %q", at, n, op.ID, op.Outcome, op.Problems, loaded, v.Active, v.NoReload)
	now := map[bool]string{false: "fix_1", true: ""}[revert]
	kept := ""
	if v.Active != nil {
		kept = v.Active.Name
	}
	done := op.Outcome == maint.OutcomeDone
	switch {
	case op.ID != "" && op.State != maint.OpEnded, op.Outcome == maint.OutcomeStuck, op.Outcome == maint.OutcomePartly:
		t.Fatal(story)
	case done && kept != now, !done && kept != was:
		t.Fatal(story)
	case loaded != kept && !(boot && loaded == "" && v.NoReload != ""):
		t.Fatal(story)
	case !stall && !boot && op.ID != "" && !done, stall && done:
		t.Fatal(story)
	case !boot && v.NoReload != "":
		t.Fatal(story)
	}
	b.Stop()
	b.w.Close()
	return at
}

// TestComponents: what cannot be is refused, with a reason and a remedy.
func TestComponents(t *testing.T) {
	t.Parallel()
	b := newPatchBed(t, nil)
	for _, c := range []struct {
		r    maint.PatchRequest
		want maint.Code
	}{
		{maint.PatchRequest{Action: maint.PatchRestart, Name: "ssh.service"}, maint.CodeComponent},
		{maint.PatchRequest{Action: maint.PatchRestart, Name: "virtlogd.service"}, maint.CodeComponent},
		{maint.PatchRequest{Action: maint.PatchMicrocode}, maint.CodeNeedsReboot},
	} {
		op := b.patch(c.r)
		b.must(op, maint.OutcomeBlocked)
		if op.Problems[0].Code != c.want || op.Problems[0].Remedy == "" {
			t.Errorf("%+v: %v", c.r, op.Problems)
		}
	}
	for _, r := range []maint.PatchRequest{{}, {Action: "force"}, {Action: maint.PatchApply, File: "fix.ko"}, {Action: maint.PatchRevert, Name: "../x"},
		{Action: maint.PatchRestart}, {Action: maint.PatchMicrocode, Boot: "x"}} {
		var p *maint.Problem
		if _, err := b.Client.Patch(b.ctx, r); !errors.As(err, &p) || p.Code != maint.CodeBadRequest {
			t.Errorf("%+v: %v", r, err)
		}
	}
}
