package migrate

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"time"

	"belay/agent/maint"
)

// In post-copy the guest runs on the destination, and its memory is on both hosts. There
// is no way back, and if either side ends the guest is lost; so nothing ends it here, no
// time limit and no abort. Where the way between the hosts breaks, libvirt and QEMU keep
// both halves, the guest's vCPUs stand still wherever they need what is not there, and
// the migration is resumed, however often and however long that takes.
//
//	copying --start--> running --done--> moved
//	                    ^   |
//	             resume |   | the way breaks: libvirt gives up after 30 s, QEMU when its
//	                    |   v connection is reset, or TCP does
//	                    broken --the way is back: QEMU goes on by itself--> moved
//
// TCP is told not to give up (hold), since QEMU on the destination may not be able to take
// it up again: see package hypervisor.

const (
	// resumeFirst is the pause before a broken post-copy is resumed again; each further
	// one is twice as long, up to resumeMost.
	resumeFirst = time.Second
	resumeMost  = 30 * time.Second
)

// errGoesOn is of a post-copy that libvirt has lost sight of, and QEMU has not.
var errGoesOn = errors.New("it goes on by itself")

// startPostCopy has the copy go on as post-copy. again says that it may have been asked
// before, of a copy that goes on as it is: to ask twice does no harm. Where libvirt
// refuses it that never heard of it, or that has refused it for so long that nothing asked
// before can be on its way to it, the copy goes on as it is, and there is a way back.
func (m *Migration) startPostCopy(ctx context.Context, a *attempt, s Scratch, again bool) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	err := m.Source.StartPostCopy(ctx, m.UUID)
	switch {
	case err == nil:
		m.refused = time.Time{}
		return
	case !errors.Is(err, maint.ErrNoJob): // it may yet be carried out, or was
		m.refused = time.Time{}
		m.Log.Warn("cannot tell whether post-copy has begun", "guest", m.Guest, "err", err)
		return
	case again:
		if m.refused.IsZero() {
			m.refused = time.Now()
		}
		if time.Since(m.refused) < settleGrace {
			return
		}
	}
	a.PostCopy, a.Unable, m.resigned = false, true, false
	if err := errors.Join(s.Save(*a), s.Note("post-copy is refused, and the copy goes on as it is: %v", err)); err != nil {
		m.Log.Error("cannot write down that post-copy was refused", "guest", m.Guest, "err", err)
	}
}

// noWayBack tells, once, who aborts, or set the time that is over, that it goes on.
func (m *Migration) noWayBack(ctx context.Context, s Scratch) error {
	why := "the operation was to be aborted"
	if m.resigned {
		return nil
	}
	m.resigned = true
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		why = "the operation's time is over"
	}
	return s.Note("%s, but the guest is in post-copy: it runs on %s and part of its memory is on %s, so there is no way back, and it goes on", why, m.To, m.From)
}

// seeThrough takes a migration that is in post-copy, and that no call to libvirt is at
// work on any more, to its end. It returns when post-copy is over, however it ended: both
// hosts tell.
func (m *Migration) seeThrough(ctx, detach context.Context, a *attempt, s Scratch) error {
	defer m.report(nil)
	pause, tries, goesOn := resumeFirst, 0, false
	for {
		now := m.look(detach, m.story(*a))
		switch {
		case detach.Err() != nil:
			return detach.Err()
		case now.Action == ResumePostCopy:
		case now.Action == Watch: // QEMU goes on by itself; or libvirt has not seen yet that it does not
			if err := m.watch(ctx, detach, nil, nil, a, s); err != nil && !transient(err) {
				m.Log.Warn("cannot watch post-copy", "guest", m.Guest, "err", err)
			}
			if !a.PostCopy { // it has never begun
				return nil
			}
			if !wait(detach, pollEvery) {
				return detach.Err()
			}
			continue
		case see(now.here) == unknown || see(now.there) == unknown:
			m.report(m.brokenProblem(a, fmt.Errorf("host %s cannot be asked", m.unseen(now))))
			if !wait(detach, pollEvery) {
				return detach.Err()
			}
			continue
		case now.Moved() && !a.BrokenSince.IsZero():
			return s.Note("post-copy has come to its end, %s after the way broke", round(time.Since(a.BrokenSince)))
		default:
			return nil
		}
		if job, err := m.Source.Job(detach, m.UUID); err == nil {
			m.seen = job
		}
		if a.BrokenSince.IsZero() {
			a.BrokenSince = time.Now()
			if err := s.Save(*a); err != nil {
				return err
			}
			if err := s.Note("the way to %s broke in post-copy, %s having been sent of %s: the guest runs there as far as its memory has come; it goes on, or is resumed, as soon as it can be", m.To, mib(m.seen.MemorySent), mib(m.seen.MemoryTotal)); err != nil {
				return err
			}
		}
		m.seen.PostCopy = maint.PostCopyBroken
		err := m.part(detach, now, a)
		if err == nil {
			done := make(chan error, 1)
			p := a.Params
			p.Compression, p.ZeroCopy = "", false // what is left of it is sent as it is
			go func() { done <- m.Source.ResumePostCopy(detach, m.UUID, p) }()
			err = m.watch(ctx, detach, done, nil, a, s)
		}
		if detach.Err() != nil {
			return detach.Err()
		}
		if m.seen.PostCopy == maint.PostCopyRunning { // it went on, and broke anew
			pause, tries = resumeFirst, 0
		}
		if err == nil {
			continue
		}
		m.report(m.brokenProblem(a, err))
		if errors.Is(err, errGoesOn) {
			if !goesOn {
				goesOn = true
				if err := s.Note("libvirt has lost sight of post-copy, and QEMU has not: when the network is back it goes on by itself, which can take 2 minutes"); err != nil {
					return err
				}
			}
			if !wait(detach, resumeFirst) {
				return detach.Err()
			}
			continue
		}
		if tries++; tries&(tries-1) == 0 { // 1, 2, 4, 8, ...
			if err := s.Note("post-copy could not be resumed at attempt %d, after %s: %v", tries, round(time.Since(a.BrokenSince)), err); err != nil {
				return err
			}
		}
		if !wait(detach, pause) {
			return detach.Err()
		}
		pause = min(2*pause, resumeMost)
	}
}

