package plan

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// Make makes a plan. The update is valid (see package update), and no two guests or peers
// of the ladder are the same.
func Make(u maint.Update, l maint.Ladder, o maint.PlanOptions) maint.Plan {
	l = ordered(l, o)
	p := maint.Plan{Version: maint.PlanVersion, World: world(u, l), Host: l.Host, HostUUID: l.HostUUID,
		Made: l.Now, Deadline: u.Deadline(l.Now), Options: o, Update: u, Off: l.Off}
	history := newHistory(l.History)
	p.Calibration = history.calibration()

	ways := choose(u, l)
	for _, w := range ways {
		p.Changes = append(p.Changes, w.planned())
		if w.rung == "" {
			p.Blockers = append(p.Blockers, w.blocker())
		}
	}
	all := make([]*candidate, len(l.Guests))
	for i, g := range l.Guests {
		all[i] = judge(g, ways, l, o, u.Urgency, history)
	}
	assign(all, l.Peers)
	t := newTimetable(p, l, all, ways)
	for _, c := range all {
		g := t.planned(c)
		p.Guests = append(p.Guests, g)
		if g.Rung == "" {
			p.Blockers = append(p.Blockers, unserved(g))
		}
	}
	p.Steps = t.steps(p)
	return p.Seal()
}

// Misplaced is why guests cannot move, all of them, where a plan sends them: peers' room goes
// up and down, and another plan that could be made by now is none that must be.
func Misplaced(p maint.Plan, l maint.Ladder) (ps []maint.Problem) {
	rooms := newRooms(l.Peers)
	for _, step := range p.Steps {
		if step.Kind != maint.PlanMove {
			continue
		}
		to := slices.IndexFunc(rooms, func(r *room) bool { return r.Name == step.To })
		for _, g := range l.Guests {
			if !slices.Contains(step.Guests, g.UUID) {
				continue
			}
			if to < 0 {
				ps = append(ps, *maint.Problemf(maint.CodeUnknownPeer, "guest "+g.Guest, "", "was to move to %s, which is no peer", step.To))
				continue
			}
			against := rooms[to].against(&candidate{g: g})
			for _, why := range against {
				why.Subject, why.Reason = "guest "+g.Guest, "was to move to "+step.To+": "+why.Subject+" "+why.Reason
				ps = append(ps, why)
			}
			if len(against) == 0 {
				rooms[to].put(g)
			}
		}
	}
	return ps
}

// ordered is a ladder in the one order that plans are made from: guests and peers by name.
func ordered(l maint.Ladder, o maint.PlanOptions) maint.Ladder {
	l.Now = l.Now.UTC().Round(0)
	l.Guests, l.Peers, l.Off = slices.Clone(l.Guests), slices.Clone(l.Peers), slices.Clone(l.Off)
	slices.SortFunc(l.Guests, func(a, b maint.LadderGuest) int {
		return cmp.Or(strings.Compare(a.Guest, b.Guest), strings.Compare(a.UUID, b.UUID))
	})
	if len(o.To) > 0 {
		l.Peers = slices.DeleteFunc(l.Peers, func(p maint.LadderPeer) bool { return !slices.Contains(o.To, p.Name) })
	}
	slices.SortFunc(l.Peers, func(a, b maint.LadderPeer) int { return strings.Compare(a.Name, b.Name) })
	slices.Sort(l.Off)
	return l
}

// unserved is the blocker of a guest that nothing serves.
func unserved(g maint.PlannedGuest) maint.Problem {
	var reasons, remedies []string
	for _, r := range g.Refused {
		for _, p := range r.Problems {
			if r.Rung == maint.RungA {
				continue // the change's affair
			}
			subject := ""
			if p.Subject != "guest "+g.Guest {
				subject = p.Subject + " "
			}
			reasons = append(reasons, fmt.Sprintf("%s: %s%s", r.Rung, subject, p.Reason))
			if p.Remedy != "" && !slices.Contains(remedies, p.Remedy) {
				remedies = append(remedies, p.Remedy)
			}
		}
	}
	return *maint.Problemf(maint.CodeUnserved, "guest "+g.Guest, strings.Join(remedies, "; or "), "no rung serves it: %s", strings.Join(reasons, "; "))
}

// world is a hash of what does not change by itself. It is by codes, and not by texts, in
// which there are figures that do.
func world(u maint.Update, l maint.Ladder) string {
	codes := func(ps []maint.Problem) (all []string) {
		for _, p := range ps {
			all = append(all, string(p.Code)+" "+p.Subject)
		}
		slices.Sort(all)
		return slices.Compact(all)
	}
	type verdict struct {
		Of, Rung, Untouched, Method string
		Codes                       []string
	}
	type guest struct {
		UUID     string
		Policy   maint.GuestPolicy
		Verdicts []verdict
	}
	var w struct {
		Update         maint.Update
		Host, HostUUID string
		Tells          bool
		MaxHold        time.Duration
		Verdicts       []verdict
		Guests         []guest
		Peers          []string
	}
	w.Update, w.Host, w.HostUUID, w.Tells, w.MaxHold = u, l.Host, l.HostUUID, l.Tells, l.MaxHold
	for _, v := range l.Verdicts {
		w.Verdicts = append(w.Verdicts, verdict{Of: v.Change, Rung: string(v.Rung), Codes: codes(v.Problems)})
	}
	for _, g := range l.Guests {
		of := guest{UUID: g.UUID, Policy: g.Policy}
		for _, v := range g.Verdicts {
			of.Verdicts = append(of.Verdicts, verdict{Rung: string(v.Rung), Untouched: v.Untouched, Method: string(v.Method), Codes: codes(v.Problems)})
		}
		for _, v := range g.Peers {
			of.Verdicts = append(of.Verdicts, verdict{Of: v.Peer, Rung: string(maint.RungD), Codes: codes(v.Problems)})
		}
		slices.SortFunc(of.Verdicts, func(a, b verdict) int {
			return cmp.Or(strings.Compare(a.Rung, b.Rung), strings.Compare(a.Of, b.Of))
		})
		w.Guests = append(w.Guests, of)
	}
	slices.SortFunc(w.Verdicts, func(a, b verdict) int {
		return cmp.Or(strings.Compare(a.Of, b.Of), strings.Compare(a.Rung, b.Rung))
	})
	for _, p := range l.Peers {
		w.Peers = append(w.Peers, p.Name)
	}
	b, err := json.Marshal(w)
	if err != nil {
		panic(fmt.Sprintf("vocabulary type %T does not marshal: %v", w, err))
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
