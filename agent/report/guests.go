package report

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"belay/agent/maint"
)

// guests is what each guest of an operation felt.
func guests(s Source) []maint.GuestReport {
	op, all := s.Op, []maint.GuestReport{}
	switch {
	case op.Kind == maint.OpMigrate:
		all = append(all, moved(op))
	case op.Kind == maint.OpReplace:
		all = append(all, replaced(op))
	case op.Held != nil && op.Hold != nil:
		for _, g := range op.Held.Guests {
			all = append(all, heldGuest(g, op.Hold.MaxPause, op.Held.Step != nil))
		}
	case op.Kexeced != nil:
		for _, g := range op.Kexeced.Guests {
			all = append(all, kexeced(g))
		}
	case op.Patched != nil:
		for _, g := range op.Patched.Guests {
			all = append(all, proved(g))
		}
		for _, q := range op.Patched.QEMUs {
			all = append(all, patched(q))
		}
	}
	for _, m := range op.Moves {
		all = append(all, ofMany(s, m))
	}
	for i := range all {
		if e := expected(s, all[i]); e != nil {
			all[i].Expected = e
		}
	}
	if op.Apply != nil {
		all = applied(s, all)
	}
	return all
}

// expected is what was predicted of a guest that stood still, or that is to.
func expected(s Source, g maint.GuestReport) *maint.Estimate {
	if s.Plan == nil || s.Op.Kind == maint.OpRestore {
		return nil
	}
	for _, p := range s.Plan.Guests {
		switch {
		case p.UUID != g.UUID:
		case s.Op.Kind == maint.OpMigrate || s.Op.Kind == maint.OpApply: // its own guests move
			return p.Blackout
		case s.Op.Kind != maint.OpPatch:
			return p.Pause
		}
	}
	return nil
}

// applied adds what guests felt of the operations that an apply is made of, and those that
// felt nothing.
func applied(s Source, all []maint.GuestReport) []maint.GuestReport {
	for _, part := range s.Parts {
		if slices.ContainsFunc(s.Op.Moves, func(m maint.GuestMove) bool { return m.Op == part.ID }) {
			continue
		}
		for _, g := range guests(Source{Op: part, Plan: s.Plan, Arrived: s.Arrived}) {
			g.Fate += ", " + string(part.ID)
			all = append(all, g)
		}
	}
	for _, p := range s.Plan.Guests {
		if !slices.ContainsFunc(all, func(g maint.GuestReport) bool { return g.UUID == p.UUID }) {
			all = append(all, maint.GuestReport{Guest: p.Guest, UUID: p.UUID, Fate: "nothing was done to it"})
		}
	}
	slices.SortStableFunc(all, func(a, b maint.GuestReport) int { return cmp.Compare(a.Guest, b.Guest) })
	return all
}

// moved is the guest of a migration.
func moved(op maint.Op) maint.GuestReport {
	g := maint.GuestReport{Guest: op.Guest, UUID: op.GuestUUID, Fate: "stays where it was"}
	if op.Migrate != nil {
		g.Limit = op.Migrate.MaxPause
	}
	if op.State == maint.OpRunning {
		g.Fate = "on its way to " + op.Peer
	}
	if op.Outcome == maint.OutcomeStuck {
		g.Fate = "to be looked for on both hosts"
	}
	if b := op.HealthBefore; b != nil {
		g.Remarks = append(g.Remarks, "before: "+health(*b))
	}
	if m := op.Move; m != nil {
		g.Fate = "moved to " + m.To
		g.Felt = &maint.Standstill{Blackout: true, Longest: m.Downtime, Times: 1}
		g.Remarks = append(g.Remarks, fmt.Sprintf("%s of memory sent in %s, %s", Bytes(m.MemorySent), count(m.Iterations, "pass", "passes"), Span(m.Copy)))
		for _, d := range m.Disks {
			g.Remarks = append(g.Remarks, fmt.Sprintf("disk %s copied, %s", d.Target, Bytes(d.Bytes)))
		}
	}
	if r := op.Arrival; r != nil {
		g.Clock = &r.Clock
		if r.Health != nil {
			g.Remarks = append(g.Remarks, "after: "+health(*r.Health))
		}
		for _, p := range r.Ports {
			if !p.Learned {
				g.Remarks = append(g.Remarks, "its new host's bridge has not learned "+p.MAC)
			}
		}
	}
	return g
}

// health says how a guest was found to do its work.
func health(r maint.HealthReport) string {
	if r.Healthy {
		return "healthy, " + r.Check
	}
	return "not healthy: " + r.Reason + ", " + r.Check
}

// replaced is the guest that got a new QEMU.
func replaced(op maint.Op) maint.GuestReport {
	g := maint.GuestReport{Guest: op.Guest, UUID: op.GuestUUID, Fate: "in its old QEMU"}
	if op.State != maint.OpEnded {
		g.Fate = "between its old QEMU and a new one"
	}
	if op.Replace != nil {
		g.Limit = op.Replace.MaxPause
	}
	v := op.Replaced
	if v == nil {
		return g
	}
	g.Fate, g.Clock = "in a new QEMU", v.Clock
	g.Felt = &maint.Standstill{Longest: v.Pause, Times: max(v.Pauses, 1)}
	for _, c := range v.Choices {
		if c.Method == v.Method && c.Pause > 0 {
			g.Expected = &maint.Estimate{Typical: c.Pause, From: "the choice of its method"}
		}
	}
	if v.Attempts > 1 {
		g.Remarks = append(g.Remarks, fmt.Sprintf("the new QEMU was started %d times", v.Attempts))
	}
	return g
}

