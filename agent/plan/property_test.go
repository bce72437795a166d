package plan_test

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"belay/agent/maint"
	"belay/agent/plan"
)

// draw makes up an update and a ladder of a few guests and peers.
func draw(t *rapid.T) (maint.Update, maint.Ladder, maint.PlanOptions) {
	pick := func(name string) bool { return rapid.Bool().Draw(t, name) }
	rarely := func(name string) bool { return rapid.IntRange(0, 4).Draw(t, name) == 0 }
	u := maint.Update{ID: "u", Urgency: rapid.SampledFrom(maint.Urgencies).Draw(t, "urgency")}
	for i := range rapid.IntRange(1, 3).Draw(t, "changes") {
		c := change(fmt.Sprintf("c%d", i), rapid.SampledFrom(maint.ChangeKinds).Draw(t, "kind"))
		for _, r := range c.Kind.Rungs() {
			if !rarely("left out " + string(r)) {
				c.Rungs = append(c.Rungs, r)
			}
		}
		u.Changes = append(u.Changes, c)
	}
	var parts []any
	names := []string{"p", "q", "r"}[:rapid.IntRange(0, 3).Draw(t, "peers")]
	for _, n := range names {
		p := peer(n, uint64(rapid.IntRange(0, 12).Draw(t, "free"))*gib)
		if rarely("taken") {
			p.Room.AntiAffinity = map[string]string{"x": "somebody"}
		}
		if pick("limited") {
			l := uint64(rapid.IntRange(0, 12).Draw(t, "limit")) * gib
			p.Room.LimitBytes = &l
		}
		parts = append(parts, p)
	}
	for i := range rapid.IntRange(0, 5).Draw(t, "guests") {
		edits := []edit{size(uint64(rapid.IntRange(1, 6).Draw(t, "size")) * gib)}
		for _, r := range []maint.Rung{B1, B2, B3, D} {
			if rarely("cannot") {
				edits = append(edits, not(r, maint.CodeDevice, "", "cannot"))
			}
			if r != D && rarely("untouched") {
				edits = append(edits, untouched(r, "it is so already"))
			}
		}
		for _, n := range names {
			if rarely("not there") {
				edits = append(edits, notTo(n, maint.CodeCPU, "its CPU"))
			}
		}
		some := func(name string) (rungs []maint.Rung) {
			for _, r := range []maint.Rung{B1, B2, B3, D} {
				if rapid.IntRange(0, 6).Draw(t, name) == 0 {
					rungs = append(rungs, r)
				}
			}
			return rungs
		}
		edits = append(edits, refuses(some("refuse")...), prefers(some("prefer")...), asks(some("ask")...), priority(rapid.IntRange(0, 1).Draw(t, "priority")))
		if pick("apart") {
			edits = append(edits, apart("x"))
		}
		if pick("impatient") {
			edits = append(edits, maxPause(time.Duration(rapid.IntRange(1, 10).Draw(t, "pause"))*time.Second))
		}
		if rarely("windows") {
			edits = append(edits, nightly(rapid.IntRange(0, 23).Draw(t, "hour")))
		}
		parts = append(parts, guest(fmt.Sprintf("g%d", i), edits...))
	}
	for _, c := range u.Changes {
		for _, r := range c.Rungs {
			if r != D && rarely("host cannot") {
				parts = append(parts, cannot(c.Name, r, maint.CodeNoRegion, "host", "cannot", ""))
			}
		}
	}
	parts = append(parts, pick("tells"))
	l := ladder(u, parts...)
	if rarely("short holds") {
		l.MaxHold = time.Duration(rapid.IntRange(1, 15).Draw(t, "hold")) * time.Second
	}
	return u, l, maint.PlanOptions{Return: pick("return")}
}

// Reading of the ladder that has nothing in common with the planner's.
type referee struct {
	u maint.Update
	l maint.Ladder
	o maint.PlanOptions
}

func (f referee) host(c maint.Change, r maint.Rung) bool {
	if !slices.Contains(c.Rungs, r) {
		return false
	}
	for _, v := range f.l.Verdicts {
		if v.Change == c.Name && v.Rung == r {
			return len(v.Problems) == 0
		}
	}
	return r == D
}

