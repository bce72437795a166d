package main

import (
	"context"
	"errors"
	"time"

	"belay/vmtests/cluster"
	"belay/vmtests/crowd"
)

const waitingGuests = 200

// benchEvents measures how soon guests see what they are told, and what it costs
// when they only ask: by Belay's own server in a process of its own, for guests in
// network namespaces. It needs no lab.
func benchEvents(ctx context.Context, _ cluster.Binaries, rounds int) error {
	if err := benchVisible(ctx, rounds); err != nil {
		return err
	}
	return benchPolls(ctx, rounds)
}

// benchVisible tells guests that wait of events: one in a round to each guest
// alone, and one to each by an operation that tells all in turn.
func benchVisible(ctx context.Context, rounds int) (err error) {
	c, err := crowd.New(ctx, waitingGuests)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	s, err := c.Belay(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	w, err := s.Wait(ctx, waitingGuests)
	if err != nil {
		return err
	}
	defer w.Close()
	guests := numbers(0, waitingGuests)
	var alone, inTurn, atOnce []crowd.Visible
	var lasted []time.Duration
	for range rounds {
		for _, g := range guests {
			v, err := w.Announce(ctx, g)
			if err != nil {
				return err
			}
			alone = append(alone, v...)
		}
		v, err := w.Cancel(ctx, guests...)
		if err != nil {
			return err
		}
		atOnce = append(atOnce, v...)
		if v, err = w.Announce(ctx, guests...); err != nil {
			return err
		}
		inTurn = append(inTurn, v...)
		lasted = append(lasted, lastSeen(v)-firstAsked(v))
		if v, err = w.Cancel(ctx, guests...); err != nil {
			return err
		}
		atOnce = append(atOnce, v...)
	}
	heading("from the announcement of an event to its guest's having read it, %d guests with long polls", waitingGuests)
	tellVisible("an event of one guest", alone)
	tellVisible("an event for each in turn", inTurn)
	line("  all have seen it after", "%s", inMs(lasted))
	tellVisible("one change of all", atOnce)
	verdict("p99 at most 20 ms", quantile(delays(alone), .99) <= 20*time.Millisecond && quantile(delays(inTurn), .99) <= 20*time.Millisecond)
	return nil
}

func tellVisible(name string, all []crowd.Visible) {
	var durable []time.Duration
	for _, v := range all {
		durable = append(durable, v.Durable-v.Asked)
	}
	line(name, "p50 %s, p99 %s of %d", ms(quantile(delays(all), .5)), ms(quantile(delays(all), .99)), len(all))
	line("  of that until on disk", "p50 %s, p99 %s", ms(quantile(durable, .5)), ms(quantile(durable, .99)))
}

func delays(all []crowd.Visible) (d []time.Duration) {
	for _, v := range all {
		d = append(d, v.Seen-v.Asked)
	}
	return d
}

func firstAsked(all []crowd.Visible) time.Duration {
	first := all[0].Asked
	for _, v := range all {
		first = min(first, v.Asked)
	}
	return first
}

func lastSeen(all []crowd.Visible) (last time.Duration) {
	for _, v := range all {
		last = max(last, v.Seen)
	}
	return last
}

// numbers are those from first to before end.
func numbers(first, end int) (all []int) {
	for i := first; i < end; i++ {
		all = append(all, i)
	}
	return all
}
