package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"belay/agent/maint"
	"belay/migrate"
)

// Moves says of a guest and a peer whether the one could be moved to the other
// now, with every reason against; "" stands for all guests, or all peers. Verdicts
// are sorted by guest and peer. Nothing is changed and no room reserved.
func (a *Agent) Moves(ctx context.Context, guest, to string) ([]maint.MoveVerdict, error) {
	const what = "cannot say where guests could be moved to"
	peers := a.peerNames()
	if to != "" {
		if peers = []string{to}; a.peers[to] == nil {
			return nil, refuse(what, a.unknownPeer(to))
		}
	}
	var guests []maint.Guest
	var err error
	if guest != "" {
		var g maint.Guest
		g, err = a.guest(ctx, what, guest)
		guests = []maint.Guest{g}
	} else if guests, err = a.hyp.Guests(ctx); err != nil {
		err = a.cannotAsk(what, err)
	}
	if err != nil {
		return nil, err
	}
	return a.verdicts(ctx, what, guests, a.destinations(ctx, peers), a.cfg.Migration.CopyDisks)
}

// destinations are the peers as migrations see them. One that does not answer is
// waited for once, and not for each guest.
func (a *Agent) destinations(ctx context.Context, peers []string) map[string]migrate.Destination {
	all := make(map[string]migrate.Destination)
	var mu sync.Mutex
	var greetings sync.WaitGroup
	for _, name := range peers {
		greetings.Go(func() {
			p := a.peers[name]
			var to migrate.Destination = carrying{p.to, a}
			ctx, cancel := context.WithTimeout(ctx, greetTimeout)
			defer cancel()
			if _, err := p.client.Greeting(ctx); err != nil {
				to = lostPeer{maint.AsProblem(err, maint.CodePeerDown, "peer "+name)}
			}
			mu.Lock()
			defer mu.Unlock()
			all[name] = to
		})
	}
	greetings.Wait()
	return all
}

// verdicts judges guests and peers. copyDisks is maint.CopyAll or maint.CopyNone.
func (a *Agent) verdicts(ctx context.Context, what string, guests []maint.Guest, to map[string]migrate.Destination, copyDisks string) ([]maint.MoveVerdict, error) {
	type pair struct {
		guest maint.Guest
		peer  string
	}
	var pairs []pair
	for _, g := range guests {
		for name := range to {
			pairs = append(pairs, pair{g, name})
		}
	}
	all := make([]maint.MoveVerdict, len(pairs))
	if err := sideBySide(surveys, pairs, func(i int, p pair) (err error) {
		all[i], err = a.verdict(ctx, p.guest, a.peers[p.peer], to[p.peer], copyDisks)
		if errors.Is(err, maint.ErrNoGuest) && len(guests) > 1 { // it has gone since it was listed
			all[i], err = maint.MoveVerdict{}, nil
		}
		return err
	}); err != nil {
		return nil, a.cannotAsk(what, err)
	}
	all = slices.DeleteFunc(all, func(v maint.MoveVerdict) bool { return v.Guest == "" })
	slices.SortFunc(all, func(x, y maint.MoveVerdict) int {
		return strings.Compare(x.Guest+"\x00"+x.Peer, y.Guest+"\x00"+y.Peer)
	})
	return all, nil
}

func (a *Agent) verdict(ctx context.Context, g maint.Guest, p *peer, to migrate.Destination, copyDisks string) (maint.MoveVerdict, error) {
	v := maint.MoveVerdict{Guest: g.Name, GuestUUID: g.UUID, Peer: p.name, Problems: a.engaged(g)}
	survey := func(copy string) (*migrate.Migration, []maint.Problem, error) {
		op := maint.Op{ID: newOpID("why", time.Now()), Guest: g.Name, GuestUUID: g.UUID,
			Migrate: &maint.MigrateRequest{BandwidthMiBs: a.cfg.Migration.BandwidthMiBs, CopyDisks: []string{copy}}}
		m := a.migration(op, p, to)
		problems, err := m.Survey(ctx)
		return m, problems, err
	}
	m, problems, err := survey(copyDisks)
	if err != nil {
		return v, err
	}
	v.CanMove = len(v.Problems)+len(problems) == 0
	if v.CanMove {
		v.Copies = m.Copies()
	}
	if len(v.Problems) == 0 && slices.ContainsFunc(problems, ofDisk) && copyDisks == maint.CopyNone {
		with, against, err := survey(maint.CopyAll)
		if err != nil {
			return v, err
		}
		if len(against) == 0 {
			v.Copies = with.Copies()
		}
	}
	v.Problems = append(v.Problems, problems...)
	return v, nil
}

// engaged is what Belay itself has to do with a guest that it would refuse to
// migrate now.
func (a *Agent) engaged(g maint.Guest) []maint.Problem {
	ps := []maint.Problem{}
	if e, there := a.findElsewhere(g); there {
		ps = append(ps, *e.problem())
	}
	for _, op := range a.journal.Ops() {
		if op.State != maint.OpEnded && inCommon(maint.Op{Guest: g.Name, GuestUUID: g.UUID}, op) != "" {
			ps = append(ps, *maint.Problemf(maint.CodeBusy, "guest "+g.Name, "wait for it (belay ops watch "+string(op.ID)+")",
				"operation %s (%s) is at work on it", op.ID, op.Kind))
		}
	}
	return ps
}

// ofDisk reports whether a problem is one that copying disks could lift.
func ofDisk(p maint.Problem) bool {
	return p.Code == maint.CodeDiskMissing || p.Code == maint.CodeDiskNotShared
}
