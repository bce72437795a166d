package main

import (
	"context"
	"errors"
	"os"
	"time"

	"belay/vmtests/cluster"
	"belay/vmtests/lab"
	"belay/vmtests/measure"
)

const (
	drained = 8 // guests
	// drainInterval is the time between their heartbeats. Each takes an emulated guest some
	// 3 ms of a processor: eight guests that send one every 10 ms keep two cores busy with
	// nothing else, at this they take a quarter of them.
	drainInterval = 50 * time.Millisecond
)

// benchDrain empties a host of its guests by belay drain and by a loop of the shell in
// turn, to and fro.
func benchDrain(ctx context.Context, bin cluster.Binaries, rounds int) (err error) {
	f, err := measure.FlockUp(ctx, measure.FlockConfig{Lab: lab.Config{Name: "bench"}, Bin: bin, Guests: drained, Interval: drainInterval})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err = errors.Join(err, f.Down(ctx))
	}()
	heading("drain, %d guests of 128 MiB, %d rounds by each, alternating, medians (min to max)", drained, rounds)
	if _, err := f.Virsh(ctx); err != nil { // warms both hosts up
		return err
	}
	var belay, virsh []measure.Evacuation
	for i := range rounds {
		// Each tool goes first, and each way, equally often.
		for _, byBelay := range []bool{i%2 == 0, i%2 != 0} {
			var e measure.Evacuation
			if byBelay {
				e, err = f.Belay(ctx)
				belay = append(belay, e)
			} else {
				e, err = f.Virsh(ctx)
				virsh = append(virsh, e)
			}
			if err != nil {
				return err
			}
		}
	}
	row := func(name string, value func(measure.Evacuation) time.Duration) measure.Row {
		return measure.Row{Name: name, A: measure.RangeOf(over(belay, value)), B: measure.RangeOf(over(virsh, value)), Scale: float64(time.Millisecond), Unit: "ms"}
	}
	total := row("total time of the command", func(e measure.Evacuation) time.Duration { return e.Total })
	outage := row("sum of outages on the LAN", measure.Evacuation.Outage)
	longest := row("longest outage of a guest", func(e measure.Evacuation) (most time.Duration) {
		for _, o := range e.Outages {
			most = max(most, o)
		}
		return most
	})
	if err := measure.PrintTable(os.Stdout, "belay drain", "shell loop", []measure.Row{total, outage, longest}); err != nil {
		return err
	}
	verdict("total at most 0.6 of the shell loop's", total.A.Median <= 0.6*total.B.Median)
	verdict("sum of outages at most 0.6 of the shell loop's", outage.A.Median <= 0.6*outage.B.Median)
	if err := f.Prove(ctx, nil); err != nil {
		return err
	}
	line("proved after", "boot IDs, memory checksums, one copy, definitions")
	return nil
}

func over(all []measure.Evacuation, value func(measure.Evacuation) time.Duration) (values []time.Duration) {
	for _, e := range all {
		values = append(values, value(e))
	}
	return values
}
