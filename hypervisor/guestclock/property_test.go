package guestclock

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"belay/agent/maint"
)

// Whatever the ways, the losses, the drift and the host do: what is said to be
// synchronised is, the error bars hold, and no clock ends ahead because of us.
func TestNeverFalselySynchronised(t *testing.T) {
	seed := rand.Uint64()
	rounds := 3000
	if testing.Short() {
		rounds = 300
	}
	states := map[maint.ClockState]int{}
	for n := range rounds {
		rng := rand.New(rand.NewPCG(seed, uint64(n)))
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			r, ahead := w.random(t, ctx, rng)
			states[r.State]++
			off, tolerance := w.guest.offset(), grainOf(w.guest.tick > ms).tolerance
			const rounding = 20 * time.Microsecond
			if r.State == maint.ClockSynchronised {
				o := r.After
				if o == nil {
					o = r.Before
				}
				if off.Abs() > tolerance+o.Error+rounding {
					t.Errorf("seed %d/%d: synchronised, but off by %s: %+v", seed, n, off, r)
				}
			}
			if r.After != nil && r.State != maint.ClockUnsynchronised && (off-r.After.Offset).Abs() > r.After.Error+rounding {
				t.Errorf("seed %d/%d: reported %+v, is %s", seed, n, *r.After, off)
			}
			if by := w.guest.aheadBy; !ahead && by > longest+rounding {
				t.Errorf("seed %d/%d: set ahead by %s: %+v", seed, n, by, r)
			}
			w.guest.backBy = 0 // a shot that is held up can step back; see the package comment
		})
	}
	t.Log(states)
	if states[maint.ClockSynchronised] < rounds/4 || states[maint.ClockOff] == 0 || states[maint.ClockUnsynchronised] == 0 {
		t.Errorf("the worlds are all alike: %v", states)
	}
}

// random makes a world of its own kind and does something to its guest. ahead
// tells that its clock may be ahead by right.
func (w *world) random(t *testing.T, ctx context.Context, rng *rand.Rand) (r maint.ClockReport, ahead bool) {
	g := w.guest
	chance := func(p float64) bool { return rng.Float64() < p }
	upTo := func(d time.Duration) time.Duration { return time.Duration(rng.Int64N(int64(d))) }
	least, most := upTo(3*ms), upTo(20*ms)+1
	way := func() time.Duration {
		if chance(0.03) {
			return upTo(2 * time.Second)
		}
		return least + upTo(most)
	}
	g.there, g.back = way, way
	g.rate = (rng.Float64() - 0.5) * 400e-6
	if chance(0.2) {
		g.tick, g.hwclock, g.os = 15625*time.Microsecond, "", `{"id":"mswindows","kernel-version":"10"}`
	}
	if chance(0.1) {
		g.hwclock = "missing"
	} else if chance(0.1) {
		g.hwclock = "failing"
	}
	if chance(0.15) {
		g.lostAfter = rng.IntN(30)
	}
	if chance(0.3) {
		off := upTo(4*time.Second) - 2*time.Second
		g.put(time.Now().Add(off))
		ahead = off > 0
	}
	if chance(0.2) {
		by := upTo(400*ms) - 200*ms
		ahead = ahead || by < 0
		time.AfterFunc(upTo(8*time.Second), func() { w.stepHost(by) })
	}
	if chance(0.2) {
		return w.Sync(ctx, g.known()), ahead
	}
	return w.hold(t, ctx, upTo(5*time.Second), nil), ahead
}
