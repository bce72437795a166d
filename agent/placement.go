package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"belay/agent/maint"
	"belay/migrate"
	"belay/migrate/evacuate"
)

// place says where guests go, beside those that other moves of the drain send, or
// have sent, to peers.
func (a *Agent) place(ctx context.Context, r maint.DrainRequest, guests []maint.Guest, others []maint.GuestMove, shun ...string) ([]maint.GuestMove, error) {
	names := a.peersFor(r)
	to := a.destinations(ctx, names)
	rooms, closed := a.rooms(ctx, to)
	var ask []maint.Guest
	refused := make(map[string]map[string][]maint.Problem) // by guest and peer
	for _, g := range guests {
		refused[keyOf(g)] = make(map[string][]maint.Problem)
		if e, there := a.findElsewhere(g); there {
			for _, name := range names {
				refused[keyOf(g)][name] = []maint.Problem{*e.problem()}
			}
			continue
		}
		ask = append(ask, g)
	}
	verdicts, err := a.verdicts(ctx, "cannot say where guests could be moved to", ask, to, cmp.Or(r.CopyDisks, a.cfg.Migration.CopyDisks))
	if err != nil {
		return nil, err
	}
	pages, copies := make(map[string][]maint.PageNeed), make(map[string]map[string][]maint.DiskCopy)
	for _, v := range verdicts {
		if len(v.Copies) > 0 {
			if copies[v.GuestUUID] == nil {
				copies[v.GuestUUID] = make(map[string][]maint.DiskCopy)
			}
			copies[v.GuestUUID][v.Peer] = v.Copies
		}
		refused[v.GuestUUID][v.Peer] = append(v.Problems, closed[v.Peer]...)
	}
	for _, g := range ask {
		if d, err := (source{a.hyp, a.local}).Describe(ctx, g.UUID); err == nil {
			pages[g.UUID] = d.Pages
		}
	}
	var peers []evacuate.Peer
	for _, name := range names {
		peers = append(peers, settledAt(evacuate.Peer{Name: name, Room: rooms[name]}, others, a.reserved))
	}
	var all []evacuate.Guest
	for _, g := range guests {
		all = append(all, evacuate.Guest{UUID: keyOf(g), Name: g.Name, Takes: migrate.Takes(g.MemoryBytes, pages[g.UUID]),
			DirtyPerSecond: a.wrote(g), AntiAffinity: a.groupsOf(g), Refused: refused[keyOf(g)], Shunned: shun})
	}
	memory := make(map[string]uint64)
	for _, g := range guests {
		memory[keyOf(g)] = g.MemoryBytes
	}
	var moves []maint.GuestMove
	for _, p := range evacuate.Place(all, peers) {
		m := maint.GuestMove{Guest: p.Guest.Name, GuestUUID: p.Guest.UUID, MemoryBytes: memory[p.Guest.UUID], Peer: p.Peer,
			State: maint.MovePlanned, AntiAffinity: p.Guest.AntiAffinity}
		m.Copies = copies[m.GuestUUID][p.Peer]
		if p.Peer == "" {
			m.State, m.Problems = maint.MoveLeft, once(p.Problems)
			for _, name := range names { // to each of which they would be the same
				if m.Copies == nil {
					m.Copies = copies[m.GuestUUID][name]
				}
			}
		}
		moves = append(moves, m)
	}
	return moves, nil
}

// peersFor are the peers that a drain's guests may go to, as far as they are still
// configured.
func (a *Agent) peersFor(r maint.DrainRequest) []string {
	if len(r.To) == 0 {
		return a.peerNames()
	}
	return slices.DeleteFunc(slices.Clone(r.To), func(name string) bool { return a.peers[name] == nil })
}

// keyOf tells guests apart; of one in the twin only the name may be known.
func keyOf(g maint.Guest) string { return cmp.Or(g.UUID, g.Name) }

// once leaves out what is said of each peer in the same words.
func once(ps []maint.Problem) (all []maint.Problem) {
	for _, p := range ps {
		if !slices.Contains(all, p) {
			all = append(all, p)
		}
	}
	return all
}

