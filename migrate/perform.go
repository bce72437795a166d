package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"belay/agent/maint"
)

const (
	// restartGrace is how long a peer is waited for that answered a moment
	// ago: a belayd that is being restarted is back within it.
	restartGrace = 10 * time.Second
	// askTimeout bounds one question to a host, with time for a peer whose own
	// libvirt does not answer to say so.
	askTimeout = 15 * time.Second
	// maxAttempts bounds how often a copy is begun: once, and again when
	// the agent was killed and the copy ended without it.
	maxAttempts = 2
	// renewEvery is how often the peer's reservation is renewed; it must be
	// well under the time after which the peer lets one lapse.
	renewEvery = 20 * time.Second
	// unheardGrace is how long a copy that nobody has heard the end of is given to show
	// itself, before it is held to be no more.
	unheardGrace = 500 * time.Millisecond
	// connections is by how many memory is sent where one is not enough.
	connections = 4
)

// attempt is what Perform writes down before it begins a copy, and again when
// libvirt has said that this copy failed: a job that is seen where no copy was
// begun, or after that, is somebody else's and not to be touched.
type attempt struct {
	Number int  `json:"number"`
	Over   bool `json:"over,omitempty"`
	// Unheard: one before it was begun of which libvirt has not said how it ended. It may
	// have been waiting in libvirt, for a job of the guest's to end, and begin yet.
	Unheard bool `json:"unheard,omitempty"`
	// Persistent, Paused and Vigil: see Story.
	Persistent bool        `json:"persistent,omitempty"`
	Paused     bool        `json:"paused,omitempty"`
	Vigil      maint.Vigil `json:"vigil,omitzero"`
	// KeptOff: the guest's autostart was on, and is turned off on the source, in this boot
	// of it.
	KeptOff bool   `json:"kept_off,omitempty"`
	Boot    string `json:"boot,omitempty"`
	// Means are those with which it is begun.
	Means []maint.Means `json:"means,omitempty"`
	// Able: it was begun so that it can go on as post-copy. PostCopy: it was told to, or
	// is about to be. Unable: that was refused.
	Able     bool `json:"able,omitempty"`
	PostCopy bool `json:"post_copy,omitempty"`
	Unable   bool `json:"unable,omitempty"`
	// Params are what it was begun with.
	Params maint.MoveParams `json:"params,omitzero"`
	// Refused is how many copies were begun anew because of that.
	Refused int `json:"refused,omitempty"`
	// Connections are those of post-copy, seen last. Held: they outlive a cut network.
	Connections []maint.Connection `json:"connections,omitempty"`
	Held        bool               `json:"held,omitempty"`
	// BrokenSince is when the way between the hosts was found to be broken in post-copy.
	BrokenSince time.Time `json:"broken_since,omitzero"`
}

// anew is how many copies were begun anew, with more means or for a refusal.
func (a attempt) anew() int {
	n := a.Refused
	for _, m := range a.Means {
		if m != maint.MeansBandwidth {
			n++
		}
	}
	return n
}

// StoryOf is the story that what Perform has written down tells; nil is nothing.
func StoryOf(performed json.RawMessage) Story {
	var a attempt
	if len(performed) > 0 && json.Unmarshal(performed, &a) != nil {
		a.Number = 1 // a copy may have been begun
	}
	return a.story()
}