// felt says what a guest feels of rungs in order, and whether that is possible and allowed.
// Pauses are as predicted by the planner, which has to stand by them: see stands.
func (f referee) may(g maint.LadderGuest, r maint.Rung, high time.Duration) bool {
	for _, refused := range g.Policy.Refuse {
		if refused == r {
			return false
		}
	}
	if r == B1 && f.l.MaxHold > 0 && high > f.l.MaxHold {
		return false
	}
	limit := g.Policy.MaxPause
	if r == D {
		limit = g.Policy.MaxBlackout
	}
	if limit > 0 && high > limit {
		return false
	}
	if f.u.Urgency != maint.UrgencyEmergency && !f.l.Tells {
		return !slices.Contains(g.Policy.Ask, r) && g.Policy.Notice == 0
	}
	return true
}

func level(g maint.LadderGuest, r maint.Rung) int {
	n := 1
	switch {
	case len(g.Policy.Prefer) > 0 && !slices.Contains(g.Policy.Prefer, r), len(g.Policy.Prefer) == 0 && r == D:
		n = 2
	}
	if slices.Contains(g.Policy.Ask, r) {
		n += 2
	}
	return n
}

// Without history every estimate is by these: twice what is assumed is the most.
func standstill(c maint.Change, r maint.Rung) time.Duration {
	switch r {
	case B1:
		if s := c.Standstill(); s > 0 {
			return s + 150*time.Millisecond
		}
		return 5150 * time.Millisecond
	case B2:
		return time.Second
	case B3:
		return 90 * time.Second
	}
	return 250 * time.Millisecond
}

// score is what an assignment comes to, in the words of the package's doc.
type score struct {
	undone     int // changes that are delivered to nobody
	high, low  int // guests that are not served, of priority 1 and 0
	levels     int
	standstill time.Duration
}

func (s score) compare(o score) int {
	return cmp.Or(cmp.Compare(s.undone, o.undone), cmp.Compare(s.high, o.high), cmp.Compare(s.low, o.low), cmp.Compare(s.levels, o.levels), cmp.Compare(s.standstill, o.standstill))
}

// stay is what a guest feels where it is, with one rung for each change; "" in ways is a
// change that is not done at all.
func (f referee) stay(g maint.LadderGuest, ways []maint.Rung) (lvl int, sum time.Duration, ok bool) {
	once := make(map[maint.Rung]bool)
	for i, r := range ways {
		if r == D {
			return 0, 0, false
		}
		if r == "" || r == A || r != B1 && once[r] {
			continue
		}
		once[r] = true
		v := g.Verdicts[slices.IndexFunc(g.Verdicts, func(v maint.GuestVerdict) bool { return v.Rung == r })]
		if len(v.Problems) > 0 {
			return 0, 0, false
		}
		if v.Untouched != "" {
			continue
		}
		d := standstill(f.u.Changes[i], r)
		if !f.may(g, r, 2*d) {
			return 0, 0, false
		}
		lvl, sum = max(lvl, level(g, r)), sum+d
	}
	return lvl, sum, true
}

// leave says whether a guest may go to a peer at all.
func (f referee) leave(g maint.LadderGuest, p maint.LadderPeer, ways []maint.Rung) bool {
	for i, r := range ways {
		if r != "" && r != A && !slices.Contains(f.u.Changes[i].Rungs, D) {
			return false
		}
	}
	for _, v := range g.Verdicts {
		if v.Rung == D && len(v.Problems) > 0 {
			return false
		}
	}
	for _, v := range g.Peers {
		if v.Peer == p.Name && len(v.Problems) > 0 {
			return false
		}
	}
	return f.may(g, D, 2*standstill(maint.Change{}, D))
}

// fit says whether guests fit on a peer together.
func fit(p maint.LadderPeer, guests []maint.LadderGuest) bool {
	var free, limit uint64
	groups := make(map[string]bool)
	for name := range p.Room.AntiAffinity {
		groups[name] = true
	}
	for _, g := range guests {
		free, limit = free+g.Takes.Free, limit+g.Takes.Limit
		for _, name := range g.Policy.AntiAffinity {
			if groups[name] {
				return false
			}
			groups[name] = true
		}
	}
	return free <= p.Room.FreeBytes && (p.Room.LimitBytes == nil || limit <= *p.Room.LimitBytes)
}

// judge scores an assignment: for each guest -2 for not served, -1 for staying, or a peer;
// false if a verdict forbids it.
func (f referee) judge(ways []maint.Rung, at []int) (s score, ok bool) {
	for _, r := range ways {
		if r == "" {
			s.undone++
		}
	}
	there := make([][]maint.LadderGuest, len(f.l.Peers))
	for i, g := range f.l.Guests {
		switch {
		case at[i] == -2 && g.Policy.Priority == 1:
			s.high++
		case at[i] == -2:
			s.low++
		case at[i] == -1:
			lvl, sum, ok := f.stay(g, ways)
			if !ok {
				return s, false
			}
			s.levels, s.standstill = s.levels+lvl, s.standstill+sum
		default:
			if !f.leave(g, f.l.Peers[at[i]], ways) {
				return s, false
			}
			there[at[i]] = append(there[at[i]], g)
			times := time.Duration(1)
			if f.o.Return {
				times = 2
			}
			s.levels, s.standstill = s.levels+level(g, D), s.standstill+times*standstill(maint.Change{}, D)
		}
	}
	for i, p := range f.l.Peers {
		if !fit(p, there[i]) {
			return s, false
		}
	}
	return s, true
}

