package agent

import (
	"cmp"
	"context"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/agent/plan"
	"belay/agent/update"
)

// Plan says how an update would be done to this host, and changes nothing.
func (a *Agent) Plan(ctx context.Context, r maint.PlanRequest) (maint.Plan, error) {
	const what = "cannot plan the update"
	u, err := update.Parse(cmp.Or(r.Name, "MANIFEST"), []byte(r.Manifest))
	if err != nil {
		return maint.Plan{}, err
	}
	for _, name := range r.Options.To {
		switch {
		case name == a.cfg.Host:
			return maint.Plan{}, refuse(what, maint.Problemf(maint.CodeSameHost, "host "+name, "name peers", "is this host"))
		case a.peers[name] == nil:
			return maint.Plan{}, refuse(what, a.unknownPeer(name))
		}
	}
	p, err := a.planUpdate(ctx, u, r.Options)
	if err != nil {
		return p, a.cannotAsk(what, err)
	}
	return p, nil
}

// planUpdate plans an update from what is so now.
func (a *Agent) planUpdate(ctx context.Context, u maint.Update, o maint.PlanOptions) (maint.Plan, error) {
	l, err := a.ladder(ctx, u, o, "")
	if err != nil {
		return maint.Plan{}, err
	}
	return plan.Make(u, l, o), nil
}

// ProposeUpdate makes up a manifest from the packages that are pending on this host.
func (a *Agent) ProposeUpdate(ctx context.Context) (maint.Proposal, error) {
	var qemus []int
	for _, g := range a.view.last.Load().guests {
		if g.State.Active() {
			qemus = append(qemus, a.preserve.Live.QEMU(g.Name))
		}
	}
	all, err := a.preserve.Pending.Look(ctx, qemus)
	if err != nil {
		return maint.Proposal{}, err
	}
	u, notes := update.Propose("pending-"+time.Now().UTC().Format("20060102"), all)
	if len(u.Changes) == 0 {
		return maint.Proposal{}, refuse("cannot make up an update", maint.Problemf(maint.CodeNothing, "host "+a.cfg.Host, "fetch the package lists anew (apt-get update)", "has no newer packages pending"))
	}
	text, err := update.Format(u)
	if err != nil {
		return maint.Proposal{}, err
	}
	return maint.Proposal{Packages: all, Manifest: string(text), Notes: notes}, nil
}

// remembered is how many of what guests have felt plans are made from, the latest.
const remembered = 2000

// felt is what guests have felt here, the oldest first.
func (a *Agent) felt() (all []maint.Felt) {
	for _, op := range a.journal.Ops() {
		all = append(all, feltOf(op)...)
	}
	slices.SortStableFunc(all, func(x, y maint.Felt) int { return x.At.Compare(y.At) })
	return all[max(0, len(all)-remembered):]
}

// feltOf is what guests have felt of one operation. What was not seen to its end says
// nothing.
func feltOf(op maint.Op) (all []maint.Felt) {
	add := func(r maint.Rung, m maint.VMMMethod, uuid string, pause time.Duration) {
		if pause > 0 && uuid != "" {
			all = append(all, maint.Felt{Rung: r, Method: m, UUID: uuid, At: op.Started.UTC(), Pause: pause})
		}
	}
	switch {
	case op.Held != nil && op.Hold != nil:
		var work time.Duration
		for _, run := range []*maint.StepRun{op.Held.Step, op.Held.Verify, op.Held.Undo} {
			if run != nil && !run.Ended.IsZero() {
				work += max(0, run.Ended.Sub(run.Started))
			}
		}
		for _, g := range op.Held.Guests {
			if g.AtMost || g.ReleasedBy != "belayd" {
				continue
			}
			add(maint.RungB1, "", g.UUID, g.Pause)
		}
		for i := range all {
			all[i].Work = min(work, all[i].Pause)
			if s := op.Held.Step; s != nil && s.OK() && op.Held.Undo == nil {
				all[i].Step = plan.StepName(op.Hold.Step)
			}
		}
	case op.Replaced != nil:
		add(maint.RungB2, op.Replaced.Method, op.GuestUUID, op.Replaced.Pause)
	case op.Kexeced != nil:
		for _, g := range op.Kexeced.Guests {
			if g.Fate == maint.KexecRestored {
				add(maint.RungB3, "", g.UUID, g.Pause)
			}
		}
	case op.Move != nil:
		add(maint.RungD, "", op.GuestUUID, op.Move.Downtime)
	}
	return all
}