// hold has the connections of a post-copy outlive a cut network, on both hosts. QEMU would
// give them up as soon as TCP does, and that it can be resumed then is not sure. What cannot
// be held is tried again.
func (m *Migration) hold(ctx context.Context, a *attempt, s Scratch) {
	if a.Held || time.Since(m.holding) < lookTimeout {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	all, err := m.Source.HoldConnections(ctx, m.UUID, port(a.Params))
	switch {
	case err == nil && len(all) == 0:
		err = errors.New("it is not found among those of its QEMU")
	case err == nil:
		a.Connections = all
		err = m.Destination.Connections(ctx, m.Op, maint.Connections{All: all})
	}
	first := m.holding.IsZero()
	a.Held, m.holding = err == nil, time.Now()
	var told error
	if err != nil && first {
		told = s.Note("the connection of post-copy may not outlive a cut network: %v", err)
	}
	if err := errors.Join(told, s.Save(*a)); err != nil {
		m.Log.Error("cannot write down the connection of post-copy", "guest", m.Guest, "err", err)
	}
}

// port is the destination's for memory, 0 where its libvirt picks it.
func port(p maint.MoveParams) uint16 {
	u, err := url.Parse(p.MigrateURI)
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseUint(u.Port(), 10, 16) // 0 for none
	return uint16(n)
}

// part sees to it that both QEMUs have given their connection up, as they must have for the
// migration to be resumed. The source's has something to send, and does so by itself where
// it is dead; until then it goes on. The destination's may not have noticed.
func (m *Migration) part(ctx context.Context, now situation, a *attempt) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	switch given, err := m.Source.Severed(ctx, m.UUID); {
	case err != nil:
		return err
	case !given:
		return fmt.Errorf("%w: QEMU on %s has not given up its connection to %s, and goes on when the network lets it", errGoesOn, m.From, m.To)
	}
	a.Held = false // the next one is not
	if see(now.there) != postcopy || len(a.Connections) == 0 {
		return nil
	}
	return m.Destination.Connections(ctx, m.Op, maint.Connections{All: a.Connections, End: true})
}

// unseen names the host that could not be asked.
func (m *Migration) unseen(now situation) string {
	if see(now.here) == unknown {
		return m.From
	}
	return m.To
}

// brokenProblem is what people are told while post-copy is broken.
func (m *Migration) brokenProblem(a *attempt, err error) *maint.Problem {
	since := ""
	if !a.BrokenSince.IsZero() {
		since = " since " + a.BrokenSince.Format(time.RFC3339)
	}
	return maint.Problemf(maint.CodePostCopy, "guest "+m.Guest,
		fmt.Sprintf("mend the network between %s and %s, and see that libvirt runs on both: it is then resumed by itself; until then neither destroy nor restart it, on either host", m.From, m.To),
		"runs on %s in post-copy, with part of its memory still on %s, and the way between them is broken%s: %v", m.To, m.From, since, err)
}

// report tells what is wrong at the moment; nil is nothing.
func (m *Migration) report(p *maint.Problem) {
	if m.Trouble != nil {
		m.Trouble(p)
	}
}
