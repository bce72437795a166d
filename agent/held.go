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

// pausedByUser reports whether a guest stands still by somebody's call, its owner's or an
// operator's. libvirt says the same of one that Belay has paused, so nothing may be known of
// what was done since by which Belay could have left it so.
func (a *Agent) pausedByUser(g maint.Guest, since time.Time) bool {
	if _, held := a.holder(g); held || g.State != maint.GuestPaused || g.Reason != "user" {
		return false
	}
	for _, l := range a.leftovers() {
		if !l.Void && slices.ContainsFunc(l.Guests, func(of leash.GuestStatus) bool { return of.UUID == g.UUID && of.Fate.Held() }) {
			return false
		}
	}
	return !slices.ContainsFunc(a.journal.Ops(), func(op maint.Op) bool {
		return (op.State != maint.OpEnded || op.Ended.After(since)) && mayHavePaused(op, g)
	})
}

// mayHavePaused reports whether an operation does something to a guest, or did, and is not known
// to have had it run again if it paused it.
func mayHavePaused(op maint.Op, g maint.Guest) bool {
	if op.Kind == maint.OpApply { // its parts may
		return false
	}
	if op.State != maint.OpEnded {
		return inCommon(maint.Op{Guest: g.Name, GuestUUID: g.UUID}, op) != ""
	}
	still := func(p *maint.Problem) bool { return p != nil && p.Code == maint.CodePaused }
	switch {
	case slices.ContainsFunc(op.Problems, func(p maint.Problem) bool { return still(&p) && p.Subject == "guest "+g.Name }):
		return true
	case op.Kind == maint.OpHold && op.Held == nil:
		return holds(op, g.UUID)
	case op.Kind == maint.OpHold:
		return slices.ContainsFunc(op.Held.Guests, func(h maint.HeldGuest) bool { return h.UUID == g.UUID && still(h.Problem) })
	case op.Kind == maint.OpKexec && op.Kexeced != nil:
		return slices.ContainsFunc(op.Kexeced.Guests, func(k maint.KexecGuest) bool { return k.UUID == g.UUID && still(k.Problem) })
	case op.Kind == maint.OpKexec:
		return true
	case op.GuestUUID == g.UUID:
		return !op.Outcome.TookEffect()
	}
	return false
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
