package evacuate

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"belay/agent/maint"
)

func sized(name string, size uint64, groups ...string) Guest {
	return Guest{UUID: "u-" + name, Name: name, Takes: maint.GuestBytes{Free: size, Limit: size}, AntiAffinity: groups}
}

func (g Guest) not(peers ...string) Guest {
	g.Refused = make(map[string][]maint.Problem)
	for _, p := range peers {
		g.Refused[p] = []maint.Problem{*maint.Problemf(maint.CodeCPU, "host "+p, "", "cannot run it")}
	}
	return g
}

func peer(name string, free uint64) Peer {
	return Peer{Name: name, Room: maint.PeerRoom{FreeBytes: free, In: 2}}
}

func placed(ps []Placement) (all []string) {
	for _, p := range ps {
		text := p.Guest.Name + ":" + p.Peer
		for _, why := range p.Problems {
			text += " " + string(why.Code)
		}
		all = append(all, text)
	}
	return all
}

func TestPlace(t *testing.T) {
	t.Parallel()
	limit := uint64(4)
	for _, c := range []struct {
		name   string
		guests []Guest
		peers  []Peer
		want   []string
	}{
		{"nothing", nil, []Peer{peer("b", 9)}, nil},
		{"no peers", []Guest{sized("x", 1)}, nil, []string{"x: unknown-peer"}},
		{"the biggest first, to the roomiest", []Guest{sized("s", 1), sized("l", 5), sized("m", 3)}, []Peer{peer("b", 6), peer("c", 8)}, []string{"l:c", "m:b", "s:b"}},
		{"of equal ones what writes most", []Guest{sized("x", 1), {UUID: "u-y", Name: "y", Takes: maint.GuestBytes{Free: 1, Limit: 1}, DirtyPerSecond: 7}}, []Peer{peer("b", 6)}, []string{"y:b", "x:b"}},
		{"memory adds up", []Guest{sized("x", 4), sized("y", 4), sized("z", 4)}, []Peer{peer("b", 9)}, []string{"x:b", "y:b", "z: no-room"}},
		{"a limit, too", []Guest{sized("x", 3), sized("y", 2)}, []Peer{{"b", maint.PeerRoom{FreeBytes: 99, LimitBytes: &limit}}}, []string{"x:b", "y: no-room"}},
		{"huge pages are not of the free memory", []Guest{{UUID: "u", Name: "x", Takes: maint.GuestBytes{Free: 1, Limit: 50}}}, []Peer{peer("b", 2)}, []string{"x:b"}},
		{"filled so that all fit", []Guest{sized("l", 6), sized("m", 4), sized("n", 4)}, []Peer{peer("b", 6), peer("c", 8)}, []string{"l:b", "m:c", "n:c"}},
		{"who has no choice comes first", []Guest{sized("l", 5), sized("m", 4).not("c")}, []Peer{peer("b", 6), peer("c", 5)}, []string{"l:c", "m:b"}},
		{"a group is apart", []Guest{sized("x", 1, "db"), sized("y", 1, "db"), sized("z", 1, "db")}, []Peer{peer("b", 9), peer("c", 8)}, []string{"x:b", "y:c", "z: anti-affinity anti-affinity"}},
		{"also from who is there", []Guest{sized("x", 1, "db")}, []Peer{{"b", maint.PeerRoom{FreeBytes: 9, AntiAffinity: map[string]string{"db": "old"}}}, peer("c", 1)}, []string{"x:c"}},
		{"refused", []Guest{sized("x", 1).not("b", "c")}, []Peer{peer("b", 9), peer("c", 9)}, []string{"x: cpu-incompatible cpu-incompatible"}},
		{"a shunned peer last", []Guest{{UUID: "u", Name: "x", Shunned: []string{"b"}}}, []Peer{peer("b", 9), peer("c", 1)}, []string{"x:c"}},
		{"but rather than none", []Guest{{UUID: "u", Name: "x", Shunned: []string{"b"}}}, []Peer{peer("b", 9)}, []string{"x:b"}},
	} {
		if d := cmp.Diff(c.want, placed(Place(c.guests, c.peers))); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}
}