// story is what it tells of the migration.
func (a attempt) story() Story {
	story := Story{Begun: CopyBegun, Persistent: a.Persistent, Paused: a.Paused, Vigil: a.Vigil}
	switch {
	case a.Number == 0:
		story.Begun = NothingBegun
	case a.Over && !a.Unheard:
		story.Begun = CopyOver
	case a.PostCopy:
		story.Begun = PostCopyBegun
	}
	return story
}

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
	var failed error   // what became of the one that was begun here
	for {
		now, err := m.settle(m.patient(ctx, detach, a), m.story(a))
		if err != nil {
			return m.notSettled(ctx, detach, s, now, a, err)
		}
		switch now.Action {
		case Finish, RemoveDefinition:
			if ctx.Err() != nil {
				return s.Note("the guest had already moved when the operation was to be cancelled")
			}
			return nil
		case ResumePostCopy, Wait: // in post-copy, else settle would not have returned it
			a.PostCopy, begun = true, true
			if err := m.seeThrough(ctx, detach, &a, s); err != nil {
				return err
			}
			continue
		case Watch:
			if !begun {
				if err := s.Note("found the copy already running, watching it"); err != nil {
					return err
				}
			}
			begun = true
			if a.Over { // it was refused for one before it, of this operation: see Unheard
				failed = nil
			}
			c = m.converge(a)
			if a.PostCopy = a.PostCopy || now.PostCopy(); a.PostCopy {
				if err := m.seeThrough(ctx, detach, &a, s); err != nil {
					return err
				}
				continue
			}
			_ = m.watch(ctx, detach, nil, c, &a, s) // both hosts tell
			continue
		case ResumeSource, StartSource:
			if err := m.startAgain(detach, s, now); err != nil {
				return m.keptOff(s, a, err)
			}
			continue
		case Leave, End:
			return m.gone(now, a)
		case Begin:
		default:
			return m.alarm(detach, s, now, a)
		}
		switch {
		case c != nil && c.again: // it was given up for a better one
			a.Means, begun, c, failed = append(a.Means, c.used...), false, nil, nil
		case ctx.Err() == nil && a.Able && refused(failed, m.seen): // it may be for that
			if err := s.Note("libvirt refuses a copy that can go on as post-copy, and it is begun anew without that: %v", failed); err != nil {
				return err
			}
			a.Refused, begun, c, failed = a.Refused+1, false, nil, nil
			a.Unable = !slices.Contains(a.Means, maint.MeansParallel) // else it may be for both at once
		}
		if err := m.unmoved(ctx, now, a, c, begun, failed); err != nil {
			return err
		}
		// Once more before the effect: the peer answers, and still has room.
		if err := m.makeRoom(ctx, b.Arrival); err != nil {
			return m.asBefore(ctx, err, m.stays(now))
		}
		if err := m.makeDisks(ctx, b.Arrival.Disks); err != nil {
			return err
		}
		g := now.here.Guest
		a.Unheard = a.Unheard || a.Number > 0 && !a.Over
		a.Number, a.Over, a.PostCopy, a.Persistent, a.Paused = a.Number+1, false, false, g.Persistent, g.State == maint.GuestPaused
		a.KeptOff, a.Boot, a.Vigil = a.KeptOff || g.Autostart, m.Boot, m.landing.Vigil
		a.Able, m.seen = m.mayPostCopy(a), maint.Job{}
		a.Held, a.Connections = false, nil
		if a.Params, err = m.with(ctx, s, a); err != nil {
			return err
		}
		if err := s.Save(a); err != nil {
			return err
		}
		if err := m.turnOff(ctx, g); err != nil {
			return err
		}
		c, begun = m.converge(a), true
		failed = m.copy(ctx, detach, s, &a, c)
		if c.slowed > 0 {
			if err := s.Note("the guest was slowed down by up to %d %% for the copy", c.slowed); err != nil {
				return err
			}
		}
		if failed != nil && !lostSight(failed) && !a.PostCopy {
			a.Over = true
			if err := s.Save(a); err != nil {
				return err
			}
		}
	}
}

// patient is the context in which the hosts are looked at: before anything was begun, the
// operation's own.
func (m *Migration) patient(ctx, detach context.Context, a attempt) context.Context {
	if a.Number == 0 {
		return ctx
	}
	return detach
}

// story is what the journal says, and what the source's boot does.
func (m *Migration) story(a attempt) Story {
	story := a.story()
	story.Rebooted = a.KeptOff && a.Boot != "" && m.Boot != "" && a.Boot != m.Boot
	return story
}

// notSettled is the error of a Perform that could not tell where the guest is. Where
// nothing was begun, that is this host's fault and nothing else.
func (m *Migration) notSettled(ctx, detach context.Context, s Scratch, now situation, a attempt, err error) error {
	switch {
	case detach.Err() != nil:
		return err
	case ctx.Err() != nil && !errors.Is(err, ErrUnsettled):
		return m.cancelled(ctx, nil)
	case now.here == nil && now.err != nil && now.nothing:
		return now.err
	}
	return m.keptOff(s, a, err)
}

