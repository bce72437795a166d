package guestclock

import (
	"context"
	"fmt"
	"time"

	"belay/agent/maint"
)

const (
	// samples is how often a clock is read at most for one measurement.
	samples = 20
	// enough is the error that each sample makes good enough: the longer a
	// measurement takes, the less is asked of it.
	enough = 100 * time.Microsecond
	// drift is how fast a clock may run away while it is measured.
	drift = 500e-6
)

// moment is a point in time on two clocks of the host.
type moment struct {
	wall time.Time     // which somebody may step
	mono time.Duration // which nobody can; its zero means nothing
}

// at is what the wall clock says at another time, unless it has been stepped.
func (m moment) at(mono time.Duration) time.Time { return m.wall.Add(mono - m.mono) }

// stepped is how far the host's wall clock was stepped since.
func (c *Clocks) stepped(since moment) (by time.Duration) {
	// A moment's two readings can be torn apart by a busy machine: the best of
	// three.
	for i := range 3 {
		now := c.now()
		if d := now.wall.Sub(since.at(now.mono)); i == 0 || d.Abs() < by.Abs() {
			by = d
		}
	}
	return by
}

// reading is what is known of a guest's clock: how far it is ahead of the host's.
type reading struct {
	least, most time.Duration
	rtt         time.Duration // the shortest round trip
}

func (r reading) bar() time.Duration { return (r.most - r.least) / 2 }

// less gives the reading against a clock that is ahead of the host's.
func (r reading) less(ahead time.Duration) reading {
	r.least, r.most = r.least-ahead, r.most-ahead
	return r
}

func (r reading) offset() maint.ClockOffset {
	return maint.ClockOffset{Offset: r.least + r.bar(), Error: r.bar()}
}

// compare measures a guest's clock against the host's as it is now.
func (c *Clocks) compare(ctx context.Context, uuid string, g grain) (reading, error) {
	since := c.now()
	r, err := c.measure(ctx, uuid, g.resolution, since)
	if err != nil {
		return r, fmt.Errorf("its clock cannot be read: %w", err)
	}
	return r.less(c.stepped(since)), nil
}

// patiently measures a clock that was set, and does so up to four times more while
// the agent does not answer, or the error is too large to say whether the clock is
// within tolerance: when many guests are released at once, their hwclocks take the
// CPU from each other for a while, and miss the half second that they wait for.
func (c *Clocks) patiently(ctx context.Context, uuid string, g grain, since moment) (reading, error) {
	const wait = 500 * time.Millisecond
	r, err := c.measure(ctx, uuid, g.resolution, since)
	for n := 0; n < 4 && (err != nil || r.bar() > g.tolerance); n++ {
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < 4*wait {
			break
		}
		if sleep(ctx, wait) != nil {
			break
		}
		again, againErr := c.measure(ctx, uuid, g.resolution, since)
		switch r = r.aged(wait); {
		case againErr != nil && err == nil:
			return r, nil
		case err != nil, again.bar() < r.bar():
			r, err = again, againErr
		}
	}
	return r, err
}

// measure reads a guest's clock up to 20 times and compares it with the host's
// wall clock as it would be had it not been stepped since. It stops early when the
// error is small or ctx is nearly over. The error is that of the first reading.
func (c *Clocks) measure(ctx context.Context, uuid string, resolution time.Duration, since moment) (r reading, err error) {
	var last time.Duration
	for n := range samples {
		if deadline, ok := ctx.Deadline(); n > 0 && ok && time.Until(deadline) < 2*r.rtt {
			break
		}
		t, asked, told, err := c.read(ctx, uuid)
		if err != nil {
			if n == 0 {
				return r, err
			}
			break
		}
		// The guest's clock read t, or up to a resolution more, after asked and
		// before told.
		rtt := told.mono - asked.mono
		now := reading{least: t.Sub(since.at(told.mono)), most: t.Sub(since.at(asked.mono)) + resolution, rtt: rtt}.aged(rtt)
		if n == 0 {
			r = now
		} else {
			r = r.aged(told.mono - last).and(now)
		}
		last = told.mono
		if n >= 2 && r.bar() <= time.Duration(n+1)*enough+resolution/2 {
			break
		}
	}
	return r.aged(c.now().mono - last), nil
}

// aged is what is still known of a clock after some time, in which it drifts.
func (r reading) aged(by time.Duration) reading {
	d := time.Duration(drift * float64(by))
	r.least, r.most = r.least-d, r.most+d
	return r
}

// and narrows down what is known by a new reading. If both cannot be true the
// clock has been set in between, and the old one is void.
func (r reading) and(now reading) reading {
	now.rtt = min(now.rtt, r.rtt)
	if least, most := max(r.least, now.least), min(r.most, now.most); least <= most {
		now.least, now.most = least, most
	}
	return now
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
