package plan

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// budget is how many steps the search for room may take: all that there are for some ten
// guests that compete, and few milliseconds.
const budget = 20_000

// assign chooses for each guest whether it stays, and else where it goes.
func assign(all []*candidate, peers []maint.LadderPeer) {
	var seekers []*candidate
	for _, c := range all {
		switch {
		case c.move.open && (!c.stay.open || c.move.cost.compare(c.stay.cost) < 0):
			seekers = append(seekers, c)
		case c.stay.open:
			c.chosen = &c.stay
		}
	}
	slices.SortStableFunc(seekers, func(a, b *candidate) int {
		return cmp.Or(cmp.Compare(b.g.Policy.Priority, a.g.Policy.Priority), cmp.Compare(b.g.Takes.Limit, a.g.Takes.Limit))
	})
	s := newSearch(seekers, peers)
	at := s.best()
	left := newRooms(peers)
	for i, c := range seekers {
		if at[i] >= 0 {
			left[at[i]].put(c.g)
		}
	}
	for i, c := range seekers {
		switch {
		case at[i] >= 0:
			c.chosen, c.peer = &c.move, peers[at[i]].Name
		default:
			if c.stay.open {
				c.chosen = &c.stay
			}
			for _, p := range left {
				c.refuse(maint.RungD, p.against(c)...)
			}
		}
	}
}

// room is what a peer has left, with those that go there.
type room struct {
	maint.LadderPeer
	free   uint64
	limit  uint64
	bound  bool              // there is a limit
	groups map[string]string // with the name of a guest of each
}

func newRoom(p maint.LadderPeer) *room {
	r := &room{LadderPeer: p, free: p.Room.FreeBytes, groups: maps.Clone(p.Room.AntiAffinity)}
	if p.Room.LimitBytes != nil {
		r.limit, r.bound = *p.Room.LimitBytes, true
	}
	if r.groups == nil {
		r.groups = make(map[string]string)
	}
	return r
}

func newRooms(peers []maint.LadderPeer) []*room {
	rooms := make([]*room, len(peers))
	for i, p := range peers {
		rooms[i] = newRoom(p)
	}
	return rooms
}

// fits is obstacles in short.
func (r *room) fits(g maint.LadderGuest) bool {
	if g.Takes.Free > r.free || r.bound && g.Takes.Limit > r.limit {
		return false
	}
	for _, name := range g.Policy.AntiAffinity {
		if _, there := r.groups[name]; there {
			return false
		}
	}
	return true
}

func (r *room) put(g maint.LadderGuest) {
	r.free -= g.Takes.Free
	if r.bound {
		r.limit -= g.Takes.Limit
	}
	for _, name := range g.Policy.AntiAffinity {
		r.groups[name] = g.Guest
	}
}

func (r *room) take(g maint.LadderGuest) {
	r.free += g.Takes.Free
	if r.bound {
		r.limit += g.Takes.Limit
	}
	for _, name := range g.Policy.AntiAffinity {
		delete(r.groups, name)
	}
}

// against is why a guest that does not go there cannot.
func (r *room) against(c *candidate) []maint.Problem {
	if ps := c.against(r.LadderPeer); len(ps) > 0 {
		return ps
	}
	return r.obstacles(c.g)
}

// obstacles is why a guest does not fit beside those that a peer has.
func obstacles(g maint.LadderGuest, p maint.LadderPeer) []maint.Problem {
	return newRoom(p).obstacles(g)
}

func (r *room) obstacles(g maint.LadderGuest) (ps []maint.Problem) {
	add := func(code maint.Code, remedy, format string, args ...any) {
		ps = append(ps, *maint.Problemf(code, "host "+r.Name, remedy, format, args...))
	}
	for _, name := range slices.Sorted(slices.Values(g.Policy.AntiAffinity)) {
		if other, there := r.groups[name]; there {
			add(maint.CodeAntiAffinity, "choose another peer", "has, or is to have, guest %s of anti-affinity group %s", other, name)
		}
	}
	if g.Takes.Free > r.free {
		add(maint.CodeNoRoom, "free memory there, or name more peers", "has %s for guests beside those that are to go there, the guest needs %s", mib(r.free), mib(g.Takes.Free))
	}
	if r.bound && g.Takes.Limit > r.limit {
		add(maint.CodeNoRoom, "raise limits.guest_memory there, or name more peers", "its limits.guest_memory leaves %s beside those that are to go there, the guest needs %s", mib(r.limit), mib(g.Takes.Limit))
	}
	return ps
}

func mib(bytes uint64) string { return fmt.Sprintf("%d MiB", bytes>>20) }

// total is the cost of an assignment; less is better, and sums of less are less.
type total struct {
	unserved   []int // by priority, the highest first
	level      int
	standstill time.Duration
}

func (t total) compare(o total) int {
	return cmp.Or(slices.Compare(t.unserved, o.unserved), cmp.Compare(t.level, o.level), cmp.Compare(t.standstill, o.standstill))
}

// search gives each seeker a peer, or -1.
type search struct {
	seekers []*candidate
	peers   []maint.LadderPeer
	// open has, by seeker and peer, whether the one can go to the other, empty.
	open  [][]bool
	ranks []int // of each seeker's priority
	// least[i] is what the seekers from i on cost at least: each has its wish.
	least []total

	rooms []*room
	now   []int
	cost  total
	steps int
	found []int
	bestC total
}

