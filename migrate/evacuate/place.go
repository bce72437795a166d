package evacuate

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"belay/agent/maint"
)

// Guest is a guest that is to go.
type Guest struct {
	UUID, Name string
	Takes      maint.GuestBytes
	// DirtyPerSecond is what it was last known to write while it was copied, bytes
	// a second; 0: not known.
	DirtyPerSecond uint64
	AntiAffinity   []string
	// Refused is why it cannot go to a peer; one that is not in it takes it.
	Refused map[string][]maint.Problem
	// Shunned are peers to which it goes only where no other takes it: a try has
	// failed there.
	Shunned []string
}

// Peer is a host that guests may go to.
type Peer struct {
	Name string
	Room maint.PeerRoom
}

// Placement is where a guest goes; Peer is "" for one that stays, and Problems why.
type Placement struct {
	Guest    Guest
	Peer     string
	Problems []maint.Problem
}

// Place says where each guest goes: first those that go, in the order in which they
// are to begin, the biggest and those that write the most first; then those that
// stay, by name.
//
// It tries some ways of filling the peers one guest after the other, and takes the
// first of those that leave the fewest behind, and of these the fewest at a peer that
// they shun.
func Place(guests []Guest, peers []Peer) []Placement {
	guests, peers = slices.Clone(guests), slices.Clone(peers)
	slices.SortFunc(guests, before)
	slices.SortFunc(peers, func(a, b Peer) int { return strings.Compare(a.Name, b.Name) })
	var best []Placement
	least := score{math.MaxInt, math.MaxInt}
	for _, order := range []func([]Guest, []Peer) []Guest{bySize, byChoices} {
		for _, rank := range []rank{roomiest, tightest, first} {
			p := fill(order(guests, peers), peers, rank)
			if s := scoreOf(p); s.less(least) {
				best, least = p, s
			}
		}
	}
	slices.SortFunc(best, func(a, b Placement) int {
		if (a.Peer == "") != (b.Peer == "") {
			return cmp.Compare(b.Peer, a.Peer) // "" comes last
		}
		if a.Peer == "" {
			return cmp.Or(strings.Compare(a.Guest.Name, b.Guest.Name), strings.Compare(a.Guest.UUID, b.Guest.UUID))
		}
		return before(a.Guest, b.Guest)
	})
	return best
}

// before orders guests as they are to begin.
func before(a, b Guest) int {
	return cmp.Or(cmp.Compare(b.Takes.Limit, a.Takes.Limit), cmp.Compare(b.DirtyPerSecond, a.DirtyPerSecond),
		strings.Compare(a.Name, b.Name), strings.Compare(a.UUID, b.UUID))
}

type score struct{ staying, shunned int }

func (s score) less(o score) bool {
	return s.staying < o.staying || s.staying == o.staying && s.shunned < o.shunned
}

func scoreOf(ps []Placement) (s score) {
	for _, p := range ps {
		switch {
		case p.Peer == "":
			s.staying++
		case slices.Contains(p.Guest.Shunned, p.Peer):
			s.shunned++
		}
	}
	return s
}

// bySize takes guests as they come, which is by size.
func bySize(guests []Guest, _ []Peer) []Guest { return guests }

// byChoices takes those first that the fewest peers take.
func byChoices(guests []Guest, peers []Peer) []Guest {
	choices := func(g Guest) (n int) {
		for _, p := range peers {
			if len(obstacles(g, p)) == 0 {
				n++
			}
		}
		return n
	}
	guests = slices.Clone(guests)
	slices.SortStableFunc(guests, func(a, b Guest) int { return cmp.Compare(choices(a), choices(b)) })
	return guests
}

// rank reports whether peer a is to be filled rather than b.
type rank func(a, b Peer) bool

func roomiest(a, b Peer) bool { return room(a) > room(b) }
func tightest(a, b Peer) bool { return room(a) < room(b) }
func first(Peer, Peer) bool   { return false }

func room(p Peer) uint64 {
	if l := p.Room.LimitBytes; l != nil {
		return min(*l, p.Room.FreeBytes)
	}
	return p.Room.FreeBytes
}

// fill places guests one after the other.
func fill(guests []Guest, peers []Peer, rather rank) []Placement {
	left := make([]Peer, len(peers))
	for i, p := range peers {
		p.Room.AntiAffinity = maps.Clone(p.Room.AntiAffinity)
		left[i] = p
	}
	all := make([]Placement, 0, len(guests))
	for _, g := range guests {
		at := -1
		var why []maint.Problem
		for i, p := range left {
			if ps := obstacles(g, p); len(ps) > 0 {
				why = append(why, ps...)
				continue
			}
			shun := slices.Contains(g.Shunned, p.Name)
			if at < 0 || !shun && slices.Contains(g.Shunned, left[at].Name) || shun == slices.Contains(g.Shunned, left[at].Name) && rather(p, left[at]) {
				at = i
			}
		}
		if at < 0 {
			if len(left) == 0 {
				why = []maint.Problem{*maint.Problemf(maint.CodeUnknownPeer, "guest "+g.Name, "name peers that take guests", "there is no peer that it could go to")}
			}
			all = append(all, Placement{Guest: g, Problems: why})
			continue
		}
		left[at] = Take(left[at], g)
		all = append(all, Placement{Guest: g, Peer: left[at].Name})
	}
	return all
}

// Take is a peer once a guest is there.
func Take(p Peer, g Guest) Peer {
	p.Room.FreeBytes -= min(p.Room.FreeBytes, g.Takes.Free)
	if p.Room.LimitBytes != nil {
		l := *p.Room.LimitBytes
		l -= min(l, g.Takes.Limit)
		p.Room.LimitBytes = &l
	}
	if len(g.AntiAffinity) > 0 {
		groups := make(map[string]string)
		maps.Copy(groups, p.Room.AntiAffinity)
		for _, name := range g.AntiAffinity {
			groups[name] = g.Name
		}
		p.Room.AntiAffinity = groups
	}
	return p
}

// obstacles is why a guest cannot go to a peer, with what is there already.
func obstacles(g Guest, p Peer) []maint.Problem {
	if ps := g.Refused[p.Name]; len(ps) > 0 {
		return ps
	}
	var ps []maint.Problem
	add := func(code maint.Code, remedy, format string, args ...any) {
		ps = append(ps, *maint.Problemf(code, "host "+p.Name, remedy, format, args...))
	}
	for _, name := range slices.Sorted(slices.Values(g.AntiAffinity)) {
		if other, there := p.Room.AntiAffinity[name]; there {
			add(maint.CodeAntiAffinity, "choose another peer", "has, or is to have, guest %s of anti-affinity group %s", other, name)
		}
	}
	if g.Takes.Free > p.Room.FreeBytes {
		add(maint.CodeNoRoom, "free memory there, or name more peers", "has %s for guests beside those that are to go there, the guest needs %s", mib(p.Room.FreeBytes), mib(g.Takes.Free))
	}
	if l := p.Room.LimitBytes; l != nil && g.Takes.Limit > *l {
		add(maint.CodeNoRoom, "raise limits.guest_memory there, or name more peers", "its limits.guest_memory leaves %s beside those that are to go there, the guest needs %s", mib(*l), mib(g.Takes.Limit))
	}
	return ps
}

func mib(bytes uint64) string { return fmt.Sprintf("%d MiB", bytes>>20) }
