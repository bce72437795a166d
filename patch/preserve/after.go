package preserve

import (
	"cmp"
	"context"
	"slices"
	"time"

	"belay/agent/maint"
)

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
			g.ReleasedBy, g.Released, g.Pause, g.AtMost, g.Problem = leash, e.Time, 0, false, nil
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
