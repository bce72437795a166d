package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

const (
	// settleGrace is how long a host that cannot be asked, or a guest that
	// is between two hosts, is waited for before a person is needed.
	settleGrace = time.Minute
	// silentGrace is the same for this host's own libvirt, which can be held
	// up by one guest's job for minutes: the guest runs on meanwhile, and
	// there is nothing that a person could do better than wait.
	silentGrace = 10 * time.Minute
	// restartGrace is how long a peer is waited for that answered a moment
	// ago: a belayd that is being restarted is back within it.
	restartGrace = 10 * time.Second
	// askTimeout bounds one question to a host, with time for a peer whose own
	// libvirt does not answer to say so.
	askTimeout = 15 * time.Second
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
	// pollFirst is the same until the copy has begun: the pause it may end with must be
	// set before it ends.
	pollFirst = 50 * time.Millisecond
	// connections is by how many memory is sent where one is not enough.
	connections = 4
	// lookFirst is the pause before both hosts are looked at again.
	lookFirst = 50 * time.Millisecond
)

// attempt is what Perform writes down before it begins a copy, and again when
// libvirt has said that this copy failed: a job that is seen where no copy was
// begun, or after that, is somebody else's and not to be touched.
type attempt struct {
	Number int  `json:"number"`
	Over   bool `json:"over,omitempty"`
	// Means are those with which it is begun.
	Means []maint.Means `json:"means,omitempty"`
}

// anew is how many copies were cancelled to be begun anew with more means.
func (a attempt) anew() (n int) {
	for _, m := range a.Means {
		if beginsAnew(m) {
			n++
		}
	}
	return n
}

// ours reports whether a copy that is running can be the one begun here.
func (a attempt) ours() bool { return a.Number > 0 && !a.Over }

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
	var a attempt
	if _, err := s.Load(PhasePerform, &a); err != nil {
		return err
	}
	defer m.renew(detach, b.Arrival)()
	begun := false
	var c *convergence // of the copy that was begun or found
	for {
		var now Situation
		var err error
		if a.Number == 0 {
			now, err = NotMoved, m.untouched(ctx)
		} else {
			now, err = m.settle(detach)
		}
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
			if !a.ours() {
				return maint.Problemf(maint.CodeBusy, "guest "+m.Guest, "wait for that migration to end, or abort it (virsh domjobabort)",
					"is being migrated by somebody else since the copy to %s failed", m.To)
			}
			if !begun {
				if err := s.Note("found the copy already running, watching it"); err != nil {
					return err
				}
			}
			begun = true
			c = m.converge(a.Means)
			_ = m.watch(ctx, detach, nil, c, s) // both hosts tell
			continue
		case NotMoved:
			if c != nil && c.again { // it was given up for a better one
				a.Means, begun, c = append(a.Means, c.used...), false, nil
			}
		case Off:
			return maint.Problemf(maint.CodeGuestOff, "guest "+m.Guest, "start it where it is wanted",
				"was shut down or stopped on %s while it was to be moved", m.From)
		default:
			return m.unsettled(now)
		}
		if ctx.Err() != nil {
			return m.cancelled(ctx, c)
		}
		if late := !m.Deadline.IsZero() && time.Now().After(m.Deadline); late && !begun {
			return maint.Problemf(maint.CodeTimeout, "guest "+m.Guest, "try again",
				"belayd on %s was away until the operation's time was over, and begins no copy to %s after it; the guest runs on %s as before", m.From, m.To, m.From)
		}
		if begun {
			return maint.Problemf(maint.CodeFailed, "guest "+m.Guest, "see the libvirt and QEMU logs of both hosts, then try again",
				"the copy to %s ended without success; the guest runs on %s as before", m.To, m.From)
		}
		if a.Number-a.anew() >= maxAttempts {
			return maint.Problemf(maint.CodeFailed, "guest "+m.Guest, "see the libvirt and QEMU logs of both hosts, then try again",
				"%d copies to %s were begun and none succeeded; the guest runs on %s as before", a.Number, m.To, m.From)
		}
		// Once more before the effect: the peer answers, and still has room.
		if err := m.retry(ctx, restartGrace, func(ctx context.Context) error { return m.Destination.Reserve(ctx, b.Arrival) }); err != nil {
			return err
		}
		a.Number, a.Over = a.Number+1, false
		if err := s.Save(a); err != nil {
			return err
		}
		c = m.converge(a.Means)
		moveErr := m.copy(ctx, detach, s, a, c)
		begun = true
		if c.slowed > 0 {
			if err := s.Note("the guest was slowed down by up to %d %% for the copy", c.slowed); err != nil {
				return err
			}
		}
		if moveErr != nil && !lostSight(moveErr) {
			a.Over = true
			if err := s.Save(a); err != nil {
				return err
			}
		}
		now, err = m.settle(detach)
		if err != nil {
			return err
		}
		if now == NotMoved && moveErr != nil && !c.again {
			if ctx.Err() != nil {
				return m.cancelled(ctx, c)
			}
			return maint.Problemf(maint.CodeFailed, "guest "+m.Guest, m.remedy(), "the copy to %s failed: %v; the guest runs on %s as before", m.To, moveErr, m.From)
		}
	}
}

