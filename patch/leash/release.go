package leash

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"belay/agent/maint"
)

const (
	// lookTimeout bounds one look at a guest, and a monitor's one use.
	lookTimeout = 500 * time.Millisecond
	// resumeFirst bounds the first try to resume a guest, and is doubled up
	// to resumeMost: a call that is given up goes on in libvirtd, which has
	// few workers, for up to 30 s when it waits for the guest's job.
	resumeFirst = 500 * time.Millisecond
	resumeMost  = 32 * time.Second
	// retryFirst is between two tries until a guest is overdue for twice the
	// patience, and is then doubled up to retryMost.
	retryFirst = 100 * time.Millisecond
	retryMost  = 2 * time.Second
	// patience is how long libvirt is waited for before a guest is released
	// past it.
	patience = time.Second
	// settle is how long a guest that was never said to be paused is watched
	// after it was seen to run: belayd may have died with its call on the
	// way to a libvirt that is slow.
	settle = 3 * time.Second
	// goneAfter is how long libvirt must say that a guest has ended.
	goneAfter = 2 * time.Second
	// killAgain is at least between two times at which libvirt is killed.
	killAgain = 30 * time.Second
	// suspendTimeout bounds the stop before the leases are taken again.
	suspendTimeout = 5 * time.Second
	// relockEvery is between two looks whether libvirt is back, and
	// relockTries how often the leases are tried for.
	relockEvery = time.Second
	relockTries = 3
	// alarmFirst is between two notes of the same failure, and is doubled
	// up to alarmMost.
	alarmFirst = time.Second
	alarmMost  = 10 * time.Minute
)

// runs reports whether a guest in this state has vCPUs that run.
func runs(s maint.GuestState) bool { return s == maint.GuestRunning || s == maint.GuestBlocked }

// see sees to one guest until it runs or is not the leash's affair, and then
// to its leases.
func (k *Keeper) see(ctx context.Context, g *GuestStatus) {
	(&effort{k: k, g: g}).release(ctx)
	k.relock(ctx, g)
}

// effort is the release of one guest, over all its tries.
type effort struct {
	k *Keeper
	g *GuestStatus

	begun   time.Duration // all times are the clock's
	running time.Duration // since when it is seen to run
	ended   time.Duration // since when libvirt says that it has
	resume  time.Duration // bound of the next try

	failure string // the last one noted, when, and until when it is not noted again
	noted   time.Duration
	silent  time.Duration
}

// release tries until there is nothing more to do.
func (e *effort) release(ctx context.Context) {
	e.begun, e.resume, e.silent = e.k.cfg.Clock(), resumeFirst, alarmFirst
	wait := retryFirst
	for e.held() && !e.try(ctx) && sleep(ctx, wait) {
		if e.k.cfg.Clock()-e.begun > 2*patience {
			wait = min(2*wait, retryMost)
		}
	}
}

// held reports whether the guest is still the leash's to release.
func (e *effort) held() bool {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	return e.g.Fate.Held()
}

// try does what can be done now, and reports whether that was all.
func (e *effort) try(ctx context.Context) (done bool) {
	state, reason, err := e.k.state(ctx, e.g.UUID)
	if errors.Is(err, maint.ErrNoGuest) {
		state, reason, err = maint.GuestNoState, "libvirt does not know it", nil
	}
	if err == nil && state.Active() {
		e.ended = 0
	}
	switch {
	case err != nil:
		return e.pastLibvirt(ctx, err)
	case runs(state):
		return e.runs()
	case !state.Active():
		return e.gone(fmt.Sprintf("it is %s (%s)", state, reason))
	case state != maint.GuestPaused || reason != "user" && reason != "unknown":
		return e.leave(fmt.Sprintf("it is %s (%s), which is not Belay's doing", state, reason))
	}
	e.running = 0
	bounded, cancel := context.WithTimeout(ctx, e.resume)
	err = e.k.cfg.Host.Resume(bounded, e.g.UUID)
	cancel()
	e.k.hear(err)
	e.resume = min(2*e.resume, resumeMost)
	switch {
	case errors.Is(err, maint.ErrLocked):
		e.k.mu.Lock()
		e.g.Locked = true
		e.k.mu.Unlock()
		return e.failed("find out who uses its disk: it stays paused until that has ended", err)
	case errors.Is(err, maint.ErrHypervisorDown):
		// Does it hang, or does the guest's job that it waits for?
		_, _, _ = e.k.state(ctx, e.g.UUID)
		return e.pastLibvirt(ctx, err)
	case err != nil:
		return e.failed("see libvirt's log", err)
	}
	// Trusted, unless it is seen to be paused as before.
	if state, reason, err := e.k.state(ctx, e.g.UUID); err == nil && state == maint.GuestPaused && reason == "user" {
		return e.failed("see libvirt's log", errors.New("libvirt has resumed it, and says that it is paused"))
	}
	return e.released("libvirt", false)
}

