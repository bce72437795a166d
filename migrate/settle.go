package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	// lookTimeout bounds one look at one host.
	lookTimeout = 10 * time.Second
	// lookFirst is the pause before both hosts are looked at again.
	lookFirst = 50 * time.Millisecond
)

// ErrUnsettled marks a Perform error after which nobody knows where the guest
// is, or knows it to be where it must not be: there must be no automatic undo.
var ErrUnsettled = errors.New("the guest's place is not settled")

// situation is both hosts, looked at once, and what to make of them.
type situation struct {
	Verdict
	here, there *maint.View // nil: could not be asked
	err         error       // why here is nil
	nothing     bool        // was begun
	came        bool        // the destination says that the guest has come
}

// settle looks at both hosts until what they show is to be acted on. It waits
// through switch-overs and through hosts that cannot be asked, for up to settleGrace or
// silentGrace, and until a verdict that two looks at two hosts may be mistaken about
// (Verdict.Doubt) has stood for long enough.
func (m *Migration) settle(detach context.Context, story Story) (situation, error) {
	begun, pause := time.Now(), lookFirst
	var was Verdict
	var since time.Time // when was was seen first
	for {
		now := m.look(detach, story)
		if now.Verdict != was {
			was, since = now.Verdict, time.Now()
		}
		left := now.Doubt() - time.Since(since)
		if (now.Action != Wait || now.PostCopy()) && left <= 0 {
			return now, nil
		}
		patience := settleGrace
		// A guest that went down with its host may run on the other one, and nobody
		// could do better than wait for that either.
		if now.here == nil && !now.nothing || story.Rebooted {
			patience = silentGrace
		}
		// In post-copy the hosts are waited for without an end: nobody could do better.
		if now.Action == Wait && time.Since(begun) > patience && story.Begun != PostCopyBegun {
			return now, m.unsettled(now)
		}
		next := pause
		if now.Action != Wait {
			next = min(pause, left)
		}
		if !wait(detach, next) {
			return now, detach.Err()
		}
		pause = min(2*pause, 2*time.Second)
	}
}

// look asks both hosts for the guest, once.
func (m *Migration) look(ctx context.Context, story Story) (now situation) {
	now.nothing = story.Begun == NothingBegun
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
		now.here = &maint.View{Host: m.From, Guest: &g}
	case errors.Is(err, maint.ErrNoGuest):
		now.here = &maint.View{Host: m.From}
	default:
		m.Log.Debug("cannot ask libvirt", "err", err)
		now.err = err
	}
	now.there = <-remote
	if now.there != nil {
		same, ran := now.there.Vigil.Since(story.Vigil)
		story.Watched, story.Came = same && !ran, ran || slices.Contains(now.there.Came, m.Op)
	}
	now.came = story.Came
	now.Verdict = Reconcile(now.here, now.there, story)
	return now
}

// startAgain has the guest run again on the source, where a migration has stopped it or its
// host went down, and nobody else will. Only the verdicts Stranded and Unstarted allow it.
// Not even then where a third host has it: somebody else's migration has taken it there.
func (m *Migration) startAgain(ctx context.Context, s Scratch, now situation) error {
	verb, do, how := "resume", m.Source.Resume, "left stopped by a switch-over that did not come about"
	if now.Action == StartSource {
		verb, do, how = "start", m.Source.Launch, "off since that host went down in the copy"
	}
	if m.Third != nil {
		ask, cancel := context.WithTimeout(ctx, lookTimeout)
		host := m.Third(ask)
		cancel()
		if host != "" {
			if err := m.keepOff(ctx, s, now); err != nil {
				return err
			}
			remedy := fmt.Sprintf("see that it runs on %s (virsh domstate --reason %s)", host, m.word())
			if now.Action == ResumeSource {
				remedy += fmt.Sprintf("; if so, on %s: virsh destroy %s, and never resume it there", m.From, m.word())
			} else {
				remedy += fmt.Sprintf("; if so, on %s: virsh undefine --keep-nvram %s, and never start it there", m.From, m.word())
			}
			return fmt.Errorf("%w: %w", ErrUnsettled, maint.Problemf(maint.CodeUnverified, "guest "+m.Guest, remedy,
				"is on %s, where this operation has not moved it, and %s on %s", host, how, m.From))
		}
	}
	if err := s.Note("the guest is %s on %s; %s has never started it, so it is started on %s again", how, m.From, m.To, m.From); err != nil {
		return err
	}
	if err := m.retry(ctx, settleGrace, func(ctx context.Context) error { return do(ctx, m.UUID) }); err != nil {
		p := maint.Problemf(maint.CodeUnverified, "guest "+m.Guest,
			fmt.Sprintf("see that %s does not run it, nor any other host that has its disks, then on %s: virsh %s %s", m.To, m.From, verb, m.word()),
			"is %s on %s, and cannot be started there: %v", how, m.From, err)
		return fmt.Errorf("%w: %w", ErrUnsettled, p)
	}
	return nil
}

