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

// healthOf is how to ask a guest, and how often; false where nothing says so.
func (a *Agent) healthOf(name, uuid string) (c health.Check, p health.Pace, ok bool) {
	for _, h := range a.cfg.Health {
		if matches(h.Guests, maint.EventGuest{UUID: uuid, Name: name}) {
			c = health.Check{TCP: h.TCP, HTTP: h.HTTP, Command: h.Command, Agent: h.Agent, Heartbeat: h.Heartbeat}.For(name)
			return c, health.Pace{WarmUp: h.WarmUp.Duration, Every: h.Every.Duration, Within: h.Within.Duration, Failures: h.Failures}, true
		}
	}
	return c, p, false
}

// works reports whether a guest is in a state in which it can be asked.
func works(g maint.Guest) bool {
	return g.State == maint.GuestRunning || g.State == maint.GuestBlocked
}

// askOnce tries a check of a guest once.
func (a *Agent) askOnce(ctx context.Context, uuid string, c health.Check) error {
	return health.Once(ctx, asked{a.hyp, a}, uuid, c)
}

// asked is by what guests are asked for their health.
type asked struct {
	Hypervisor
	agent *Agent
}

// Heard implements health.Guests.
func (a asked) Heard(uuid string) time.Time {
	if s := a.agent.guests.Load(); s != nil {
		return s.handler.Heard(uuid)
	}
	return time.Time{}
}

// healthBefore writes down how the guest of a migration does before it. It is asked once, for
// a few seconds at most, and its answer stops nothing.
func (a *Agent) healthBefore(ctx context.Context, op maint.Op, s *run.Scratch) error {
	g, err := a.hyp.Guest(ctx, op.GuestUUID)
	if err != nil {
		return nil // the steps that follow meet that, too
	}
	c, _, ok := a.healthOf(g.Name, g.UUID)
	if !ok || !works(g) {
		return nil
	}
	began := time.Now()
	err = a.askOnce(ctx, g.UUID, c)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return s.Record(maint.RecHealth, maint.HealthReport{Check: c.String(), Healthy: err == nil, Reason: health.Reason(err), Tries: 1, Took: time.Since(began)})
}

// healthOfArrival asks a guest that has come here, until it is well.
func (a *Agent) healthOfArrival(ctx context.Context, came maint.Arrived, g maint.Guest) *maint.HealthReport {
	c, pace, ok := a.healthOf(g.Name, g.UUID)
	if !ok {
		return nil
	}
	r := pace.Until(ctx, came.At, func(ctx context.Context) error { return a.askOnce(ctx, g.UUID, c) })
	r.Check = c.String()
	if !r.Healthy && ctx.Err() == nil {
		a.log.Warn("a guest that has come does not do its work", "guest", g.Name, "check", r.Check, "err", r.Reason)
	}
	return &r
}
