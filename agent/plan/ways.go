package plan

import (
	"slices"

	"belay/agent/maint"
)

// way is how a change is delivered to guests that stay: A, B1, B2, B3; D is that none
// stays, and "" that this host cannot do it.
type way struct {
	change  maint.Change
	rung    maint.Rung
	refused []maint.RefusedRung // of the rungs before it
}

// choose decides it for each change.
func choose(u maint.Update, l maint.Ladder) []way {
	ways := make([]way, len(u.Changes))
	can := make([][]maint.Rung, len(u.Changes))
	boots := false // a change needs B3, in which others are done too
	for i, c := range u.Changes {
		ways[i].change = c
		for _, r := range c.Kind.Rungs() {
			if ps := hostProblems(c, r, l); len(ps) > 0 {
				ways[i].refused = append(ways[i].refused, maint.RefusedRung{Rung: r, Problems: ps})
			} else {
				can[i] = append(can[i], r)
			}
		}
		boots = boots || c.Kind.BootsKernel() && slices.Contains(can[i], maint.RungB3) && !slices.Contains(can[i], maint.RungA)
	}
	for i := range ways {
		w := &ways[i]
		if b3 := slices.Index(can[i], maint.RungB3); b3 >= 0 && !boots {
			can[i] = slices.Delete(can[i], b3, b3+1)
			if len(can[i]) == 0 || can[i][0] == maint.RungD {
				w.refused = append(w.refused, maint.RefusedRung{Rung: maint.RungB3, Problems: []maint.Problem{*maint.Problemf(maint.CodeRung,
					"change "+w.change.Name, "", "no change of this update boots another kernel, in whose boot it could be done")}})
			}
		}
		switch {
		case len(can[i]) == 0:
		case can[i][0] == maint.RungA:
			w.rung = maint.RungA
		case boots && slices.Contains(can[i], maint.RungB3):
			w.rung = maint.RungB3
		default:
			w.rung = can[i][0]
		}
		w.refused = slices.DeleteFunc(w.refused, func(r maint.RefusedRung) bool {
			return w.rung != "" && slices.Index(maint.Rungs, r.Rung) > slices.Index(maint.Rungs, w.rung)
		})
	}
	return ways
}

// hostProblems is why this host cannot do a change by a rung.
func hostProblems(c maint.Change, r maint.Rung, l maint.Ladder) []maint.Problem {
	if !c.Delivers(r) {
		return []maint.Problem{*maint.Problemf(maint.CodeRung, "change "+c.Name, "", "its manifest does not say that rung %s is able to deliver it", r)}
	}
	for _, v := range l.Verdicts {
		if v.Change == c.Name && v.Rung == r {
			return v.Problems
		}
	}
	if r == maint.RungD {
		return nil // it takes guests, not the host
	}
	return []maint.Problem{*maint.Problemf(maint.CodeRung, "host "+l.Host, "see 'belay doctor'", "does not say that it can do rung %s", r)}
}

func (w way) planned() maint.PlannedChange {
	return maint.PlannedChange{Change: w.change.Name, Kind: w.change.Kind, Rung: w.rung, Refused: w.refused}
}

// blocker is why a change cannot be done to this host at all.
func (w way) blocker() maint.Problem {
	p := *maint.Problemf(maint.CodeRung, "change "+w.change.Name, "", "this host cannot do it by any rung")
	for _, r := range w.refused {
		for _, why := range r.Problems {
			p.Reason += "; " + string(r.Rung) + ": " + why.Reason
			if p.Remedy == "" {
				p.Remedy = why.Remedy
			}
		}
	}
	return p
}

// away reports whether a guest that is elsewhere meanwhile is served of the change.
func (w way) away() bool {
	return w.rung == "" || w.rung == maint.RungA || w.change.Delivers(maint.RungD)
}