// lostSight reports whether Migrate returned without libvirt's answer, so that
// the copy may be running.
func lostSight(err error) bool {
	return transient(err) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// untouched makes sure, before the first copy, that the guest is as preflight
// found it.
func (m *Migration) untouched(ctx context.Context) error {
	var g maint.Guest
	err := m.retry(ctx, settleGrace, func(ctx context.Context) (err error) {
		g, err = m.Source.Guest(ctx, m.UUID)
		return err
	})
	switch {
	case ctx.Err() != nil:
		return m.cancelled(ctx, nil)
	case errors.Is(err, maint.ErrNoGuest):
		return maint.Problemf(maint.CodeUnknownGuest, "guest "+m.Guest, "find out who removed it or moved it away",
			"has gone from %s before the copy to %s was begun", m.From, m.To)
	case err != nil:
		return err
	}
	if problems := m.unfit(g); len(problems) > 0 {
		return m.refuse(problems)
	}
	return nil
}

// renew keeps the peer's reservation alive until the function it returns is
// called. A failure is the destination's affair: at worst the room goes to
// somebody else, and libvirt there refuses the guest.
func (m *Migration) renew(ctx context.Context, a maint.Arrival) (stop func()) {
	until, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for wait(until, renewEvery) {
			ask, cancel := context.WithTimeout(ctx, askTimeout)
			if err := m.Destination.Reserve(ask, a); err != nil && ctx.Err() == nil {
				m.Log.Warn("cannot renew the reservation", "peer", m.To, "err", err)
			}
			cancel()
		}
	}()
	// A renewal under way is waited for: it must not undo the release.
	return func() { cancel(); <-ended }
}

// Cancel makes sure that no copy is running and that the guest is where it
// was. It is the undo of Perform.
func (m *Migration) Cancel(ctx context.Context, s Scratch) error {
	var a attempt
	if _, err := s.Load(PhasePerform, &a); err != nil || a.Number == 0 {
		return err
	}
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
			if !a.ours() {
				return nil
			}
			_ = m.watch(abortCtx, ctx, nil, nil, s) // both hosts tell
		default:
			return m.unsettled(now)
		}
	}
}

// copy runs one peer-to-peer migration and watches it to its end.
func (m *Migration) copy(ctx, detach context.Context, s Scratch, a attempt, c *convergence) error {
	g, err := m.Source.Guest(ctx, m.UUID)
	if err != nil {
		return err
	}
	p := m.params(g.Persistent)
	if slices.Contains(a.Means, maint.MeansParallel) {
		p.Parallel = connections
	}
	if slices.Contains(a.Means, maint.MeansBandwidth) {
		p.BandwidthMiBs = 0
	}
	p.Slow = slices.Contains(a.Means, maint.MeansSlow)
	done := make(chan error, 1)
	go func() { done <- m.Source.Migrate(detach, m.UUID, p) }()
	return m.watch(ctx, detach, done, c, s)
}

