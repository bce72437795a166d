package migrate

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"belay/agent/maint"
)

const (
	// pollEvery is how often a copy's statistics are read. Each reading is a
	// question to QEMU's main loop, in the middle of the guest's switch-over
	// too: not often.
	pollEvery = 250 * time.Millisecond
	// pollFirst is the same until the copy has begun: the pause it may end with must be
	// set before it ends.
	pollFirst = 50 * time.Millisecond
)

// watch follows the running copy until it ends, sees to it that it does, and cancels
// it when ctx ends, or for one that is to be better (c.again); but not once it was told to
// go on as post-copy, from where there is no way back. done delivers Migrate's result; nil
// when the Migrate of an agent that was killed is being watched: then the job itself is,
// until it is over or broken. A nil c leaves the copy as it is, until it is known that it
// does not go on as post-copy.
func (m *Migration) watch(ctx, detach context.Context, done <-chan error, c *convergence, a *attempt, s Scratch) error {
	tick := time.NewTicker(pollFirst)
	defer tick.Stop()
	stop, cancelled, begun := ctx.Done(), false, time.Now()
	var pauses pauses
	defer pauses.over(m)
	for {
		select {
		case err := <-done:
			return err
		case <-detach.Done():
			return detach.Err()
		case <-stop:
			stop = nil
			if a.PostCopy {
				if err := m.noWayBack(ctx, s); err != nil {
					return err
				}
				continue
			}
			cancelled = true
			m.abort(detach)
			continue // the job's end takes its time
		case <-tick.C:
		}
		if !a.PostCopy && (cancelled || c != nil && c.again) {
			m.abort(detach)
		}
		lookCtx, cancel := context.WithTimeout(detach, lookTimeout)
		job, err := m.Source.Job(lookCtx, m.UUID)
		cancel()
		switch {
		case err == nil && job.Active && job.Operation == jobOut: // not what came after it
			m.seen = job
			m.Progress(job)
			switch {
			case job.PostCopy == maint.PostCopyBroken && done == nil:
				return nil
			case job.PostCopy == maint.PostCopyBroken:
				if time.Since(begun) > lookTimeout {
					m.report(m.brokenProblem(a, fmt.Errorf("it is being resumed, and libvirt and QEMU of %s do not answer to that", m.To)))
				}
			case job.PostCopy == maint.PostCopyRunning:
				m.report(nil)
				m.hold(detach, a, s)
			case a.PostCopy:
				if m.startPostCopy(detach, a, s, true); a.PostCopy {
					break
				}
				if stop = ctx.Done(); done == nil && c == nil {
					return nil
				}
			case c != nil && !c.again && !cancelled:
				m.tune(detach, c, a, job, s)
			}
			if !a.Paused && !a.PostCopy && job.PostCopy == "" {
				if err := pauses.look(detach, m, s); err != nil {
					return err
				}
			}
			tick.Reset(pollEvery)
		case done == nil: // the job is gone, or libvirt is: look at both hosts
			return err
		}
	}
}

// tune does what has to be done for a copy to come to its end. What libvirt refuses of
// it, the copy goes on without.
func (m *Migration) tune(ctx context.Context, c *convergence, a *attempt, job maint.Job, s Scratch) {
	d := c.next(job)
	bounded, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	var err error
	did := ""
	if d.pause > 0 {
		err = m.Source.SetMaxDowntime(bounded, m.UUID, d.pause)
		did = fmt.Sprintf("it may end with a pause of %s", round(d.pause))
	}
	switch d.means {
	case "":
	case maint.MeansBandwidth:
		err = errors.Join(err, m.Source.LiftBandwidth(bounded, m.UUID))
		did += ", and the limit of its bandwidth is lifted"
	case maint.MeansParallel:
		did += fmt.Sprintf(", and it is begun anew, by %d connections", connections)
	case maint.MeansSlow:
		did += ", and it is begun anew, with the guest slowed down as far as it must be"
	case maint.MeansPostCopy:
		if c.again {
			did += ", and it is begun anew, by one connection, to go on as post-copy"
			break
		}
		did += fmt.Sprintf(", and it goes on as post-copy: the guest is started on %s, and the %s that are left follow it; there is no way back", m.To, mib(job.MemoryLeft))
	}
	if err != nil {
		m.Log.Warn("cannot change the copy that runs", "guest", m.Guest, "err", err)
		did += fmt.Sprintf(" (refused by libvirt: %v)", err)
	}
	if d.why != "" {
		if err := s.Note("the copy does not get on: %s; %s", d.why, strings.TrimPrefix(did, ", and ")); err != nil {
			m.Log.Error("cannot note what is done to the copy", "guest", m.Guest, "err", err)
		}
	}
	switch {
	case c.again:
		m.abort(ctx)
	case d.means == maint.MeansPostCopy:
		m.hold(ctx, a, s)
		a.PostCopy = true
		if err := s.Save(*a); err != nil { // not without its being on disk
			m.Log.Error("cannot write down that post-copy begins", "guest", m.Guest, "err", err)
			a.PostCopy, c.owed = false, true
			return
		}
		m.startPostCopy(ctx, a, s, false)
	}
}

// abort asks libvirt to cancel the copy. A job that has not begun yet, or has
// just ended, is no failure: the watch goes on and asks again.
func (m *Migration) abort(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	if err := m.Source.AbortJob(ctx, m.UUID); err != nil && !errors.Is(err, maint.ErrNoJob) {
		m.Log.Warn("cannot cancel the copy", "guest", m.Guest, "err", err)
	}
}
