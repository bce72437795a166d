package agent

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/boottime"
	"belay/agent/maint"
	"belay/patch/leash"
	"belay/patch/preserve"
)

// holder is the open operation that a guest is paused by, if it is one. A guest
// that was paused by somebody else before a hold began is not that hold's.
func (a *Agent) holder(g maint.Guest) (maint.Op, bool) {
	if g.State != maint.GuestPaused {
		return maint.Op{}, false
	}
	for _, op := range a.journal.Ops() {
		if op.State == maint.OpEnded {
			continue
		}
		if op.Kind == maint.OpReplace && op.GuestUUID == g.UUID || op.Kind == maint.OpHold && op.Held == nil && holds(op, g.UUID) {
			return op, true
		}
	}
	return maint.Op{}, false
}

// holds reports whether a hold has found the guest fit to be paused.
func holds(op maint.Op, uuid string) bool {
	for _, s := range op.Steps {
		var order preserve.Order
		if s.Name == preserve.PhasePreflight && json.Unmarshal(s.Data, &order) == nil {
			return slices.ContainsFunc(order.Guests, func(m preserve.Member) bool { return m.UUID == uuid && m.Left == "" })
		}
	}
	return false
}

// unlessHeld refuses a guest that is paused by an operation: nobody is to be sent
// to resume it.
func (a *Agent) unlessHeld(what string, g maint.Guest) error {
	op, held := a.holder(g)
	if !held {
		return nil
	}
	return refuse(what, maint.Problemf(maint.CodeBusy, "guest "+g.Name, fmt.Sprintf("wait for it (belay ops watch %s)", op.ID),
		"is held by operation %s", op.ID))
}

// overdue are the conditions of holds that are open although their time has
// passed, and whose leash does not know all guests to run.
func (a *Agent) overdue(all []leash.Leftover) (cs []maint.Condition) {
	for _, l := range all {
		op, known := a.journal.Op(leashedOp(l.Op))
		late := boottime.Now() - l.Deadline
		if l.Void || !known || op.State == maint.OpEnded || late < overdueAfter {
			continue
		}
		var held []string
		for _, g := range l.Guests {
			if g.Fate.Held() {
				held = append(held, g.Name)
			}
		}
		if len(held) > 0 {
			cs = append(cs, maint.Condition{Code: maint.CodePaused,
				Text: fmt.Sprintf("operation %s has not released its guests %s after its limit: %s", op.ID, late.Round(time.Second), strings.Join(held, ", ")),
				Remedy: "if libvirt hangs (virsh list does not answer), end its daemon with kill -9 and its pid: " +
					"guests go on without it; they are tried again until they run"})
		}
	}
	return cs
}

// overdueAfter is how long a release may take before it is a condition.
const overdueAfter = 2 * time.Second
