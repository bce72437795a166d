package agent_test

import (
	"bytes"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// The source dies, agent and libvirt, when the guest has just started on the destination,
// which moves it on before the source is back. What the source holds is out of date by
// then, although the destination has nothing of the guest any more: it is started on no
// account, and no file is removed on the word of a source that knows no better.
func TestMovedOnBeforeTheSourceIsBack(t *testing.T) {
	t.Parallel()
	for name, disk := range map[string]bool{"shared disks": false, "a copied disk": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), nil, "a", "b", "c")
			a, b := w.Nodes[0], w.Nodes[1]
			r := toB
			var uuid string
			if disk {
				uuid, r.CopyDisks = withDisk(t, w), []string{maint.CopyAll}
			} else {
				uuid = a.Host.PutGuest("web-1", autostarted)
			}
			dead := make(chan struct{})
			w.OnPhase(func(_ string, p hypervisortest.Phase) {
				if p == hypervisortest.PhaseResumed {
					w.OnPhase(func(string, hypervisortest.Phase) {})
					a.Kill()
					a.Host.KillLibvirt()
					close(dead)
				}
			})
			ctx := ctxFor(t, patience)
			first, err := a.Client.Migrate(ctx, r)
			check(t, err)
			<-dead
			r.To = "c"
			for {
				on, err := b.Client.Migrate(ctx, r)
				if err == nil {
					if on = await(t, ctx, b, on.ID); on.Outcome != maint.OutcomeDone {
						t.Fatalf("to c: %s, %v", on.Outcome, on.Problems)
					}
					break
				}
				select { // b's view of its guests may be older
				case <-time.After(5 * time.Millisecond):
				case <-ctx.Done():
					t.Fatal(err)
				}
			}
			a.Host.RestartLibvirt()
			a.Restart()
			if first = await(t, ctx, a, first.ID); first.Outcome != maint.OutcomeStuck {
				t.Errorf("%s, %v", first.Outcome, first.Problems)
			}
			if running, _ := places(t, w, uuid); running != "c" {
				t.Errorf("runs on %q, %v", running, first.Problems)
			}
			staysOff(t, a, uuid)
			if disk && !bytes.Equal(b.Host.ReadFile(t, diskPath), image) {
				t.Error("its disk is gone")
			}
			v, err := peerOf(t, b, "a").View(ctx, uuid)
			if err != nil || v.Guest != nil || !slices.Equal(v.Came, []maint.OpID{first.ID}) {
				t.Errorf("b tells of %+v, %v", v, err)
			}
		})
	}
}

// The agent dies while its copy fails, the guest is migrated to a third host by hand, and
// the source's libvirt dies before it can clear up. What the source holds then looks like
// what this agent's own copy would have left.
func TestMovedElsewhereByHand(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b", "c")
	a, b := w.Nodes[0], w.Nodes[1]
	uuid := a.Host.PutGuest("web-1", autostarted)
	failed, moved := make(chan struct{}), make(chan struct{})
	var once sync.Once
	w.OnPhase(func(uuid string, p hypervisortest.Phase) {
		if p == hypervisortest.PhaseCopying {
			w.OnPhase(func(string, hypervisortest.Phase) {})
			a.Kill()
			b.Host.KillQEMU(t, uuid)
			close(failed)
		}
	})
	ctx := ctxFor(t, patience)
	op, err := a.Client.Migrate(ctx, toB)
	check(t, err)
	<-failed
	w.OnPhase(func(_ string, p hypervisortest.Phase) {
		if p == hypervisortest.PhaseResumed {
			once.Do(func() {
				a.Host.KillLibvirt()
				close(moved)
			})
		}
	})
	foreign(t, w, uuid)
	<-moved
	a.Host.RestartLibvirt()
	a.Restart()
	if op = await(t, ctx, a, op.ID); op.Outcome != maint.OutcomeStuck || !strings.Contains(op.Problems[0].Reason, "is on c") {
		t.Errorf("%s, %v", op.Outcome, op.Problems)
	}
	if running, _ := places(t, w, uuid); running != "c" {
		t.Errorf("runs on %q", running)
	}
	staysOff(t, a, uuid)
}

// staysOff checks that what a node still has of a guest does not start with the host.
func staysOff(t *testing.T, n *agenttest.Node, uuid string) {
	t.Helper()
	if g, err := n.Host.Guest(ctxFor(t, patience), uuid); err != nil || g.Autostart {
		t.Errorf("%s would start it when it reboots: %+v, %v", n.Host.Name(), g, err)
	}
}
