package agent

import (
	"context"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/agent/run"
	"belay/migrate"
)

// newDrainage is the convoy of a drain.
func newDrainage(a *Agent, op maint.Op, s *run.Scratch) *convoy {
	c := newConvoy(a, op, s)
	c.atOnce = op.Drain.Parallel
	c.ownMoves(func(m *maint.GuestMove) { m.Op = newOpID("mig", time.Now()) }, byDrain+string(op.ID),
		func(m maint.GuestMove) maint.MigrateRequest { return a.oneOf(op, m.GuestUUID, m.Peer) })
	d := &drainage{convoy: c, op: op, judged: make(map[string]maint.GuestState)}
	c.look = d.look
	return c
}

// drainage is what a drain has beside a convoy: it chooses peers, and sees guests
// come and go.
type drainage struct {
	*convoy
	op maint.Op
	// judged is the state in which a guest was that is left.
	judged map[string]maint.GuestState
	asked  bool // of the peers' limits
}

// look notices guests that have started, or stopped, and finds a peer for those that
// have none. last says that nothing else is to be done: then libvirt is asked. It
// reports whether there is something to wait for.
func (d *drainage) look(ctx context.Context, last bool) (wait bool, err error) {
	a := d.a
	if err := d.limits(ctx); err != nil {
		return true, nil
	}
	guests := a.complete(a.view.last.Load().guests)
	if last {
		if guests, err = a.present(ctx); err != nil {
			return true, nil // what is not known is waited for
		}
	}
	moves := make(map[string]maint.GuestMove)
	all := d.moves()
	for _, m := range all {
		moves[m.GuestUUID] = m
	}
	var fresh, again []maint.Guest
	active := make(map[string]bool)
	for _, g := range guests {
		key := keyOf(g)
		if !g.State.Active() {
			continue
		}
		active[key] = true
		m, known := moves[key]
		judged, before := d.judged[key]
		switch {
		case known && m.State == maint.MoveMoving:
			wait = true
		case known && m.State == maint.MovePlanned && m.Peer != "":
			wait = true
		case known && m.State == maint.MovePlanned:
			wait = true
			if d.due(m) {
				again = append(again, g)
			}
		case known && m.State == maint.MoveMoved && !last: // the listing is older than that
		case known && m.State == maint.MoveLeft && (m.Tries >= maxTries || before && judged == g.State || !before && d.stays(m)):
			d.judged[key] = g.State
		case a.engagedByOther(g, d.op.ID):
			wait = true
		default:
			fresh = append(fresh, g)
		}
	}
	if last {
		for _, m := range all {
			if m.State == maint.MovePlanned && !active[m.GuestUUID] {
				m.State, m.Problems = maint.MoveLeft, []maint.Problem{*maint.Problemf(maint.CodeGuestOff, "guest "+m.Guest, "", "does not run on %s any more", a.cfg.Host)}
				if err := d.put(m); err != nil {
					return false, err
				}
			}
		}
	}
	if len(fresh) > 0 {
		if err := d.assign(ctx, fresh, moves); err != nil {
			return true, err
		}
		wait = true
	}
	for _, g := range again { // each shuns peers of its own
		if err := d.assign(ctx, []maint.Guest{g}, moves, d.shunned[keyOf(g)]...); err != nil {
			return true, err
		}
	}
	return wait, nil
}

// stays reports whether a guest is left for good, also for a belayd that has not
// judged it itself: somebody has aborted its move, or nobody knows where it is.
func (d *drainage) stays(m maint.GuestMove) bool {
	op, known := d.a.journal.Op(m.Op)
	return known && (op.Outcome == maint.OutcomeAborted || op.Outcome == maint.OutcomeStuck)
}

// limits asks peers how many guests they take in at once.
func (d *drainage) limits(ctx context.Context) error {
	if d.asked {
		return nil
	}
	to := make(map[string]migrate.Destination)
	for _, name := range d.a.peersFor(*d.op.Drain) {
		to[name] = d.a.peers[name].to
	}
	rooms, _ := d.a.rooms(ctx, to)
	for name, r := range rooms {
		d.perPeer[name] = r.In
	}
	d.asked = true
	return ctx.Err()
}

// assign finds a peer for guests.
func (d *drainage) assign(ctx context.Context, guests []maint.Guest, was map[string]maint.GuestMove, shun ...string) error {
	others := slices.DeleteFunc(d.moves(), func(m maint.GuestMove) bool {
		return slices.ContainsFunc(guests, func(g maint.Guest) bool { return keyOf(g) == m.GuestUUID })
	})
	placed, err := d.a.place(ctx, *d.op.Drain, guests, others, shun...)
	if err != nil {
		for _, g := range guests {
			d.later(keyOf(g)) // libvirt may be away
		}
		return nil
	}
	for _, m := range placed {
		old, known := was[m.GuestUUID]
		m.Tries = old.Tries
		if m.State == maint.MoveLeft && known && old.State == maint.MovePlanned { // it was to go somewhere
			if !soon(m.Problems) {
				m.Tries++
			}
			if m.Tries < maxTries {
				m.State = maint.MovePlanned
				d.later(m.GuestUUID)
			}
		}
		if m.State == maint.MoveLeft {
			m.Instead = d.a.instead(ctx, m)
			for _, g := range guests {
				if keyOf(g) == m.GuestUUID {
					d.judged[m.GuestUUID] = g.State
				}
			}
		}
		if err := d.put(m); err != nil {
			return err
		}
	}
	return nil
}

// soon reports whether something in the way goes by itself.
func soon(ps []maint.Problem) bool {
	return slices.ContainsFunc(ps, func(p maint.Problem) bool { return p.Code == maint.CodeBusy || p.Code == maint.CodeHostBusy })
}

// engagedByOther reports whether an operation that is not part of a drain is at work
// on a guest.
func (a *Agent) engagedByOther(g maint.Guest, drain maint.OpID) bool {
	return slices.ContainsFunc(a.journal.Ops(), func(op maint.Op) bool {
		return op.State != maint.OpEnded && op.Part != drain && inCommon(maint.Op{Guest: g.Name, GuestUUID: g.UUID}, op) != ""
	})
}
