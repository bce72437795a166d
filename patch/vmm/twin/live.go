package twin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"belay/agent/maint"
)

// errOff says that the guest was shut down by itself, or by its owner.
var errOff = errors.New("the guest is off")

const (
	// alarmLooks is how often in a row an impossible situation must be seen:
	// the two sides are not looked at in the same instant.
	alarmLooks = 4
	// minLimit and limitRate bound a live migration by default: memory is
	// copied within one host, and a busy host is slow.
	minLimit  = time.Minute
	limitRate = 64 << 20 // bytes per second
	// usualMaxPause is the default of Visit.MaxPause.
	usualMaxPause = 2 * time.Second
)

// carry takes the guest over by one live migration and returns nil when it is on
// the other side. A copy that is found running is watched. A *stayedError says
// that it is where it was, errOff that it was shut down, ErrStuck that nobody
// knows or that it runs twice. When ctx ends the copy is cancelled.
func (v *Visit) carry(ctx, detach context.Context, l leg, s Scratch, c *crossing) error {
	begun := false
	var failed error
	for {
		now, err := v.settle(detach, l)
		if err != nil {
			return err
		}
		switch now {
		case there:
			return v.arrived(detach, l, s, c)
		case leftover:
			// Its libvirtd died before it could end the process.
			if err := v.retry(detach, func(ctx context.Context) error { return l.from.QuitMigrated(ctx, v.UUID) }); err != nil {
				return v.lost("runs %s, but its stopped process %s cannot be ended: %v", l.toAt, l.fromAt, err)
			}
			if !wait(detach, v.paced().look) {
				return detach.Err()
			}
			continue
		case copying:
			if !c.ours() {
				return v.stayed(l, maint.CodeBusy, "wait for that migration to end, or abort it (virsh domjobabort)", "it is being migrated by somebody else")
			}
			v.watch(ctx, detach, l, nil)
			begun = true
			continue
		case off:
			return fmt.Errorf("%w: %w", errOff, maint.Problemf(maint.CodeGuestOff, "guest "+v.Guest, "start it if it is wanted", "was shut down while its QEMU was to be changed"))
		case here:
		default:
			return v.unsettled(l, now)
		}
		switch {
		case ctx.Err() != nil:
			return v.cancelled(ctx, l)
		case failed != nil:
			return failed
		case begun:
			return v.stayed(l, maint.CodeFailed, "see the logs of libvirtd and QEMU, then try again", "its migration ended without success")
		}
		begun = true
		c.Begun, c.Over = c.Begun+1, false
		if err := s.Save(c); err != nil {
			return err
		}
		if err := v.copy(ctx, detach, l); err != nil && !lostSight(err) {
			c.Over = true
			if err := s.Save(c); err != nil {
				return err
			}
			failed = v.stayed(l, maint.CodeFailed, "see the logs of libvirtd and QEMU, then try again", "its migration failed: %v", err)
		}
	}
}

// arrived writes down how long the guest stood still.
func (v *Visit) arrived(ctx context.Context, l leg, s Scratch, c *crossing) error {
	ask, cancel := context.WithTimeout(ctx, v.paced().ask)
	defer cancel()
	job, err := l.to.CompletedJob(ask, v.UUID)
	if err != nil {
		return s.Note("how long it stood still on its way is not known: %v", err)
	}
	c.Pause = job.Downtime
	return s.Save(c)
}

// copy runs one live migration, bounded in time.
func (v *Visit) copy(ctx, detach context.Context, l leg) error {
	ask, cancel := context.WithTimeout(ctx, v.paced().ask)
	defer cancel()
	if err := ignoreShared(ask, l.from, v.UUID, false); err != nil {
		return err
	}
	g, err := l.from.Guest(ask, v.UUID)
	if err != nil {
		return err
	}
	limit := v.Limit
	if limit == 0 {
		limit = minLimit + time.Duration(g.MemoryBytes/limitRate)*time.Second
	}
	ctx, stop := context.WithTimeoutCause(ctx, limit, errTooLong)
	defer stop()
	stretch := time.AfterFunc(limit/2, func() { v.stretch(detach, l) })
	defer stretch.Stop()
	done := make(chan error, 1)
	go func() { done <- l.from.Migrate(detach, v.UUID, l.params) }()
	err = v.watch(ctx, detach, l, done)
	if err != nil && errors.Is(context.Cause(ctx), errTooLong) {
		return fmt.Errorf("it did not come to an end within %s: the guest writes its memory faster than it is copied", limit)
	}
	return err
}

var errTooLong = errors.New("too long")

