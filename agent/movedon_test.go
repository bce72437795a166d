package agent_test

import (
	"bytes"
	"context"
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

// The same, and the guest is moved on by hand, before anything was written down of its
// arrival, and to a host that the source does not know. The destination has seen it run; or,
// where its agent was away too, nobody has.
func TestMovedOnByHand(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name          string
		blind, reboot bool
		state         string
	}{
		{"the source's libvirt dies", false, false, "it has come to b"},
		{"the source goes down", false, true, "it has come to b"},
		{"the source's libvirt dies, and the destination's agent", true, false, "cannot be told"},
		{"the source goes down, and the destination's agent", true, true, "cannot be told"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), func(c *config.Config) { delete(c.Peers, map[string]string{"a": "c"}[c.Host]) }, "a", "b", "c")
			a, b := w.Nodes[0], w.Nodes[1]
			uuid := a.Host.PutGuest("web-1", autostarted)
			dead := make(chan struct{})
			w.OnPhase(func(_ string, p hypervisortest.Phase) {
				if p == hypervisortest.PhaseResumed {
					w.OnPhase(func(string, hypervisortest.Phase) {})
					if c.reboot {
						a.Crash()
					} else {
						a.Kill()
						a.Host.KillLibvirt()
					}
					close(dead)
				}
			})
			ctx := ctxFor(t, patience)
			op, err := a.Client.Migrate(ctx, toB)
			check(t, err)
			<-dead
			check(t, b.Host.Migrate(ctx, uuid, maint.MoveParams{DestURI: w.Nodes[2].Host.URI(), Persist: true}))
			if c.blind {
				b.Stop()
				b.Start(nil)
			}
			a.Host.RestartLibvirt()
			a.Restart()
			op = await(t, ctx, a, op.ID)
			if op.Outcome != maint.OutcomeStuck || len(op.Problems) != 1 || !strings.Contains(op.Problems[0].Reason, c.state) || op.Problems[0].Remedy == "" {
				t.Errorf("%s, %v", op.Outcome, op.Problems)
			}
			if running, _ := places(t, w, uuid); running != "c" {
				t.Errorf("runs on %q", running)
			}
			staysOff(t, a, uuid)
		})
	}
}

// libvirt begins with a copy late, which its agent has asked for in its life before: it is
// the operation's own, also when the next one is refused for it.
func TestOwnCopyBeginsLate(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a := w.Nodes[0]
	uuid := a.Host.PutGuest("web-1", autostarted)
	a.Host.HoldCopies()
	a.Stop()
	dead := make(chan struct{})
	a.Start(func(what string) {
		if what == "before Migrate" {
			a.Kill()
			close(dead)
		}
	})
	ctx := ctxFor(t, patience)
	op, err := a.Client.Migrate(ctx, toB)
	check(t, err)
	<-dead
	begun, late := make(chan struct{}), make(chan error, 1)
	w.OnPhase(func(_ string, p hypervisortest.Phase) {
		if p == hypervisortest.PhaseCopying {
			close(begun)
		}
	})
	var once, refused sync.Once
	a.RestartWith(func(what string) {
		switch what {
		case "before Migrate":
			once.Do(func() {
				go func() {
					late <- a.Host.Migrate(context.Background(), uuid, maint.MoveParams{DestURI: w.Nodes[1].Host.URI(), Persist: true})
				}()
				<-begun
			})
		case "before Job":
			refused.Do(a.Host.ReleaseCopies)
		}
	})
	if op = await(t, ctx, a, op.ID); op.Outcome != maint.OutcomeDone {
		t.Errorf("%s, %v", op.Outcome, op.Problems)
	}
	check(t, <-late)
	aloneOn(t, w, uuid, "b")
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
