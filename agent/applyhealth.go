package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"belay/agent/config"
	"belay/agent/health"
	"belay/agent/maint"
	"belay/agent/run"
)

// A guest is asked before an update for what it will be held to after it: that it runs if it
// ran, that it is well by its own check if it was, and, where it has none, that its guest
// agent answers if it did.

// fitness is how guests, by their UUIDs, were before an update's first change.
type fitness struct {
	Ran      []string `json:"ran,omitempty"`
	Well     []string `json:"well,omitempty"`     // by their own checks
	Answered []string `json:"answered,omitempty"` // their guest agents, of those without
}

// askedAtOnce is how many guests are asked side by side.
const askedAtOnce = 16

// usualPace is for guests of which the configuration says nothing.
var usualPace = health.Pace{Every: config.HealthEvery, Within: config.HealthWithin, Failures: config.HealthFailures}

// examine writes down how the plan's guests are before the update, and names those that are
// not well.
func (x application) examine(ctx context.Context, s *run.Scratch) error {
	var (
		mu  sync.Mutex
		f   fitness
		ill []string
	)
	x.each(func(p maint.PlannedGuest) {
		g, err := x.a.hyp.Guest(ctx, p.UUID)
		if err != nil || !works(g) {
			return
		}
		c, pace, own := x.a.healthOf(g.Name, g.UUID)
		if !own {
			c, pace = health.Check{Agent: true}, health.Pace{Within: usualPace.Within}
		}
		var r maint.HealthReport
		if own || g.Agent != maint.AgentNone {
			r = pace.Until(ctx, time.Time{}, func(ctx context.Context) error { return x.a.askOnce(ctx, g.UUID, c) })
		}
		mu.Lock()
		defer mu.Unlock()
		f.Ran = append(f.Ran, p.UUID)
		switch {
		case r.Healthy && own:
			f.Well = append(f.Well, p.UUID)
		case r.Healthy:
			f.Answered = append(f.Answered, p.UUID)
		case own:
			ill = append(ill, fmt.Sprintf("guest %s is not well before the update: %s, %s", p.Guest, r.Reason, c))
		}
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	slices.Sort(ill)
	for _, text := range ill {
		if err := s.Note("%s", text); err != nil {
			return err
		}
	}
	return s.Save(f)
}

// ailing says of each guest that is not as well as it was before the update what is wrong with it.
func (x application) ailing(ctx context.Context, s *run.Scratch) (ill []string) {
	var was fitness
	_, _ = s.Load(x.phaseFitness(), &was) // none: nobody was asked
	var mu sync.Mutex
	x.each(func(p maint.PlannedGuest) {
		if why := x.ails(ctx, p, was); why != "" {
			mu.Lock()
			defer mu.Unlock()
			ill = append(ill, "guest "+p.Guest+" "+why)
		}
	})
	slices.Sort(ill)
	return ill
}

// each does something for every guest of the plan, many at once.
func (x application) each(do func(maint.PlannedGuest)) {
	_ = sideBySide(askedAtOnce, x.plan.Guests, func(_ int, g maint.PlannedGuest) error { // none fails
		do(g)
		return nil
	})
}

// ails is what is wrong with a guest, "" for nothing. One that has moved is asked by the host
// that it has come to.
func (x application) ails(ctx context.Context, p maint.PlannedGuest, was fitness) string {
	well, answered := slices.Contains(was.Well, p.UUID), slices.Contains(was.Answered, p.UUID)
	now, _ := x.a.journal.Op(x.op.ID)
	for _, m := range now.Moves {
		if m.GuestUUID == p.UUID && m.State == maint.MoveMoved {
			return x.ailsThere(ctx, m, well, answered)
		}
	}
	c, pace, own := x.a.healthOf(p.Guest, p.UUID)
	if !own {
		pace = usualPace
	}
	r := pace.Until(ctx, x.touched(p.UUID), func(ctx context.Context) error {
		g, err := x.a.hyp.Guest(ctx, p.UUID)
		switch {
		case err != nil:
			return err
		case !slices.Contains(was.Ran, p.UUID) || ownDoing(g) || x.a.pausedByUser(g, x.op.Started):
			return nil
		case !works(g):
			return fmt.Errorf("is %s (%s)", g.State, g.Reason)
		case own && well:
			return x.a.askOnce(ctx, p.UUID, c)
		case !own && answered:
			return x.a.askOnce(ctx, p.UUID, health.Check{Agent: true})
		}
		return nil
	})
	switch {
	case r.Healthy:
		return ""
	case own:
		return fmt.Sprintf("is not well: %s, %s, %d times", r.Reason, c, r.Tries)
	}
	return fmt.Sprintf("is not well: %s, %d times", r.Reason, r.Tries)
}

// ownDoing reports whether a guest does not run because somebody wanted that: it was shut
// down or ended, or sleeps.
func ownDoing(g maint.Guest) bool {
	return g.State == maint.GuestSuspended || g.State == maint.GuestShutdown ||
		g.State == maint.GuestShutoff && g.Reason != "crashed" && g.Reason != "failed"
}

// ailsThere is ails of a guest that has moved, by what its new host says.
func (x application) ailsThere(ctx context.Context, m maint.GuestMove, well, answered bool) string {
	var child maint.Op
	_ = x.a.until(ctx, func() bool { // the caller sees that ctx has ended
		child, _ = x.a.journal.Op(m.Op)
		return !unheard(child)
	})
	r := child.Arrival
	switch {
	case r == nil:
		return ""
	case r.Health != nil && !r.Health.Healthy && well:
		return fmt.Sprintf("is not well on %s: %s, %s", m.Peer, r.Health.Reason, r.Health.Check)
	case r.Health == nil && r.Agent == maint.AgentSilent && answered:
		return fmt.Sprintf("is not well on %s: its guest agent does not answer", m.Peer)
	}
	return ""
}

// touched is when something was last done to a guest in this update, the zero time for never.
func (x application) touched(uuid string) (last time.Time) {
	for _, op := range x.a.journal.Ops() {
		if op.Part != x.op.ID || !op.Ended.After(last) {
			continue
		}
		if op.GuestUUID == uuid || op.Kexec != nil || op.Hold != nil && slices.Contains(op.Hold.Guests, uuid) {
			last = op.Ended
		}
	}
	return last
}

// few are the first of many texts.
func few(all []string) string {
	const most = 3
	text := strings.Join(all[:min(len(all), most)], "; ")
	if more := len(all) - most; more > 0 {
		text += fmt.Sprintf("; and %d more", more)
	}
	return text
}