// world draws guests and peers that are close to each other in size.
func world(t *rapid.T) (guests []Guest, peers []Peer) {
	groups := []string{"g1", "g2", "g3"}
	for i := range rapid.IntRange(0, 4).Draw(t, "peers") {
		p := peer(fmt.Sprintf("p%d", i), rapid.Uint64Range(0, 30).Draw(t, "free"))
		p.Room.In = rapid.IntRange(1, 3).Draw(t, "in")
		if rapid.Bool().Draw(t, "limited") {
			limit := rapid.Uint64Range(0, 30).Draw(t, "limit")
			p.Room.LimitBytes = &limit
		}
		if rapid.IntRange(0, 3).Draw(t, "occupied") == 0 {
			p.Room.AntiAffinity = map[string]string{rapid.SampledFrom(groups).Draw(t, "group"): "old"}
		}
		peers = append(peers, p)
	}
	for i := range rapid.IntRange(0, 10).Draw(t, "guests") {
		g := sized(fmt.Sprintf("v%d", i), rapid.Uint64Range(1, 12).Draw(t, "size"))
		g.Takes.Free = rapid.Uint64Range(0, g.Takes.Limit).Draw(t, "fresh")
		g.DirtyPerSecond = rapid.Uint64Range(0, 2).Draw(t, "dirty")
		g.AntiAffinity = rapid.SliceOfNDistinct(rapid.SampledFrom(groups), 0, 2, rapid.ID[string]).Draw(t, "groups")
		for _, p := range peers {
			if rapid.IntRange(0, 4).Draw(t, "refused") == 0 {
				if g.Refused == nil {
					g.Refused = make(map[string][]maint.Problem)
				}
				g.Refused[p.Name] = []maint.Problem{{Code: maint.CodeCPU, Subject: "host " + p.Name, Reason: "no"}}
			}
		}
		guests = append(guests, g)
	}
	return guests, peers
}

// load is what peers have of guests that have gone there, one after the other.
type load struct {
	t     *rapid.T
	peers map[string]Peer
}

func (l load) add(g Guest, to string) {
	p := l.peers[to]
	if len(g.Refused[to]) > 0 {
		l.t.Fatalf("%s goes to %s, which refuses it", g.Name, to)
	}
	if g.Takes.Free > p.Room.FreeBytes || p.Room.LimitBytes != nil && g.Takes.Limit > *p.Room.LimitBytes {
		l.t.Fatalf("%s does not fit on %s any more: %+v", g.Name, to, p.Room)
	}
	for _, name := range g.AntiAffinity {
		if other, there := p.Room.AntiAffinity[name]; there {
			l.t.Fatalf("%s goes to %s, where %s of its group is", g.Name, to, other)
		}
	}
	l.peers[to] = Take(p, g)
}

func loaded(t *rapid.T, peers []Peer) load {
	l := load{t, make(map[string]Peer)}
	for _, p := range peers {
		l.peers[p.Name] = p
	}
	return l
}

// TestEveryPlanHolds: no peer has more than it has room for and no group meets, at
// any step of carrying a plan out in any order within the limits; who stays has
// reasons; and who could go if each went to the first peer that takes it, goes.
func TestEveryPlanHolds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		guests, peers := world(t)
		plan := Place(guests, peers)
		if len(plan) != len(guests) {
			t.Fatalf("%d guests, and %d in the plan", len(guests), len(plan))
		}
		shuffled := rapid.Permutation(guests).Draw(t, "shuffled")
		if d := cmp.Diff(plan, Place(shuffled, rapid.Permutation(peers).Draw(t, "peers shuffled"))); d != "" {
			t.Fatalf("another plan of the same:\n%s", d)
		}
		l, stays := loaded(t, peers), 0
		for i, p := range plan {
			if p.Peer == "" {
				stays++
				if len(p.Problems) == 0 {
					t.Fatalf("%s stays, and nothing says why", p.Guest.Name)
				}
				continue
			}
			if stays > 0 || i > 0 && plan[i-1].Guest.Takes.Limit < p.Guest.Takes.Limit {
				t.Fatalf("wrong order: %v", placed(plan))
			}
			l.add(p.Guest, p.Peer)
		}
		if stays > 0 && firstFit(guests, peers) {
			t.Fatalf("all could go, and these stay: %v", placed(plan))
		}
		carryOut(t, plan, peers)
	})
}