func newSearch(seekers []*candidate, peers []maint.LadderPeer) *search {
	s := &search{seekers: seekers, peers: peers, now: make([]int, len(seekers))}
	var priorities []int
	for _, c := range seekers {
		priorities = append(priorities, c.g.Policy.Priority)
		open := make([]bool, len(peers))
		for i, p := range peers {
			open[i] = len(c.against(p)) == 0
		}
		s.open = append(s.open, open)
	}
	slices.SortFunc(priorities, func(a, b int) int { return cmp.Compare(b, a) })
	priorities = slices.Compact(priorities)
	for _, c := range seekers {
		s.ranks = append(s.ranks, slices.Index(priorities, c.g.Policy.Priority))
	}
	s.cost.unserved = make([]int, len(priorities))
	s.least = make([]total, len(seekers)+1)
	for i := len(seekers) - 1; i >= 0; i-- {
		m := seekers[i].move.cost
		s.least[i] = total{level: s.least[i+1].level + m.level, standstill: s.least[i+1].standstill + m.standstill}
	}
	return s
}

// pay adds, or with -1 takes back, what it costs that a seeker goes or does not.
func (s *search) pay(i, peer, sign int) {
	c := s.seekers[i]
	switch {
	case peer >= 0:
		s.cost.level += sign * c.move.cost.level
		s.cost.standstill += time.Duration(sign) * c.move.cost.standstill
	case c.stay.open:
		s.cost.level += sign * c.stay.cost.level
		s.cost.standstill += time.Duration(sign) * c.stay.cost.standstill
	default:
		s.cost.unserved[s.ranks[i]] += sign
	}
}

// best is the best assignment that is found.
func (s *search) best() []int {
	keep := func() {
		if s.found == nil || s.cost.compare(s.bestC) < 0 {
			s.found = slices.Clone(s.now)
			s.bestC = s.cost
			s.bestC.unserved = slices.Clone(s.cost.unserved)
		}
	}
	for _, order := range s.orders() {
		for _, rather := range []func(a, b *room) bool{roomiest, tightest, first} {
			s.fill(order, rather)
			keep()
			for i, peer := range s.now {
				s.pay(i, peer, -1)
			}
			if !slices.Contains(s.found, -1) {
				return s.found
			}
		}
	}
	s.rooms = newRooms(s.peers)
	s.branch(0, keep)
	return s.found
}

// orders are those in which seekers are given room: as they are, and those first within
// their priority that the fewest peers take.
func (s *search) orders() [2][]int {
	asTheyAre := make([]int, len(s.seekers))
	for i := range asTheyAre {
		asTheyAre[i] = i
	}
	choices := func(i int) (n int) {
		for _, open := range s.open[i] {
			if open {
				n++
			}
		}
		return n
	}
	fewest := slices.Clone(asTheyAre)
	slices.SortStableFunc(fewest, func(a, b int) int {
		return cmp.Or(cmp.Compare(s.ranks[a], s.ranks[b]), cmp.Compare(choices(a), choices(b)))
	})
	return [2][]int{asTheyAre, fewest}
}

func (r *room) left() uint64 {
	if r.bound {
		return min(r.free, r.limit)
	}
	return r.free
}

func roomiest(a, b *room) bool { return a.left() > b.left() }
func tightest(a, b *room) bool { return a.left() < b.left() }
func first(*room, *room) bool  { return false }

// fill gives room to one after the other.
func (s *search) fill(order []int, rather func(a, b *room) bool) {
	rooms := newRooms(s.peers)
	for _, i := range order {
		s.now[i] = -1
		g := s.seekers[i].g
		for p, r := range rooms {
			if s.open[i][p] && r.fits(g) && (s.now[i] < 0 || rather(r, rooms[s.now[i]])) {
				s.now[i] = p
			}
		}
		if s.now[i] >= 0 {
			rooms[s.now[i]].put(g)
		}
		s.pay(i, s.now[i], 1)
	}
}

// branch tries everything for the seekers from i on that can be better than what is found.
func (s *search) branch(i int, keep func()) {
	if s.steps++; s.steps > budget {
		return
	}
	reach := s.cost
	reach.level += s.least[i].level
	reach.standstill += s.least[i].standstill
	if reach.compare(s.bestC) >= 0 {
		return
	}
	if i == len(s.seekers) {
		keep()
		return
	}
	g := s.seekers[i].g
	for p, r := range s.rooms {
		if !s.open[i][p] || !r.fits(g) || slices.ContainsFunc(s.rooms[:p], func(earlier *room) bool { return s.same(i, p, earlier) }) {
			continue
		}
		r.put(g)
		s.now[i] = p
		s.pay(i, p, 1)
		s.branch(i+1, keep)
		s.pay(i, p, -1)
		r.take(g)
	}
	s.now[i] = -1
	s.pay(i, -1, 1)
	s.branch(i+1, keep)
	s.pay(i, -1, -1)
}

// same reports whether a peer is as an earlier one to every seeker from i on, so that
// trying both is of no use.
func (s *search) same(i, p int, earlier *room) bool {
	r := s.rooms[p]
	if r.free != earlier.free || r.bound != earlier.bound || r.limit != earlier.limit || !sameKeys(r.groups, earlier.groups) {
		return false
	}
	q := slices.IndexFunc(s.peers, func(o maint.LadderPeer) bool { return o.Name == earlier.Name })
	for j := i; j < len(s.seekers); j++ {
		if s.open[j][p] != s.open[j][q] {
			return false
		}
	}
	return true
}

func sameKeys(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k := range a {
		if _, in := b[k]; !in {
			return false
		}
	}
	return true
}

// biggest orders moves as they are to begin: by priority, then size.
func biggest(a, b *candidate) int {
	return cmp.Or(cmp.Compare(b.g.Policy.Priority, a.g.Policy.Priority), cmp.Compare(b.g.Takes.Limit, a.g.Takes.Limit),
		strings.Compare(a.g.Guest, b.g.Guest), strings.Compare(a.g.UUID, b.g.UUID))
}
