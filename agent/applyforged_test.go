package agent_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

func newSpread(t *testing.T, hosts ...string) *updates {
	t.Helper()
	return &updates{newFleet(t, 4, nil, hosts...), ctxFor(t, patience)}
}

// TestApplyForged: whoever rewrites a plan can give it its hash, too; it is refused all the same
// if it is not what would be made.
func TestApplyForged(t *testing.T) {
	t.Parallel()
	u := newUpdates(t, nil)
	step := func(p *maint.Plan, kind maint.PlanStepKind) *maint.PlanStep {
		return &p.Steps[slices.IndexFunc(p.Steps, func(s maint.PlanStep) bool { return s.Kind == kind })]
	}
	for name, forge := range map[string]func(*maint.Plan){
		"no steps":          func(p *maint.Plan) { p.Steps = nil },
		"nobody is held":    func(p *maint.Plan) { step(p, maint.PlanHold).Guests = nil },
		"one is not held":   func(p *maint.Plan) { step(p, maint.PlanHold).Guests = p.Steps[2].Guests[:2] },
		"without a hold":    func(p *maint.Plan) { step(p, maint.PlanHold).Kind = maint.PlanPatch },
		"of no change":      func(p *maint.Plan) { step(p, maint.PlanHold).Changes = nil },
		"not checked":       func(p *maint.Plan) { p.Steps = p.Steps[1:] },
		"feels nothing":     func(p *maint.Plan) { p.Guests[0].Feels = nil },
		"no such rung":      func(p *maint.Plan) { p.Update.Changes[0].Rungs = []maint.Rung{"E"} },
		"waited for nobody": func(p *maint.Plan) { p.Deadline = p.Made.Add(-time.Second) },
	} {
		p := u.plan(byPause, false)
		forge(&p)
		if op, err := u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: p.Seal()}); err == nil {
			t.Errorf("%s: it is applied", name)
			await(t, u.ctx, u.a, op.ID)
		}
	}
	p := u.plan(byMove, false)
	step(&p, maint.PlanMove).To = "nowhere"
	if _, err := u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: p.Seal()}); err == nil {
		t.Error("to a host that there is not: it is applied")
	}
}

// TestApplyPeerFills: room on a peer that is there no more by the time of the apply.
func TestApplyPeerFills(t *testing.T) {
	t.Parallel()
	u := newSpread(t, "a", "b", "c")
	p := u.plan(byMove, false)
	to := p.Guests[0].To
	full := u.Nodes[map[string]int{"b": 1, "c": 2}[to]]
	info, err := full.Host.Info(u.ctx)
	check(t, err)
	full.Host.PutGuest("big", func(g *maint.Guest) { g.MemoryBytes = info.FreeMemoryBytes - 32<<20 })
	_, err = u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: p})
	if err == nil || !strings.Contains(err.Error(), p.Guests[0].Guest) || !strings.Contains(err.Error(), to) {
		t.Errorf("%v", err)
	}
	if ops := u.ops(u.a); len(ops) > 0 {
		t.Errorf("%+v", ops)
	}
}
