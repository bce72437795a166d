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

// loads are what the guest does while it is moved.
func loads() []load {
	return []load{
		{"idle guest (heartbeats only)", 0},
		{"guest that dirties 20 MiB/s", 20},
	}
}

type load struct {
	name string
	rate float64 // MiB/s
}

// workingSet is what the guest dirties, MiB.
const workingSet = 64

// benchMigrate moves one guest to and fro by Belay and by virsh in turn.
func benchMigrate(ctx context.Context, bin cluster.Binaries, rounds int) (err error) {
	b, err := measure.Up(ctx, measure.Config{Lab: lab.Config{Name: "bench"}, Bin: bin})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err = errors.Join(err, b.Down(ctx))
	}()
	for _, l := range loads() {
		if err := b.Dirty(ctx, l.rate, workingSet); err != nil {
			return err
		}
		heading("live migration, %s, %d moves by each, alternating, medians (min to max)", l.name, rounds)
		if _, err := b.Virsh(ctx); err != nil { // warms both hosts up
			return err
		}
		var belay, virsh []measure.Move
		for i := range rounds {
			// Turn about, so that each tool goes first, and each way, equally often.
			tools := []func(context.Context) (measure.Move, error){b.Belay, b.Virsh, b.Virsh, b.Belay}
			for _, move := range tools[2*(i%2) : 2*(i%2)+2] {
				m, err := move(ctx)
				if err != nil {
					return err
				}
				if m.Tool == measure.Belay {
					belay = append(belay, m)
				} else {
					virsh = append(virsh, m)
				}
			}
		}
		if err := measure.PrintComparison(os.Stdout, measure.Summarise(measure.Belay, belay), measure.Summarise(measure.Virsh, virsh)); err != nil {
			return err
		}
		if err := b.Prove(ctx); err != nil {
			return err
		}
		line("proved after", "boot ID, memory checksums, one copy, definition")
	}
	return nil
}
