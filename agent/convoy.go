package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"belay/agent/maint"
	"belay/agent/run"
	"belay/migrate/evacuate"
	"belay/notify/board"
)

// convoy has many guests moved, each by a migration of its own, here or on a peer.
//
//	planned ── written down with its name ──► moving ── begin, await ──► moved
//	   ▲                                        │
//	   └──────── failed: later, or left ────────┘
//
// A migration is given its name, and that is on disk, before it is begun: whoever
// takes the operation up again finds it by that name, or knows that it never began.
type convoy struct {
	a  *Agent
	op maint.OpID
	s  *run.Scratch
	// atOnce is how many guests are moved at once, and perPeer how many of them to
	// or from one peer. Told guests are waited for side by side: their turns come
	// when they have had their notice.
	atOnce  int
	perPeer map[string]int

	// name gives a move the name of its next migration. begun reports whether there
	// is one of that name; begin begins it, at most once, and may complete the move.
	name  func(*maint.GuestMove)
	begun func(maint.GuestMove) bool
	begin func(ctx context.Context, m *maint.GuestMove) error
	// await returns the migration as it has ended.
	await func(ctx context.Context, m maint.GuestMove) (maint.Op, error)
	abort func(ctx context.Context, m maint.GuestMove) error
	// tells reports whether guests that go to, or come from, a peer are told beforehand
	// by the host that they leave.
	tells func(peer string) bool
	// waits reports whether the migration waits for its guest's notice.
	waits func(maint.GuestMove) bool
	// when is the moment from which on a planned move may begin; nil: any.
	when func(maint.GuestMove) time.Time
	// look may plan more; see drainage.
	look func(ctx context.Context, last bool) (wait bool, err error)

	now       time.Time            // when it last woke up
	notBefore map[string]time.Time // when a guest's move may be tried again
	pause     map[string]time.Duration
	shunned   map[string][]string // peers at which a guest's move has failed
}

func newConvoy(a *Agent, op maint.Op, s *run.Scratch) *convoy {
	return &convoy{a: a, op: op.ID, s: s, perPeer: make(map[string]int), notBefore: make(map[string]time.Time),
		pause: make(map[string]time.Duration), shunned: make(map[string][]string)}
}

// ownMoves has the moves be migrations of this host: name gives one its name, by is who asks
// for it, and request says what is asked.
func (c *convoy) ownMoves(name func(*maint.GuestMove), by string, request func(maint.GuestMove) maint.MigrateRequest) {
	a := c.a
	c.name = name
	c.tells = func(string) bool { return a.cfg.Events.Enabled }
	c.begun = func(m maint.GuestMove) bool {
		_, known := a.journal.Op(m.Op)
		return known
	}
	c.begin = func(ctx context.Context, m *maint.GuestMove) error {
		_, err := a.migrate(ctx, by, request(*m), func(child *maint.Op) { child.ID, child.Part = m.Op, c.op })
		return err
	}
	c.await = func(ctx context.Context, m maint.GuestMove) (end maint.Op, err error) {
		err = a.until(ctx, func() bool {
			end, _ = a.journal.Op(m.Op)
			return end.State == maint.OpEnded
		})
		return end, err
	}
	c.waits = func(m maint.GuestMove) bool {
		child, _ := a.journal.Op(m.Op)
		return child.Step == phaseAnnounce
	}
	c.abort = func(ctx context.Context, m maint.GuestMove) error {
		_, err := a.Abort(ctx, by, m.Op)
		return err
	}
}

func (c *convoy) moves() []maint.GuestMove {
	op, _ := c.a.journal.Op(c.op)
	return slices.Clone(op.Moves)
}

func moveRecord(m maint.GuestMove) maint.Record {
	data, err := json.Marshal(m)
	if err != nil {
		panic("a GuestMove does not marshal: " + err.Error())
	}
	return maint.Record{Kind: maint.RecMove, Data: data}
}

// put writes down where a guest's move is.
func (c *convoy) put(m maint.GuestMove) error { return c.s.Append(moveRecord(m)) }

const (
	// convoyPause is after the first failure of a guest's move; it doubles.
	convoyPause    = 500 * time.Millisecond
	convoyPauseMax = 30 * time.Second
)

// later has a guest's move be tried again after a while.
func (c *convoy) later(uuid string) {
	d := max(convoyPause, c.pause[uuid])
	c.pause[uuid] = min(2*d, convoyPauseMax)
	c.notBefore[uuid] = time.Now().Add(d)
}

