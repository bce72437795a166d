package agent_test

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent"
	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/journal"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// awayInMidCopy is a world whose source's agent was stopped in the middle of a
// copy, which is held, of an operation that has a second to live. Copies that
// are begun after it come over begun.
func awayInMidCopy(t *testing.T, ctx context.Context) (w *agenttest.World, uuid string, op maint.Op, begun <-chan string) {
	t.Helper()
	w = agenttest.New(t, quiet(t), nil, "a", "b")
	source := w.Nodes[0]
	uuid = source.Host.PutGuest("web-1", autostarted)
	source.Host.HoldCopies()
	begun = copying(w)
	r := toB
	r.Timeout = time.Second
	op, err := source.Client.Migrate(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	<-begun
	source.Stop()
	return w, uuid, op, begun
}

// TestGraceAfterAbsence: an operation whose time ran out while the agent was
// away is given some more, also at the first restart: its copy has gone on.
func TestGraceAfterAbsence(t *testing.T) {
	t.Parallel()
	ctx := ctxFor(t, patience)
	w, uuid, op, _ := awayInMidCopy(t, ctx)
	source := w.Nodes[0]
	time.Sleep(time.Until(op.Deadline))
	source.Start(nil)
	time.AfterFunc(100*time.Millisecond, source.Host.ReleaseCopies)
	ends(t, w, await(t, ctx, source, op.ID), uuid, maint.OutcomeDone, "")
}

// TestNoCopyAfterItsTime: where the copy has failed while the agent was away,
// the guest is not moved by an operation that nobody expects any more.
func TestNoCopyAfterItsTime(t *testing.T) {
	t.Parallel()
	ctx := ctxFor(t, patience)
	w, uuid, op, begun := awayInMidCopy(t, ctx)
	source := w.Nodes[0]
	w.Nodes[1].Host.KillQEMU(t, uuid)
	source.Host.ReleaseCopies()
	time.Sleep(time.Until(op.Deadline))
	source.Start(nil)
	ends(t, w, await(t, ctx, source, op.ID), uuid, maint.OutcomeFailed, maint.CodeTimeout)
	if len(begun) > 0 {
		t.Error("another copy was begun after the operation's time")
	}
}

// foreign has somebody else migrate a guest from a to c, and returns when that
// is under way.
func foreign(t *testing.T, w *agenttest.World, uuid string) {
	from, to := w.Nodes[0].Host, w.Nodes[2].Host
	go func() {
		_ = from.Migrate(context.Background(), uuid, maint.MoveParams{DestURI: to.URI(), Persist: true})
	}()
	for {
		if j, err := from.Job(ctxFor(t, patience), uuid); err != nil || j.Active {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// TestForeignMigration: somebody else begins to migrate the guest while Belay is
// about to, or after Belay's own copy has failed. That job is not touched, not
// even by an abort, and its guest not claimed.
func TestForeignMigration(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		call string     // of a, after which it happens
		code maint.Code // "" to have the operation aborted
	}{
		"before the copy":              {"DryRun", maint.CodeBusy},
		"before the copy, and aborted": {"DryRun", ""},
		"after the copy":               {"Migrate", maint.CodeBusy},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), nil, "a", "b", "c")
			source := w.Nodes[0]
			uuid := source.Host.PutGuest("web-1", autostarted)
			source.Host.HoldCopies()
			var once, dies sync.Once
			var aborts atomic.Int32
			w.OnPhase(func(uuid string, p hypervisortest.Phase) {
				if c.call == "Migrate" && p == hypervisortest.PhaseCopying {
					dies.Do(func() { w.Nodes[1].Host.KillQEMU(t, uuid) })
				}
			})
			w.OnCall(func(call hypervisortest.Call) {
				if call.Host == "a" && call.Op == "AbortJob" {
					aborts.Add(1)
				}
				if call.Host == "a" && call.Op == c.call && call.Done {
					once.Do(func() {
						foreign(t, w, uuid)
						if c.code == "" {
							abortAll(t, source)
						}
					})
				}
			})
			op := move(t, w)
			if c.code == "" {
				if op.Outcome != maint.OutcomeAborted {
					t.Errorf("%q: %+v", op.Outcome, op.Problems)
				}
			} else if op.Outcome != maint.OutcomeBlocked && op.Outcome != maint.OutcomeFailed || op.Problems[0].Code != c.code {
				t.Errorf("%q: %+v", op.Outcome, op.Problems)
			}
			if n := aborts.Load(); n > 0 {
				t.Errorf("somebody else's job was aborted %d times", n)
			}
			source.Host.ReleaseCopies()
			for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
				if running, _ := places(t, w, uuid); running == "c" {
					break
				}
				if time.Now().After(deadline) {
					t.Fatal("the other migration came to nothing")
				}
			}
		})
	}
}

