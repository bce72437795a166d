package agent_test

import (
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"belay/agent/agenttest"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// aloneOn checks that a guest runs on one host, and starts with that and with no other.
func aloneOn(t *testing.T, w *agenttest.World, uuid, host string) {
	t.Helper()
	running, defined := places(t, w, uuid)
	if running != host || defined != host+"+autostart" {
		t.Errorf("it runs on %q, and is defined on %q; want %s alone, with autostart", running, defined, host)
	}
}

// The source's host goes down in the middle of a migration, and boots. What starts with it
// is no second guest, and a guest that has stayed there starts all the same.
func TestSourceReboots(t *testing.T) {
	t.Parallel()
	for phase, moved := range map[hypervisortest.Phase]bool{
		hypervisortest.PhaseCopying:   false,
		hypervisortest.PhaseSuspended: false,
		hypervisortest.PhasePerformed: false,
		hypervisortest.PhaseResumed:   true, // and the source's libvirt has not heard of it
	} {
		t.Run(string(phase), func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), nil, "a", "b")
			a := w.Nodes[0]
			uuid := a.Host.PutGuest("web-1", autostarted)
			down := make(chan struct{})
			w.OnPhase(func(_ string, p hypervisortest.Phase) {
				if p == phase {
					w.OnPhase(func(string, hypervisortest.Phase) {})
					a.Crash()
					close(down)
				}
			})
			ctx := ctxFor(t, 2*patience)
			op, err := a.Client.Migrate(ctx, toB)
			check(t, err)
			<-down
			if running, _ := places(t, w, uuid); running != map[bool]string{true: "b"}[moved] {
				t.Errorf("when the source is back it runs on %q", running)
			}
			launched := 0
			a.RestartWith(func(what string) {
				if what == "before Launch" {
					launched++
				}
			})
			op = await(t, ctx, a, op.ID)
			if op.Outcome != maint.OutcomeDone || len(op.Problems) > 0 {
				t.Errorf("%s, %v", op.Outcome, op.Problems)
			}
			aloneOn(t, w, uuid, "b")
			if (launched == 0) != moved {
				t.Errorf("it was started on the source %d times", launched)
			}
		})
	}
}

// Killed again, wherever that may be, after its host went down in the copy.
func TestSourceRebootsKilledAnywhere(t *testing.T) {
	t.Parallel()
	points := rebootAndKill(t, 1<<30)
	if points < 6 {
		t.Fatalf("only %d points are met", points)
	}
	turn := make(chan struct{}, 16) // each waits most of its time
	var all sync.WaitGroup
	for n := range points {
		all.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			t.Run(strconv.Itoa(n), func(t *testing.T) { rebootAndKill(t, n) })
		})
	}
	all.Wait()
}

// rebootAndKill has the source's host go down in the copy, kills its agent at the n-th thing
// that it does when it is back, and has no further copy come about. It returns how many
// things there were.
func rebootAndKill(t *testing.T, n int) (points int) {
	t.Helper()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a := w.Nodes[0]
	uuid := a.Host.PutGuest("web-1", autostarted)
	down := make(chan struct{})
	var copies atomic.Int32
	w.OnPhase(func(uuid string, p hypervisortest.Phase) {
		switch {
		case p != hypervisortest.PhaseCopying:
		case copies.Add(1) == 1:
			a.Crash()
			close(down)
		default:
			w.Nodes[1].Host.KillQEMU(t, uuid)
		}
	})
	ctx := ctxFor(t, 2*patience)
	op, err := a.Client.Migrate(ctx, toB)
	check(t, err)
	<-down
	k := &killer{node: a, left: n, dead: make(chan struct{})}
	a.RestartWith(k.hook)
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		select {
		case <-k.dead:
			a.Restart()
		case <-ctx.Done():
		}
	}()
	op = await(t, ctx, a, op.ID)
	k.mu.Lock()
	k.off = true
	at := k.at
	points = n - k.left
	k.mu.Unlock()
	if at != "" {
		<-restarted
	}
	if op.Outcome != maint.OutcomeFailed {
		t.Errorf("killed %s: %s, %v", at, op.Outcome, op.Problems)
	}
	aloneOn(t, w, uuid, "a")
	return points
}

