package preserve

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"belay/agent/maint"
)

const (
	// suspendTimeout bounds the stopping of all vCPUs together.
	suspendTimeout = 5 * time.Second
	// callTimeout bounds one call to libvirt within the release: it may have
	// died, and the next try meets its successor.
	callTimeout = time.Second
	// releaseGrace is how long after the deadline belayd goes on trying to
	// release a guest; the leash does so for ever.
	releaseGrace = 20 * time.Second
	// endingTakes is what the end of a step takes that has to be killed.
	endingTakes = 400 * time.Millisecond
	// atOnce is how many guests are stopped or started at once: as many calls
	// as libvirtd serves (max_workers).
	atOnce = 20
	// fresh is for how long what was seen of a guest is still believed: who
	// pauses it meanwhile would see it released by us.
	fresh = 50 * time.Millisecond
	// lookTimeout is how long those that can be looked at wait for one that
	// cannot, before they are released.
	lookTimeout = 200 * time.Millisecond
	// farOff is what a guest's own time service is not trusted to put right
	// unnoticed.
	farOff = 500 * time.Millisecond
	// settle is how long a guest is watched that a belayd which died may have
	// asked to stop.
	settle = 3 * time.Second
	// clockTimeout bounds the correction of all clocks.
	clockTimeout = 30 * time.Second
)

// pause is one pause of the guests of an order.
type pause struct {
	h     *Hold
	line  Line
	order Order
	begun time.Time // where an earlier belayd began it: before any pause

	mu     sync.Mutex
	guests map[string]*held // by UUID: those that were asked to stop
	left   map[string]string
	freed  bool
	events []maint.LeashEvent // the leash's, once freed
	calm   chan struct{}      // closed when nobody is to be released any more
	clocks sync.WaitGroup
}

// held is a guest that was asked to stop.
type held struct {
	maint.HeldGuest
	group  int
	agent  maint.AgentState
	unsure error // why it is not known whether it was paused at all
	over   bool  // it was released under an earlier belayd, or never paused
	timed  bool  // its clock is being seen to
	// stopped is when its vCPUs stood, and stood for how long they did at least:
	// Paused and Pause have what libvirt took to do as it was told.
	stopped time.Time
	stood   time.Duration
	lost    time.Duration // what its clock may have lost at most
	// resuming: it was asked to run again, and may do so although no answer came.
	resuming bool
	// running is since when one that an earlier belayd may have been about to
	// pause is seen to run.
	running time.Time
}

func newPause(h *Hold, line Line, order Order) *pause {
	return &pause{h: h, line: line, order: order, guests: make(map[string]*held), left: make(map[string]string), calm: make(chan struct{})}
}

// names are the guests that are held.
func (p *pause) names() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var names []string
	for _, m := range p.order.Guests {
		if p.guests[m.UUID] != nil {
			names = append(names, m.Guest)
		}
	}
	return names
}

// margin is kept of the pause for the release itself.
func (p *pause) margin() time.Duration {
	return min(max(p.order.MaxPause/10, 100*time.Millisecond), time.Second)
}

// releaseBy is when belayd begins to release, come what may: in time before
// the leash does.
func (p *pause) releaseBy() time.Time { return p.line.Deadline().Add(-p.margin()) }

// stepEnd is when the step is told to end: in time to be over before the
// release. An undo gets a third of the pause.
func (p *pause) stepEnd(undo bool) time.Time {
	end := p.releaseBy().Add(-min(endingTakes, p.order.MaxPause/5))
	if undo {
		end = end.Add(-p.order.MaxPause / 3)
	}
	return end
}

// begin stops the vCPUs of all guests together. Who is found paused is left
// to whoever paused it. An error leaves to end what had been paused.
func (p *pause) begin(ctx context.Context) error {
	if err := p.line.Check(); err != nil {
		return maint.Problemf(maint.CodeLeash, "leash", "see 'belay doctor' for rung B", "does not hold, so nothing was paused: %v", err)
	}
	now := time.Now()
	end := now.Add(suspendTimeout)
	if by := p.releaseBy(); by.Before(end) {
		end = by
	}
	ctx, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	// Looked at right before: a guest that is paused now is somebody else's,
	// and to suspend it would be a success as well. All are looked at before
	// the first is stopped, which then does not wait for it.
	n := len(p.order.Guests)
	running, errs := make([]bool, n), make([]error, n)
	each(n, func(i int) {
		if m := p.order.Guests[i]; m.Left == "" {
			running[i], errs[i] = p.runs(ctx, m)
		}
	})
	if err := errors.Join(errs...); err != nil {
		return err
	}
	looked := time.Now()
	each(n, func(i int) {
		if !running[i] {
			return
		}
		if m := p.order.Guests[i]; looked.Sub(now) > fresh || time.Since(looked) > fresh {
			if running[i], errs[i] = p.runs(ctx, m); !running[i] {
				return
			}
		}
		errs[i] = p.stop(ctx, p.order.Guests[i])
	})
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// The leash may have fired meanwhile: the step is not begun then.
	return p.held()
}