// unmoved says of a guest that is on the source, and of which no copy runs, why none is
// to be begun; nil for one that is. begun says that one was, in this life, and failed
// what became of it.
func (m *Migration) unmoved(ctx context.Context, now situation, a attempt, c *convergence, begun bool, failed error) error {
	const logs = "see the libvirt and QEMU logs of both hosts, then try again"
	fail := func(code maint.Code, remedy, format string, args ...any) error {
		return maint.Problemf(code, "guest "+m.Guest, remedy, "%s; %s", fmt.Sprintf(format, args...), m.stays(now))
	}
	problems := m.unfit(*now.here.Guest)
	switch {
	case ctx.Err() != nil:
		return m.cancelled(ctx, c)
	case a.Number == 0 && len(problems) > 0:
		return m.refuse(problems)
	case failed != nil:
		code, remedy := m.blame(failed)
		return fail(code, remedy, "the copy to %s failed: %v", m.To, failed)
	case !begun && !m.Deadline.IsZero() && time.Now().After(m.Deadline):
		return fail(maint.CodeTimeout, "try again",
			"belayd on %s was away until the operation's time was over, and begins no copy to %s after it", m.From, m.To)
	case begun:
		return fail(maint.CodeFailed, logs, "the copy to %s ended without success", m.To)
	case a.Number-a.anew() >= maxAttempts:
		return fail(maint.CodeFailed, logs, "%d copies to %s were begun and none succeeded", a.Number, m.To)
	case len(problems) > 0:
		return &problems[0]
	}
	return nil
}

// gone is the end of what is not this operation's to move, or not there any more.
func (m *Migration) gone(now situation, a attempt) error {
	switch {
	case now.State == ForeignCopy && a.Number == 0:
		return m.refuse(m.unfit(*now.here.Guest))
	case now.State == ForeignCopy:
		return maint.Problemf(maint.CodeBusy, "guest "+m.Guest, "wait for that migration to end, or abort it (virsh domjobabort)",
			"is being migrated by somebody else since the copy to %s failed", m.To)
	case now.State == Off && a.Number > 0:
		return maint.Problemf(maint.CodeGuestOff, "guest "+m.Guest, "start it where it is wanted",
			"was shut down or stopped on %s while it was to be moved", m.From)
	case now.here.Guest != nil:
		return m.refuse(m.unfit(*now.here.Guest))
	}
	return maint.Problemf(maint.CodeUnknownGuest, "guest "+m.Guest, "find out who removed it or moved it away",
		"has gone from %s before the copy to %s was begun", m.From, m.To)
}

