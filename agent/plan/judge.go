package plan

import (
	"cmp"
	"slices"
	"time"

	"belay/agent/maint"
)

// candidate is a guest, and what staying and moving would be to it.
type candidate struct {
	g    maint.LadderGuest
	stay option
	move option
	// refused are the rungs that cannot or may not be, in order.
	refused []maint.RefusedRung

	chosen *option // nil: nothing serves it
	peer   string  // that it moves to
}

// option is one of the two.
type option struct {
	open  bool // it is possible and allowed
	cost  cost
	feels []maint.Rung
	// longest is the longest single standstill, sum all of them together.
	longest maint.Estimate
	sum     time.Duration
	pauses  int
	method  maint.VMMMethod
	asked   bool
	note    string
}

// judge says what staying and moving would be to a guest.
func judge(g maint.LadderGuest, ways []way, l maint.Ladder, o maint.PlanOptions, u maint.Urgency, h history) *candidate {
	c := &candidate{g: g}
	c.judgeStay(ways, l, u, h)
	c.judgeMove(ways, l, o, u, h)
	return c
}

func (c *candidate) refuse(r maint.Rung, ps ...maint.Problem) {
	if len(ps) == 0 {
		return
	}
	for i := range c.refused {
		if c.refused[i].Rung == r {
			for _, p := range ps {
				if !slices.Contains(c.refused[i].Problems, p) {
					c.refused[i].Problems = append(c.refused[i].Problems, p)
				}
			}
			return
		}
	}
	c.refused = append(c.refused, maint.RefusedRung{Rung: r, Problems: ps})
}

// judgeStay goes through the changes as the guest would feel them where it is.
func (c *candidate) judgeStay(ways []way, l maint.Ladder, u maint.Urgency, h history) {
	c.stay.open = true
	var done []maint.Rung // B2 and B3 are felt once, however many changes they deliver
	for _, w := range ways {
		switch {
		case w.rung == "" || w.rung == maint.RungA:
			continue
		case w.rung == maint.RungD:
			c.stay.open = false
			continue
		case w.rung != maint.RungB1 && slices.Contains(done, w.rung):
			continue
		}
		done = append(done, w.rung)
		v := c.verdict(w.rung)
		if v.Untouched != "" && len(v.Problems) == 0 {
			c.stay.note = v.Untouched
			continue
		}
		e := h.standstill(w, ways, c.g.UUID, v)
		ps := slices.Concat(v.Problems, c.mayNot(w.rung, e, l, u))
		if len(ps) > 0 {
			c.refuse(w.rung, ps...)
			c.stay.open = false
			continue
		}
		c.stay.add(w.rung, e)
		if w.rung == maint.RungB2 {
			c.stay.method = v.Method
		}
	}
	c.stay.weigh(c.g.Policy)
}

// judgeMove sees whether the guest may move to any peer, their room aside.
func (c *candidate) judgeMove(ways []way, l maint.Ladder, o maint.PlanOptions, u maint.Urgency, h history) {
	e := h.blackout(c.g.UUID)
	v := c.verdict(maint.RungD)
	ps := slices.Concat(v.Problems, c.mayNot(maint.RungD, e, l, u))
	for _, w := range ways {
		if !w.away() {
			ps = append(ps, *maint.Problemf(maint.CodeRung, "change "+w.change.Name, "", "its manifest does not say that rung D is able to deliver it"))
		}
	}
	if len(ps) > 0 {
		c.refuse(maint.RungD, ps...)
		return
	}
	takers, against := c.takers(l)
	if c.move.open = len(takers) > 0; !c.move.open {
		c.refuse(maint.RungD, against...)
		return
	}
	c.move.add(maint.RungD, e)
	if o.Return {
		c.move.add(maint.RungD, e)
	}
	c.move.weigh(c.g.Policy)
}

// takers are the peers, empty, that would take the guest, and what the others have against it.
func (c *candidate) takers(l maint.Ladder) (names []string, against []maint.Problem) {
	if len(l.Peers) == 0 {
		return nil, []maint.Problem{*maint.Problemf(maint.CodeUnknownPeer, "host "+l.Host, "name a peer in its configuration ([peers.NAME])", "has no peer that it could go to")}
	}
	for _, p := range l.Peers {
		if ps := c.against(p); len(ps) > 0 {
			against = append(against, ps...)
		} else {
			names = append(names, p.Name)
		}
	}
	return names, against
}