// held is an error if the leash does not hold the guests.
func (p *pause) held() error {
	if err := p.line.Check(); err != nil {
		return maint.Problemf(maint.CodeLeash, "leash", "see the system's log for what ended it", "was lost, so the guests were released at once: %v", err)
	}
	return nil
}

// each does f for 0 to n-1, as many at once as libvirt serves.
func each(n int, f func(i int)) {
	var all errgroup.Group
	all.SetLimit(atOnce)
	for i := range n {
		all.Go(func() error { f(i); return nil })
	}
	_ = all.Wait()
}

// runs reports whether a guest runs. One that does not is left as it is.
func (p *pause) runs(ctx context.Context, m Member) (bool, error) {
	state, reason, err := p.h.Host.State(ctx, m.UUID)
	switch {
	case errors.Is(err, maint.ErrNoGuest):
		p.leave(m, "it has gone from this host")
	case err != nil:
		return false, maint.Problemf(maint.CodeFailed, "guest "+m.Guest, "", "cannot be looked at before the pause: %v", err)
	case state != maint.GuestRunning && state != maint.GuestBlocked:
		p.leave(m, "it is "+string(state)+" ("+reason+")")
	default:
		return true, nil
	}
	return false, nil
}

// leave notes why a guest is not paused.
func (p *pause) leave(m Member, why string) {
	p.line.Mark(Left, m.UUID)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.guests, m.UUID)
	p.left[m.UUID] = why
}

// stop stops the vCPUs of a guest that runs.
func (p *pause) stop(ctx context.Context, m Member) error {
	g := p.add(m, time.Now()) // before the call: it may have its effect and fail
	if err := p.h.Host.Suspend(ctx, m.UUID); err != nil {
		g.unsure = fmt.Errorf("it was found running: it could not be paused: %w", err)
		if state, _, err := p.h.Host.State(ctx, m.UUID); errors.Is(err, maint.ErrNoGuest) || err == nil && !state.Active() {
			p.leave(m, "it shut itself down")
			return nil
		}
		return maint.Problemf(maint.CodeFailed, "guest "+m.Guest, "", "cannot be paused: %v", err)
	}
	g.stopped = time.Now()
	p.line.Mark(Paused, m.UUID)
	return nil
}

// release starts every guest's vCPUs, group by group, and then has their
// clocks put right, which goes on when it returns. A guest that cannot be
// released yet does not keep the others waiting.
func (p *pause) release(ctx context.Context) {
	groups := make(map[int][]*held)
	var freed []*held
	for _, g := range p.guests {
		if !g.over {
			groups[g.group] = append(groups[g.group], g)
		}
	}
	var late sync.WaitGroup
	from := p.line.Deadline() // which has passed if there was no belayd for long
	if now := time.Now(); now.After(from) {
		from = now
	}
	giveUp, cancel := context.WithDeadline(ctx, from.Add(releaseGrace))
	defer cancel()
	for _, n := range slices.Sorted(maps.Keys(groups)) {
		// All are looked at before the first is resumed: those that run again
		// want the CPUs.
		group := groups[n]
		done, paused := make([]bool, len(group)), make([]bool, len(group))
		looking, stop := context.WithTimeout(giveUp, lookTimeout)
		each(len(group), func(i int) { done[i], paused[i] = p.look(looking, group[i]) })
		stop()
		each(len(group), func(i int) {
			if paused[i] {
				done[i] = p.resume(giveUp, group[i])
			}
		})
		for i, g := range group {
			if done[i] {
				freed = append(freed, g)
			} else {
				late.Go(func() { p.insist(giveUp, g) })
			}
		}
	}
	for _, g := range freed {
		p.correct(ctx, g)
	}
	late.Wait()
	close(p.calm)
}

// insist tries until the guest runs, is gone, or ctx ends.
func (p *pause) insist(ctx context.Context, g *held) {
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, 250*time.Millisecond) {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			p.h.Log.Error("guest is still paused, its release is left to the leash", "guest", g.Guest, "err", g.Problem)
			return
		}
		if p.try(ctx, g) {
			p.correct(context.WithoutCancel(ctx), g)
			return
		}
	}
}

// try releases one guest and reports whether nothing is left to be done.
func (p *pause) try(ctx context.Context, g *held) (done bool) {
	done, paused := p.look(ctx, g)
	if paused {
		done = p.resume(ctx, g)
	}
	return done
}

