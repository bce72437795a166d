package agent

import (
	"context"
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
		Reservations: a.journal.Reservations(now), Conditions: a.conditions(snap)}
	s.Host.Name = a.cfg.Host
	if s.Reservations == nil {
		s.Reservations = []maint.Reservation{}
	}
	for _, g := range snap.guests {
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

// stuckFor is how long a stuck operation is shown as a condition of the host.
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
	for _, op := range a.journal.Ops() {
		if op.Outcome == maint.OutcomeStuck && op.State == maint.OpEnded && time.Since(op.Ended) < stuckFor {
			text := "operation " + string(op.ID) + " on guest " + op.Guest + " is stuck"
			remedy := "belay ops show " + string(op.ID)
			if len(op.Problems) > 0 {
				text += ": " + op.Problems[0].Reason
				remedy = op.Problems[0].Remedy
			}
			cs = append(cs, maint.Condition{Code: maint.CodeUnverified, Text: text, Remedy: remedy, Since: op.Ended})
		}
	}
	return cs
}
