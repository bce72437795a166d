package agent

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/agent/run"
)

// The steps of a drain. Its moves are operations of their own.
const (
	phasePlan     = "plan"
	phaseCordon   = "cordon"
	phaseEvacuate = "evacuate"
	phaseAccount  = "account" // who is left, and why
)

// byDrain is who asks for a drain's cordon and migrations.
const byDrain = "drain:"

// maxTries is how many migrations of one guest may fail in a drain or a restore.
const maxTries = 3

// Drain admits the evacuation of this host, writes it down and starts it.
func (a *Agent) Drain(ctx context.Context, by string, r maint.DrainRequest) (maint.Op, error) {
	what := "cannot drain host " + a.cfg.Host
	if err := a.checkDrain(what, &r); err != nil {
		return maint.Op{}, err
	}
	r.Timeout, r.Parallel = cmp.Or(r.Timeout, maint.DrainTimeout), cmp.Or(r.Parallel, a.atOnce(a.cfg.Limits.MigrationsOut))
	now := time.Now()
	return a.submit(ctx, what, maint.Op{ID: newOpID("drain", now), Kind: maint.OpDrain, By: by, Reason: r.Reason,
		Deadline: now.Add(r.Timeout), Drain: &r})
}

// checkDrain refuses what can be refused without knowing the guests, and has each
// peer named once.
func (a *Agent) checkDrain(what string, r *maint.DrainRequest) error {
	var to []string
	for _, name := range r.To {
		switch {
		case name == a.cfg.Host:
			return refuse(what, maint.Problemf(maint.CodeSameHost, "host "+name, "name peers", "is this host"))
		case a.peers[name] == nil:
			return refuse(what, a.unknownPeer(name))
		case !slices.Contains(to, name):
			to = append(to, name)
		}
	}
	r.To = to
	if len(a.peers) == 0 {
		return refuse(what, a.unknownPeer("HOST"))
	}
	if r.Parallel < 0 || r.Parallel > a.cfg.Limits.MigrationsOut {
		return badRequest("parallel", "choose one up to limits.migrations_out, or leave it out", "%d is not between 1 and %d", r.Parallel, a.cfg.Limits.MigrationsOut)
	}
	if r.Timeout < 0 || r.Timeout > maxTimeout {
		return badRequest("timeout", fmt.Sprintf("choose one up to %s", maxTimeout), "%s is out of range", r.Timeout)
	}
	if c := r.CopyDisks; c != "" && c != maint.CopyAll && c != maint.CopyNone {
		return badRequest("copy_disks", "choose all or none; to name disks, migrate their guest by itself", "%.60q is neither %q nor %q", c, maint.CopyAll, maint.CopyNone)
	}
	return a.checkRequest(a.oneOf(maint.Op{Drain: r}, "any", a.peerNames()[0]))
}

// atOnce is how many of at most so many copies are worth running at once: each keeps a
// CPU busy, and a guest that is switched over while others have the CPUs is away for
// longer.
func (a *Agent) atOnce(most int) int {
	if cpus := a.view.last.Load().host.CPUs; cpus > 0 {
		return min(most, cpus)
	}
	return most
}

// oneOf is the migration of one guest of a drain.
func (a *Agent) oneOf(op maint.Op, guest, to string) maint.MigrateRequest {
	d := op.Drain
	r := maint.MigrateRequest{Guest: guest, To: to, Timeout: d.MoveTimeout, BandwidthMiBs: d.BandwidthMiBs,
		MaxPause: d.MaxPause, Allow: d.Allow, Reason: d.Reason, Emergency: d.Emergency}
	if d.CopyDisks != "" {
		r.CopyDisks = []string{d.CopyDisks}
	}
	return r
}

// PlanDrain says what a drain would do, and changes nothing.
func (a *Agent) PlanDrain(ctx context.Context, r maint.DrainRequest) (maint.DrainPlan, error) {
	const what = "cannot plan the drain"
	if err := a.checkDrain(what, &r); err != nil {
		return maint.DrainPlan{}, err
	}
	guests, err := a.present(ctx)
	if err != nil {
		return maint.DrainPlan{}, a.cannotAsk(what, err)
	}
	plan := maint.DrainPlan{Guests: []maint.GuestMove{}, AtOnce: cmp.Or(r.Parallel, a.atOnce(a.cfg.Limits.MigrationsOut))}
	var active []maint.Guest
	for _, g := range guests {
		if g.State.Active() {
			active = append(active, g)
		} else {
			plan.Off = append(plan.Off, g.Name)
		}
	}
	moves, err := a.place(ctx, r, active, nil)
	if err != nil {
		return maint.DrainPlan{}, a.cannotAsk(what, err)
	}
	for i := range moves {
		if moves[i].State == maint.MoveLeft {
			moves[i].Instead = a.instead(ctx, moves[i])
		}
	}
	plan.Guests = append(plan.Guests, moves...)
	return plan, nil
}

// present lists the guests of this host, those in the twin or between two QEMUs
// among them.
func (a *Agent) present(ctx context.Context) ([]maint.Guest, error) {
	guests, err := a.hyp.Guests(ctx)
	return a.complete(guests), err
}

