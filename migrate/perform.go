package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"belay/agent/maint"
)

const (
	// settleGrace is how long a host that cannot be asked, or a guest that
	// is between two hosts, is waited for before a person is needed.
	settleGrace = time.Minute
	// restartGrace is how long a peer is waited for that answered a moment
	// ago: a belayd that is being restarted is back within it.
	restartGrace = 10 * time.Second
	// lookTimeout bounds one look at one host.
	lookTimeout = 10 * time.Second
	// maxAttempts bounds how often a copy is begun: once, and again when
	// the agent was killed and the copy ended without it.
	maxAttempts = 2

	// alarmLooks is how often in a row an impossible situation must be seen.
	alarmLooks = 4
	// renewEvery is how often the peer's reservation is renewed; it must be
	// well under the time after which the peer lets one lapse.
	renewEvery = 20 * time.Second

	// pollEvery is how often a copy's statistics are read. Each reading is a
	// question to QEMU's main loop, in the middle of the guest's switch-over
	// too: not often.
	pollEvery = 500 * time.Millisecond
	// lookFirst is the pause before both hosts are looked at again.
	lookFirst = 50 * time.Millisecond
)

// attempt is what Perform writes down before it begins a copy.
type attempt struct {
	Number int `json:"number"`
}

// ErrUnsettled marks a Perform error after which nobody knows where the guest
// is, or knows it to be where it must not be: there must be no automatic undo.
var ErrUnsettled = errors.New("the guest's place is not settled")

// Perform copies the guest and returns nil when it has moved, however often
// the agent was killed on the way: it always looks first, watches a copy that
// it finds running, and begins one only when none is.
//
// When ctx ends the copy is cancelled, unless the agent itself is going down
// (see Detach); then it is left running for the next Perform.
func (m *Migration) Perform(ctx, detach context.Context, s Scratch) error {
	var b before
	if _, err := s.Load(PhasePreflight, &b); err != nil {
		return err
	}
	defer m.renew(detach, b.Arrival)()
	begun := false
	for {
		now, err := m.settle(detach)
		if err != nil {
			return err
		}
		switch now {
		case Moved, MovedLeftover:
			if ctx.Err() != nil {
				return s.Note("the guest had already moved when the operation was to be cancelled")
			}
			return nil
		case Copying:
			if err := s.Note("found the copy already running, watching it"); err != nil {
				return err
			}
			m.watch(ctx, detach, nil)
			begun = true
			continue
		case NotMoved:
		case Off:
			return maint.Problemf(maint.CodeGuestOff, "guest "+m.Guest, "start it where it is wanted",
				"was shut down or stopped on %s while it was to be moved", m.From)
		default:
			return m.unsettled(now)
		}
		if ctx.Err() != nil {
			return m.cancelled(ctx)
		}
		if begun {
			return maint.Problemf(maint.CodeFailed, "guest "+m.Guest, "see the libvirt and QEMU logs of both hosts, then try again",
				"the copy to %s ended without success; the guest runs on %s as before", m.To, m.From)
		}
		var a attempt
		if _, err := s.Load(PhasePerform, &a); err != nil {
			return err
		}
		if a.Number >= maxAttempts {
			return maint.Problemf(maint.CodeFailed, "guest "+m.Guest, "see the libvirt and QEMU logs of both hosts, then try again",
				"%d copies to %s were begun and none succeeded; the guest runs on %s as before", a.Number, m.To, m.From)
		}
		// Once more before the effect: the peer answers, and still has room.
		if err := m.retry(ctx, restartGrace, func() error { return m.Destination.Reserve(ctx, b.Arrival) }); err != nil {
			return err
		}
		a.Number++
		if err := s.Save(a); err != nil {
			return err
		}
		moveErr := m.copy(ctx, detach, s)
		begun = true
		now, err = m.settle(detach)
		if err != nil {
			return err
		}
		if now == NotMoved && moveErr != nil {
			if ctx.Err() != nil {
				return m.cancelled(ctx)
			}
			return maint.Problemf(maint.CodeFailed, "guest "+m.Guest, m.remedy(), "the copy to %s failed: %v; the guest runs on %s as before", m.To, moveErr, m.From)
		}
	}
}

// renew keeps the peer's reservation alive until the function it returns is
// called. A failure is the destination's affair: at worst the room goes to
// somebody else, and libvirt there refuses the guest.
func (m *Migration) renew(ctx context.Context, a maint.Arrival) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		for wait(ctx, renewEvery) {
			if err := m.Destination.Reserve(ctx, a); err != nil && ctx.Err() == nil {
				m.Log.Warn("cannot renew the reservation", "peer", m.To, "err", err)
			}
		}
	}()
	return cancel
}

// Cancel makes sure that no copy is running and that the guest is where it
// was. It is the undo of Perform.
func (m *Migration) Cancel(ctx context.Context, s Scratch) error {
	abortCtx, cancel := context.WithCancel(ctx)
	cancel()
	for {
		now, err := m.settle(ctx)
		if err != nil {
			return err
		}
		switch now {
		case NotMoved, Off:
			return nil
		case Copying:
			m.watch(abortCtx, ctx, nil)
		default:
			return m.unsettled(now)
		}
	}
}