// state looks at a guest.
func (k *Keeper) state(ctx context.Context, uuid string) (maint.GuestState, string, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	state, reason, err := k.cfg.Host.State(ctx, uuid)
	k.hear(err)
	return state, reason, err
}

// hear notes that libvirt has answered, if that is what the error says.
func (k *Keeper) hear(err error) {
	if !errors.Is(err, maint.ErrHypervisorDown) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.heardOf = k.cfg.Clock()
	}
}

// pastLibvirt releases the guest by its monitor, when libvirt has been waited
// for and has not said that a lease is taken.
func (e *effort) pastLibvirt(ctx context.Context, cause error) (done bool) {
	e.k.mu.Lock()
	locked := e.g.Locked
	e.k.mu.Unlock()
	switch {
	case e.k.cfg.Clock()-e.begun < patience:
		return false
	case locked:
		return e.failed("start libvirt; the guest is not released past it, since a lease of its disks was taken", cause)
	case !errors.Is(cause, maint.ErrHypervisorDown):
		return e.failed("see libvirt's log", cause)
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	done, err := e.byMonitor(ctx)
	if errors.Is(err, ErrTaken) {
		e.k.unhang(e.begun)
	}
	if err != nil {
		return e.failed("restart libvirt", fmt.Errorf("%w; and its monitor: %w", cause, err))
	}
	return done
}

// unhang has a libvirt killed that hangs, where the order allows it and, with a
// guest overdue, it has answered nothing for as long as that says.
func (k *Keeper) unhang(since time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now, after := k.cfg.Clock(), k.s.KillLibvirt
	since = max(since, k.heardOf)
	if after == 0 || k.cfg.KillLibvirt == nil || now-since < after || k.killed != 0 && now-k.killed < max(after, killAgain) {
		return
	}
	k.killed = now
	text := fmt.Sprintf("libvirt has not answered for %s, with guests overdue: it was killed", (now - since).Round(tick))
	if err := k.cfg.KillLibvirt(); err != nil {
		text = fmt.Sprintf("libvirt does not answer, and cannot be killed: %v", err)
	}
	k.note(maint.LeashEvent{Kind: maint.LeashFailed, Text: text})
	k.save()
	k.cfg.Log.Error("libvirt hangs", "op", k.cfg.Op, "err", text)
}

// byMonitor starts the vCPUs of a guest whose QEMU says that they were stopped
// as Belay stops them.
func (e *effort) byMonitor(ctx context.Context) (done bool, err error) {
	if e.g.Monitor == "" {
		return false, errors.New("it is not known where")
	}
	m, err := e.k.cfg.Monitor(ctx, e.g.Monitor)
	if err != nil {
		return false, err
	}
	defer m.Close()
	uuid, err := m.UUID(ctx)
	if err != nil {
		return false, err
	}
	if !strings.EqualFold(uuid, e.g.UUID) {
		return false, fmt.Errorf("%s is that of guest %s", e.g.Monitor, uuid)
	}
	status, err := m.Status(ctx)
	switch {
	case err != nil:
		return false, err
	case status == "running":
		return e.runs(), nil
	case status != "paused":
		// libvirt will say what it makes of it.
		return false, fmt.Errorf("QEMU says %q, which is not Belay's doing", status)
	}
	e.running = 0
	e.k.mu.Lock()
	e.g.Unleased = true // before it is
	e.k.save()
	e.k.mu.Unlock()
	if err := m.Cont(ctx); err != nil {
		return false, err
	}
	if status, err := m.Status(ctx); err == nil && status != "running" {
		return false, fmt.Errorf("QEMU was told to run, and says %q", status)
	}
	return e.released("monitor", true), nil
}

// runs is for a guest that is found running without the leash.
func (e *effort) runs() (done bool) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	now := e.k.cfg.Clock()
	if e.running == 0 {
		e.running = now
	}
	if e.g.Fate == Armed && now-e.running < settle {
		return false
	}
	e.g.Fate, e.g.Text = Released, "it was found running"
	e.k.save()
	e.k.cfg.Log.Info("guest runs already", "op", e.k.cfg.Op, "guest", e.g.Name)
	return true
}