// TestLeftoverDoesNotStart: what is left on the source after a move must not
// start a second copy when that host reboots.
func TestLeftoverDoesNotStart(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
	w.OnPhase(func(_ string, p hypervisortest.Phase) {
		if p == hypervisortest.PhaseResumed {
			killAndReturn(w, w.Nodes[0])
		}
	})
	op := move(t, w)
	if op.Outcome != maint.OutcomePartly || len(op.Problems) != 1 || !strings.Contains(op.Problems[0].Remedy, "virsh undefine --keep-nvram web-1") {
		t.Fatalf("%q, %+v", op.Outcome, op.Problems)
	}
	if running, defined := places(t, w, uuid); running != "b" || defined != "ab+autostart" {
		t.Errorf("it runs on %q, and is defined on %q", running, defined)
	}
}

// TestStartedOnTheSourceMeanwhile: two copies that are found when the move is
// being verified are as much of an alarm as those found before.
func TestStartedOnTheSourceMeanwhile(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
	var once sync.Once
	w.OnCall(func(c hypervisortest.Call) {
		if c.Host == "b" && c.Op == "SetAutostart" && c.Done {
			once.Do(func() { w.Nodes[0].Host.PutGuest("web-1", func(g *maint.Guest) { g.UUID = uuid }) })
		}
	})
	op := move(t, w)
	if op.Outcome != maint.OutcomeStuck || !strings.Contains(op.Problems[0].Reason, "both hosts") {
		t.Errorf("two copies run, and the record says %q: %+v", op.Outcome, op.Problems)
	}
	s, err := w.Nodes[0].Client.Status(ctxFor(t, patience))
	if err != nil || len(s.Conditions) == 0 {
		t.Errorf("two copies run, and the host's status says nothing: %+v, %v", s, err)
	}
}

// TestLapsedInMidCopy: room for a guest whose copy goes on while neither agent
// renews it is kept again as soon as its source is back, also for a guest that
// is here already, paused, and takes the room.
func TestLapsedInMidCopy(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := hypervisortest.NewWorld()
		defer w.Close()
		j, err := journal.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		cfg := config.Config{Host: "b", StateDir: dir, Limits: config.Limits{MigrationsIn: 1}, Journal: config.Journal{Keep: config.Duration{Duration: time.Hour}}}
		host := w.AddHost("b", hypervisortest.HostOptions{})
		a := agent.New(cfg, "test", host, j, agent.Preserve{}, nil, quiet(t))
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); _ = a.Run(ctx) }()
		defer func() { stop(); <-ended }()

		r := maint.Arrival{Op: "mig-1", Guest: "web-1", GuestUUID: "10000000-0000-4000-8000-00000000abcd", MemoryBytes: 1 << 20, DomainType: "qemu"}
		if _, err := a.Reserve(ctx, "a", r); err != nil {
			t.Fatal(err)
		}
		host.PutGuest("web-1", func(g *maint.Guest) {
			g.UUID, g.State, g.Reason, g.Persistent = r.GuestUUID, maint.GuestPaused, "migrating", false
		})
		time.Sleep(10 * time.Minute)
		if _, err := a.Reserve(ctx, "c", r); err == nil {
			t.Error("another host has taken the reservation over")
		}
		if _, err := a.Reserve(ctx, "a", r); err != nil {
			t.Errorf("what is on its way is not expected any more: %v", err)
		}
		if s, err := a.Status(ctx); err != nil || len(s.Reservations) != 1 {
			t.Errorf("the reservations are %+v, %v", s.Reservations, err)
		}
	})
}