// drainSteps wires a drain to the runner.
func (a *Agent) drainSteps(op maint.Op) []run.Step {
	return []run.Step{
		{Name: phasePlan, Do: func(ctx context.Context, s *run.Scratch) error { return a.planStep(ctx, op, s) }},
		{Name: phaseCordon,
			Do:   func(_ context.Context, s *run.Scratch) error { return a.cordonFor(op, s) },
			Undo: func(_ context.Context, s *run.Scratch) error { return a.uncordonFor(op, s) }},
		{Name: phaseEvacuate, Commit: true, Do: func(ctx context.Context, s *run.Scratch) error {
			return newDrainage(a, op, s).run(ctx)
		}},
		{Name: phaseAccount, Do: func(ctx context.Context, s *run.Scratch) error { return a.account(ctx, op, s) }},
	}
}

// planStep writes down where each guest is to go, or refuses the drain.
func (a *Agent) planStep(ctx context.Context, op maint.Op, s *run.Scratch) error {
	plan, err := a.PlanDrain(ctx, *op.Drain)
	if err != nil {
		return err
	}
	left := maint.Left(plan.Guests)
	if len(left) > 0 && (!op.Drain.Partial || len(left) == len(plan.Guests)) {
		var ps []maint.Problem
		for _, m := range left {
			p := whyLeft(m)
			p.Remedy += "; or drain the others: --partial"
			ps = append(ps, p)
		}
		return maint.Refuse("cannot drain host "+a.cfg.Host, ps)
	}
	var recs []maint.Record
	for _, m := range plan.Guests {
		recs = append(recs, moveRecord(m))
	}
	if err := s.Append(recs...); err != nil {
		return err
	}
	if len(plan.Off) > 0 {
		return s.Note("%d guests do not run, and stay defined here: %s", len(plan.Off), strings.Join(plan.Off, ", "))
	}
	return nil
}

// whyLeft says in one problem why a guest stays, and what can be done.
func whyLeft(m maint.GuestMove) maint.Problem {
	p := together("guest "+m.Guest, m.Problems, m.Instead...)
	p.Reason = "cannot be moved: " + p.Reason
	return p
}

// together makes one problem of several, with remedies of its own after theirs.
func together(subject string, all []maint.Problem, more ...string) maint.Problem {
	p := maint.Problem{Code: maint.CodeFailed, Subject: subject}
	var reasons, remedies []string
	for _, why := range all {
		p.Code = why.Code
		reason := why.Reason
		if why.Subject != p.Subject {
			reason = why.Subject + " " + reason
		}
		reasons = append(reasons, reason)
		if why.Remedy != "" && !slices.Contains(remedies, why.Remedy) {
			remedies = append(remedies, why.Remedy)
		}
	}
	p.Reason = strings.Join(reasons, "; ")
	p.Remedy = strings.Join(slices.Concat(remedies, more), "; ")
	return p
}

// cordonFor has the host take no guests in. A cordon that is there already is not
// the drain's.
func (a *Agent) cordonFor(op maint.Op, s *run.Scratch) error {
	if c := a.journal.Cordon(); c != nil {
		if c.By == byDrain+string(op.ID) {
			return nil
		}
		return s.Note("the host was cordoned before, by %s at %s", c.By, c.Since.Format(time.RFC3339))
	}
	_, err := a.Cordon(a.life, byDrain+string(op.ID), op.Reason)
	return err
}

// uncordonFor lifts the drain's own cordon.
func (a *Agent) uncordonFor(op maint.Op, _ *run.Scratch) error {
	if c := a.journal.Cordon(); c != nil && c.By == byDrain+string(op.ID) {
		return a.uncordon(byDrain + string(op.ID))
	}
	return nil
}

// account ends the drain well, or says who is left.
func (a *Agent) account(ctx context.Context, op maint.Op, s *run.Scratch) error {
	guests, err := a.presentAtLast(ctx)
	if err != nil {
		return err
	}
	now, _ := a.journal.Op(op.ID)
	var ps []maint.Problem
	active := make(map[string]bool)
	for _, g := range guests {
		active[keyOf(g)] = g.State.Active()
	}
	for _, m := range now.Moves {
		child, _ := a.journal.Op(m.Op)
		if m.State == maint.MoveMoved || child.Outcome == maint.OutcomeStuck && !active[m.GuestUUID] {
			ps = append(ps, m.Problems...) // what its migration has left to a person
		}
	}
	for _, g := range guests {
		if !active[keyOf(g)] {
			continue
		}
		why := maint.Problemf(maint.CodeFailed, "guest "+g.Name, "drain the host again, or migrate it", "runs on %s", a.cfg.Host)
		for _, m := range now.Moves {
			if m.GuestUUID == keyOf(g) && len(m.Problems) > 0 {
				*why = whyLeft(m)
			}
		}
		ps = append(ps, *why)
	}
	return maint.Refuse("host "+a.cfg.Host+" is not empty", ps)
}

// presentAtLast is present, and waits for libvirt for a while.
func (a *Agent) presentAtLast(ctx context.Context) (guests []maint.Guest, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		next := a.view.changed()
		if guests, err = a.present(ctx); err == nil {
			return guests, nil
		}
		select {
		case <-next:
		case <-ctx.Done():
			return nil, a.downProblem(err)
		}
	}
}
