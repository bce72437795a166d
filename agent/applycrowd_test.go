package agent_test

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"belay/agent/maint"
)

// TestApplyCrowd: a plan of 2400 guests, of each of which there is something to be said, goes
// through the API there and back, and into the journal; and operations in a list, or as they
// are watched, are small all the same.
func TestApplyCrowd(t *testing.T) {
	t.Parallel()
	const guests = 2400
	u := &updates{newFleet(t, 0, nil, "a", "b"), ctxFor(t, 10*time.Minute)}
	for i := range guests {
		u.a.Host.PutGuest(fmt.Sprintf("shop-%04d.customer-%04d.frankfurt-7.production.example.net", i, i), func(g *maint.Guest) {
			g.Policy = `prefer = ["D"]` // for which the peer has no room
		})
	}
	p := u.plan(byPause+guestsWell, false)
	text, err := json.Marshal(p)
	check(t, err)
	if len(p.Guests) != guests || len(text) < 1<<20 || len(p.Encode()) > maint.MaxPlan/4 {
		t.Fatalf("%d guests, %d bytes, %d as it is saved", len(p.Guests), len(text), len(p.Encode()))
	}
	saved, err := maint.DecodePlan("saved", p.Encode())
	check(t, err)
	op, err := u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: saved})
	check(t, err)
	op, err = u.a.Client.Watch(u.ctx, op.ID, func(op maint.Op) {
		if text, err := json.Marshal(op); err != nil || len(text) > 512<<10 {
			t.Errorf("it is told with %d bytes: %v", len(text), err)
		}
	})
	if err != nil || op.Outcome != maint.OutcomeDone {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, err)
	}
	u.a.Restart() // its journal is read anew
	op, err = u.a.Client.Op(u.ctx, op.ID)
	if err != nil || op.Apply.Plan.Hash != p.Hash || len(op.Apply.Plan.Guests) != guests {
		t.Errorf("its record has %d guests of the plan: %v", len(op.Apply.Plan.Guests), err)
	}
	recs, err := u.a.Client.Records(u.ctx, op.ID)
	if err != nil || len(recs) == 0 {
		t.Errorf("%d records, %v", len(recs), err)
	}
	r, err := u.a.Client.Report(u.ctx, op.ID)
	if err != nil || len(r.Guests) != guests {
		t.Errorf("its report has %d guests: %v", len(r.Guests), err)
	}
	ops, err := u.a.Client.Ops(u.ctx)
	check(t, err)
	for _, o := range ops {
		if o.Apply != nil && (o.Apply.Plan.Guests != nil || o.Apply.Plan.Update.ID != "by-pause" || o.Apply.Plan.Hash != p.Hash) {
			t.Errorf("in a list: %+v", o.Apply.Plan)
		}
	}
}
