package plan_test

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// now is when all situations are planned: a Tuesday.
var now = time.Date(2026, 12, 1, 10, 0, 0, 0, time.UTC)

// situation is a golden file's.
type situation struct {
	name, about string
	update      maint.Update
	ladder      maint.Ladder
	options     maint.PlanOptions
}

const gib = 1 << 30

func update(id string, u maint.Urgency, changes ...maint.Change) maint.Update {
	return maint.Update{ID: id, Urgency: u, Changes: changes}
}

func command(expected time.Duration, words ...string) *maint.ChangeStep {
	return &maint.ChangeStep{HostStep: maint.HostStep{Command: words}, Expected: expected}
}

func change(name string, kind maint.ChangeKind, rungs ...maint.Rung) maint.Change {
	c := maint.Change{Name: name, Kind: kind, Rungs: rungs}
	switch kind {
	case maint.ChangeLivepatch:
		c.File = "/var/lib/updates/" + name + ".ko"
	case maint.ChangeKernel:
		c.Kernel, c.Initrd = "/boot/vmlinuz-new", "/boot/initrd-new"
	case maint.ChangeService:
		c.Apply = &maint.ChangeStep{HostStep: maint.HostStep{Unit: name + ".service"}, Expected: 3 * time.Second}
	}
	return c
}

// ladder is a host that can do everything that is listed by its changes, but for no A.
func ladder(u maint.Update, parts ...any) maint.Ladder {
	l := maint.Ladder{Host: "host-a", HostUUID: "11111111-0000-0000-0000-000000000000", Now: now, Tells: true}
	for _, c := range u.Changes {
		for _, r := range c.Rungs {
			if r != maint.RungD {
				l.Verdicts = append(l.Verdicts, maint.HostVerdict{Change: c.Name, Rung: r})
			}
		}
	}
	for _, part := range parts {
		switch p := part.(type) {
		case maint.LadderGuest:
			p.UUID = fmt.Sprintf("%08d-1111-1111-1111-111111111111", len(l.Guests)+1)
			l.Guests = append(l.Guests, p)
		case maint.LadderPeer:
			l.Peers = append(l.Peers, p)
		case maint.HostVerdict:
			i := slices.IndexFunc(l.Verdicts, func(v maint.HostVerdict) bool { return v.Change == p.Change && v.Rung == p.Rung })
			l.Verdicts[i] = p
		case []maint.Felt:
			l.History = append(l.History, p...)
		case string:
			l.Off = append(l.Off, p)
		case bool:
			l.Tells = p
		default:
			panic(fmt.Sprintf("%T", part))
		}
	}
	for i := range l.Guests { // every peer takes it that does not say otherwise
		g := &l.Guests[i]
		for _, p := range l.Peers {
			if !slices.ContainsFunc(g.Peers, func(v maint.PeerVerdict) bool { return v.Peer == p.Name }) {
				g.Peers = append(g.Peers, maint.PeerVerdict{Peer: p.Name})
			}
		}
	}
	return l
}

func cannot(change string, r maint.Rung, code maint.Code, subject, reason, remedy string) maint.HostVerdict {
	return maint.HostVerdict{Change: change, Rung: r, Problems: []maint.Problem{*maint.Problemf(code, subject, remedy, "%s", reason)}}
}

func peer(name string, free uint64) maint.LadderPeer {
	return maint.LadderPeer{Name: name, Room: maint.PeerRoom{FreeBytes: free, In: 4, Out: 4}}
}

// guest has 4 GiB, can everything, and is given quarter of an hour of notice.
func guest(name string, edits ...func(*maint.LadderGuest)) maint.LadderGuest {
	g := maint.LadderGuest{Guest: name, Takes: maint.GuestBytes{Free: 4 * gib, Limit: 4 * gib},
		Policy: maint.GuestPolicy{Notice: 15 * time.Minute},
		Verdicts: []maint.GuestVerdict{{Rung: maint.RungB1}, {Rung: maint.RungB2, Method: maint.VMMInPlace, Pause: time.Second},
			{Rung: maint.RungB3}, {Rung: maint.RungD}}}
	for _, edit := range edits {
		edit(&g)
	}
	return g
}

type edit = func(*maint.LadderGuest)

func verdict(r maint.Rung, change func(*maint.GuestVerdict)) edit {
	return func(g *maint.LadderGuest) {
		i := slices.IndexFunc(g.Verdicts, func(v maint.GuestVerdict) bool { return v.Rung == r })
		change(&g.Verdicts[i])
	}
}

func not(r maint.Rung, code maint.Code, remedy, reason string) edit {
	return func(g *maint.LadderGuest) {
		verdict(r, func(v *maint.GuestVerdict) {
			v.Problems = append(v.Problems, *maint.Problemf(code, "guest "+g.Guest, remedy, "%s", reason))
		})(g)
	}
}

func untouched(r maint.Rung, why string) edit {
	return verdict(r, func(v *maint.GuestVerdict) { v.Untouched = why })
}

func method(m maint.VMMMethod, pause time.Duration) edit {
	return verdict(maint.RungB2, func(v *maint.GuestVerdict) { v.Method, v.Pause = m, pause })
}

