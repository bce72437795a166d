package live

import (
	"context"
	"fmt"
	"slices"
	"time"

	"belay/agent/maint"
)

// answerWithin is how long libvirt has to list its guests.
const answerWithin = 5 * time.Second

// Soak watches the host after the transition, and then writes down that the livepatch is
// active.
func (j *Job) Soak(ctx context.Context, s Scratch) error {
	var plan intent
	if _, err := s.Load(PhasePreflight, &plan); err != nil {
		return err
	}
	if err := j.rebooted(); err != nil {
		return err
	}
	var since begun
	if _, err := s.Load(PhaseLoad, &since); err != nil {
		return err
	}
	whole := time.Now()
	end := time.NewTimer(j.Timing.Soak)
	defer end.Stop()
	tick := time.NewTicker(max(j.Timing.Poll, j.Timing.Soak/30))
	defer tick.Stop()
	for over := false; !over; {
		select {
		case <-tick.C:
		case <-end.C:
			over = true
			if j.Health != nil {
				if err := j.Health(ctx); err != nil {
					return j.unwell("health command", "see what it says is wrong", "%v", err)
				}
			}
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := j.well(ctx, plan, over); err != nil {
			return err
		}
	}
	result := maint.PatchResult{Name: plan.Patch.Name, Transition: since.Took, Soaked: time.Since(whole)}
	if plan.Before != nil {
		result.Replaced = plan.Before.Name
	}
	patch := plan.Patch
	return j.Record(maint.Patches{Active: &patch}, &result)
}

func (j *Job) unwell(subject, remedy, reason string, args ...any) error {
	return maint.Problemf(maint.CodeUnwell, subject, remedy, "after the livepatch: "+reason, args...)
}

// well says what is wrong with the host that was not before. Libvirt may take its time,
// but has to answer in the end.
func (j *Job) well(ctx context.Context, plan intent, last bool) error {
	p, err := j.Tree.Patch(plan.Patch.Name)
	if err != nil {
		return err
	}
	if p == nil || !p.Whole() || !is(*p, &plan.Patch) {
		return j.unwell("livepatch "+plan.Patch.Name, "see who else has to do with livepatches here", "it is not whole any more")
	}
	lines, err := j.Witness.KernelLog(ctx, plan.LogSeq)
	if err != nil {
		return err
	}
	if i := slices.IndexFunc(lines, Line.Alarm); i >= 0 {
		return j.unwell("this host's kernel", "see its log (dmesg)", "it says %q", lines[i].Text)
	}
	taint, err := j.Tree.Taint()
	if err != nil {
		return err
	}
	if more := taint &^ plan.Taint & taintSickened; more != 0 {
		return j.unwell("this host's kernel", "see its log (dmesg)", "its taint went from %d to %d", plan.Taint, taint)
	}
	asked, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	guests, err := j.Guests(asked)
	switch {
	case err != nil && last:
		return j.unwell("libvirt", "systemctl status libvirtd virtqemud", "it does not answer: %v", err)
	case err != nil:
		return nil
	}
	for _, was := range plan.Guests {
		if trouble := ailing(guests, was); trouble != "" {
			return j.unwell("guest "+was.Name, "see its log in /var/log/libvirt/qemu", "%s", trouble)
		}
	}
	return nil
}

// ailing says what is wrong with a guest that ran; "": nothing, or its owner has stopped it.
func ailing(guests []maint.Guest, was guest) string {
	i := slices.IndexFunc(guests, func(g maint.Guest) bool { return g.UUID == was.UUID })
	if i < 0 {
		if was.Transient {
			return "it has gone"
		}
		return "" // moved, or undefined: not by what is wrong with a kernel
	}
	g := guests[i]
	bad := g.State == maint.GuestCrashed ||
		g.State == maint.GuestPaused && slices.Contains([]string{"I/O error", "watchdog", "crashed"}, g.Reason) ||
		g.State == maint.GuestShutoff && slices.Contains([]string{"crashed", "failed"}, g.Reason)
	if !bad {
		return ""
	}
	return fmt.Sprintf("it is %s (%s)", g.State, g.Reason)
}