// released is for a guest that the leash has released.
func (e *effort) released(way string, unleased bool) (done bool) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	again := e.g.Unleased && !unleased
	e.g.Fate, e.g.Text, e.g.Unleased, e.g.Locked = Released, "by the leash, by "+way, unleased, false
	ev := maint.LeashEvent{Kind: maint.LeashReleased, Guest: e.g.Name, UUID: e.g.UUID, Way: way}
	switch {
	case unleased:
		ev.Text = "libvirt did not answer; the leases of its disks are not held until it does"
	case again:
		ev.Text = "the leases of its disks are held again"
	}
	e.k.note(ev)
	e.k.save()
	e.k.cfg.Log.Warn("guest released", "op", e.k.cfg.Op, "guest", e.g.Name, "way", way, "unleased", unleased)
	return true
}

// gone is for a guest that libvirt says has ended. It may say so for a moment
// while it starts.
func (e *effort) gone(why string) (done bool) {
	now := e.k.cfg.Clock()
	if e.ended == 0 {
		e.ended = now
	}
	return now-e.ended >= goneAfter && e.leave(why)
}

// leave is for a guest that is not the leash's to release, or not any more.
func (e *effort) leave(why string) (done bool) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	e.g.Fate, e.g.Text, e.g.Unleased = Left, why, false
	e.k.note(maint.LeashEvent{Kind: maint.LeashFailed, Guest: e.g.Name, UUID: e.g.UUID, Text: "left alone: " + why})
	e.k.save()
	e.k.cfg.Log.Error("guest is left alone", "op", e.k.cfg.Op, "guest", e.g.Name, "why", why)
	return true
}

// failed raises the alarm, at once for a new reason and ever less often for the
// same one.
func (e *effort) failed(remedy string, err error) (done bool) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	now, text := e.k.cfg.Clock(), err.Error()
	switch {
	case text != e.failure:
		e.failure, e.silent = text, alarmFirst
	case now-e.noted < e.silent:
		return false
	default:
		e.silent = min(2*e.silent, alarmMost)
	}
	e.noted = now
	e.k.note(maint.LeashEvent{Kind: maint.LeashFailed, Guest: e.g.Name, UUID: e.g.UUID, Text: text})
	e.k.save()
	e.k.cfg.Log.Error("guest is still paused", "op", e.k.cfg.Op, "guest", e.g.Name, "err", err, "remedy", remedy)
	return false
}

// relock has libvirt take the leases of a guest that was released past it, by
// stopping and resuming it once.
func (k *Keeper) relock(ctx context.Context, g *GuestStatus) {
	seen := 0 // looks in a row at which libvirt answered
	for tries := 0; tries < relockTries; {
		k.mu.Lock()
		over := !g.Unleased || k.ending
		k.mu.Unlock()
		if over || !sleep(ctx, relockEvery) {
			return
		}
		state, reason, err := k.state(ctx, g.UUID)
		switch {
		case errors.Is(err, maint.ErrNoGuest) || err == nil && !runs(state):
			// Whoever resumes or starts it does so through libvirt, which
			// takes the leases.
			k.mu.Lock()
			g.Unleased = false
			k.save()
			k.mu.Unlock()
			k.cfg.Log.Warn("guest was stopped since it was released past libvirt", "op", k.cfg.Op, "guest", g.Name, "state", state, "reason", reason)
			return
		case err != nil:
			seen = 0
			continue
		}
		// Not at the first answer of a libvirt that may fall over again.
		if seen++; seen < 2 {
			continue
		}
		tries++
		k.mu.Lock()
		g.Fate = Armed // before it is stopped: whoever comes after us resumes it
		k.save()
		k.mu.Unlock()
		bounded, cancel := context.WithTimeout(ctx, suspendTimeout)
		err = k.cfg.Host.Suspend(bounded, g.UUID)
		cancel()
		if err != nil {
			k.cfg.Log.Error("cannot stop guest to have its disks' leases taken again", "op", k.cfg.Op, "guest", g.Name, "err", err)
		}
		(&effort{k: k, g: g}).release(ctx)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if !g.Unleased {
		return
	}
	k.note(maint.LeashEvent{Kind: maint.LeashFailed, Guest: g.Name, UUID: g.UUID, Text: "it runs, and the leases of its disks are not held: suspend and resume it by hand"})
	k.save()
	k.cfg.Log.Error("guest runs without its disks' leases", "op", k.cfg.Op, "guest", g.Name, "remedy", "virsh suspend and resume it")
}

// sleep waits, and reports false when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