// heldGuest is a guest of a hold, which may stand still for limit; begun: its command was.
func heldGuest(h maint.HeldGuest, limit time.Duration, begun bool) maint.GuestReport {
	g := maint.GuestReport{Guest: h.Guest, UUID: h.UUID, Limit: limit}
	if h.Problem != nil {
		g.Problems = []maint.Problem{*h.Problem}
	}
	if h.Left != "" {
		g.Fate, g.Limit = "left: "+h.Left, 0
		return g
	}
	g.Fate, g.Clock = "held", h.Clock
	if h.ReleasedBy != "" {
		g.Fate = "released by " + h.ReleasedBy
	}
	switch {
	case !h.Paused.IsZero():
		g.Felt = &maint.Standstill{Longest: h.Pause, Times: 1, AtMost: h.AtMost}
	case begun: // belayd died before it had written down when
		g.Felt = &maint.Standstill{Times: 1}
	}
	return g
}

// kexeced is a guest under which the kernel changed.
func kexeced(k maint.KexecGuest) maint.GuestReport {
	g := maint.GuestReport{Guest: k.Guest, UUID: k.UUID, Fate: cmp.Or(string(k.Fate), "unknown"), Clock: k.Clock, SameBoot: k.SameBoot}
	switch {
	case k.Fate == maint.KexecRan:
		g.Felt = &maint.Standstill{}
	case k.Fate == maint.KexecRestored, k.Pause > 0:
		g.Felt = &maint.Standstill{Longest: k.Pause, Times: 1}
	}
	if k.Save > 0 {
		g.Remarks = append(g.Remarks, fmt.Sprintf("%s %s: saved in %s, checked in %s, restored in %s", Bytes(k.Bytes), cmp.Or(k.Memory, maint.KexecCopied), Span(k.Save), Span(k.Check), Span(k.Restore)))
	}
	if k.Started {
		g.Remarks = append(g.Remarks, "booted afresh")
	}
	if k.Problem != nil {
		g.Problems = []maint.Problem{*k.Problem}
	}
	return g
}

// proved is a guest that is to have felt nothing.
func proved(p maint.GuestProof) maint.GuestReport {
	g := maint.GuestReport{Guest: p.Guest, UUID: p.UUID, Fate: fmt.Sprintf("%s, QEMU process %d", p.State, p.QEMU), Felt: &maint.Standstill{Times: p.Pauses}}
	if p.Problem != nil {
		g.Problems = []maint.Problem{*p.Problem}
	}
	return g
}

// patched is a guest whose QEMU was patched, which is stopped for that.
func patched(q maint.PatchedQEMU) maint.GuestReport {
	g := maint.GuestReport{Guest: q.Guest, UUID: q.UUID, Fate: fmt.Sprintf("QEMU process %d has not the livepatch", q.PID)}
	switch {
	case q.Gone:
		g.Fate = fmt.Sprintf("QEMU process %d had ended", q.PID)
	case q.Applied:
		g.Fate = fmt.Sprintf("QEMU process %d has the livepatch", q.PID)
	}
	if q.Before == q.Applied && !q.Gone {
		g.Fate += ", as before"
	}
	if q.Stopped > 0 {
		g.Felt = &maint.Standstill{Longest: q.Stopped, Times: 1, AtMost: true}
	}
	if q.Problem != nil {
		g.Problems = []maint.Problem{*q.Problem}
	}
	return g
}

// ofMany is a guest of a drain or a restore.
func ofMany(s Source, m maint.GuestMove) maint.GuestReport {
	g := maint.GuestReport{Guest: m.Guest, UUID: m.GuestUUID, Fate: moveFate(s.Op.Kind, m), Problems: slices.Clone(m.Problems)}
	if m.Tries > 0 {
		g.Remarks = append(g.Remarks, count(uint64(m.Tries), "try", "tries")+" failed")
	}
	if m.State == maint.MoveMoved {
		g.Felt = &maint.Standstill{Blackout: true, Longest: m.Downtime, Times: 1}
	}
	for _, part := range s.Parts {
		if part.ID == m.Op && m.Op != "" {
			p := moved(part)
			g.Limit, g.Clock = p.Limit, p.Clock
			g.Remarks = append(g.Remarks, p.Remarks...)
			if g.Felt != nil && g.Felt.Longest == 0 && p.Felt != nil {
				g.Felt = p.Felt
			}
		}
	}
	for _, a := range s.Arrived {
		if a.Op == m.Op && m.Op != "" && a.GuestUUID == m.GuestUUID && a.Report != nil {
			g.Clock = &a.Report.Clock
		}
	}
	return g
}

// moveFate is where a guest's move of a drain or a restore is.
func moveFate(kind maint.OpKind, m maint.GuestMove) string {
	way, peer := " to ", cmp.Or(m.Peer, "a peer")
	if kind == maint.OpRestore {
		way = " back from "
	}
	switch m.State {
	case maint.MoveMoved:
		return "moved" + way + peer
	case maint.MoveMoving:
		return "on its way" + way + peer
	case maint.MovePlanned:
		return "is to move" + way + peer
	}
	if kind == maint.OpRestore {
		return "left on " + peer
	}
	return "left here"
}

func count(n uint64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
