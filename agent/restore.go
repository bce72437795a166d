package agent

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/agent/run"
)

// The steps of a restore, beside phasePlan and phaseAccount.
const (
	phaseUncordon = "uncordon"
	phaseReturn   = "return"
)

// byRestore is who asks for a restore's uncordoning.
const byRestore = "restore:"

// Restore admits the return of what a drain or an update has moved away, writes it down
// and starts it.
func (a *Agent) Restore(ctx context.Context, by string, r maint.RestoreRequest) (maint.Op, error) {
	what := "cannot restore host " + a.cfg.Host
	if r.Timeout < 0 || r.Timeout > maxTimeout {
		return maint.Op{}, badRequest("timeout", fmt.Sprintf("choose one up to %s", maxTimeout), "%s is out of range", r.Timeout)
	}
	if r.MaxPause < 0 || r.MaxPause > config.MaxMigrationPause {
		return maint.Op{}, badRequest("max_pause", fmt.Sprintf("choose one up to %s", config.MaxMigrationPause), "%s is out of range", r.MaxPause)
	}
	if err := checkReason(r.Reason); err != nil {
		return maint.Op{}, err
	}
	drain, err := a.drained(what, r.Drain)
	if err != nil {
		return maint.Op{}, err
	}
	r.Drain, r.Timeout = drain.ID, cmp.Or(r.Timeout, maint.DrainTimeout)
	now := time.Now()
	return a.submit(ctx, what, maint.Op{ID: newOpID("restore", now), Kind: maint.OpRestore, By: by, Reason: r.Reason,
		Deadline: now.Add(r.Timeout), Restore: &r})
}

// drained is the drain or apply of that ID, or for "" the last that has moved guests away
// and has not brought them back itself.
func (a *Agent) drained(what string, id maint.OpID) (maint.Op, error) {
	moved := func(op maint.Op) bool {
		return slices.ContainsFunc(op.Moves, func(m maint.GuestMove) bool { return m.State == maint.MoveMoved })
	}
	for _, op := range slices.Backward(a.journal.Ops()) {
		switch {
		case op.Kind != maint.OpDrain && op.Kind != maint.OpApply || id != "" && op.ID != id:
		case op.State != maint.OpEnded:
			return op, refuse(what, maint.Problemf(maint.CodeBusy, "operation "+string(op.ID),
				fmt.Sprintf("wait for it (belay ops watch %s) or abort it (belay ops abort %s)", op.ID, op.ID), "is still at work on this host"))
		case moved(op) && (id != "" || !returned(op)):
			return op, nil
		case id != "":
			return op, refuse(what, maint.Problemf(maint.CodeNothing, "operation "+string(op.ID), "", "has moved no guest"))
		}
	}
	if id == "" {
		return maint.Op{}, refuse(what, maint.Problemf(maint.CodeNothing, "host "+a.cfg.Host, "", "nothing that the journal knows of has moved a guest away and left it there"))
	}
	if op, known := a.journal.Op(id); known {
		return op, refuse(what, maint.Problemf(maint.CodeBadRequest, "operation "+string(id), "see 'belay ops list' for drains and applies", "is neither, but a %s", op.Kind))
	}
	return maint.Op{}, refuse(what, maint.Problemf(maint.CodeUnknownOp, "operation "+string(id), "see 'belay ops list' for the IDs", "is not in the journal of %s", a.cfg.Host))
}

// returned reports whether an apply has brought back the guests that it has moved: by its
// plan, or as it was taken back.
func returned(op maint.Op) bool {
	switch op.Outcome {
	case maint.OutcomeFailed, maint.OutcomeAborted:
		return op.Kind == maint.OpApply
	case maint.OutcomeDone:
		return op.Kind == maint.OpApply && op.Apply.Plan.Options.Return
	}
	return false
}

// restoreSteps wires a restore to the runner.
func (a *Agent) restoreSteps(op maint.Op) []run.Step {
	return []run.Step{
		{Name: phasePlan, Do: func(ctx context.Context, s *run.Scratch) error { return a.planReturns(ctx, op, s) }},
		{Name: phaseUncordon, Do: func(_ context.Context, s *run.Scratch) error {
			if c := a.journal.Cordon(); c != nil {
				if err := s.Note("lifts the cordon by %s%s", c.By, c.Why()); err != nil {
					return err
				}
			}
			return a.uncordon(byRestore + string(op.ID))
		}},
		{Name: phaseReturn, Commit: true, Do: func(ctx context.Context, s *run.Scratch) error {
			return newReturn(ctx, a, op, s).run(ctx)
		}},
		{Name: phaseAccount, Do: func(ctx context.Context, _ *run.Scratch) error { return a.accountReturns(ctx, op) }},
	}
}

