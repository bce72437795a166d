package agent_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// patience is far more than anything here takes.
const patience = 2 * time.Minute

// toB asks for web-1 to go to b.
var toB = maint.MigrateRequest{Guest: "web-1", To: "b"}

// autostarted is how web-1 is kept, so that it can be told whether it still is.
func autostarted(g *maint.Guest) { g.Autostart = true }

// ends checks how an operation on web-1 has ended, that this is what both
// hosts show, and that the record tells the same.
func ends(t *testing.T, w *agenttest.World, op maint.Op, uuid string, want maint.Outcome, code maint.Code) {
	t.Helper()
	if op.State != maint.OpEnded || op.Outcome != want {
		t.Fatalf("the operation is %s, %q, want %q: %+v", op.State, op.Outcome, want, op.Problems)
	}
	if code == "" && len(op.Problems) > 0 || code != "" && !slices.ContainsFunc(op.Problems, func(p maint.Problem) bool { return p.Code == code }) {
		t.Errorf("want problem %q, there are %+v", code, op.Problems)
	}
	where := "a"
	if want.TookEffect() {
		where = "b"
	}
	running, defined := places(t, w, uuid)
	if running != where {
		t.Errorf("%q, and it runs on %q, want %q", op.Outcome, running, where)
	}
	if defined != where+"+autostart" {
		t.Errorf("%q, and it is defined on %q, want %s alone, with autostart", op.Outcome, defined, where)
	}
	if (op.Move != nil) != (want == maint.OutcomeDone) {
		t.Errorf("%q, and the record of the move is %+v", op.Outcome, op.Move)
	}
	recs, err := w.Nodes[0].Client.Records(ctxFor(t, patience), op.ID)
	if err != nil || len(recs) == 0 {
		t.Fatalf("it has %d records, %v", len(recs), err)
	}
	if recs[len(recs)-1].Kind == maint.RecSeenTo { // the other host's, at any time after the end
		recs = recs[:len(recs)-1]
	}
	if last := recs[len(recs)-1]; last.Kind != maint.RecEnded || !strings.Contains(string(last.Data), `"`+string(want)+`"`) {
		t.Errorf("the last record is %s %s", last.Kind, last.Data)
	}
	if want == maint.OutcomeBlocked && slices.ContainsFunc(recs, func(r maint.Record) bool { return r.Step == "perform" && r.Kind == maint.RecStepNote }) {
		t.Error("blocked is before any effect, and a copy was begun")
	}
}

// move asks for web-1 to go to b and waits for the end.
func move(t *testing.T, w *agenttest.World) maint.Op {
	t.Helper()
	ctx := ctxFor(t, patience)
	op, err := w.Nodes[0].Client.Migrate(ctx, toB)
	if err != nil {
		t.Fatal(err)
	}
	return await(t, ctx, w.Nodes[0], op.ID)
}

// refusal gives the codes of a refusal.
func refusal(t *testing.T, err error) (codes []maint.Code) {
	t.Helper()
	var r *maint.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("want a refusal, there is %T: %v", err, err)
	}
	for _, p := range r.Problems {
		codes = append(codes, p.Code)
	}
	return codes
}