// watch follows the running copy until it ends, sees to it that it does, and cancels
// it when ctx ends, or for one that is to be better (c.again). done delivers
// Migrate's result; nil when the Migrate of an agent that was killed is being watched:
// then the job itself is. A nil c leaves the copy as it is.
func (m *Migration) watch(ctx, detach context.Context, done <-chan error, c *convergence, s Scratch) error {
	tick := time.NewTicker(pollFirst)
	defer tick.Stop()
	stop, cancelled := ctx.Done(), false
	for {
		select {
		case err := <-done:
			return err
		case <-detach.Done():
			return detach.Err()
		case <-stop:
			stop, cancelled = nil, true
			m.abort(detach)
			continue // the job's end takes its time
		case <-tick.C:
		}
		if cancelled || c != nil && c.again {
			m.abort(detach)
		}
		lookCtx, cancel := context.WithTimeout(detach, lookTimeout)
		job, err := m.Source.Job(lookCtx, m.UUID)
		cancel()
		switch {
		case err == nil && job.Active && job.Operation == jobOut: // not what came after it
			m.Progress(job)
			if c != nil && !c.again && !cancelled {
				m.tune(detach, c, job, s)
			}
			tick.Reset(pollEvery)
		case done == nil: // the job is gone, or libvirt is: look at both hosts
			return err
		}
	}
}

// tune does what has to be done for a copy to come to its end. What libvirt refuses of
// it, the copy goes on without.
func (m *Migration) tune(ctx context.Context, c *convergence, job maint.Job, s Scratch) {
	d := c.next(job)
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	var err error
	did := ""
	if d.pause > 0 {
		err = m.Source.SetMaxDowntime(ctx, m.UUID, d.pause)
		did = fmt.Sprintf("it may end with a pause of %s", round(d.pause))
	}
	switch d.means {
	case "":
	case maint.MeansBandwidth:
		err = errors.Join(err, m.Source.LiftBandwidth(ctx, m.UUID))
		did += ", and the limit of its bandwidth is lifted"
	case maint.MeansParallel:
		did += fmt.Sprintf(", and it is begun anew, by %d connections", connections)
	case maint.MeansSlow:
		did += ", and it is begun anew, with the guest slowed down as far as it must be"
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
	if c.again {
		m.abort(ctx)
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
// settleGrace, or silentGrace. The two looks are not made at the same instant,
// so what would be an alarm is believed only when it is seen again and again.
func (m *Migration) settle(detach context.Context) (Situation, error) {
	begun, pause := time.Now(), lookFirst
	for alarms := 0; ; {
		here, there := m.look(detach)
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
		patience := settleGrace
		if here == nil {
			patience = silentGrace
		}
		if time.Since(begun) > patience {
			return now, m.unsettled(now)
		}
		if !wait(detach, pause) {
			return now, detach.Err()
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

// cancelled is the end of an operation whose time is over, or that is not wanted any
// more. c is of its last copy, nil where there is none.
func (m *Migration) cancelled(ctx context.Context, c *convergence) error {
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		p := maint.Problemf(maint.CodeTimeout, "guest "+m.Guest,
			"allow more time (--timeout) or bandwidth, or move it when it writes less memory",
			"the copy to %s did not finish in time and was cancelled; the guest runs on %s as before", m.To, m.From)
		if c != nil && c.stuck != "" {
			p.Reason, p.Remedy = p.Reason+": "+c.stuck, c.remedy()
		}
		return p
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
		p.Reason = fmt.Sprintf("one of the hosts %s and %s could not be asked, however often it was tried; where it runs is not known", m.From, m.To)
		p.Remedy = fmt.Sprintf("look on both: virsh domstate --reason %s; start it nowhere before the other host is known not to run it", m.Guest)
	case Both:
		p.Remedy = "stop one copy at once, before both write to the same disk: compare 'virsh domstate --reason' and the guest's own clock on both hosts"
	case Neither:
		p.Remedy = fmt.Sprintf("see the libvirt and QEMU logs of both hosts; its definition, if it had one, is in the record of the operation (belay ops show %s -o json, as an operator)", m.Op)
	case Switching:
		p.Remedy = fmt.Sprintf("look on both: virsh domstate --reason %s; a copy that is paused for migration is resumed with virsh resume only when the other host has none", m.Guest)
	}
	return fmt.Errorf("%w: %w", ErrUnsettled, p)
}