// due reports whether a guest's move may be tried, as of when the convoy last woke up.
func (c *convoy) due(m maint.GuestMove) bool {
	return !c.now.Before(c.notBefore[m.GuestUUID]) && (c.when == nil || !c.now.Before(c.when(m)))
}

// trial is one migration that has ended, or could not begin.
type trial struct {
	move   maint.GuestMove
	op     maint.Op
	err    error
	lapsed bool // it was not begun: no more are
}

// run moves the guests until all have moved or are left. When ctx ends no more begin,
// and those that are on their way are seen to their end.
func (c *convoy) run(ctx context.Context) error {
	life, stop := context.WithCancel(c.a.life)
	var trials sync.WaitGroup
	defer trials.Wait()
	defer stop()
	ended := make(chan trial)
	under, aborted := make(map[string]maint.GuestMove), make(map[string]bool)
	for {
		changed, seen, told := c.a.journal.Changed(), c.a.view.changed(), c.a.keeper.See(func(board.Board) {})
		c.now = time.Now()
		over := ctx.Err() != nil
		wait := false
		if !over {
			var err error
			if wait, err = c.more(ctx, len(under) == 0); err != nil {
				return err
			}
		} else {
			c.abortThose(life, under, aborted)
		}
		for _, m := range c.moves() {
			if _, is := under[m.GuestUUID]; is || m.State != maint.MoveMoving {
				continue
			}
			under[m.GuestUUID] = m
			trials.Add(1)
			c.a.workers.Go(func() {
				defer trials.Done()
				t := c.try(life, ctx, m)
				select {
				case ended <- t:
				case <-life.Done():
				}
			})
		}
		if len(under) == 0 && (over || !wait) {
			return c.close(ctx)
		}
		var done <-chan struct{}
		if !over {
			done = ctx.Done()
		}
		alarm := time.NewTimer(c.wake())
		select {
		case t := <-ended:
			delete(under, t.move.GuestUUID)
			delete(aborted, t.move.GuestUUID)
			if err := c.settle(ctx, t); err != nil {
				alarm.Stop()
				return err
			}
		case <-changed:
		case <-seen:
		case <-told:
		case <-alarm.C:
		case <-done:
		case <-c.a.life.Done():
			alarm.Stop()
			return c.a.life.Err()
		}
		alarm.Stop()
	}
}

// wake is how long nothing is to be done unless something happens.
func (c *convoy) wake() time.Duration {
	least := time.Minute
	until := func(at time.Time) {
		if at.After(c.now) {
			least = min(least, max(0, time.Until(at)))
		}
	}
	for _, at := range c.notBefore {
		until(at)
	}
	for _, m := range c.moves() {
		if c.when != nil && m.State == maint.MovePlanned {
			until(c.when(m))
		}
	}
	return least
}

// more looks for more to do, and has those be moving that may. It reports whether
// there is anything to wait for. idle says that nothing moves.
func (c *convoy) more(ctx context.Context, idle bool) (wait bool, err error) {
	if wait, err = c.look(ctx, false); err != nil {
		return false, err
	}
	if idle && !wait {
		if wait, err = c.look(ctx, true); err != nil {
			return false, err
		}
	}
	var ready []maint.GuestMove
	for _, m := range c.moves() {
		if m.State == maint.MovePlanned && (m.Peer == "" || !c.due(m)) {
			continue
		}
		ready = append(ready, m)
	}
	atOnce, perPeer := c.atOnce, maps.Clone(c.perPeer)
	for _, m := range ready {
		if c.tells(m.Peer) {
			atOnce, perPeer[m.Peer] = len(ready), len(ready)
		}
	}
	for _, m := range evacuate.Next(ready, atOnce, perPeer) {
		m.State, m.Problems = maint.MoveMoving, nil
		c.name(&m)
		if err := c.put(m); err != nil {
			return false, err
		}
		wait = true
	}
	return wait, nil
}

// abortThose has migrations be aborted once the convoy is over: those whose guests
// still have their notice, and if that was asked for all.
func (c *convoy) abortThose(ctx context.Context, under map[string]maint.GuestMove, aborted map[string]bool) {
	op, _ := c.a.journal.Op(c.op)
	for _, m := range op.Moves { // as they were completed, which under does not know
		if _, runs := under[m.GuestUUID]; !runs || aborted[m.GuestUUID] || !op.AbortNow && !c.waits(m) {
			continue
		}
		var p *maint.Problem
		err := c.abort(ctx, m)
		if errors.As(err, &p) && p.Code == maint.CodeUnknownOp {
			continue // it is about to begin, or will not
		}
		if err != nil {
			c.a.log.Warn("cannot abort what runs of an operation", "op", c.op, "guest", m.Guest, "err", err)
		}
		aborted[m.GuestUUID] = true
	}
}