// lostSight reports whether Migrate returned without libvirt's answer, so that
// the copy may be running.
func lostSight(err error) bool {
	return transient(err) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
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
			if _, err := m.Destination.Reserve(ask, a); err != nil && ctx.Err() == nil {
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
	for heard := a.Over && !a.Unheard; ; heard = true {
		now, err := m.settle(ctx, m.story(a))
		if err != nil {
			return m.keptOff(s, a, err)
		}
		switch now.Action {
		case Begin, End, Leave:
			if heard || !wait(ctx, unheardGrace) {
				return ctx.Err()
			}
		case Watch:
			_ = m.watch(abortCtx, ctx, nil, nil, &a, s) // both hosts tell
		case ResumePostCopy:
			if err := m.seeThrough(abortCtx, ctx, &a, s); err != nil {
				return err
			}
		case ResumeSource, StartSource:
			if err := m.startAgain(ctx, s, now); err != nil {
				return m.keptOff(s, a, err)
			}
		default:
			return m.alarm(ctx, s, now, a)
		}
	}
}

// copy runs one peer-to-peer migration and watches it to its end.
func (m *Migration) copy(ctx, detach context.Context, s Scratch, a *attempt, c *convergence) error {
	p := a.Params
	done := make(chan error, 1)
	go func() { done <- m.send(detach, s, p) }()
	return m.watch(ctx, detach, done, c, a, s)
}

// with is how the attempt's copy is to be begun.
func (m *Migration) with(ctx context.Context, s Scratch, a attempt) (maint.MoveParams, error) {
	p := m.params(a.Persistent)
	post := slices.Contains(a.Means, maint.MeansPostCopy) // it is all about that, and by one connection
	if slices.Contains(a.Means, maint.MeansParallel) && !post {
		p.Parallel = connections
	}
	if slices.Contains(a.Means, maint.MeansBandwidth) {
		p.BandwidthMiBs = 0
	}
	if post {
		p.Compression, p.ZeroCopy = "", false
	}
	p.Slow = slices.Contains(a.Means, maint.MeansSlow)
	p.PostCopy = a.Able
	return m.equip(ctx, s, m.land(p))
}

// mayPostCopy reports whether the next copy is to be one that can go on as post-copy.
// Whether both hosts can do that is for libvirt and QEMU to say, as it is begun. One by
// several connections is first tried with it too: QEMU takes both from 10.1 on.
func (m *Migration) mayPostCopy(a attempt) bool {
	several := slices.Contains(a.Means, maint.MeansParallel) && !slices.Contains(a.Means, maint.MeansPostCopy)
	return slices.Contains(m.Allow, maint.MeansPostCopy) && m.canPostCopy(a) && (!several || a.Refused == 0)
}

// canPostCopy reports whether nothing speaks against post-copy. A guest that is paused has
// no use for it, and one whose disks go along would have those on two hosts, too.
func (m *Migration) canPostCopy(a attempt) bool {
	return !a.Unable && !a.Paused && len(m.copies)+len(a.Params.CopyDisks) == 0
}

// refused reports whether libvirt refused a copy before anything was sent.
func refused(failed error, last maint.Job) bool {
	return failed != nil && !lostSight(failed) && last.MemorySent == 0
}

// send has libvirt migrate the guest. Where it knows nothing of what is to make the copy
// faster, it has done nothing, and does so without.
func (m *Migration) send(ctx context.Context, s Scratch, p maint.MoveParams) error {
	err := m.Source.Migrate(ctx, m.UUID, p)
	if !errors.Is(err, maint.ErrParameter) || p.Compression == "" && !p.ZeroCopy {
		return err
	}
	if err := s.Note("compression and zero-copy are left out: %v", err); err != nil {
		return err
	}
	p.Compression, p.ZeroCopy = "", false
	return m.Source.Migrate(ctx, m.UUID, p)
}

// cancelled is the end of an operation whose time is over, or that is not wanted any
// more. c is of its last copy, nil where there is none.
func (m *Migration) cancelled(ctx context.Context, c *convergence) error {
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		p := maint.Problemf(maint.CodeTimeout, "guest "+m.Guest,
			"allow more time (--timeout) or bandwidth, or move it when it writes less memory",
			"the copy to %s did not finish in time and was cancelled; the guest runs on %s as before", m.To, m.From)
		if c != nil && c.told != "" {
			p.Reason, p.Remedy = p.Reason+": "+c.told, c.remedy()
		} else if left := m.disksLeft(); left != "" {
			p.Reason, p.Remedy = p.Reason+": "+left, "allow more time (--timeout) or bandwidth, or have the guest's writes to its disks wait for the destination (--allow slow)"
		}
		return p
	}
	return maint.Problemf(maint.CodeAborted, "guest "+m.Guest, "",
		"the operation was aborted; the guest runs on %s as before", m.From)
}

// blame is the code and the remedy for a copy that libvirt says has failed.
func (m *Migration) blame(err error) (maint.Code, string) {
	if errors.Is(err, maint.ErrCertificate) {
		return maint.CodeCertificate, fmt.Sprintf("see on both hosts with 'belay doctor' which certificate is wrong, and in QEMU's log on %s what it refused: all must be of one CA, and that of QEMU on %s (server-cert.pem, in the folder migrate_tls_x509_cert_dir of its qemu.conf) for the name that it is called by", m.To, m.To)
	}
	return maint.CodeFailed, m.remedy()
}

func (m *Migration) remedy() string {
	return fmt.Sprintf("see that libvirt runs on %s and that it can be reached from here at %s (belay doctor), then try again", m.To, m.Params.DestURI)
}