// TestBlocked is what the destination does not let in.
func TestBlocked(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		hosts map[string]hypervisortest.HostOptions
		edit  func(*config.Config)
		world func(w *agenttest.World, uuid string)
		want  []maint.Code
	}{
		{"too small", nil, func(c *config.Config) { c.Limits.GuestMemory.Bytes = 100 << 20 }, nil, []maint.Code{maint.CodeNoRoom}},
		{"no memory", map[string]hypervisortest.HostOptions{"b": {MemoryBytes: 100 << 20}}, nil, nil, []maint.Code{maint.CodeNoRoom}},
		{"other CPU", map[string]hypervisortest.HostOptions{"b": {CannotRun: []string{"qemu64"}}}, nil, nil, []maint.Code{maint.CodeCPU}},
		{"older QEMU", map[string]hypervisortest.HostOptions{"b": {MachineTypes: []string{"pc-q35-6.0"}}}, nil, nil, []maint.Code{maint.CodeMachineType}},
		{"same host UUID", map[string]hypervisortest.HostOptions{"a": {UUID: "00000000-0000-4000-8000-0000000000aa"}, "b": {UUID: "00000000-0000-4000-8000-0000000000aa"}},
			nil, nil, []maint.Code{maint.CodeSameHost}},
		{"name taken", nil, nil, func(w *agenttest.World, _ string) { w.Nodes[1].Host.PutGuest("web-1") }, []maint.Code{maint.CodeNameTaken}},
		{"inactive definition there", nil, nil, func(w *agenttest.World, uuid string) {
			w.Nodes[1].Host.PutGuest("web-1", func(g *maint.Guest) { g.UUID, g.State, g.Persistent = uuid, maint.GuestShutoff, false })
		}, []maint.Code{maint.CodeNameTaken}},
		{"belayd there is down", nil, nil, func(w *agenttest.World, _ string) { w.Nodes[1].Stop() }, []maint.Code{maint.CodePeerDown}},
		{"libvirt there is down", nil, nil, func(w *agenttest.World, _ string) { w.Nodes[1].Host.KillLibvirt() }, []maint.Code{maint.CodeHypervisorDown}},
		{"all at once", map[string]hypervisortest.HostOptions{"b": {CannotRun: []string{"qemu64"}, Arch: "aarch64", MemoryBytes: 1}}, nil,
			func(w *agenttest.World, uuid string) {
				w.Nodes[1].Host.PutGuest("web-1")
				w.Nodes[0].Host.FailDisk(t, uuid)
			},
			[]maint.Code{maint.CodeGuestPaused, maint.CodeNameTaken, maint.CodeDomainType, maint.CodeCPU, maint.CodeNoRoom}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.NewOn(t, quiet(t), c.hosts, c.edit, "a", "b")
			uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
			if c.world != nil {
				c.world(w, uuid)
			}
			op := move(t, w)
			var got []maint.Code
			for _, p := range op.Problems {
				if p.Remedy == "" {
					t.Errorf("no remedy: %+v", p)
				}
				got = append(got, p.Code)
			}
			if op.Outcome != maint.OutcomeBlocked || !slices.Equal(got, c.want) {
				t.Fatalf("%q for %v, want %v", op.Outcome, got, c.want)
			}
			if c.name == "all at once" {
				w.Nodes[0].Host.Unpause(t, uuid) // it was not Belay that paused it
			}
			ends(t, w, op, uuid, maint.OutcomeBlocked, c.want[0])
		})
	}
}

// TestFailsInMidCopy is what goes wrong while the guest is on its way.
func TestFailsInMidCopy(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		phase hypervisortest.Phase
		world func(t *testing.T, w *agenttest.World, uuid string)
		after func(w *agenttest.World) // once the operation has ended
		want  maint.Outcome
		code  maint.Code
	}{
		{"destination's libvirt is killed", hypervisortest.PhaseCopying,
			func(_ *testing.T, w *agenttest.World, _ string) { w.Nodes[1].Host.KillLibvirt() },
			func(w *agenttest.World) { w.Nodes[1].Host.RestartLibvirt() }, maint.OutcomeFailed, maint.CodeFailed},
		{"destination's libvirt is restarted", hypervisortest.PhaseSuspended,
			func(_ *testing.T, w *agenttest.World, _ string) {
				w.Nodes[1].Host.KillLibvirt()
				w.Nodes[1].Host.RestartLibvirt()
			},
			nil, maint.OutcomeFailed, maint.CodeFailed},
		{"source's libvirt is killed and comes back", hypervisortest.PhaseCopying,
			func(_ *testing.T, w *agenttest.World, _ string) { killAndReturn(w, w.Nodes[0]) }, nil, maint.OutcomeFailed, maint.CodeFailed},
		{"source's libvirt is killed in the blackout", hypervisortest.PhaseSuspended,
			func(_ *testing.T, w *agenttest.World, _ string) { killAndReturn(w, w.Nodes[0]) }, nil, maint.OutcomeFailed, maint.CodeFailed},
		{"source's libvirt is killed when all is sent", hypervisortest.PhasePerformed,
			func(_ *testing.T, w *agenttest.World, _ string) { killAndReturn(w, w.Nodes[0]) }, nil, maint.OutcomeFailed, maint.CodeFailed},
		{"connections to the source's libvirt are cut", hypervisortest.PhaseCopying,
			func(_ *testing.T, w *agenttest.World, _ string) { w.Nodes[0].Host.DropConnections() }, nil, maint.OutcomeDone, ""},
		{"destination's QEMU dies", hypervisortest.PhaseCopying,
			func(t *testing.T, w *agenttest.World, uuid string) { w.Nodes[1].Host.KillQEMU(t, uuid) }, nil, maint.OutcomeFailed, maint.CodeFailed},
		{"destination's QEMU dies in the blackout", hypervisortest.PhaseSuspended,
			func(t *testing.T, w *agenttest.World, uuid string) { w.Nodes[1].Host.KillQEMU(t, uuid) }, nil, maint.OutcomeFailed, maint.CodeFailed},
		{"destination's belayd is restarted", hypervisortest.PhaseCopying,
			func(_ *testing.T, w *agenttest.World, _ string) { w.Nodes[1].Stop(); w.Nodes[1].Start(nil) }, nil, maint.OutcomeDone, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), nil, "a", "b")
			uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
			var once sync.Once // a copy is begun again where that makes sense
			w.OnPhase(func(uuid string, p hypervisortest.Phase) {
				if p == c.phase {
					once.Do(func() { c.world(t, w, uuid) })
				}
			})
			op := move(t, w)
			if c.after != nil {
				c.after(w)
			}
			ends(t, w, op, uuid, c.want, c.code)
			res, err := w.Nodes[1].Client.Status(ctxFor(t, patience))
			if err != nil || len(res.Reservations) > 0 {
				t.Errorf("the destination still keeps room: %+v, %v", res.Reservations, err)
			}
		})
	}
}