// copy runs one peer-to-peer migration and watches it to its end.
func (m *Migration) copy(ctx, detach context.Context, s Scratch) error {
	g, err := m.Source.Guest(ctx, m.UUID)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- m.Source.Migrate(detach, m.UUID, m.params(g.Persistent)) }()
	return m.watch(ctx, detach, done)
}

// watch follows the running copy until it ends, and cancels it when ctx ends.
// done delivers Migrate's result; nil when the Migrate of an agent that was
// killed is being watched: then the job itself is.
func (m *Migration) watch(ctx, detach context.Context, done <-chan error) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	stop, cancelled := ctx.Done(), false
	for {
		select {
		case err := <-done:
			return err
		case <-detach.Done():
			return detach.Err()
		case <-stop:
			stop, cancelled = nil, true // abort below, then wait for the end
		case <-tick.C:
		}
		if cancelled {
			m.abort(detach)
		}
		lookCtx, cancel := context.WithTimeout(detach, lookTimeout)
		job, err := m.Source.Job(lookCtx, m.UUID)
		cancel()
		switch {
		case err == nil && job.Active:
			m.Progress(job)
		case done == nil: // the job is gone, or libvirt is: look at both hosts
			return err
		}
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

// settle looks at both hosts until the situation is one to act on. It waits
// through switch-overs and through hosts that cannot be asked, for up to
// settleGrace. The two looks are not made at the same instant, so what would
// be an alarm is believed only when it is seen again and again.
func (m *Migration) settle(detach context.Context) (Situation, error) {
	grace, cancel := context.WithTimeout(detach, settleGrace)
	defer cancel()
	pause := lookFirst
	for alarms := 0; ; {
		here, there := m.look(grace)
		now := Classify(here, there)
		switch now {
		case Switching, Unknown:
		case Both, Neither:
			if alarms++; alarms >= alarmLooks {
				return now, nil
			}
		default:
			return now, nil
		}
		if !wait(grace, pause) {
			if detach.Err() != nil {
				return now, detach.Err()
			}
			return now, m.unsettled(now)
		}
		pause = min(2*pause, 2*time.Second)
	}
}

// look asks both hosts for the guest. A host that cannot be asked gives nil.
func (m *Migration) look(ctx context.Context) (here, there *maint.View) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	remote := make(chan *maint.View, 1)
	go func() {
		v, err := m.Destination.View(ctx, m.UUID)
		if err != nil {
			m.Log.Debug("cannot ask the peer", "peer", m.To, "err", err)
			remote <- nil
			return
		}
		remote <- &v
	}()
	g, err := m.Source.Guest(ctx, m.UUID)
	switch {
	case err == nil:
		here = &maint.View{Host: m.From, Guest: &g}
	case errors.Is(err, maint.ErrNoGuest):
		here = &maint.View{Host: m.From}
	default:
		m.Log.Debug("cannot ask libvirt", "err", err)
	}
	return here, <-remote
}

func (m *Migration) cancelled(ctx context.Context) error {
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		return maint.Problemf(maint.CodeTimeout, "guest "+m.Guest,
			"allow more time (--timeout) or bandwidth, or move it when it writes less memory",
			"the copy to %s did not finish in time and was cancelled; the guest runs on %s as before", m.To, m.From)
	}
	return maint.Problemf(maint.CodeAborted, "guest "+m.Guest, "",
		"the operation was aborted; the guest runs on %s as before", m.From)
}

func (m *Migration) remedy() string {
	return fmt.Sprintf("see that libvirt runs on %s and that it can be reached from here at %s (belay doctor), then try again", m.To, m.Params.DestURI)
}

func (m *Migration) unsettled(now Situation) error {
	p := maint.Problemf(maint.CodeUnverified, "guest "+m.Guest, "", "after the copy to %s it is %s", m.To, now)
	switch now {
	case Unknown:
		p.Reason = fmt.Sprintf("one of the hosts %s and %s could not be asked for %s; where it runs is not known", m.From, m.To, settleGrace)
		p.Remedy = fmt.Sprintf("look on both: virsh domstate --reason %s; start it nowhere before the other host is known not to run it", m.Guest)
	case Both:
		p.Remedy = "stop one copy at once, before both write to the same disk: compare 'virsh domstate --reason' and the guest's own clock on both hosts"
	case Neither:
		p.Remedy = fmt.Sprintf("see the libvirt and QEMU logs of both hosts; its definition is in the record of operation %s (belay ops show %s -o json)", m.Op, m.Op)
	case Switching:
		p.Remedy = fmt.Sprintf("look on both: virsh domstate --reason %s; a copy that is paused for migration is resumed with virsh resume only when the other host has none", m.Guest)
	}
	return fmt.Errorf("%w: %w", ErrUnsettled, p)
}