// against is what a peer, empty, has against the guest.
func (c *candidate) against(p maint.LadderPeer) []maint.Problem {
	for _, v := range c.g.Peers {
		if v.Peer == p.Name {
			if len(v.Problems) > 0 {
				return v.Problems
			}
			return obstacles(c.g, p)
		}
	}
	return []maint.Problem{*maint.Problemf(maint.CodeUnknownPeer, "peer "+p.Name, "", "has not been asked about it")}
}

func (c *candidate) verdict(r maint.Rung) maint.GuestVerdict {
	for _, v := range c.g.Verdicts {
		if v.Rung == r {
			return v
		}
	}
	return maint.GuestVerdict{Rung: r, Problems: []maint.Problem{*maint.Problemf(maint.CodeRung, "guest "+c.g.Guest, "", "nothing is known of it and rung %s", r)}}
}

// mayNot is what the guest's policy has against a rung.
func (c *candidate) mayNot(r maint.Rung, e maint.Estimate, l maint.Ladder, u maint.Urgency) (ps []maint.Problem) {
	p, subject := c.g.Policy, "guest "+c.g.Guest
	set := func(flag string) string {
		return "ask its owner, and change its policy: belay policy set " + maint.ShellWord(c.g.Guest) + " " + flag
	}
	if r.In(p.Refuse) {
		ps = append(ps, *maint.Problemf(maint.CodePolicy, subject, set("--refuse …"), "its policy refuses rung %s", r))
	}
	limit, what, flag := p.MaxPause, "pause", "--max-pause"
	if r == maint.RungD {
		limit, what, flag = p.MaxBlackout, "blackout", "--max-blackout"
	}
	if limit > 0 && e.High > limit {
		ps = append(ps, *maint.Problemf(maint.CodeLongPause, subject, set(flag+" "+short(e.High).String()),
			"a %s of up to %s is to be expected, and its policy allows %s", what, short(e.High), limit))
	}
	if r == maint.RungB1 && l.MaxHold > 0 && e.High > l.MaxHold { // the leash would release it half way
		ps = append(ps, *maint.Problemf(maint.CodeLongPause, "host "+l.Host, "raise hold.max_pause_limit there",
			"holds guests for %s at most, and a pause of up to %s is to be expected", l.MaxHold, short(e.High)))
	}
	if u == maint.UrgencyEmergency || l.Tells {
		return ps
	}
	if r.In(p.Ask) {
		ps = append(ps, *maint.Problemf(maint.CodePolicy, subject, "have this host tell its guests (events.enabled), or change its policy",
			"its policy has rung %s ask its owner, and this host does not tell guests of anything", r))
	} else if n := p.NoticeFor(u); n > 0 {
		ps = append(ps, *maint.Problemf(maint.CodePolicy, subject, "have this host tell its guests (events.enabled), or change its policy",
			"its policy asks for %s of notice, and this host does not tell guests of anything", n))
	}
	return ps
}

func (o *option) add(r maint.Rung, e maint.Estimate) {
	if len(o.feels) == 0 || o.feels[len(o.feels)-1] != r {
		o.feels = append(o.feels, r)
	}
	o.pauses++
	o.sum += e.Typical
	if e.High > o.longest.High {
		o.longest = e
	}
}

// weigh finds the option's cost by the guest's policy.
func (o *option) weigh(p maint.GuestPolicy) {
	level := 0
	for _, r := range o.feels {
		n := 1
		if r == maint.RungD {
			n = 2
		}
		if len(p.Prefer) > 0 {
			if n = 2; r.In(p.Prefer) {
				n = 1
			}
		}
		if r.In(p.Ask) {
			n += 2
			o.asked = true
		}
		level = max(level, n)
	}
	o.cost = cost{level: level, standstill: o.sum}
}

// cost is an option's, less being better; see the package's doc.
type cost struct {
	level      int
	standstill time.Duration
}

func (c cost) compare(o cost) int {
	return cmp.Or(cmp.Compare(c.level, o.level), cmp.Compare(c.standstill, o.standstill))
}

// short is a duration as people are told it: rounded up to two figures or so.
func short(d time.Duration) time.Duration {
	unit := time.Millisecond
	switch {
	case d >= 10*time.Second:
		unit = time.Second
	case d >= time.Second:
		unit = 100 * time.Millisecond
	case d >= 100*time.Millisecond:
		unit = 10 * time.Millisecond
	}
	return (d + unit - 1).Truncate(unit)
}