// killAndReturn kills a node's libvirt and starts it again as soon as its
// agent has met that.
func killAndReturn(w *agenttest.World, n *agenttest.Node) {
	n.Host.KillLibvirt()
	var once sync.Once
	w.OnCall(func(c hypervisortest.Call) {
		if c.Host == n.Host.Name() && c.Op == "Guest" && c.Done {
			once.Do(n.Host.RestartLibvirt)
		}
	})
}

// TestAnswerLostAtTheSwitchOver is libvirt's worst moment: the destination has
// begun to run the guest and its libvirt dies before the source hears of it, so
// the source's libvirt lets its own copy run on. That must never be recorded as
// a copy that failed, with the guest where it was.
func TestAnswerLostAtTheSwitchOver(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
	var once sync.Once
	w.OnPhase(func(_ string, p hypervisortest.Phase) {
		if p == hypervisortest.PhaseResumed {
			once.Do(func() {
				w.Nodes[1].Host.KillLibvirt()
				time.AfterFunc(300*time.Millisecond, w.Nodes[1].Host.RestartLibvirt)
			})
		}
	})
	ctx := ctxFor(t, patience)
	op, err := w.Nodes[0].Client.Migrate(ctx, toB)
	if err != nil {
		t.Fatal(err)
	}
	op = await(t, ctx, w.Nodes[0], op.ID)
	running, _ := places(t, w, uuid)
	if running != "ab" {
		t.Fatalf("it runs on %q; this test is of a guest that runs on both", running)
	}
	if op.Outcome != maint.OutcomeStuck || len(op.Problems) == 0 || !strings.Contains(op.Problems[0].Reason, "both hosts") || op.Problems[0].Remedy == "" {
		t.Fatalf("two copies run, and the record says %q: %+v", op.Outcome, op.Problems)
	}
	s, err := w.Nodes[0].Client.Status(ctx)
	if err != nil || len(s.Conditions) == 0 {
		t.Fatalf("two copies run, and the host's status says nothing: %+v, %v", s, err)
	}
}

// TestLeftover: the source's libvirt dies before it can clear away what has
// moved. The guest runs on the destination; a person is told of the rest.
func TestLeftover(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
	w.OnPhase(func(_ string, p hypervisortest.Phase) {
		if p == hypervisortest.PhaseResumed {
			killAndReturn(w, w.Nodes[0])
		}
	})
	op := move(t, w)
	if op.Outcome != maint.OutcomePartly || len(op.Problems) != 1 || op.Problems[0].Code != maint.CodeLeftover {
		t.Fatalf("%q, %+v", op.Outcome, op.Problems)
	}
	if !strings.Contains(op.Problems[0].Remedy, "make sure that it runs on b, then on a: virsh destroy web-1") {
		t.Errorf("the remedy is %q", op.Problems[0].Remedy)
	}
	if running, _ := places(t, w, uuid); running != "b" {
		t.Errorf("it runs on %q", running)
	}
	if g, err := w.Nodes[0].Host.Guest(ctxFor(t, patience), uuid); err != nil || g.State != maint.GuestPaused {
		t.Errorf("the agent has touched the leftover: %+v, %v", g, err)
	}
	ctx := ctxFor(t, patience)
	for { // nothing else gives the room up, and it could not be moved on meanwhile
		s, err := w.Nodes[1].Client.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Reservations) == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
}

