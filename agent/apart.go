package agent

import (
	"context"
	"maps"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/migrate"
)

// groupsOf are the anti-affinity groups that a guest is in, sorted: those of its
// <metadata>, those of the configuration, and of policies in both. nil is none.
func (a *Agent) groupsOf(g maint.Guest) []string {
	groups := append(slices.Clone(g.AntiAffinity), a.policyGroups(g)...)
	for _, name := range slices.Sorted(maps.Keys(a.cfg.AntiAffinity)) {
		if matches(a.cfg.AntiAffinity[name], maint.EventGuest{UUID: g.UUID, Name: g.Name}) {
			groups = append(groups, name)
		}
	}
	slices.Sort(groups)
	return slices.Compact(groups)
}

// groupsAt are those of a guest of this host; of one that cannot be looked at, as
// it was last seen.
func (a *Agent) groupsAt(ctx context.Context, uuid, name string) []string {
	g, err := a.hyp.Guest(ctx, uuid)
	if err != nil {
		g = maint.Guest{UUID: uuid, Name: name}
		for _, seen := range a.view.last.Load().guests {
			if seen.UUID == uuid {
				g = seen
			}
		}
	}
	return a.groupsOf(g)
}

// apart lists guests here, or on their way here, of a group that an arriving guest
// is in, too.
func (a *Agent) apart(r maint.Arrival, guests []maint.Guest, kept []maint.Reservation) (ps []maint.Problem) {
	groups := a.groupsOf(maint.Guest{UUID: r.GuestUUID, Name: r.Guest, AntiAffinity: r.AntiAffinity})
	if len(groups) == 0 {
		return nil
	}
	// Those that come back together were here together before.
	if together := a.comingBack(); together[r.GuestUUID] {
		guests = slices.DeleteFunc(slices.Clone(guests), func(g maint.Guest) bool { return together[g.UUID] })
		kept = slices.DeleteFunc(slices.Clone(kept), func(r maint.Reservation) bool { return together[r.GuestUUID] })
	}
	there := a.occupied(r.GuestUUID, guests, kept)
	for _, name := range groups {
		if other, taken := there[name]; taken {
			ps = append(ps, *maint.Problemf(maint.CodeAntiAffinity, "host "+a.cfg.Host, "choose another peer, or take one of them out of the group",
				"has, or expects, guest %s of anti-affinity group %s", other, name))
		}
	}
	return ps
}

// comingBack are the guests of a restore that runs, by UUID.
func (a *Agent) comingBack() map[string]bool {
	all := make(map[string]bool)
	for _, op := range a.journal.Ops() {
		if op.Kind != maint.OpRestore || op.State == maint.OpEnded {
			continue
		}
		for _, m := range op.Moves {
			all[m.GuestUUID] = true
		}
	}
	return all
}

// occupied are the groups of guests that run here or are expected, but for one,
// with the name of a guest of each.
func (a *Agent) occupied(but string, guests []maint.Guest, kept []maint.Reservation) map[string]string {
	there := make(map[string]string)
	put := func(g maint.Guest) {
		for _, name := range a.groupsOf(g) {
			there[name] = g.Name
		}
	}
	for _, g := range guests {
		if g.UUID != but && g.State.Active() {
			put(g)
		}
	}
	for _, r := range kept {
		if r.GuestUUID != but {
			put(maint.Guest{UUID: r.GuestUUID, Name: r.Guest, AntiAffinity: r.AntiAffinity})
		}
	}
	return there
}

// Room tells a peer what this host has room for.
func (a *Agent) Room(ctx context.Context) (maint.PeerRoom, error) {
	host, err := a.hyp.Info(ctx)
	if err != nil {
		return maint.PeerRoom{}, a.downProblem(err)
	}
	guests, err := a.hyp.Guests(ctx)
	if err != nil {
		return maint.PeerRoom{}, a.downProblem(err)
	}
	kept := a.journal.Reservations(time.Now())
	r := maint.PeerRoom{In: a.cfg.Limits.MigrationsIn, Out: a.cfg.Limits.MigrationsOut, Tells: a.cfg.Events.Enabled, AntiAffinity: a.occupied("", guests, kept)}
	r.FreeBytes, r.LimitBytes = migrate.Room{Host: host, Guests: guests, Reservations: kept,
		MemoryLimit: a.cfg.Limits.GuestMemory.Bytes, MemoryReserve: a.cfg.Limits.MemoryReserve.Bytes}.Left()
	return r, nil
}

// crowded reports whether a migration that is part of a drain, or that a peer has asked
// for, has to wait for others: as many as may are under way, or on their way to the same
// peer, which would refuse it.
func (a *Agent) crowded(op maint.Op) bool {
	if op.Part == "" && op.Return == nil {
		return false
	}
	all, there := 0, 0
	for _, other := range a.journal.Ops() {
		if other.Kind != maint.OpMigrate || other.ID == op.ID || other.State == maint.OpEnded || a.waiting(other) {
			continue
		}
		if op.Part != "" && other.Part == op.Part {
			all++
		}
		if other.Peer == op.Peer {
			there++
		}
	}
	parallel, in := 0, a.peers[op.Peer].takesIn()
	if whole, known := a.journal.Op(op.Part); known && whole.Drain != nil {
		parallel = whole.Drain.Parallel
	}
	return parallel > 0 && all >= parallel || in > 0 && there >= in
}
