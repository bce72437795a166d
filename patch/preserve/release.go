package preserve

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"belay/agent/maint"
)

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
		g.AtMost = true
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
		g.still("find out who uses its disk, end that, then: virsh resume "+maint.ShellWord(g.Guest), "is still paused: %v", err)
	default:
		g.still("virsh resume "+maint.ShellWord(g.Guest), "is still paused: %v", err)
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