// Both hosts go down in the copy: which of them has had the guest last nobody has seen, so
// that it is started on neither, and somebody is told.
func TestBothReboot(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a, b := w.Nodes[0], w.Nodes[1]
	uuid := a.Host.PutGuest("web-1", autostarted)
	down := make(chan struct{})
	w.OnPhase(func(_ string, p hypervisortest.Phase) {
		if p == hypervisortest.PhaseSuspended {
			w.OnPhase(func(string, hypervisortest.Phase) {})
			a.Crash()
			b.Crash()
			close(down)
		}
	})
	ctx := ctxFor(t, 2*patience)
	op, err := a.Client.Migrate(ctx, toB)
	check(t, err)
	<-down
	b.Restart()
	a.Restart()
	op = await(t, ctx, a, op.ID)
	if op.Outcome != maint.OutcomeStuck || len(op.Problems) != 1 || !strings.Contains(op.Problems[0].Remedy, "virsh start web-1") {
		t.Errorf("%s, %v", op.Outcome, op.Problems)
	}
	if running, defined := places(t, w, uuid); running != "" || defined != "a" {
		t.Errorf("runs on %q, defined on %q", running, defined)
	}
	if !slices.ContainsFunc(op.Steps, func(s maint.Step) bool {
		return slices.ContainsFunc(s.Notes, func(n string) bool { return strings.Contains(n, "virsh autostart web-1") })
	}) {
		t.Errorf("nothing says that its autostart is off: %+v", op.Steps)
	}
}

// The host goes down before anything is begun: its libvirt starts the guest, as ever.
func TestSourceRebootsBeforeTheCopy(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a := w.Nodes[0]
	uuid := a.Host.PutGuest("web-1", autostarted)
	a.Stop()
	down := make(chan struct{})
	a.Start(func(what string) {
		if what == "before append step-start perform" {
			a.Crash()
			close(down)
		}
	})
	ctx := ctxFor(t, 2*patience)
	op, err := a.Client.Migrate(ctx, toB)
	check(t, err)
	<-down
	aloneOn(t, w, uuid, "a")
	a.Restart()
	if op = await(t, ctx, a, op.ID); op.Outcome != maint.OutcomeDone {
		t.Errorf("%s, %v", op.Outcome, op.Problems)
	}
	aloneOn(t, w, uuid, "b")
}

// libvirt does not let the autostart be turned off: nothing is begun, and nothing is lost.
// Where it cannot be turned on again, that is told.
func TestAutostartCannotBeChanged(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a := w.Nodes[0]
	uuid := a.Host.PutGuest("web-1", autostarted)
	w.OnPhase(func(_ string, p hypervisortest.Phase) { t.Errorf("a copy is %s", p) })
	a.Host.Fault("SetAutostart", hypervisortest.Fault{Err: maint.ErrLocked})
	op := move(t, w)
	if op.Outcome != maint.OutcomeFailed || !slices.ContainsFunc(op.Problems, func(p maint.Problem) bool {
		return p.Code == maint.CodeAutostart && strings.Contains(p.Remedy, "virsh autostart web-1")
	}) {
		t.Errorf("%s, %v", op.Outcome, op.Problems)
	}
	aloneOn(t, w, uuid, "a")

	a.Host.Heal("SetAutostart")
	w.OnPhase(func(uuid string, p hypervisortest.Phase) {
		if p == hypervisortest.PhaseCopying {
			if g, err := a.Host.Guest(t.Context(), uuid); err != nil || g.Autostart {
				t.Errorf("in the copy: %+v, %v", g, err)
			}
			w.Nodes[1].Host.KillQEMU(t, uuid)
		}
	})
	if op := move(t, w); op.Outcome != maint.OutcomeFailed {
		t.Errorf("%s, %v", op.Outcome, op.Problems)
	}
	aloneOn(t, w, uuid, "a")
}