// settledAt is a peer with what a drain's moves take of it that it does not count
// itself: those to come, and groups of those that have arrived by another name there.
func settledAt(p evacuate.Peer, moves []maint.GuestMove, reserved func(maint.GuestMove) bool) evacuate.Peer {
	for _, m := range moves {
		if m.Peer != p.Name || m.State == maint.MoveLeft {
			continue
		}
		g := evacuate.Guest{Name: m.Guest, AntiAffinity: m.AntiAffinity}
		if !reserved(m) {
			g.Takes = migrate.Takes(m.MemoryBytes, nil)
		}
		p = evacuate.Take(p, g)
	}
	return p
}

// reserved reports whether a guest's peer counts it among its own, or may do so.
func (a *Agent) reserved(m maint.GuestMove) bool {
	op, known := a.journal.Op(m.Op)
	return m.State == maint.MoveMoved || known && slices.ContainsFunc(op.Steps, func(s maint.Step) bool {
		return s.Name == migrate.PhaseReserve && s.Status == "done"
	})
}

// wrote is what a guest has last written while it was copied from here, bytes a
// second; 0: that is not known.
func (a *Agent) wrote(g maint.Guest) uint64 {
	for _, op := range slices.Backward(a.journal.Ops()) {
		if m := op.Move; m != nil && op.GuestUUID == g.UUID && m.Copy > 0 && m.MemorySent > g.MemoryBytes {
			return uint64(float64(m.MemorySent-g.MemoryBytes) / m.Copy.Seconds())
		}
	}
	return 0
}

// rooms asks peers what they have room for, side by side. closed says why one takes
// none.
func (a *Agent) rooms(ctx context.Context, to map[string]migrate.Destination) (rooms map[string]maint.PeerRoom, closed map[string][]maint.Problem) {
	rooms, closed = make(map[string]maint.PeerRoom), make(map[string][]maint.Problem)
	var mu sync.Mutex
	var asked sync.WaitGroup
	for name, d := range to {
		if _, lost := d.(lostPeer); lost {
			continue // the verdicts say so
		}
		asked.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, greetTimeout)
			defer cancel()
			r, err := a.peers[name].client.Room(ctx)
			err = cmp.Or(err, r.Validate())
			mu.Lock()
			defer mu.Unlock()
			var p *maint.Problem
			switch {
			case err == nil:
				a.peers[name].in.Store(int32(r.In))
				rooms[name] = r
			case errors.As(err, &p) && p.Code == maint.CodePeerRefused:
				closed[name] = []maint.Problem{*maint.Problemf(p.Code, "peer "+name, p.Remedy, "cannot say what it has room for: %s", p.Reason)}
			case errors.As(err, &p) && p.Code == maint.CodeNotFound:
				closed[name] = []maint.Problem{*maint.Problemf(maint.CodePeerRefused, "peer "+name, "update Belay there, or migrate guests to it one by one", "its belayd is older and cannot say what it has room for")}
			default:
				closed[name] = []maint.Problem{*maint.AsProblem(err, maint.CodePeerDown, "peer "+name)}
			}
		})
	}
	asked.Wait()
	return rooms, closed
}

// instead is what can be done for a guest on this host that cannot leave it.
func (a *Agent) instead(ctx context.Context, m maint.GuestMove) (ways []string) {
	g, err := a.hyp.Guest(ctx, m.GuestUUID)
	if err != nil || !works(g) {
		return nil
	}
	if len(m.Copies) > 0 {
		ways = append(ways, "have its disks copied along: belay drain --copy-disks")
	}
	ways = append(ways, fmt.Sprintf("hold it while a command services the host, if that needs no reboot: belay hold --guest %s -- COMMAND", maint.ShellWord(g.Name)))
	choices, _ := a.ReplaceChoices(ctx, g.UUID)
	var methods []string
	for _, c := range choices {
		if len(c.Problems) == 0 {
			methods = append(methods, string(c.Method))
		}
	}
	if len(methods) > 0 {
		ways = append(ways, fmt.Sprintf("give it a new QEMU here (%s): belay replace-vmm %s", strings.Join(methods, ", "), maint.ShellWord(g.Name)))
	}
	return ways
}
