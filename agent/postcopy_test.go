package agent_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// toBByPostCopy is of a guest that nothing else helps.
var toBByPostCopy = maint.MigrateRequest{Guest: "web-1", To: "b", MaxPause: 300 * time.Millisecond, Allow: []maint.Means{maint.MeansPostCopy}}

// writesFast has guests write faster than they can be copied.
func writesFast(w *agenttest.World, postCopy time.Duration) {
	w.SetCopy(hypervisortest.Copy{PostCopy: postCopy, Writes: hypervisortest.Writes{PerSecond: 5000 << 20, WorkingSet: 64 << 20, Network: 150 << 20}})
}

// TestKilledInPostCopy kills the source's agent at all that it does from when a copy is to
// go on as post-copy, which then breaks: the next agent sees it through.
func TestKilledInPostCopy(t *testing.T) {
	t.Parallel()
	points := make(chan string, 100)
	t.Run("at", func(t *testing.T) {
		for n := range 20 {
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				t.Parallel()
				if at := killedInPostCopy(t, n); at != "" {
					points <- at
				}
			})
		}
	})
	close(points)
	met := make(map[string]bool)
	for at := range points {
		met[at] = true
	}
	for _, what := range []string{"before HoldOut", "after HoldOut", "before StartPostCopy", "after StartPostCopy", "before ResumePostCopy", "after ResumePostCopy"} {
		if !met[what] {
			t.Errorf("never killed %s, only at %v", what, met)
		}
	}
}

func killedInPostCopy(t *testing.T, n int) string {
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	source := w.Nodes[0]
	uuid := source.Host.PutGuest("web-1", autostarted)
	writesFast(w, 300*time.Millisecond)
	var once sync.Once
	w.OnPhase(func(uuid string, p hypervisortest.Phase) {
		if p == hypervisortest.PhasePostCopy {
			once.Do(func() { time.AfterFunc(50*time.Millisecond, func() { source.Host.BreakPostCopy(t, uuid) }) })
		}
	})
	k := &killer{node: source, left: n, dead: make(chan struct{})}
	begun := false // only what the agent does from then on counts
	var mu sync.Mutex
	source.Stop()
	source.Start(func(what string) {
		mu.Lock()
		begun = begun || what == "before HoldOut"
		counts := begun && (strings.Contains(what, "PostCopy") || strings.Contains(what, "HoldOut") || strings.Contains(what, "append"))
		mu.Unlock()
		if counts {
			k.hook(what)
		}
	})
	ctx := ctxFor(t, patience)
	op, err := source.Client.Migrate(ctx, toBByPostCopy)
	if err != nil {
		t.Fatal(err)
	}
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		select {
		case <-k.dead:
			source.Restart()
		case <-ctx.Done():
		}
	}()
	op = await(t, ctx, source, op.ID)
	k.mu.Lock()
	at := k.at
	k.off = true
	k.mu.Unlock()
	if at != "" {
		<-restarted
	}
	running, defined := places(t, w, uuid)
	if op.Outcome != maint.OutcomeDone || running != "b" || defined != "b+autostart" {
		t.Fatalf("killed %s (n=%d): %q, %+v; runs on %q, defined on %q", at, n, op.Outcome, op.Problems, running, defined)
	}
	return at
}

// TestBrokenPostCopyIsTold: while it is broken an abort is refused, and status, the
// operation and the metrics say so; when it is over they do not any more.
func TestBrokenPostCopyIsTold(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	source := w.Nodes[0]
	uuid := source.Host.PutGuest("web-1", autostarted)
	writesFast(w, 300*time.Millisecond)
	w.OnPhase(func(uuid string, p hypervisortest.Phase) {
		if p == hypervisortest.PhasePostCopy {
			source.Host.CutLAN() // the agents' own is not
			time.AfterFunc(50*time.Millisecond, func() { source.Host.BreakPostCopy(t, uuid) })
		}
	})
	ctx := ctxFor(t, patience)
	op, err := source.Client.Migrate(ctx, toBByPostCopy)
	if err != nil {
		t.Fatal(err)
	}
	metrics := func() string {
		answer := httptest.NewRecorder()
		source.Agent.Metrics().ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		return answer.Body.String()
	}
	told := func() bool {
		op, err := source.Client.Op(ctx, op.ID)
		if err != nil {
			t.Fatal(err)
		}
		return op.Trouble != nil
	}
	for !told() {
		if ctx.Err() != nil {
			t.Fatal("nobody was told")
		}
		time.Sleep(20 * time.Millisecond)
	}
	broken := func(c maint.Condition) bool { return c.Code == maint.CodePostCopy && c.Remedy != "" }
	s, err := source.Client.Status(ctx)
	if err != nil || !slices.ContainsFunc(s.Conditions, broken) {
		t.Errorf("the conditions are %+v, %v", s.Conditions, err)
	}
	if m := metrics(); !strings.Contains(m, "belay_postcopy_broken 1") {
		t.Errorf("the metrics say\n%s", m)
	}
	var p *maint.Problem
	if _, err := source.Client.Abort(ctx, op.ID); !errors.As(err, &p) || p.Code != maint.CodePostCopy || !strings.Contains(p.Reason, "there is no way back") {
		t.Errorf("the abort: %v", err)
	}
	source.Host.RestoreLAN()
	op = await(t, ctx, source, op.ID)
	ends(t, w, op, uuid, maint.OutcomeDone, "")
	if s, err = source.Client.Status(ctx); err != nil || slices.ContainsFunc(s.Conditions, broken) || !strings.Contains(metrics(), "belay_postcopy_broken 0") {
		t.Errorf("the conditions are %+v, %v", s.Conditions, err)
	}
}
