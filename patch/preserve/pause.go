package preserve

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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
			g.Problem = g.Clock.Behind(g.lost)
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
