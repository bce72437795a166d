package live

import (
	"context"
	"time"

	"belay/agent/maint"
)

// PreflightRevert judges whether a livepatch can be taken back, and writes the intent down.
func (j *Job) PreflightRevert(ctx context.Context, s Scratch) error {
	refuse := func(p *maint.Problem) error { return maint.Refuse(whatRevert, []maint.Problem{*p}) }
	name, known := j.Request.Name, j.Known()
	if err := j.rebooted(); err != nil {
		return err
	}
	patches, err := j.Tree.Patches()
	if err != nil {
		return err
	}
	there := false
	for _, p := range patches {
		there = there || p.Name == name
		if p.Transition {
			return refuse(maint.Problemf(maint.CodeTransition, "livepatch "+p.Name, "wait for it (belay patch watch)", "is in transition"))
		}
		if p.Name == name && !is(p, known.Active) {
			return refuse(maint.Problemf(maint.CodePatchStack, "livepatch "+name, "have it unloaded by whoever loaded it (echo 0 > /sys/kernel/livepatch/"+name+"/enabled; rmmod "+name+")",
				"was loaded by somebody else"))
		}
	}
	if k := known.Active; k == nil || k.Name != name {
		if there {
			return refuse(maint.Problemf(maint.CodePatchStack, "livepatch "+name, "see 'belay patch list'", "is not one of Belay's"))
		}
		return refuse(maint.Problemf(maint.CodeNothing, "livepatch "+name, "see 'belay patch list'", "is not loaded, and not kept"))
	}
	plan := intent{Patch: *known.Active, Known: known}
	if there {
		plan.Before = known.Active
	}
	return s.Save(plan)
}

// Withdraw disables the livepatch, sees that through, and writes down that it is not kept any
// more. One that is kept and not loaded is only forgotten.
func (j *Job) Withdraw(ctx context.Context, s Scratch) error {
	var plan intent
	if _, err := s.Load(PhasePreflight, &plan); err != nil {
		return err
	}
	if err := j.rebooted(); err != nil {
		return err
	}
	begun := time.Now()
	if err := j.takeOut(ctx, s, plan.Patch, j.Timing.Limit); err != nil {
		return err
	}
	return j.Record(maint.Patches{}, &maint.PatchResult{Name: plan.Patch.Name, Transition: time.Since(begun)})
}

// UndoWithdraw puts the livepatch back.
func (j *Job) UndoWithdraw(ctx context.Context, s Scratch) error {
	var plan intent
	if found, err := s.Load(PhasePreflight, &plan); err != nil || !found {
		return err
	}
	if j.rebooted() == nil && plan.Before != nil {
		// Only one that was whole is withdrawn; of one that is on its way out the
		// transition is turned round.
		if p, err := j.Tree.Patch(plan.Patch.Name); err != nil {
			return err
		} else if p != nil && !p.Enabled {
			_ = j.Kernel.Enable(ctx, plan.Patch.Name, true) // whether it holds is seen below
			if err := j.turned(ctx, s, plan.Patch); err != nil {
				return err
			}
		}
		if err := j.bringIn(ctx, s, plan.Patch, time.Now(), j.Timing.Back); err != nil {
			return err
		}
	}
	return j.Record(plan.Known, nil)
}

// turned waits until a livepatch is on its way in again, or out for good.
func (h Host) turned(ctx context.Context, s Scratch, k maint.KeptPatch) error {
	return h.await(ctx, s, k, time.Now(), h.Timing.Back, func(p *maint.LivePatch) (bool, error) { return p == nil || p.Enabled, nil })
}
