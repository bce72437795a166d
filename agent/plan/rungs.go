package plan

import (
	"slices"

	"belay/agent/maint"
)

// Every is an update with a change for each rung that guests feel, by which Rungs asks for
// all of them. Of rung B3 it is the kernel that runs, by its image and initrd.
func Every(kernel maint.KernelImage) maint.Update {
	change := func(k maint.ChangeKind, r maint.Rung) maint.Change {
		return maint.Change{Name: string(r), Kind: k, Rungs: []maint.Rung{r}}
	}
	boot := change(maint.ChangeKernel, maint.RungB3)
	boot.Kernel, boot.Initrd = kernel.Kernel, kernel.Initrd
	return maint.Update{ID: "ladder", Urgency: maint.UrgencyNormal, Changes: []maint.Change{
		change(maint.ChangeNetwork, maint.RungB1), change(maint.ChangeQEMU, maint.RungB2), boot, change(maint.ChangeLeave, maint.RungD)}}
}

// Rungs says of each guest which rungs can be taken and which may be, in the order of names.
// The ladder is that of Every.
func Rungs(u maint.Update, l maint.Ladder) []maint.GuestRungs {
	l = ordered(l, maint.PlanOptions{})
	h := newHistory(l.History)
	all := make([]maint.GuestRungs, len(l.Guests))
	for i, g := range l.Guests {
		c := &candidate{g: g}
		all[i] = maint.GuestRungs{Guest: g.Guest, UUID: g.UUID}
		for _, r := range maint.Rungs {
			var v maint.RungVerdict // of rung A, which nobody feels
			if r == maint.RungC {
				v.Cannot = silent(l)
			}
			for _, change := range u.Changes {
				if change.Delivers(r) {
					v = c.rung(way{change: change, rung: r}, l, h)
				}
			}
			v.Rung = r
			all[i].Rungs = append(all[i].Rungs, v)
		}
	}
	return all
}

// silent is why a host cannot tell its guests.
func silent(l maint.Ladder) []maint.Problem {
	if l.Tells {
		return nil
	}
	return []maint.Problem{*maint.Problemf(maint.CodeRung, "host "+l.Host, "set events.enabled in its configuration", "does not tell guests of anything")}
}

// rung is the verdict on one that guests feel.
func (c *candidate) rung(w way, l maint.Ladder, h history) maint.RungVerdict {
	given := c.verdict(w.rung)
	v := maint.RungVerdict{Untouched: given.Untouched, Method: given.Method, Asks: w.rung.In(c.g.Policy.Ask)}
	v.Cannot = slices.Concat(hostProblems(w.change, w.rung, l), given.Problems)
	var e maint.Estimate
	switch w.rung {
	case maint.RungB1:
		e = h.by[key{rung: maint.RungB1}].predict(c.g.UUID, assumedOverhead)
	case maint.RungD:
		e = h.blackout(c.g.UUID)
		var against []maint.Problem
		if v.Peers, against = c.takers(l); len(v.Peers) == 0 {
			v.Cannot = append(v.Cannot, against...)
		}
	default:
		e = h.standstill(w, []way{w}, c.g.UUID, given)
	}
	v.MayNot = c.mayNot(w.rung, e, l, maint.UrgencyNormal)
	if v.Untouched == "" && len(v.Cannot) == 0 {
		v.Feels = &e
	}
	return v
}