// planReturns writes down which guests come back, in the reverse order of the drain,
// and which are left where they are.
func (a *Agent) planReturns(ctx context.Context, op maint.Op, s *run.Scratch) error {
	drain, known := a.journal.Op(op.Restore.Drain)
	if !known {
		return maint.Problemf(maint.CodeUnknownOp, "operation "+string(op.Restore.Drain), "", "is not in the journal any more")
	}
	here, err := a.present(ctx)
	if err != nil {
		return a.downProblem(err)
	}
	var recs []maint.Record
	n := 0
	for _, m := range slices.Backward(drain.Moves) {
		if m.State != maint.MoveMoved {
			continue
		}
		back := maint.GuestMove{Guest: m.Guest, GuestUUID: m.GuestUUID, MemoryBytes: m.MemoryBytes, Peer: m.Peer, State: maint.MovePlanned}
		isHere := slices.ContainsFunc(here, func(g maint.Guest) bool { return keyOf(g) == m.GuestUUID && g.State.Active() })
		if why := a.notThere(ctx, m, isHere); why != nil {
			back.State, back.Problems = maint.MoveLeft, []maint.Problem{*why}
		} else {
			n++
		}
		recs = append(recs, moveRecord(back))
	}
	if n == 0 {
		var ps []maint.Problem
		here := true
		for _, r := range recs {
			var m maint.GuestMove
			if err := decode(r, &m); err != nil {
				return err
			}
			ps = append(ps, m.Problems...)
			here = here && m.Problems[0].Code == maint.CodeNothing
		}
		if here {
			ps = []maint.Problem{*maint.Problemf(maint.CodeNothing, "host "+a.cfg.Host, "", "every guest that %s has moved is back", drain.ID)}
		}
		return maint.Refuse("cannot restore host "+a.cfg.Host, ps)
	}
	return s.Append(recs...)
}

// notThere is why a guest is not to be fetched, nil when it runs where it was sent.
func (a *Agent) notThere(ctx context.Context, m maint.GuestMove, here bool) *maint.Problem {
	guest := "guest " + m.Guest
	if here {
		return maint.Problemf(maint.CodeNothing, guest, "", "is back on %s already", a.cfg.Host)
	}
	p := a.peers[m.Peer]
	if p == nil {
		return a.unknownPeer(m.Peer)
	}
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	v, err := p.client.View(ctx, m.GuestUUID)
	switch {
	case err != nil:
		return maint.AsProblem(err, maint.CodePeerDown, "peer "+m.Peer)
	case v.Guest == nil:
		return maint.Problemf(maint.CodeUnknownGuest, guest, "look for it with 'belay guests' on other hosts; if it is still wanted here, migrate it", "is not on %s any more", m.Peer)
	case !v.Guest.State.Active():
		return maint.Problemf(maint.CodeGuestOff, guest, "start it there and migrate it, or move its definition with virsh", "is %s on %s", v.Guest.State, m.Peer)
	}
	return nil
}

// accountReturns says which guests should have come back and have not. One that its
// peer does not give back may be here all the same: only the peer's answer was lost.
func (a *Agent) accountReturns(ctx context.Context, op maint.Op) error {
	now, _ := a.journal.Op(op.ID)
	guests, err := a.presentAtLast(ctx)
	if err != nil {
		return err
	}
	here := make(map[string]bool)
	for _, g := range guests {
		here[keyOf(g)] = g.State.Active()
	}
	var ps []maint.Problem
	for _, m := range now.Moves {
		switch {
		case m.State == maint.MoveMoved:
			ps = append(ps, m.Problems...)
		case !here[m.GuestUUID] && !slices.ContainsFunc(m.Problems, noneToFetch):
			ps = append(ps, whyLeft(m))
		}
	}
	return maint.Refuse("not every guest is back on "+a.cfg.Host, ps)
}

// noneToFetch is a problem with a guest that nobody expects back: it is off, has moved
// on or is no more.
func noneToFetch(p maint.Problem) bool {
	return p.Code == maint.CodeGuestOff || p.Code == maint.CodeUnknownGuest || p.Code == maint.CodeNothing
}

// newReturn is the convoy of a restore: its migrations are the peers'.
func newReturn(ctx context.Context, a *Agent, op maint.Op, s *run.Scratch) *convoy {
	c := newConvoy(a, op, s)
	c.atOnce = a.atOnce(a.cfg.Limits.MigrationsIn)
	rooms, _ := a.rooms(ctx, a.destinations(ctx, slices.DeleteFunc(peersOf(c.moves()), func(n string) bool { return a.peers[n] == nil })))
	for name, r := range rooms {
		c.perPeer[name] = r.Out
	}
	c.tells = func(peer string) bool { return rooms[peer].Tells }
	c.name = func(m *maint.GuestMove) { m.Token, m.Op = strings.ToLower(rand.Text()), "" }
	c.begun = func(m maint.GuestMove) bool { return m.Op != "" }
	c.begin = func(ctx context.Context, m *maint.GuestMove) error {
		p := a.peers[m.Peer]
		if p == nil {
			return a.unknownPeer(m.Peer)
		}
		arrived, err := a.sentBy(op, m.GuestUUID)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, returnGrace)
		defer cancel()
		there, err := p.client.Return(ctx, maint.ReturnRequest{Token: m.Token, GuestUUID: m.GuestUUID, Arrived: arrived,
			MaxPause: op.Restore.MaxPause, Reason: op.Restore.Reason})
		m.Op = there.ID
		return err
	}
	var waiting sync.Map // by UUID, whether its notice is waited for
	c.await = func(ctx context.Context, m maint.GuestMove) (maint.Op, error) {
		return a.awaitReturn(ctx, m, func(there maint.Op) { waiting.Store(m.GuestUUID, there.Step == phaseAnnounce) })
	}
	c.waits = func(m maint.GuestMove) bool {
		is, known := waiting.Load(m.GuestUUID)
		return known && is.(bool)
	}
	c.abort = func(ctx context.Context, m maint.GuestMove) error {
		p := a.peers[m.Peer]
		if p == nil || m.Op == "" {
			return maint.Problemf(maint.CodeUnknownOp, "guest "+m.Guest, "", "its migration is not known yet")
		}
		return p.client.AbortReturn(ctx, m.Op)
	}
	c.look = func(context.Context, bool) (bool, error) {
		return slices.ContainsFunc(c.moves(), func(m maint.GuestMove) bool {
			return m.State == maint.MovePlanned || m.State == maint.MoveMoving
		}), nil
	}
	return c
}