// TestAbortInEveryPhase aborts and waits until the wish has reached libvirt
// before the migration goes on.
func TestAbortInEveryPhase(t *testing.T) {
	t.Parallel()
	for phase, want := range map[hypervisortest.Phase]maint.Outcome{
		hypervisortest.PhaseCopying:   maint.OutcomeAborted,
		hypervisortest.PhaseSuspended: maint.OutcomeAborted,
		hypervisortest.PhaseResumed:   maint.OutcomeDone,
	} {
		t.Run(string(phase), func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), nil, "a", "b")
			uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
			asked, answered := make(chan struct{}), make(chan struct{})
			var once sync.Once
			w.OnCall(func(c hypervisortest.Call) {
				if c.Op == "AbortJob" && c.Done {
					once.Do(func() { close(asked) })
				}
			})
			w.OnPhase(func(_ string, p hypervisortest.Phase) {
				if p != phase {
					return
				}
				abortAll(t, w.Nodes[0])
				close(answered)
				select {
				case <-asked:
				case <-time.After(patience):
					t.Error("libvirt was never asked to cancel the job")
				}
			})
			op := move(t, w)
			<-answered // the operation may have ended before who aborts it has his answer
			code := maint.CodeAborted
			if want == maint.OutcomeDone {
				code = ""
			}
			ends(t, w, op, uuid, want, code)
			if op.AbortBy != "root" {
				t.Errorf("the abort is by %q", op.AbortBy)
			}
			if want == maint.OutcomeDone && !slices.ContainsFunc(op.Steps, func(s maint.Step) bool {
				return slices.ContainsFunc(s.Notes, func(n string) bool { return strings.Contains(n, "had already moved when") })
			}) {
				t.Errorf("nothing says why the abort came to nothing: %+v", op.Steps)
			}
		})
	}
}

// abortAll aborts every operation that runs. It is called from a World's hooks.
func abortAll(t *testing.T, n *agenttest.Node) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ops, err := n.Client.Ops(ctx)
	if err != nil {
		t.Error(err)
	}
	for _, op := range ops {
		if _, err := n.Client.Abort(ctx, op.ID); err != nil {
			t.Error(err)
		}
	}
}

// TestAbortBeforeTheCopy aborts while the hosts are being asked, and while the
// destination is about to promise room.
func TestAbortBeforeTheCopy(t *testing.T) {
	t.Parallel()
	t.Run("preflight", func(t *testing.T) {
		t.Parallel()
		w := agenttest.New(t, quiet(t), nil, "a", "b")
		uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
		w.OnCall(func(c hypervisortest.Call) {
			if c.Op == "DryRun" && !c.Done {
				abortAll(t, w.Nodes[0])
			}
		})
		ends(t, w, abortedQuietly(t, move(t, w)), uuid, maint.OutcomeAborted, "")
	})
	t.Run("reserve", func(t *testing.T) {
		t.Parallel()
		w := agenttest.New(t, quiet(t), nil, "a", "b")
		uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
		w.Nodes[1].Stop()
		w.Nodes[1].Start(func(what string) {
			if strings.HasPrefix(what, "before append reserved") {
				abortAll(t, w.Nodes[0])
			}
		})
		ends(t, w, abortedQuietly(t, move(t, w)), uuid, maint.OutcomeAborted, "")
		s, err := w.Nodes[1].Client.Status(ctxFor(t, patience))
		if err != nil || len(s.Reservations) > 0 {
			t.Errorf("the destination still keeps room: %+v, %v", s.Reservations, err)
		}
	})
}

// abortedQuietly checks that an aborted operation blames nobody, and takes
// its problems away.
func abortedQuietly(t *testing.T, op maint.Op) maint.Op {
	t.Helper()
	for _, p := range op.Problems {
		if p.Code != maint.CodeAborted || !strings.Contains(p.Reason, "runs on a as before") {
			t.Errorf("aborted on request, and the record says %+v", p)
		}
	}
	op.Problems = nil
	return op
}

func TestDeadline(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
	w.Nodes[0].Host.HoldCopies()
	ctx := ctxFor(t, patience)
	r := toB
	r.Timeout = 300 * time.Millisecond
	op, err := w.Nodes[0].Client.Migrate(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	ends(t, w, await(t, ctx, w.Nodes[0], op.ID), uuid, maint.OutcomeFailed, maint.CodeTimeout)
}

// TestDeadlineWhileAsking: that an operation had no time left to wait is not
// the fault of the host that it waited for.
func TestDeadlineWhileAsking(t *testing.T) {
	t.Parallel()
	for name, frozen := range map[string]int{"source's libvirt": 0, "destination's libvirt": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), nil, "a", "b")
			uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
			var once sync.Once
			w.OnCall(func(c hypervisortest.Call) {
				if c.Op == "DryRun" && c.Done {
					once.Do(w.Nodes[frozen].Host.Freeze)
				}
			})
			ctx := ctxFor(t, patience)
			r := toB
			r.Timeout = 300 * time.Millisecond
			op, err := w.Nodes[0].Client.Migrate(ctx, r)
			if err != nil {
				t.Fatal(err)
			}
			op = await(t, ctx, w.Nodes[0], op.ID)
			w.Nodes[frozen].Host.Thaw()
			ends(t, w, op, uuid, maint.OutcomeFailed, maint.CodeTimeout)
		})
	}
}