// look finds out whether a guest is to be resumed, or nothing is left to be done.
// Neither: it cannot be told yet.
func (p *pause) look(ctx context.Context, g *held) (done, paused bool) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	state, reason, err := p.h.Host.State(ctx, g.UUID)
	switch {
	case errors.Is(err, maint.ErrNoGuest), err == nil && !state.Active():
		g.Problem = maint.Problemf(maint.CodeGuestState, "guest "+g.Guest, "see its log", "is no longer running: it ended while it was held (%s)", reason)
		p.line.Mark(Left, g.UUID)
		return true, false
	case err != nil:
		g.still("see that libvirt runs", "cannot be released yet: %v", err)
		return false, false
	case state == maint.GuestRunning || state == maint.GuestBlocked:
		if g.unsure == errDied {
			// Its call may still be on its way to a libvirt that is slow.
			if g.Problem = nil; g.running.IsZero() {
				g.running = time.Now()
			}
			if time.Since(g.running) < settle {
				return false, false
			}
		}
		if g.resuming {
			p.released(g, belayd)
			return true, false
		}
		// The leash, if it fired; its events tell, see credit.
		p.released(g, somebodyElse)
		return true, false
	}
	g.running = time.Time{}
	return false, true
}

// resume starts the vCPUs of a guest that is paused.
func (p *pause) resume(ctx context.Context, g *held) (done bool) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	asked := time.Now()
	g.resuming = true
	err := p.h.Host.Resume(ctx, g.UUID)
	switch {
	case err == nil:
		if !g.stopped.IsZero() {
			g.stood = asked.Sub(g.stopped)
		}
		p.released(g, belayd)
	case errors.Is(err, maint.ErrLocked):
		g.still("find out who uses its disk, end that, then: virsh resume "+g.Guest, "is still paused: %v", err)
	default:
		g.still("virsh resume "+g.Guest, "is still paused: %v", err)
	}
	return err == nil
}

// released notes that a guest runs again, and since when.
func (p *pause) released(g *held, by string) {
	g.ReleasedBy, g.Problem = by, nil
	// One that was found running, and that a belayd had paused that has
	// died, may have been released by that: nobody knows when.
	if g.over = by == somebodyElse && g.Paused.IsZero(); !g.over {
		g.Released = time.Now()
	}
	if !g.Paused.IsZero() {
		g.Pause = g.Released.Sub(g.Paused)
	}
	p.line.Mark(Released, g.UUID)
}

// still notes why a guest is paused.
func (g *held) still(remedy, format string, args ...any) {
	g.Problem = maint.Problemf(maint.CodePaused, "guest "+g.Guest, remedy, format, args...)
}

// Who released a guest.
const (
	belayd       = "belayd"
	leash        = "leash"
	somebodyElse = "somebody else"
)

// correct puts the clock right, in a goroutine, of a guest that belayd has
// released. The leash may stop one once more that it released: see credit.
func (p *pause) correct(ctx context.Context, g *held) {
	if g.ReleasedBy == belayd {
		p.restore(ctx, g)
	}
}

// restore puts a guest's clock right, in a goroutine, unless it ended.
func (p *pause) restore(ctx context.Context, g *held) {
	if g.Released.IsZero() && !g.over || g.timed {
		return
	}
	g.timed = true
	by, released := g.ReleasedBy, cmp.Or(g.Released, time.Now())
	g.lost = released.Round(0).Sub(cmp.Or(g.Paused, p.begun).Round(0))
	guest := maint.Guest{Name: g.Guest, UUID: g.UUID, Agent: g.agent}
	p.clocks.Go(func() {
		// Those calls are slow, and libvirtd has only so many workers: whoever
		// is still to be released comes first, if that does not take long.
		select {
		case <-p.calm:
		case <-time.After(callTimeout):
		}
		ctx, cancel := context.WithTimeout(ctx, clockTimeout)
		defer cancel()
		var r maint.ClockReport
		if c := p.h.clocks[g.UUID]; c != nil && by == belayd {
			r = c.Correct(ctx, released, g.stood)
		} else {
			r = p.h.Clocks.Restore(ctx, guest, g.lost)
		}
		g.Clock = &r
	})
}

// clockProblem is one of a clock that the pause has left behind.
func clockProblem(guest string, r maint.ClockReport, lost time.Duration) *maint.Problem {
	reason := ""
	switch {
	case r.State == maint.ClockSynchronised || lost < farOff:
	case r.State == maint.ClockUnsynchronised:
		reason = "its clock may be " + lost.Round(time.Millisecond).String() + " behind: " + r.Reason
	case r.After != nil && r.After.Offset < -farOff && (r.Before == nil || r.Before.Offset-r.After.Offset > farOff):
		reason = "its clock is " + (-r.After.Offset).Round(time.Millisecond).String() + " behind"
	}
	if reason == "" {
		return nil
	}
	return maint.Problemf(maint.CodeClock, "guest "+guest, "when its agent answers: belay clock "+guest+" --sync", "%s", reason)
}