// sentBy is the migration by which the drain has sent a guest away.
func (a *Agent) sentBy(op maint.Op, uuid string) (maint.OpID, error) {
	drain, _ := a.journal.Op(op.Restore.Drain)
	for _, m := range drain.Moves {
		if m.GuestUUID == uuid {
			return m.Op, nil
		}
	}
	return "", maint.Problemf(maint.CodeUnknownOp, "operation "+string(op.Restore.Drain), "", "is not in the journal any more")
}

const (
	// returnGrace is how long a peer that migrates a guest back may be silent. One that
	// answers says something at least every watchAlive.
	returnGrace = 30 * time.Second
	returnAgain = time.Second
)

// awaitReturn follows a peer's migration to its end. If the peer is not heard of for
// long, this host says whether the guest has come.
func (a *Agent) awaitReturn(ctx context.Context, m maint.GuestMove, tell func(maint.Op)) (maint.Op, error) {
	heard := time.Now()
	for {
		p := a.peers[m.Peer]
		if p == nil {
			return maint.Op{}, a.unknownPeer(m.Peer)
		}
		watch := func(ctx context.Context, f func(maint.Op)) (maint.Op, error) {
			return p.client.WatchReturn(ctx, m.Op, f)
		}
		op, err := unlessSilent(ctx, max(returnGrace-time.Since(heard), returnAgain), returnGrace, watch, func(there maint.Op) {
			heard = time.Now()
			tell(there)
		})
		if err == nil {
			return a.seeReturned(ctx, m, op), nil
		}
		if ctx.Err() != nil {
			return op, err
		}
		var problem *maint.Problem
		if errors.As(err, &problem) && problem.Code != maint.CodePeerDown && problem.Code != maint.CodeShuttingDown || time.Since(heard) > returnGrace {
			if g, herr := a.hyp.Guest(ctx, m.GuestUUID); herr == nil && g.State.Active() && g.Job == "" {
				return maint.Op{ID: m.Op, Outcome: maint.OutcomePartly, Problems: []maint.Problem{*maint.Problemf(maint.CodeUnverified, "guest "+m.Guest,
					"see 'belay ops show "+string(m.Op)+"' on "+m.Peer, "runs here, but %s cannot be asked whether all of its migration is done: %v", m.Peer, err)}}, nil
			}
			if silent := time.Since(heard); silent > returnGrace {
				err = maint.Problemf(maint.CodePeerDown, "peer "+m.Peer,
					fmt.Sprintf("bring its belayd or its network back, see there what becomes of guest %s (belay ops show %s), and restore again", m.Guest, maint.ShellWord(string(m.Op))),
					"cannot be reached: it was to migrate guest %s back, and has not been heard of for %s", m.Guest, silent.Round(time.Second))
			}
			return op, err
		}
		if !pause(ctx, returnAgain) {
			return op, ctx.Err()
		}
	}
}

// unlessSilent watches an operation, and gives that up when nothing is heard of it for first,
// or for then after a word of it: a connection may stand for hours of which nobody is left at
// the other end.
func unlessSilent(ctx context.Context, first, then time.Duration, watch func(context.Context, func(maint.Op)) (maint.Op, error), tell func(maint.Op)) (maint.Op, error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	alarm := time.AfterFunc(first, stop)
	defer alarm.Stop()
	return watch(ctx, func(there maint.Op) {
		alarm.Reset(then)
		tell(there)
	})
}

// seeReturned does not take a peer's word alone that a guest has come back.
func (a *Agent) seeReturned(ctx context.Context, m maint.GuestMove, op maint.Op) maint.Op {
	if !op.Outcome.TookEffect() {
		return op
	}
	if _, err := a.hyp.Guest(ctx, m.GuestUUID); errors.Is(err, maint.ErrNoGuest) {
		op.Outcome = maint.OutcomeStuck
		op.Problems = append(op.Problems, *maint.Problemf(maint.CodeUnverified, "guest "+m.Guest, "look for it with 'belay guests' on both hosts",
			"is not here, although %s says that it has moved", m.Peer))
	}
	return op
}
