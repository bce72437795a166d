package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"belay/agent/maint"
)

// What a guest needs that has moved, and that need not be waited for, its new host
// does for it by itself: its clock lost the blackout, and the LAN must find it. It begins when the old host
// settles the guest, goes on over a restart of belayd, and is told to the old host,
// whose operation has ended by then.

const (
	// arrivalWait is how long one question for an arrival's report is kept waiting.
	arrivalWait = 20 * time.Second
	// unsettledEvery is how often guests are looked for that have come, and whose old
	// host was not heard of since.
	unsettledEvery = time.Minute
	// hearWithin is for how long after the end of an operation the new host is asked
	// for its report.
	hearWithin = 10 * time.Minute
)

// hearFirst and hearMost are the pauses before a peer is asked again: the first, and the longest.
const hearFirst, hearMost = 100 * time.Millisecond, 5 * time.Second

// arrived writes down that a guest has come, and sees to it. It may be called more
// than once for an operation.
func (a *Agent) arrived(ctx context.Context, op maint.OpID, from string, g maint.Guest) error {
	came := maint.Arrived{Op: op, From: from, GuestUUID: g.UUID, Guest: g.Name, At: time.Now().Round(0)}
	var err error
	return cmp.Or(a.inLoop(ctx, func() { err = a.hasArrived(came) }), err)
}

// hasArrived is arrived, in the loop.
func (a *Agent) hasArrived(came maint.Arrived) error {
	if _, known := a.journal.Arrival(came.Op); known {
		return nil
	}
	if err := a.noteArrived(came); err != nil {
		return err
	}
	a.workers.Go(func() { a.seeTo(a.life, came) })
	return nil
}

// arrivedBefore writes down that a guest has come which is about to leave again, where its
// old host has not said so: that may still hold it, stopped, and must not take its absence
// from here for a proof that it never ran here. It is called in the loop.
func (a *Agent) arrivedBefore(leaves maint.Op) error {
	for _, r := range a.journal.Reservations(time.Time{}) { // the lapsed, too
		if leaves.Kind != maint.OpMigrate || r.GuestUUID != leaves.GuestUUID {
			continue
		}
		came := maint.Arrived{Op: r.Op, From: r.From, GuestUUID: r.GuestUUID, Guest: r.Guest, At: time.Now().Round(0)}
		if err := a.hasArrived(came); err != nil {
			return err
		}
	}
	return nil
}

func (a *Agent) noteArrived(came maint.Arrived) error {
	data, err := json.Marshal(came)
	if err != nil {
		return err
	}
	return a.append(maint.Record{Op: came.Op, Kind: maint.RecArrived, By: came.From, Data: data})
}

// seeTo does what is to be done for a guest that has come, and writes down what it was.
func (a *Agent) seeTo(ctx context.Context, came maint.Arrived) {
	report := a.reportOn(ctx, came)
	if ctx.Err() != nil {
		return // the next belayd does it again
	}
	a.metrics.clock(report.Clock)
	came.Report = &report
	for {
		err := a.noteArrived(came)
		if err == nil {
			return
		}
		a.log.Error("cannot write down what was done for a guest that has come", "guest", came.Guest, "op", came.Op, "err", err)
		if !pause(ctx, journalRetry) {
			return
		}
	}
}

// reportOn does it, all at once: the clock first of what asks the guest's agent.
func (a *Agent) reportOn(life context.Context, came maint.Arrived) (r maint.ArrivalReport) {
	ctx, cancel := context.WithTimeout(life, clockWait)
	defer cancel()
	g, err := a.hyp.Guest(ctx, came.GuestUUID)
	runs := err == nil && g.State == maint.GuestRunning
	var ports sync.WaitGroup
	if runs {
		ports.Go(func() { r.Health = a.healthOfArrival(life, came, g) }) // has a time of its own
		ports.Go(func() { r.Ports = a.portsOfArrival(ctx, g) })
	}
	r.Clock = a.clockOfArrival(ctx, came, g, err)
	if runs {
		r.Agent = a.agentOfArrival(ctx, g)
	}
	ports.Wait()
	if r.Agent == maint.AgentSilent || r.Health != nil && !r.Health.Healthy {
		// One that somebody has paused meanwhile is not ill.
		if g, err := a.hyp.Guest(life, came.GuestUUID); err == nil && a.pausedByUser(g, came.At) {
			r.Health, r.Agent = nil, ""
		}
	}
	return r
}

