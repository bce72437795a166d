package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// Status is put together from what is at hand; it never waits for libvirt or
// a peer.
func (a *Agent) Status(context.Context) (maint.Status, error) {
	snap := a.view.last.Load()
	now := time.Now()
	s := maint.Status{Version: a.version, Since: a.since, Now: now, Host: snap.host,
		Guests: make(map[maint.GuestState]int), Operations: []maint.Op{}, Peers: []maint.PeerStatus{},
		Reservations: a.journal.Reservations(now), Cordon: a.journal.Cordon(), Conditions: a.conditions(snap)}
	s.Host.Name = a.cfg.Host
	if s.Reservations == nil {
		s.Reservations = []maint.Reservation{}
	}
	for _, g := range a.complete(snap.guests) {
		s.Guests[g.State]++
	}
	for _, op := range a.journal.Ops() {
		if op.State != maint.OpEnded {
			a.addProgress(&op)
			s.Operations = append(s.Operations, op)
		}
	}
	for _, name := range a.peerNames() {
		s.Peers = append(s.Peers, *a.peers[name].last.Load())
	}
	return s, nil
}

// stuckFor is how long what an operation left to a person is shown as a
// condition of the host.
const stuckFor = 7 * 24 * time.Hour

// conditions is what is wrong with this host now.
func (a *Agent) conditions(snap *snapshot) []maint.Condition {
	cs := []maint.Condition{}
	if snap.err != nil {
		cs = append(cs, maint.Condition{Code: maint.CodeHypervisorDown, Since: snap.since,
			Text:   "libvirt cannot be asked: " + snap.err.Error(),
			Remedy: "see that libvirtd or virtqemud runs (systemctl status libvirtd virtqemud); guests go on without it"})
	}
	if err := a.journal.Health(); err != nil {
		cs = append(cs, maint.Condition{Code: maint.CodeJournal, Text: err.Error(),
			Remedy: "make room in, and writable, the state folder " + a.cfg.StateDir + "; no operation is begun until then"})
	}
	for _, name := range a.peerNames() {
		if p := a.peers[name].last.Load(); !p.OK && !p.Checked.IsZero() {
			cs = append(cs, maint.Condition{Code: maint.CodePeerDown, Text: p.Error, Since: p.Checked})
		}
	}
	a.troubles.Range(func(id, p any) bool {
		trouble := p.(maint.Problem)
		cs = append(cs, maint.Condition{Code: trouble.Code, Remedy: trouble.Remedy,
			Text: fmt.Sprintf("operation %s: %s %s", id, trouble.Subject, trouble.Reason)})
		return true
	})
	cs = append(cs, a.ofPatches()...)
	cs = append(cs, a.ofKexec()...)
	cs = append(cs, a.astray(snap.guests)...)
	cs = append(cs, a.strayDisks()...)
	leashes := a.leftovers()
	cs = append(cs, a.abandoned(leashes, snap.guests)...)
	cs = append(cs, a.overdue(leashes)...)
	if s := a.guests.Load(); s != nil {
		cs = append(cs, s.conditions()...)
	}
	return append(cs, unresolved(a.journal.Ops())...)
}

// whom names the guests of an operation.
func whom(op maint.Op) string {
	switch {
	case op.Guest != "":
		return "guest " + op.Guest
	case op.Hold != nil && op.Hold.All:
		return "all guests"
	case op.Hold != nil:
		return "guests " + strings.Join(op.Hold.Guests, ", ")
	}
	return "this host"
}

// unresolved is the operations that left something for a person to do, but for
// those of which a later one has put in order, or shows anew, all that they were
// about. ops are the oldest first.
func unresolved(ops []maint.Op) []maint.Condition {
	var cs []maint.Condition
	seen := make(map[string]bool)
	for _, op := range slices.Backward(ops) {
		left := op.Outcome == maint.OutcomeStuck || op.Outcome == maint.OutcomePartly ||
			op.Outcome == maint.OutcomeFailed && len(op.Problems) > 1 // beside why it failed
		if op.State != maint.OpEnded || !left && op.Outcome != maint.OutcomeDone {
			continue
		}
		if left && time.Since(op.Ended) < stuckFor && slices.ContainsFunc(troubled(op), func(s string) bool { return !seen[s] }) && !(moveMany(op) && seen[ofDrains]) {
			c := maint.Condition{Code: maint.CodeUnverified, Since: op.Ended, Remedy: "belay ops show " + string(op.ID),
				Text: fmt.Sprintf("operation %s on %s is %s", op.ID, whom(op), op.Outcome)}
			told := op.Problems
			if op.Outcome == maint.OutcomeFailed {
				told = told[1:] // the first says why it failed
			}
			if len(told) > 0 {
				p := told[0]
				c.Code, c.Remedy, c.Text = p.Code, p.Remedy, c.Text+": "+p.Subject+": "+p.Reason
			}
			cs = append(cs, c)
		}
		for _, s := range subjects(op) {
			seen[s] = true
		}
	}
	return cs
}

// subjects are what an operation was about: guests, by UUID, and what was done
// to the host around them.
func subjects(op maint.Op) []string {
	if moveMany(op) { // a restore is the end of its drain
		return []string{ofDrains}
	}
	if op.Kind == maint.OpPatch {
		return []string{"patch " + op.Patch.Name}
	}
	if op.Kind != maint.OpHold {
		return []string{op.GuestUUID}
	}
	all := []string{hostStep(op)}
	if op.Held != nil {
		for _, g := range op.Held.Guests {
			if g.Left == "" {
				all = append(all, g.UUID)
			}
		}
	}
	return all
}

// ofDrains is what drains and restores are about, beside their guests.
const ofDrains = "drain"

// leftBehind are the guests that a drain or a restore has left, or that its
// migrations have left in trouble.
func leftBehind(op maint.Op) (uuids []string) {
	for _, m := range op.Moves {
		if len(m.Problems) > 0 {
			uuids = append(uuids, m.GuestUUID)
		}
	}
	if len(uuids) == 0 {
		return []string{ofDrains}
	}
	return uuids
}

// troubled are those of its subjects that an operation left in trouble: of a
// hold the guests that have a problem, and if there is none the host.
func troubled(op maint.Op) []string {
	if moveMany(op) {
		return leftBehind(op)
	}
	if op.Kind != maint.OpHold {
		return subjects(op)
	}
	var all []string
	if op.Held != nil {
		for _, g := range op.Held.Guests {
			if g.Problem != nil {
				all = append(all, g.UUID)
			}
		}
	}
	if len(all) == 0 || op.Held.Undo != nil && !op.Held.Undo.OK() {
		all = append(all, hostStep(op))
	}
	return all
}

// hostStep is the same for holds that do the same to the host.
func hostStep(op maint.Op) string {
	if s := op.Hold.Step; s.Unit != "" {
		return "unit " + s.Unit
	}
	return "command " + strings.Join(op.Hold.Step.Command, "\x00")
}