// firstFit is an independent planner, as simple as can be: the biggest first, each
// to the first peer that takes it.
func firstFit(guests []Guest, peers []Peer) bool {
	guests, peers = slices.Clone(guests), slices.Clone(peers)
	slices.SortFunc(guests, func(a, b Guest) int {
		if a.Takes.Limit != b.Takes.Limit {
			return int(b.Takes.Limit) - int(a.Takes.Limit)
		}
		if a.DirtyPerSecond != b.DirtyPerSecond {
			return int(b.DirtyPerSecond) - int(a.DirtyPerSecond)
		}
		return strings.Compare(a.Name, b.Name)
	})
next:
	for _, g := range guests {
		for i, p := range peers {
			apart := !slices.ContainsFunc(g.AntiAffinity, func(n string) bool { return p.Room.AntiAffinity[n] != "" })
			if len(g.Refused[p.Name]) == 0 && apart && g.Takes.Free <= p.Room.FreeBytes && (p.Room.LimitBytes == nil || g.Takes.Limit <= *p.Room.LimitBytes) {
				peers[i] = Take(p, g)
				continue next
			}
		}
		return false
	}
	return true
}

// carryOut begins what Next gives, and has moves end in any order, until all have.
func carryOut(t *rapid.T, plan []Placement, peers []Peer) {
	var moves []maint.GuestMove
	guests := make(map[string]Guest)
	for _, p := range plan {
		if p.Peer != "" {
			moves = append(moves, maint.GuestMove{GuestUUID: p.Guest.UUID, Peer: p.Peer, State: maint.MovePlanned})
			guests[p.Guest.UUID] = p.Guest
		}
	}
	atOnce, in := rapid.IntRange(1, 4).Draw(t, "at once"), make(map[string]int)
	for _, p := range peers {
		in[p.Name] = p.Room.In
	}
	l := loaded(t, peers)
	for ended := 0; ended < len(moves); ended++ {
		for _, m := range Next(moves, atOnce, in) {
			m.State = maint.MoveMoving
			moves = maint.PutMove(moves, m)
			l.add(guests[m.GuestUUID], m.Peer)
		}
		moving, at := []maint.GuestMove{}, make(map[string]int)
		for _, m := range moves {
			if m.State == maint.MoveMoving {
				moving = append(moving, m)
				if at[m.Peer]++; at[m.Peer] > in[m.Peer] {
					t.Fatalf("%d on their way to %s, of %d", at[m.Peer], m.Peer, in[m.Peer])
				}
			}
		}
		if len(moving) == 0 || len(moving) > atOnce {
			t.Fatalf("%d move at once, of %d", len(moving), atOnce)
		}
		m := rapid.SampledFrom(moving).Draw(t, "ends")
		m.State = maint.MoveMoved
		moves = maint.PutMove(moves, m)
	}
}

func TestNext(t *testing.T) {
	t.Parallel()
	m := func(uuid, peer string, s maint.MoveState) maint.GuestMove {
		return maint.GuestMove{GuestUUID: uuid, Peer: peer, State: s}
	}
	moves := []maint.GuestMove{m("1", "b", maint.MoveMoved), m("2", "b", maint.MoveMoving), m("3", "b", maint.MovePlanned), m("4", "b", maint.MovePlanned),
		m("5", "c", maint.MovePlanned), m("6", "c", maint.MovePlanned), m("7", "d", maint.MoveLeft)}
	for _, c := range []struct {
		atOnce int
		in     map[string]int
		want   string
	}{
		{1, map[string]int{"b": 9, "c": 9}, ""},
		{2, map[string]int{"b": 9, "c": 9}, "3"},
		{9, map[string]int{"b": 2, "c": 1}, "35"},
		{9, map[string]int{"b": 1, "c": 2}, "56"},
		{9, nil, "5"},
	} {
		got := ""
		for _, n := range Next(moves, c.atOnce, c.in) {
			got += n.GuestUUID
		}
		if got != c.want {
			t.Errorf("at once %d, per peer %v: %q, want %q", c.atOnce, c.in, got, c.want)
		}
	}
}
