package agent

import (
	"context"
	"path/filepath"
	"slices"

	"belay/agent/maint"
	"belay/agent/run"
	"belay/patch/live"
)

// patch changes the running host.
func (x application) patch(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	c := x.change(step.Changes[0])
	var r maint.PatchRequest
	switch {
	case c.Kind == maint.ChangeLivepatch:
		if err := x.keepActive(s, step); err != nil {
			return err
		}
		r = maint.PatchRequest{Action: maint.PatchApply, File: c.File}
	case c.Kind == maint.ChangeQEMU:
		r = maint.PatchRequest{Action: maint.PatchQEMU, File: c.File, All: true}
	case c.Kind == maint.ChangeMicrocode && c.Apply == nil:
		r = maint.PatchRequest{Action: maint.PatchMicrocode}
	case c.Apply != nil && c.Apply.Unit != "" && (c.Apply.Job == "" || c.Apply.Job == "restart" || c.Apply.Job == "reload"):
		r = maint.PatchRequest{Action: maint.PatchRestart, Name: c.Apply.Unit, Job: c.Apply.Job}
	default:
		return x.service(ctx, s, step)
	}
	r.Reason = x.reason()
	_, err := x.through(ctx, maint.StepOp(x.op.ID, step.N), x.patching(ctx, r))
	if err == nil && c.Verify != nil {
		err = x.host(ctx, s, "verify", step, c.Verify)
	}
	return err
}

// unpatch takes that back, as far as it can be.
func (x application) unpatch(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	c := x.change(step.Changes[0])
	op, done := x.done(maint.StepOp(x.op.ID, step.N))
	r := maint.PatchRequest{Reason: x.reason()}
	switch {
	case !done && !restarted(op):
		return x.takeBack(ctx, s, step)
	case op.Patch.Action == maint.PatchApply && op.Patched != nil:
		return x.unload(s, step, op)
	case op.Patch.Action == maint.PatchQEMU && op.Patched != nil:
		r.Action, r.File, r.Revert = maint.PatchQEMU, c.File, true
		for _, q := range op.Patched.QEMUs {
			if !q.Before && !q.Gone { // those that had it keep it
				r.Guests = append(r.Guests, q.Guest)
			}
		}
		if len(r.Guests) == 0 {
			return nil
		}
	case c.Undo != nil:
		return x.host(ctx, s, "undo", step, c.Undo)
	default:
		return nil
	}
	return x.takeBackBy(step, x.patching(x.a.life, r))
}

// restarted reports whether a unit's restart was begun, however it has ended.
func restarted(op maint.Op) bool {
	return op.Patch != nil && op.Patch.Action == maint.PatchRestart &&
		slices.ContainsFunc(op.Steps, func(s maint.Step) bool { return s.Name == live.PhaseRestart })
}

// patching begins to change the running host.
func (x application) patching(ctx context.Context, r maint.PatchRequest) beginning {
	return func(edit func(*maint.Op)) (maint.Op, error) { return x.a.patch(ctx, x.by(), r, edit) }
}

// before keeps livepatches that an apply may put others in the place of, until it has ended.
func (x application) before() live.Store {
	return live.Store{Dir: filepath.Join(x.a.cfg.StateDir, "live-before")}
}

// keepActive keeps the livepatch that is active before another is loaded: who loads that
// forgets it.
func (x application) keepActive(s *run.Scratch, step maint.PlanStep) error {
	active := x.a.journal.Patches().Active
	if active == nil || x.begun(maint.StepOp(x.op.ID, step.N)) {
		return nil
	}
	a, err := x.a.preserve.Live.Host.Store.Read(*active)
	if err == nil {
		err = x.before().Put(active.Name, a)
	}
	if err != nil {
		return maint.Problemf(maint.CodePatchFile, "livepatch "+active.Name, "apply it again from its own files (belay patch apply), and then the update", "is active, and cannot be kept for the case that the update is taken back: %v", err)
	}
	return s.Save(hostRun{Before: active})
}

// unload takes a livepatch back, and loads the one again that was active before it.
func (x application) unload(s *run.Scratch, step maint.PlanStep, op maint.Op) error {
	var h hostRun
	if _, err := s.Load(step.Name(), &h); err != nil {
		return err
	}
	do := []beginning{x.patching(x.a.life, maint.PatchRequest{Action: maint.PatchRevert, Name: op.Patched.Name, Reason: x.reason()})}
	if b := h.Before; b != nil && op.Patched.Replaced == b.Name {
		do = append(do, x.patching(x.a.life, maint.PatchRequest{Action: maint.PatchApply, File: x.before().File(*b), Reason: x.reason()}))
	}
	return x.takeBackBy(step, do...)
}