// clockOfArrival puts the clock of a guest right that has come here; err is why nothing
// is known of it.
func (a *Agent) clockOfArrival(ctx context.Context, came maint.Arrived, g maint.Guest, err error) maint.ClockReport {
	r := maint.ClockReport{Guest: came.Guest, UUID: came.GuestUUID, State: maint.ClockUnsynchronised}
	switch {
	case err != nil:
		r.Reason = err.Error()
		return r
	case g.State != maint.GuestRunning:
		r.Reason = fmt.Sprintf("it is %s", g.State)
		return r
	}
	if job, err := a.hyp.CompletedJob(ctx, came.GuestUUID); err == nil {
		return a.preserve.Clocks.Restore(ctx, g, job.Downtime)
	}
	return a.preserve.Clocks.Sync(ctx, g)
}

// followArrivals sees to guests that an earlier belayd has not seen to, and to those
// whose old host was not heard of after they had come.
func (a *Agent) followArrivals(ctx context.Context) {
	for _, came := range a.journal.Arrivals() {
		if came.Report == nil {
			a.workers.Go(func() { a.seeTo(ctx, came) })
		}
	}
	tick := time.NewTicker(unsettledEvery)
	defer tick.Stop()
	for {
		a.seeToUnsettled(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// seeToUnsettled finds guests that run in room that was promised to them, and that
// their old host has not settled by the time that the promise has lapsed.
func (a *Agent) seeToUnsettled(ctx context.Context) {
	now := time.Now()
	for _, r := range a.journal.Reservations(time.Time{}) {
		if _, known := a.journal.Arrival(r.Op); known || r.Expires.After(now) {
			continue
		}
		g, err := a.hyp.Guest(ctx, r.GuestUUID)
		if err != nil || g.State != maint.GuestRunning || g.Job != "" {
			continue
		}
		a.log.Warn("a guest has come, and its old host was not heard of since", "guest", g.Name, "from", r.From, "op", r.Op)
		if err := a.arrived(ctx, r.Op, r.From, g); err != nil {
			a.log.Error("cannot see to a guest that has come", "guest", g.Name, "err", err)
		}
	}
}

// Arrival gives what was done for a guest that has come from a peer, and waits for it.
func (a *Agent) Arrival(ctx context.Context, from string, id maint.OpID) (maint.ArrivalReport, error) {
	ctx, cancel := context.WithTimeout(ctx, arrivalWait)
	defer cancel()
	for {
		changed := a.journal.Changed()
		came, ok := a.journal.Arrival(id)
		switch {
		case !ok || came.From != from:
			return maint.ArrivalReport{}, maint.Problemf(maint.CodeForbidden, "operation "+string(id), "", "no guest has come to %s from %s by it", a.cfg.Host, from)
		case came.Report != nil:
			return *came.Report, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return maint.ArrivalReport{}, maint.Problemf(maint.CodeBusy, "guest "+came.Guest, "ask again", "%s is still seeing to it", a.cfg.Host)
		case <-a.life.Done():
			return maint.ArrivalReport{}, maint.Problemf(maint.CodeShuttingDown, "belayd on "+a.cfg.Host, "try again in a moment", "is shutting down")
		}
	}
}

// unheard reports whether the new host of an operation's guest has yet to say what it
// did for it.
func unheard(op maint.Op) bool {
	return op.Kind == maint.OpMigrate && op.State == maint.OpEnded && op.Move != nil && op.Arrival == nil
}

// hear writes down with an operation that has ended what the guest's new host did for
// it. A host that does not say so in time is written down as that.
func (a *Agent) hear(ctx context.Context, op maint.Op) {
	var report maint.ArrivalReport
	for wait := hearFirst; ; wait = min(2*wait, hearMost) {
		var err error
		if report, err = a.askArrival(ctx, op); err == nil {
			break
		}
		var p *maint.Problem
		final := errors.As(err, &p) && (p.Code == maint.CodeForbidden || p.Code == maint.CodeUnknownPeer)
		if final || time.Since(op.Ended) > hearWithin {
			report.Clock = maint.ClockReport{Guest: op.Guest, UUID: op.GuestUUID, State: maint.ClockUnsynchronised,
				Reason: fmt.Sprintf("%s did not say that it was put right: %v", op.Peer, err)}
			break
		}
		if !pause(ctx, wait) {
			return
		}
	}
	a.seenFromHere(ctx, report.Ports)
	data, err := json.Marshal(report)
	for err == nil && a.append(maint.Record{Op: op.ID, Kind: maint.RecSeenTo, Data: data}) != nil {
		if !pause(ctx, journalRetry) {
			return
		}
	}
}

func (a *Agent) askArrival(ctx context.Context, op maint.Op) (maint.ArrivalReport, error) {
	p := a.peers[op.Peer]
	if p == nil {
		return maint.ArrivalReport{}, a.unknownPeer(op.Peer)
	}
	ctx, cancel := context.WithTimeout(ctx, arrivalWait+greetTimeout)
	defer cancel()
	return p.client.Arrival(ctx, op.ID)
}

// pause waits for d, and reports whether ctx is still alive.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
