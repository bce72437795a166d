package agent_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/preserve/preservetest"
)

// noticed is a pause that is longer than a guest's own time service is trusted with.
const noticed = 600 * time.Millisecond

// unanswered are the clocks of guests whose agents do not answer, told at once.
type unanswered struct{ preservetest.Clocks }

func (unanswered) Restore(_ context.Context, g maint.Guest, _ time.Duration) maint.ClockReport {
	return maint.ClockReport{Guest: g.Name, UUID: g.UUID, State: maint.ClockUnsynchronised, Reason: "its agent does not answer"}
}

// A guest with another QEMU whose clock nobody could put right is no success, unless it is its
// owner's alone; all else of the replacement is done.
func TestReplacementLeavesClockBehind(t *testing.T) {
	t.Parallel()
	inPlace := func(t *testing.T, ctx context.Context, state maint.AgentState) (*agenttest.Node, maint.Op) {
		_, node, _ := replaceable(t, func(n *agenttest.Node) func(string) {
			n.Clocks = unanswered{}
			return func(what string) {
				if what == "after QuitMigrated" {
					time.Sleep(noticed)
				}
			}
		}, func(g *maint.Guest) { g.Agent = state })
		op, err := node.Client.Replace(ctx, maint.ReplaceRequest{Guest: "web-1", Method: maint.VMMInPlace})
		if err != nil {
			t.Fatal(err)
		}
		return node, await(t, ctx, node, op.ID)
	}
	home := func(t *testing.T, ctx context.Context, state maint.AgentState) (*agenttest.Node, maint.Op) {
		w, node, _ := strayed(t, quiet(t), func(g *maint.Guest) { g.Agent = state })
		w.SetCopy(hypervisortest.Copy{Blackout: noticed})
		node.Clocks = unanswered{}
		node.Start(nil)
		return node, replacement(t, ctx, node)
	}
	for name, replace := range map[string]func(*testing.T, context.Context, maint.AgentState) (*agenttest.Node, maint.Op){
		"in place": inPlace, "home": home,
	} {
		for state, want := range map[maint.AgentState]maint.Outcome{maint.AgentConnected: maint.OutcomePartly, maint.AgentNone: maint.OutcomeDone} {
			t.Run(name+" "+string(state), func(t *testing.T) {
				t.Parallel()
				ctx := ctxFor(t, patience)
				node, op := replace(t, ctx, state)
				if op.Outcome != want || op.Replaced == nil || op.Replaced.Pause < noticed {
					t.Fatalf("ended %s: %v, %+v", op.Outcome, op.Problems, op.Replaced)
				}
				if want == maint.OutcomePartly && (op.Problems[0].Code != maint.CodeClock || !strings.Contains(op.Problems[0].Remedy, "belay clock web-1 --sync")) {
					t.Errorf("%+v", op.Problems)
				}
				if g, err := node.Host.Guest(ctx, op.GuestUUID); err != nil || g.State != maint.GuestRunning {
					t.Errorf("it is %+v, %v", g, err)
				}
				if failing(t, ctx, node) {
					t.Error("something is left to go on with")
				}
			})
		}
	}
}
