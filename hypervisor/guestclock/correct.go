package guestclock

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"belay/agent/maint"
)

const (
	// maxShots is how often a clock is set at most.
	maxShots = 4
	// worthwhile is what a clock must be behind, beyond the round trip, to be
	// set: less is for the guest's time service, and not worth the risk of a step
	// back by a setting that comes late.
	worthwhile = time.Millisecond
	// near is from where on a guest no longer counts as running with a wrong
	// clock, although it may be set once more.
	near = 250 * time.Millisecond
	// longest is what is believed of the way to a guest at most. A setting that
	// arrives sooner than was believed leaves the clock ahead by as much, for good.
	longest = 5 * time.Millisecond
	// beforeHalf is when in a second of the guest's a clock is set again.
	beforeHalf = 350 * time.Millisecond
)

// correction is the putting right of one guest's clock.
type correction struct {
	c      *Clocks
	report maint.ClockReport
	grain
	coarse, canSet bool

	// before is what the clock was off before the pause; nil: it does not matter.
	before *maint.ClockOffset
	// target is what the guest's clock is to be ahead of the host's: 0 but for a
	// clock that was off and stays so, and then kept says why.
	target  time.Duration
	kept    string
	rtt     time.Duration // shortest round trip to the agent
	resumed time.Time     // zero: nobody asks for how long the clock was stale
	stood   time.Duration // what it has lost at least
}

// Correct puts a guest's clock right after a pause. It is to be called right after
// the release, resumed being when the vCPUs began to run; stood is for how long they
// did not at least, 0 if nobody knows. The clock is set at
// once, from what the Baseline has, and measured afterwards; it is set again while
// that is worth it, four times at most. It returns when the clock is as good as
// it gets, or ctx ends; a deadline should leave a few seconds to agents that wait
// for hwclock.
//
// The report's Before is the offset before the pause. A guest whose agent did not
// answer then is not tried again: it would keep the others waiting.
func (c *Clocks) Correct(ctx context.Context, b Baseline, resumed time.Time, stood time.Duration) maint.ClockReport {
	k := &correction{c: c, stood: stood, grain: grainOf(b.Coarse), coarse: b.Coarse, rtt: b.RTT, resumed: resumed,
		report: maint.ClockReport{Guest: b.Guest, UUID: b.UUID, State: maint.ClockUnsynchronised, Before: b.Offset, Reason: b.Reason}}
	switch {
	case !b.Agent:
	case b.Offset == nil:
		return c.restore(ctx, maint.Guest{Name: b.Guest, UUID: b.UUID}, resumed.Sub(b.Taken), resumed, firstAnswer)
	case !b.CanSet:
		read, err := c.compare(ctx, b.UUID, k.grain)
		if err != nil {
			k.report.Reason = err.Error()
			break
		}
		offset := read.offset()
		k.report.After = &offset
		k.judge(offset)
		if k.report.State != maint.ClockSynchronised {
			k.report.Reason += "; " + cannotSet
		}
	default:
		k.before = b.Offset
		k.shoot(ctx)
	}
	return k.report
}

// aim decides where to: to the host's time, except that a clock which was off on
// purpose stays so, and that none is stepped back.
func (k *correction) aim(ctx context.Context) {
	before := *k.before
	switch {
	case before.Offset.Abs() > onPurpose:
		k.kept = "it was so before the pause, and was left so"
	case before.Offset > worthwhile+before.Error:
		// By now it is behind, unless the pause was shorter than it was ahead.
		if before.Offset+before.Error < k.stood {
			return
		}
		asked := k.c.now()
		t, err := k.c.host.GuestTime(ctx, k.report.UUID)
		if err == nil && t.Add(k.resolution).Before(asked.wall) {
			return
		}
		k.kept = "it was so before the pause, and is not stepped back"
	default:
		return
	}
	k.target = before.Offset
}

// shoot sets the clock and measures, in turn. Each time ends in a verdict.
func (k *correction) shoot(ctx context.Context) {
	delay := min(k.rtt/2, longest) // the way to the guest, as far as is known
	var ways []time.Duration       // what it was
	for range maxShots {
		s, err := k.shot(ctx, delay)
		switch {
		case s.sent.wall.IsZero():
			if k.report.Shots == 0 {
				k.report.Reason = "it was not told the time: " + err.Error()
			}
			return // else the verdict stands
		case err != nil:
			k.report.State, k.report.After = maint.ClockUnsynchronised, nil
			k.report.Reason = "its agent was told the time, but did not answer: " + err.Error()
			return
		}
		after := s.left.less(-k.target).offset()
		k.report.After = &after
		k.judge(after)
		left := s.left.offset()
		if s.hit && left.Offset.Abs() <= near && k.report.StaleError == 0 && !k.resumed.IsZero() {
			effect := s.sent.mono + s.way
			k.report.Stale = max(0, time.Since(k.resumed)-(k.c.now().mono-effect))
			k.report.StaleError = left.Error
		}
		if !k.behind(left, s.left.rtt) {
			return
		}
		if !s.hit && s.refused != nil {
			k.report.Reason += "; its agent could not set it: " + s.refused.Error() + k.remedy()
			return
		}
		if s.hit {
			ways = append(ways, s.way)
		}
		delay = s.left.rtt / 2
		if len(ways) > 1 {
			// Behind twice: the way is longer than the way back.
			delay = max(delay, min(slices.Min(ways), s.left.rtt))
		}
		delay = min(delay, longest)
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < s.took+2*time.Second {
			return // no time to set it and see what came of it
		}
	}
}