// stays says for people how the guest is on the source, which it has not left.
func (m *Migration) stays(now situation) string {
	if now.here != nil && now.here.Guest != nil && !now.here.Running() {
		return fmt.Sprintf("the guest is still on %s, where it is %s (%s)", m.From, now.here.Guest.State, now.here.Guest.Reason)
	}
	return fmt.Sprintf("the guest runs on %s as before", m.From)
}

// alarm is unsettled of a verdict. Where the guest is known to have come to the destination,
// what the source still has does not start with that host.
func (m *Migration) alarm(ctx context.Context, s Scratch, now situation, a attempt) error {
	if now.State == PausedTwice || now.came {
		if err := m.keepOff(ctx, s, now); err != nil {
			return err
		}
	}
	return m.keptOff(s, a, m.unsettled(now))
}

// word is the guest's name as a word of a command.
func (m *Migration) word() string { return maint.ShellWord(m.Guest) }

// unsettled is the end of what cannot be acted on.
func (m *Migration) unsettled(now situation) error {
	look := fmt.Sprintf("look on both: virsh domstate --reason %s", m.word())
	p := maint.Problemf(maint.CodeUnverified, "guest "+m.Guest, look, "after the copy to %s it is %s", m.To, now.State)
	switch now.State {
	case Unknown:
		p.Reason = fmt.Sprintf("one of the hosts %s and %s could not be asked, however often it was tried; where it runs is not known", m.From, m.To)
		p.Remedy = look + "; start it nowhere before the other host is known not to run it"
	case Both, SecondCopy:
		p.Remedy = "stop one copy at once, before both write to the same disk: compare 'virsh domstate --reason' and the guest's own clock on both hosts"
	case Gone:
		p.Reason = fmt.Sprintf("is shut off on %s, and not on %s, whose belayd or libvirt was away meanwhile: it cannot be told whether it has run there and moved on", m.From, m.To)
		p.Remedy = fmt.Sprintf("find out where it runs: on every host that has its disks, virsh domstate %s; if nowhere, on %s: virsh start %s; else there: virsh undefine --keep-nvram %s", m.word(), m.From, m.word(), m.word())
		if now.came {
			p.Reason = fmt.Sprintf("is shut off on %s; it has come to %s, which does not have it any more: it has moved on, or has ended there", m.From, m.To)
		}
	case OldCopy:
		p.Reason = fmt.Sprintf("runs on %s, which has lost %s's answer; it has come to %s, which does not have it any more: it has moved on, or has ended there", m.From, m.To, m.To)
		p.Remedy = fmt.Sprintf("find out at once whether it runs on another host ('belay ops list' on %s, virsh list on every host that has its disks): two of them would write to the same disk, and what runs on %s is the older one", m.To, m.From)
	case Neither:
		p.Remedy = fmt.Sprintf("see the libvirt and QEMU logs of both hosts; its definition, if it had one, is in the record of the operation (belay ops show %s -o json, as an operator)", m.Op)
	case Switching:
		p.Remedy = look + "; a copy that is paused for migration is resumed with virsh resume only when the other host has none"
	case Doubtful:
		p.Reason = fmt.Sprintf("is stopped on %s, in the switch-over to %s, where it is not: it cannot be told whether it has run and ended there", m.From, m.To)
		p.Remedy = fmt.Sprintf("see its QEMU log on %s (%s); if it has not run there, on %s: virsh resume %s; if it has, what %s holds is out of date: on %s virsh destroy %s, and start it where it is wanted",
			m.To, maint.ShellWord("/var/log/libvirt/qemu/"+m.Guest+".log"), m.From, m.word(), m.From, m.From, m.word())
		if now.came {
			p.Reason = fmt.Sprintf("is stopped on %s; it has come to %s, which does not have it any more: it has moved on, or has ended there", m.From, m.To)
			p.Remedy = fmt.Sprintf("find out where it runs now ('belay ops list' on %s); what %s holds is out of date and must not be resumed: on %s virsh destroy %s", m.To, m.From, m.From, m.word())
		}
	case PausedTwice:
		p.Reason = fmt.Sprintf("is paused on both hosts; it has arrived on %s, and what %s holds is out of date", m.To, m.From)
		p.Remedy = fmt.Sprintf("see why it is paused on %s (virsh domstate --reason %s) and resume it there, nowhere else; when it runs, on %s: virsh destroy %s", m.To, m.word(), m.From, m.word())
	case PostCopyLostThere:
		p.Reason = fmt.Sprintf("has ended on %s in post-copy, while part of its memory was on %s: neither host has it whole", m.To, m.From)
		p.Remedy = fmt.Sprintf("never resume it on %s, whose memory is older than its disk; there: virsh destroy %s; then see that no other host has it, moved on by hand, and start it where it is wanted, as after a power cut", m.From, m.word())
	case PostCopyLostHere:
		p.Reason = fmt.Sprintf("runs on %s, and the part of its memory that was on %s is gone with its process there", m.To, m.From)
		p.Remedy = fmt.Sprintf("it will hang where it needs that part: shut it down on %s, and start it where it is wanted, as after a power cut", m.To)
	}
	return fmt.Errorf("%w: %w", ErrUnsettled, p)
}