// bootsRight says whether every change that is done in a boot has one.
func (f referee) bootsRight(ways []maint.Rung) bool {
	boots := false
	for i, r := range ways {
		boots = boots || r == B3 && bootsKernel(f.u.Changes[i])
	}
	for i, r := range ways {
		if r == B3 && !boots || r == "" && boots && f.host(f.u.Changes[i], B3) {
			return false
		}
	}
	return true
}

func bootsKernel(c maint.Change) bool {
	return c.Kind == maint.ChangeKernel || c.Kind == maint.ChangeMicrocode
}

// best tries every rung for every change, and every assignment.
func (f referee) best() (least score) {
	n := 0
	var ways []maint.Rung
	var eachWay func()
	at := make([]int, len(f.l.Guests))
	var each func(i int)
	each = func(i int) {
		if i < len(at) {
			for at[i] = -2; at[i] < len(f.l.Peers); at[i]++ {
				each(i + 1)
			}
			return
		}
		if s, ok := f.judge(ways, at); ok && (n == 0 || s.compare(least) < 0) {
			least = s
			n++
		}
	}
	eachWay = func() {
		if len(ways) == len(f.u.Changes) {
			if f.bootsRight(ways) {
				each(0)
			}
			return
		}
		c, some := f.u.Changes[len(ways)], false
		for _, r := range []maint.Rung{A, B1, B2, B3, D} {
			if f.host(c, r) && (r == A || !f.host(c, A)) { // A is felt by nobody, and so not weighed
				some = some || r != B3 || bootsKernel(c)
				ways = append(ways, r)
				eachWay()
				ways = ways[:len(ways)-1]
			}
		}
		if !some {
			ways = append(ways, "")
			eachWay()
			ways = ways[:len(ways)-1]
		}
	}
	eachWay()
	return least
}

// chosen is a plan as the referee reads one.
func (f referee) chosen(t *rapid.T, p maint.Plan) (ways []maint.Rung, at []int) {
	for _, c := range p.Changes {
		ways = append(ways, c.Rung)
	}
	for _, g := range p.Guests {
		switch {
		case g.Rung == "":
			at = append(at, -2)
		case g.To != "":
			i := slices.IndexFunc(f.l.Peers, func(p maint.LadderPeer) bool { return p.Name == g.To })
			if i < 0 {
				t.Fatalf("guest %s goes to %s, which is no peer", g.Guest, g.To)
			}
			at = append(at, i)
		default:
			at = append(at, -1)
		}
	}
	return ways, at
}

// TestNeverMoreImpact: what a plan does is possible and allowed, and no other that is has
// less impact.
func TestNeverMoreImpact(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		u, l, o := draw(t)
		p := plan.Make(u, l, o)
		f := referee{u, l, o}
		ways, at := f.chosen(t, p)
		for i, r := range ways {
			if r != "" && !f.host(u.Changes[i], r) {
				t.Fatalf("change %d is done by %s, which the host cannot", i, r)
			}
		}
		s, ok := f.judge(ways, at)
		if !ok {
			t.Fatalf("a verdict forbids the plan:\n%s", p.Text())
		}
		if least := f.best(); least.compare(s) != 0 {
			t.Fatalf("there is a plan with %+v, and this one has %+v:\n%s", least, s, p.Text())
		}
	})
}

// TestTimes: nobody feels anything before its notice has passed, nor outside its windows
// unless it is at the deadline or an emergency.
func TestTimes(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		u, l, o := draw(t)
		p := plan.Make(u, l, o)
		for i, g := range p.Guests {
			if g.Begin.IsZero() || u.Urgency == maint.UrgencyEmergency {
				continue
			}
			from := l.Guests[i]
			if l.Tells && g.Begin.Before(now.Add(from.Policy.NoticeFor(u.Urgency))) {
				t.Fatalf("guest %s begins %s, and has %s of notice", g.Guest, g.Begin, from.Policy.NoticeFor(u.Urgency))
			}
			in := len(from.Policy.Windows) == 0 || slices.ContainsFunc(from.Slots, func(s maint.Slot) bool {
				return !g.Begin.Before(s.Start) && g.Begin.Before(s.End)
			})
			if !in && g.Begin.Before(p.Deadline) {
				t.Fatalf("guest %s begins %s, which is in none of its windows", g.Guest, g.Begin)
			}
			if g.Asked && g.Begin.Before(p.Deadline) {
				t.Fatalf("guest %s is asked, and begins %s", g.Guest, g.Begin)
			}
		}
	})
}

