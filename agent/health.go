package agent

import (
	"context"
	"time"

	"belay/agent/health"
	"belay/agent/maint"
	"belay/agent/run"
)

// A guest whose health the configuration says how to ask for is asked before a move, by the
// host that it leaves, so that a move is not blamed for what was so before; and after it, by
// the one that it has come to.

// healthOf is how to ask a guest that runs, and for how long; false where nothing says so.
func (a *Agent) healthOf(g maint.Guest) (c health.Check, within time.Duration, ok bool) {
	if g.State != maint.GuestRunning && g.State != maint.GuestBlocked {
		return c, 0, false
	}
	for _, h := range a.cfg.Health {
		if matches(h.Guests, maint.EventGuest{UUID: g.UUID, Name: g.Name}) {
			return health.Check{TCP: h.TCP, HTTP: h.HTTP, Command: h.Command}.For(g.Name), h.Within.Duration, true
		}
	}
	return c, 0, false
}

// healthBefore writes down how the guest of a migration does before it. It is asked once, for
// a few seconds at most, and its answer stops nothing.
func (a *Agent) healthBefore(ctx context.Context, op maint.Op, s *run.Scratch) error {
	g, err := a.hyp.Guest(ctx, op.GuestUUID)
	if err != nil {
		return nil // the steps that follow meet that, too
	}
	c, _, ok := a.healthOf(g)
	if !ok {
		return nil
	}
	began := time.Now()
	err = health.Once(ctx, a.hyp, g.UUID, c)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return s.Record(maint.RecHealth, maint.HealthReport{Check: c.String(), Healthy: err == nil, Reason: health.Reason(err), Tries: 1, Took: time.Since(began)})
}

// healthOfArrival asks a guest that has come here, until it is well.
func (a *Agent) healthOfArrival(ctx context.Context, g maint.Guest) *maint.HealthReport {
	c, within, ok := a.healthOf(g)
	if !ok {
		return nil
	}
	r := health.Until(ctx, a.hyp, g.UUID, c, within)
	if !r.Healthy && ctx.Err() == nil {
		a.log.Warn("a guest that has come does not do its work", "guest", g.Name, "check", r.Check, "err", r.Reason)
	}
	return &r
}