// try sees one migration from its beginning, unless it has begun, to its end.
func (c *convoy) try(life, ctx context.Context, m maint.GuestMove) trial {
	if !c.begun(m) {
		if ctx.Err() != nil {
			return trial{move: m, lapsed: true}
		}
		was := m.Op
		if err := c.begin(life, &m); err != nil && !c.begun(m) {
			return trial{move: m, err: err}
		}
		if m.Op != was {
			if err := c.put(m); err != nil {
				return trial{move: m, err: err}
			}
		}
	}
	op, err := c.await(life, m)
	return trial{move: m, op: op, err: err}
}

// settle writes down what became of a guest's move.
func (c *convoy) settle(ctx context.Context, t trial) error {
	m := t.move
	if errors.Is(t.err, run.ErrLeftOpen) || c.a.life.Err() != nil {
		return cmp.Or(c.a.life.Err(), t.err)
	}
	m.Problems = t.op.Problems
	counts := true
	switch {
	case t.lapsed:
		m.State, m.Op = maint.MovePlanned, ""
		return c.put(m)
	case t.err != nil:
		var refusal *maint.Refusal
		if errors.As(t.err, &refusal) {
			m.Problems = refusal.Problems
		} else {
			m.Problems = []maint.Problem{*maint.AsProblem(t.err, maint.CodeFailed, "guest "+m.Guest)}
		}
		counts = !soon(m.Problems) && !slices.ContainsFunc(m.Problems, func(p maint.Problem) bool { return p.Code == maint.CodeJournal })
	case t.op.Outcome.TookEffect():
		m.State = maint.MoveMoved
		if t.op.Move != nil {
			m.Downtime = t.op.Move.Downtime
		}
		return c.put(m)
	case t.op.Outcome == maint.OutcomeAborted, t.op.Outcome == maint.OutcomeStuck:
		m.State = maint.MoveLeft
		return c.put(m)
	case t.op.Outcome == maint.OutcomeBlocked:
		counts = !soon(m.Problems)
	}
	if slices.ContainsFunc(m.Problems, gone) {
		m.State = maint.MoveLeft
		return c.put(m)
	}
	if counts {
		m.Tries++
		c.shunned[m.GuestUUID] = append(c.shunned[m.GuestUUID], m.Peer)
	}
	m.State = maint.MovePlanned
	if m.Tries >= maxTries {
		m.State = maint.MoveLeft
	} else {
		c.later(m.GuestUUID)
		c.failed(&m)
	}
	return c.put(m)
}

// gone is a problem that no other try has an answer to: there is no guest to move, or
// it may not be.
func gone(p maint.Problem) bool {
	return p.Code == maint.CodeGuestOff || p.Code == maint.CodeUnknownGuest || p.Code == maint.CodeForbidden
}

// failed has a guest that is to be tried again look for a peer anew, if it may choose.
func (c *convoy) failed(m *maint.GuestMove) {
	if m.Token == "" {
		m.Peer = ""
	}
}

// close says of those that were not begun why, and returns what ended the convoy early.
func (c *convoy) close(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	why := maint.Problemf(maint.CodeTimeout, "guest ", "begin it again, or allow more time (--timeout)", "its turn had not come when the time was up")
	aborted := errors.Is(context.Cause(ctx), run.ErrAborted)
	if aborted {
		why = maint.Problemf(maint.CodeAborted, "guest ", "", "its turn had not come when it was aborted")
	}
	var recs []maint.Record
	states := make(map[maint.MoveState]int)
	for _, m := range c.moves() {
		if m.State == maint.MovePlanned {
			p := *why
			p.Subject += m.Guest
			m.State, m.Problems = maint.MoveLeft, append(m.Problems, p)
			recs = append(recs, moveRecord(m))
		}
		states[m.State]++
	}
	if err := c.s.Append(recs...); err != nil || !aborted {
		return err
	}
	return maint.Problemf(maint.CodeAborted, "host "+c.a.cfg.Host, "", "%d guests had moved, and stay where they are; %d were left", states[maint.MoveMoved], states[maint.MoveLeft])
}

// peersOf are the peers of moves.
func peersOf(moves []maint.GuestMove) []string {
	set := make(map[string]bool)
	for _, m := range moves {
		if m.Peer != "" {
			set[m.Peer] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}