// TestSteps: every guest that feels something does so in exactly the steps that say so, who
// moves is gone by then, and everybody who is told is told first.
func TestSteps(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		u, l, o := draw(t)
		p := plan.Make(u, l, o)
		in := func(uuid string, kinds ...maint.PlanStepKind) (n []int) {
			for _, s := range p.Steps {
				if slices.Contains(kinds, s.Kind) && slices.Contains(s.Guests, uuid) {
					n = append(n, s.N)
				}
			}
			return n
		}
		for _, g := range p.Guests {
			felt := in(g.UUID, maint.PlanHold, maint.PlanReplace, maint.PlanKexec)
			moved := in(g.UUID, maint.PlanMove)
			told := in(g.UUID, maint.PlanAnnounce)
			switch {
			case g.To != "" && (len(felt) > 0 || len(moved) != 1):
				t.Fatalf("guest %s moves in steps %v and is held in %v:\n%s", g.Guest, moved, felt, p.Text())
			case g.To == "" && len(moved) > 0, g.To == "" && len(felt) != g.Pauses:
				t.Fatalf("guest %s stays, moves in %v and is held in %v, %d times:\n%s", g.Guest, moved, felt, g.Pauses, p.Text())
			case l.Tells && u.Urgency != maint.UrgencyEmergency && len(felt)+len(moved) > 0 && (len(told) != 1 || told[0] > slices.Min(slices.Concat(felt, moved))):
				t.Fatalf("guest %s is told in %v, and feels it in %v and %v:\n%s", g.Guest, told, felt, moved, p.Text())
			}
			back := in(g.UUID, maint.PlanReturn)
			leaves := slices.ContainsFunc(u.Changes, func(c maint.Change) bool { return c.Kind == maint.ChangeLeave })
			if want := g.To != "" && o.Return && !leaves; want != (len(back) == 1) {
				t.Fatalf("guest %s is brought back in %v:\n%s", g.Guest, back, p.Text())
			}
		}
		for i, s := range p.Steps {
			if s.N != i+1 {
				t.Fatalf("step %d has number %d", i+1, s.N)
			}
		}
	})
}

// TestSameInputSameBytes: in whatever order guests, peers and verdicts come.
func TestSameInputSameBytes(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		u, l, o := draw(t)
		want := plan.Make(u, l, o).Encode()
		l.Guests = rapid.Permutation(l.Guests).Draw(t, "guests")
		l.Peers = rapid.Permutation(l.Peers).Draw(t, "peers")
		l.Verdicts = rapid.Permutation(l.Verdicts).Draw(t, "verdicts")
		if got := plan.Make(u, l, o).Encode(); !bytes.Equal(got, want) {
			t.Fatalf("is %s, was %s", got, want)
		}
	})
}

// TestWorld: a plan's world is the same later on, with other free memory; not with another
// guest, verdict or policy.
func TestWorld(t *testing.T) {
	t.Parallel()
	u := update("ovs", maint.UrgencyNormal, change("ovs", maint.ChangeService, B1, D))
	make := func(parts ...any) string { return plan.Make(u, ladder(u, parts...), maint.PlanOptions{}).World }
	was := make(guest("web-1"), peer("host-b", 8*gib))
	later := ladder(u, guest("web-1"), peer("host-b", 9*gib))
	later.Now = now.Add(time.Hour)
	later.History = felt(D, "", 1, time.Second)
	if is := plan.Make(u, later, maint.PlanOptions{}).World; is != was {
		t.Error("the world is another an hour later")
	}
	for name, is := range map[string]string{
		"a guest":   make(guest("web-1"), guest("web-2"), peer("host-b", 8*gib)),
		"a policy":  make(guest("web-1", refuses(D)), peer("host-b", 8*gib)),
		"a verdict": make(guest("web-1", not(D, maint.CodeDevice, "", "has a device")), peer("host-b", 8*gib)),
		"a peer":    make(guest("web-1"), peer("host-c", 8*gib)),
	} {
		if is == was {
			t.Errorf("the world is the same with %s that is another", name)
		}
	}
}