// meanwhile does f, and frees the guests when that takes longer than there is
// time, whatever keeps it from ending.
func (p *pause) meanwhile(ctx context.Context, what string, f func()) {
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	left := time.NewTimer(time.Until(p.releaseBy()))
	defer left.Stop()
	select {
	case <-done:
		return
	case <-left.C:
		p.h.Log.Warn("the host step takes longer than the pause may: releasing the guests meanwhile", "step", what)
	case <-p.line.Lost():
	}
	p.free(context.WithoutCancel(ctx))
	<-done
}

// free releases what is still held and disarms the leash.
func (p *pause) free(ctx context.Context) {
	if p.freed {
		return
	}
	p.freed = true
	p.release(ctx)
	events, err := p.disarm(ctx)
	if err != nil {
		p.h.Log.Error("cannot disarm the leash", "err", err)
		events = p.line.Leave() // what it has done is so all the same
	}
	p.events = events
}

// end frees the guests, waits for their clocks, and tells what became of each.
func (p *pause) end(ctx context.Context) ([]maint.HeldGuest, []maint.LeashEvent) {
	p.free(ctx)
	p.credit(ctx)
	p.clocks.Wait()
	for _, g := range p.guests {
		if g.Problem == nil && g.Clock != nil && g.agent != maint.AgentNone {
			g.Problem = clockProblem(g.Guest, *g.Clock, g.lost)
		}
	}
	var result []maint.HeldGuest
	for _, m := range p.order.Guests {
		g := maint.HeldGuest{Guest: m.Guest, UUID: m.UUID, Left: cmp.Or(m.Left, p.left[m.UUID])}
		switch h := p.guests[m.UUID]; {
		case h == nil:
		case h.unsure != nil && h.ReleasedBy == somebodyElse: // nobody else would have
			g.Left, g.Clock = h.unsure.Error(), h.Clock
		default:
			g = h.HeldGuest
		}
		result = append(result, g)
	}
	return result, p.events
}

// credit gives the leash what it released, under this belayd or under one that
// died, and sees to the clocks that are left: the leash is done with the guests
// now. Of the dead one's pauses only the arming is known, right before them.
func (p *pause) credit(ctx context.Context) {
	var armed time.Time
	fired, credited := false, make(map[string]bool)
	for _, e := range p.events {
		fired = fired || e.Kind == maint.LeashFired
		if e.Kind == maint.LeashArmed && armed.IsZero() {
			armed = e.Time
		}
		// Only the first release is one: the others have leases taken again.
		i := slices.IndexFunc(p.order.Guests, func(m Member) bool { return m.UUID == e.UUID })
		if e.Kind != maint.LeashReleased || i < 0 || credited[e.UUID] {
			continue
		}
		credited[e.UUID] = true
		g := p.guests[e.UUID]
		if g == nil {
			g = p.add(p.order.Guests[i], time.Time{})
		}
		if g.ReleasedBy != belayd {
			g.ReleasedBy, g.Released, g.Pause, g.Problem = leash, e.Time, 0, nil
		}
	}
	for _, g := range p.guests {
		if g.Paused.IsZero() {
			g.Paused = armed
		}
		switch {
		case !g.over || g.ReleasedBy != "":
		case fired || g.unsure != nil: // the leash found it running
			g.ReleasedBy = somebodyElse
		default:
			g.ReleasedBy = belayd
		}
		if g.Pause == 0 && !g.Paused.IsZero() && !g.Released.IsZero() {
			g.Pause = g.Released.Round(0).Sub(g.Paused.Round(0)) // the leash's times are of the wall clock
		}
		p.restore(ctx, g)
	}
}

// add makes a guest one that is held.
func (p *pause) add(m Member, paused time.Time) *held {
	g := &held{HeldGuest: maint.HeldGuest{Guest: m.Guest, UUID: m.UUID, Paused: paused}, group: m.Group, agent: m.Agent}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.guests[m.UUID] = g
	return g
}

// disarm leaves the leash at work where a guest is still paused.
func (p *pause) disarm(ctx context.Context) ([]maint.LeashEvent, error) {
	for _, g := range p.guests {
		if g.Problem != nil && g.Problem.Code == maint.CodePaused {
			return p.line.Leave(), nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, armTimeout)
	defer cancel()
	return p.line.Disarm(ctx)
}