// stretch lets a copy that does not converge stop the guest for longer, up to
// what was allowed. Best effort: the copy is cancelled when its time is over.
func (v *Visit) stretch(ctx context.Context, l leg) {
	pause := v.MaxPause
	if pause == 0 {
		pause = usualMaxPause
	}
	ctx, cancel := context.WithTimeout(ctx, v.paced().ask)
	defer cancel()
	if _, err := l.from.QMP(ctx, v.UUID, "migrate-set-parameters", map[string]any{"downtime-limit": pause.Milliseconds()}); err != nil {
		v.Log.Warn("cannot allow a longer blackout", "guest", v.Guest, "err", err)
	}
}

// watch follows the running copy until it ends, and cancels it when ctx ends.
// done delivers Migrate's result; nil where somebody killed has called Migrate.
func (v *Visit) watch(ctx, detach context.Context, l leg, done <-chan error) error {
	p := v.paced()
	tick := time.NewTicker(p.poll)
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
		case <-tick.C:
		}
		ask, cancel := context.WithTimeout(detach, p.ask)
		if cancelled {
			if err := l.from.AbortJob(ask, v.UUID); err != nil && !errors.Is(err, maint.ErrNoJob) {
				v.Log.Warn("cannot cancel the copy", "guest", v.Guest, "err", err)
			}
		}
		job, err := l.from.Job(ask, v.UUID)
		cancel()
		switch {
		case err == nil && job.Active && job.Operation == jobOut:
			if v.Progress != nil {
				v.Progress(job)
			}
		case done == nil: // it is over, or libvirt is down: look at both sides
			return err
		}
	}
}

// settle looks at both sides until the situation is one to act on.
func (v *Visit) settle(detach context.Context, l leg) (situation, error) {
	p := v.paced()
	begun, pause := time.Now(), p.look
	for alarms := 0; ; {
		from, to := v.view(detach, l.from), v.view(detach, l.to)
		now := classify(from, to)
		switch now {
		case switching, unknown:
		case both:
			if alarms++; alarms >= alarmLooks {
				return now, nil
			}
		default:
			return now, nil
		}
		patience := p.settle
		if from == nil || to == nil {
			patience = p.silent
		}
		if time.Since(begun) > patience {
			return now, v.unsettled(l, now)
		}
		if !wait(detach, pause) {
			return now, detach.Err()
		}
		pause = min(2*pause, 2*time.Second)
	}
}

// view looks at one side; nil when it cannot be asked.
func (v *Visit) view(ctx context.Context, side Side) *maint.View {
	ctx, cancel := context.WithTimeout(ctx, v.paced().ask)
	defer cancel()
	g, err := side.Guest(ctx, v.UUID)
	switch {
	case err == nil:
		return &maint.View{Guest: &g}
	case errors.Is(err, maint.ErrNoGuest):
		return &maint.View{}
	}
	v.Log.Debug("cannot ask libvirt", "guest", v.Guest, "err", err)
	return nil
}

func (v *Visit) cancelled(ctx context.Context, l leg) error {
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		return v.stayed(l, maint.CodeTimeout, "allow more time", "the time for it is over")
	}
	return v.stayed(l, maint.CodeAborted, "", "the operation was aborted")
}

// unsettled is a guest of which nobody knows where it is, or that is where it
// must not be.
func (v *Visit) unsettled(l leg, now situation) error {
	if now == both {
		return v.lost("runs at home and in the twin: stop one of them at once, before both write to the same disk")
	}
	return v.lost("is %s, between %s and %s, for too long: look at both libvirts", now, l.fromAt, l.toAt)
}

func (v *Visit) lost(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrStuck, maint.Problemf(maint.CodeUnverified, "guest "+v.Guest,
		"compare at home: virsh domstate --reason "+maint.ShellWord(v.Guest)+", with: virsh -c "+maint.ShellWord(v.Twin.Route(v.UUID, true).DestURI)+" domstate --reason "+maint.ShellWord(v.Guest)+"; then have belay bring it home (belay replace-vmm "+maint.ShellWord(v.Guest)+")",
		format, args...))
}

// retry calls f until it works, fails for a reason that stays, or detach ends.
func (v *Visit) retry(detach context.Context, f func(context.Context) error) error {
	p := v.paced()
	for begun, pause := time.Now(), p.look; ; pause = min(2*pause, 2*time.Second) {
		ask, cancel := context.WithTimeout(detach, p.ask)
		err := f(ask)
		cancel()
		if err == nil || !errors.Is(err, maint.ErrHypervisorDown) || time.Since(begun) > p.settle || !wait(detach, pause) {
			return err
		}
	}
}

// lostSight reports whether Migrate returned without libvirt's answer, so that
// the copy may be running.
func lostSight(err error) bool {
	return errors.Is(err, maint.ErrHypervisorDown) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
