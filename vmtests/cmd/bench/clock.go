package main

import (
	"context"
	"time"

	"belay/vmtests/cluster"
	"belay/vmtests/measure"
)

// benchClock holds one guest for a second and looks at its clock once the
// command has returned; by virsh that is suspend, sleep, resume, domtime --now.
// The ruler for both is the guest's probe, asked 20 times.
func benchClock(ctx context.Context, bin cluster.Binaries, rounds int) error {
	return ward(ctx, bin, 1, func(w *measure.Ward) error {
		heading("clock after a pause of 1 s, %d rounds by each, alternating", rounds)
		var seen, reported, virsh, bars []time.Duration
		for range rounds {
			m, err := w.Belay(ctx, holdStep)
			if err != nil {
				return err
			}
			c := m.Guests[0].Clock
			seen, bars = append(seen, c.Offset.Abs()), append(bars, c.Error)
			if after := m.Op.Held.Guests[0].Clock.After; after != nil {
				reported = append(reported, after.Offset.Abs())
			}
			if _, err := w.Virsh(ctx, holdStep); err != nil {
				return err
			}
			if c, err = w.Domtime(ctx); err != nil {
				return err
			}
			virsh = append(virsh, c.Offset.Abs())
			if err := w.Sync(ctx); err != nil {
				return err
			}
		}
		tell := func(name string, d []time.Duration) {
			line(name, "median %s, p99 %s of %d", ms(measure.Median(d)), ms(quantile(d, .99)), len(d))
		}
		tell("belay, |offset| by the guest", seen)
		tell("belay, |offset| as reported", reported)
		tell("virsh domtime --now", virsh)
		line("error of the ruler", "± %s", ms(measure.Median(bars)))
		times := ratio(measure.Median(virsh), measure.Median(seen))
		line("virsh/belay", "%.0f", times)
		verdict("at most 2 ms at the median", measure.Median(seen) <= 2*time.Millisecond && measure.Median(reported) <= 2*time.Millisecond)
		verdict("at most 5 ms at p99", quantile(seen, .99) <= 5*time.Millisecond && quantile(reported, .99) <= 5*time.Millisecond)
		verdict("100 times better than virsh domtime --now", times >= 100)
		return nil
	})
}
