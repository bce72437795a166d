package agent_test

import (
	"bytes"
	"slices"
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
