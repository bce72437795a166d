package migrate

import (
	"context"
	"errors"
	"fmt"
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
//	             resume |   | the way breaks: libvirt gives up after 30 s, QEMU when TCP does
//	                    |   v
//	                    broken --the way is back in time: QEMU goes on by itself--> moved

const (
	// resumeFirst is the pause before a broken post-copy is resumed again; each further
	// one is twice as long, up to resumeMost.
	resumeFirst = time.Second
	resumeMost  = 30 * time.Second
)

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
	pause, tries := resumeFirst, 0
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
			if err := s.Note("the way to %s broke in post-copy, %s having been sent of %s: the guest runs there as far as its memory has come; it is resumed as soon as it can be", m.To, mib(m.seen.MemorySent), mib(m.seen.MemoryTotal)); err != nil {
				return err
			}
		}
		m.seen.PostCopy = maint.PostCopyBroken
		done := make(chan error, 1)
		p := a.Params
		p.Compression, p.ZeroCopy = "", false // what is left of it is sent as it is
		go func() { done <- m.Source.ResumePostCopy(detach, m.UUID, p) }()
		err := m.watch(ctx, detach, done, nil, a, s)
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