func policy(change func(*maint.GuestPolicy)) edit {
	return func(g *maint.LadderGuest) { change(&g.Policy) }
}

func size(bytes uint64) edit {
	return func(g *maint.LadderGuest) { g.Takes = maint.GuestBytes{Free: bytes, Limit: bytes} }
}

func notTo(peer string, code maint.Code, reason string) edit {
	return func(g *maint.LadderGuest) {
		g.Peers = append(g.Peers, maint.PeerVerdict{Peer: peer, Problems: []maint.Problem{*maint.Problemf(code, "host "+peer, "", "%s", reason)}})
	}
}

// nightly has windows from an hour of each night on, four hours long.
func nightly(hour int) edit {
	return func(g *maint.LadderGuest) {
		g.Policy.Windows = []maint.Window{{Rule: fmt.Sprintf("FREQ=DAILY;BYHOUR=%d;BYMINUTE=0", hour), Zone: "UTC", Length: 4 * time.Hour}}
		for day := range 15 {
			start := time.Date(2026, 12, 1+day, hour, 0, 0, 0, time.UTC)
			g.Slots = append(g.Slots, maint.Slot{Start: start, End: start.Add(4 * time.Hour)})
		}
	}
}

func refuses(r ...maint.Rung) edit {
	return policy(func(p *maint.GuestPolicy) { p.Refuse = r })
}

func prefers(r ...maint.Rung) edit {
	return policy(func(p *maint.GuestPolicy) { p.Prefer = r })
}

func asks(r ...maint.Rung) edit { return policy(func(p *maint.GuestPolicy) { p.Ask = r }) }

func apart(groups ...string) edit {
	return policy(func(p *maint.GuestPolicy) { p.AntiAffinity = groups })
}

func maxPause(d time.Duration) edit {
	return policy(func(p *maint.GuestPolicy) { p.MaxPause = d })
}

func priority(n int) edit { return policy(func(p *maint.GuestPolicy) { p.Priority = n }) }

// felt are so many of a rung by a guest, one a day until now, of pauses that go round.
func felt(r maint.Rung, m maint.VMMMethod, guest int, pauses ...time.Duration) (all []maint.Felt) {
	for i, p := range pauses {
		all = append(all, maint.Felt{Rung: r, Method: m, UUID: fmt.Sprintf("%08d-1111-1111-1111-111111111111", guest),
			At: now.Add(-time.Duration(len(pauses)-i) * 24 * time.Hour), Pause: p})
	}
	return all
}

// describe writes what a plan is made from, as far as it is out of the ordinary.
func (s situation) describe() string {
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	say("%s", s.about)
	say("")
	for _, c := range s.update.Changes {
		say("change %s (%s) can be delivered by %v", c.Name, c.Kind, c.Rungs)
	}
	if !s.ladder.Tells {
		say("the host does not tell guests of anything")
	}
	if s.ladder.MaxHold > 0 {
		say("the host holds guests for %s at most", s.ladder.MaxHold)
	}
	if s.options.Return {
		say("guests are to be brought back")
	}
	if len(s.options.To) > 0 {
		say("guests may go to %v", s.options.To)
	}
	for _, v := range s.ladder.Verdicts {
		for _, p := range v.Problems {
			say("host cannot do %s by %s: %s", v.Change, v.Rung, p.Code)
		}
	}
	for _, g := range s.ladder.Guests {
		say("guest %s, %d GiB%s", g.Guest, g.Takes.Free/gib, describePolicy(g.Policy))
		for _, v := range g.Verdicts {
			for _, p := range v.Problems {
				say("  cannot %s: %s", v.Rung, p.Code)
			}
			if v.Untouched != "" {
				say("  needs no %s: %s", v.Rung, v.Untouched)
			}
		}
		for _, v := range g.Peers {
			for _, p := range v.Problems {
				say("  cannot go to %s: %s", v.Peer, p.Code)
			}
		}
	}
	for _, p := range s.ladder.Peers {
		say("peer %s, %d GiB free", p.Name, p.Room.FreeBytes/gib)
	}
	if n := len(s.ladder.History); n > 0 {
		say("%d pauses and blackouts have been measured", n)
	}
	return b.String()
}

func describePolicy(p maint.GuestPolicy) (text string) {
	for _, part := range []struct {
		name string
		v    any
		set  bool
	}{
		{"refuses", p.Refuse, len(p.Refuse) > 0}, {"prefers", p.Prefer, len(p.Prefer) > 0}, {"asks before", p.Ask, len(p.Ask) > 0},
		{"paused for at most", p.MaxPause, p.MaxPause > 0}, {"blackout at most", p.MaxBlackout, p.MaxBlackout > 0},
		{"security notice", p.SecurityNotice, p.SecurityNotice > 0}, {"priority", p.Priority, p.Priority != 0},
		{"not with others of", p.AntiAffinity, len(p.AntiAffinity) > 0},
	} {
		if part.set {
			text += fmt.Sprintf(", %s %v", part.name, part.v)
		}
	}
	for _, w := range p.Windows {
		text += ", only " + w.Rule
	}
	return text
}