// shot is one setting of a clock.
type shot struct {
	sent    moment        // zero: it was not
	took    time.Duration // until the agent answered; says nothing about the clock
	refused error         // by the agent, which does not say that nothing was set
	left    reading       // how far ahead of its target the clock was afterwards
	way     time.Duration // from the reading of the host's clock to the setting of the guest's
	hit     bool          // way is possible: it is this shot that set the clock
}

// shot sets the clock once, delay being the estimate of the way, and measures. The
// error is that nothing could be sent, or measured.
func (k *correction) shot(ctx context.Context, delay time.Duration) (s shot, err error) {
	if after := k.report.After; after != nil && (after.Offset-k.target).Abs() <= near {
		done, err := k.calm(ctx)
		if err != nil {
			return s, err
		}
		defer done()
	}
	sent, answered, err := k.c.set(ctx, k.report.UUID, k.coarse, func() time.Duration {
		if k.report.Shots == 0 && k.before != nil {
			k.aim(ctx)
		}
		return k.target + delay
	})
	if sent.wall.IsZero() {
		return s, err
	}
	k.report.Shots++
	s.sent, s.took, s.refused = sent, answered.mono-sent.mono, err
	read, err := k.c.patiently(ctx, k.report.UUID, k.grain, sent)
	if err != nil {
		return s, cmp.Or(s.refused, err)
	}
	// The guest's clock read what was sent when the host's, as it was when that
	// was sent, read as much less what the guest is ahead of it.
	past := read.less(k.target).offset()
	s.way = delay - past.Offset
	s.hit = s.way >= -past.Error && s.way <= s.took+past.Error
	s.left = read.less(k.target + k.c.stepped(sent))
	return s, nil
}

// calm waits for a good time to set a clock again that is nearly right. hwclock
// turns in a loop until the guest's next half second, so the half second is near;
// and few guests do so at once, for each takes a CPU from the others.
func (k *correction) calm(ctx context.Context) (done func(), err error) {
	if err := enter(ctx, k.c.again); err != nil {
		return nil, err
	}
	done = func() { <-k.c.again }
	if k.coarse {
		return done, nil // Windows has no hwclock
	}
	guest := k.c.now().wall.Add(k.target)
	since := guest.Sub(guest.Truncate(time.Second)) // its last full second
	if err := sleep(ctx, (beforeHalf-since+time.Second)%time.Second); err != nil {
		done()
		return nil, err
	}
	return done, nil
}

// behind reports whether a clock is so far behind that setting it is worth it: a
// setting is as exact as the round trip that it takes.
func (k *correction) behind(o maint.ClockOffset, rtt time.Duration) bool {
	return o.Offset < -(worthwhile + max(o.Error, rtt))
}

// judge says what an offset means.
func (k *correction) judge(o maint.ClockOffset) {
	k.report.State, k.report.Reason = maint.ClockSynchronised, ""
	if o.Offset.Abs() <= k.tolerance {
		return
	}
	k.report.State = maint.ClockOff
	if k.kept != "" && (o.Offset-k.target).Abs() <= k.tolerance {
		k.report.Reason = fmt.Sprintf("it is %s: %s", apart(o), k.kept)
		return
	}
	k.report.Reason = "it is " + apart(o)
	switch {
	case k.kept != "":
		k.report.Reason += ", and was " + apart(*k.report.Before) + " before the pause"
	case o.Offset > 0:
		k.report.Reason += ", and is not stepped back"
	}
}

// apart gives an offset as a person would.
func apart(o maint.ClockOffset) string {
	way := "behind"
	if o.Offset > 0 {
		way = "ahead"
	}
	return fmt.Sprintf("%s %s, ± %s", brief(o.Offset.Abs()), way, brief(o.Error))
}

// remedy is for an agent that cannot set the clock.
func (k *correction) remedy() string {
	if k.coarse {
		return ""
	}
	return " (it needs /sbin/hwclock in the guest; Debian has it in util-linux-extra)"
}

// brief gives a duration as a person would.
func brief(d time.Duration) string {
	unit := time.Second
	for unit > time.Microsecond && d < 10*unit {
		unit /= 10
	}
	return d.Round(unit).String()
}
