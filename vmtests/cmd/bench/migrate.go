package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/lab"
	"belay/vmtests/measure"
)

// loads are what the guest does while it is moved.
func loads() []load {
	return []load{
		{"idle guest (heartbeats only)", 0, 0},
		{"guest that dirties 20 MiB/s", 20, 0},
		{"guest that dirties 60 % of a link of 40 MiB/s", 24, 40},
	}
}

type load struct {
	name string
	rate float64 // MiB/s
	link uint64  // MiB/s; 0: as fast as it can be
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
		if err := shape(ctx, b, l.link); err != nil {
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
		for _, p := range measure.Phases(belay) {
			line("  belay's "+p.Name, "%s", p.Took.In(float64(time.Millisecond), "ms"))
		}
		// The guest's own clock stands still with its vCPUs; the LAN hears it again when
		// it has also got going.
		line("reported blackout", "against the guest's standstill: %s", measure.Agree(belay, func(m measure.Move) time.Duration { return m.Report.Standstill }))
		line("reported blackout", "against the silence on the LAN: %s", measure.Agree(belay, func(m measure.Move) time.Duration { return m.Outage }))
		if err := b.Prove(ctx); err != nil {
			return err
		}
		line("proved after", "boot ID, memory checksums, one copy, definition")
	}
	if err := shape(ctx, b, 0); err != nil {
		return err
	}
	return benchTooFast(ctx, b)
}

// shape gives both hosts a link of so much, MiB/s; 0: as fast as it can be.
func shape(ctx context.Context, b *measure.Bed, mibs uint64) error {
	var shaping []string
	if mibs > 0 {
		shaping = []string{"tbf", "rate", fmt.Sprintf("%dmibit", 8*mibs), "burst", "256kb", "latency", "10ms"}
	}
	for _, n := range []*cluster.Node{b.At(), b.Other()} {
		if err := n.Netem(ctx, shaping...); err != nil {
			return err
		}
	}
	return nil
}

const (
	// tooFast is what a guest dirties, and slowLink what takes it, MiB/s.
	tooFast, slowLink = 60, 20
	// given is how long each tool has for that.
	given = 2 * time.Minute
)

// benchTooFast moves a guest that writes faster than the network takes it: virsh in the
// time given, and Belay with the guest slowed down.
func benchTooFast(ctx context.Context, b *measure.Bed) error {
	if err := b.Dirty(ctx, tooFast, workingSet); err != nil {
		return err
	}
	b.BandwidthMiBs, b.Allow = slowLink, []maint.Means{maint.MeansSlow}
	heading("a guest that dirties %d MiB/s over %d MiB/s, each tool once, %s given", tooFast, slowLink, given)
	in, cancel := context.WithTimeout(ctx, given)
	defer cancel()
	switch m, err := b.Virsh(in); {
	case err == nil:
		line(measure.Virsh, "moved it in %s, outage %s", m.Total.Round(time.Millisecond), m.Outage.Round(time.Millisecond))
	case in.Err() == nil:
		return err
	default:
		line(measure.Virsh, "has not moved it")
		if err := b.Abort(ctx); err != nil {
			return err
		}
	}
	m, err := b.Belay(ctx)
	if err != nil {
		return err
	}
	line(measure.Belay, "moved it in %s, outage %s", m.Total.Round(time.Millisecond), m.Outage.Round(time.Millisecond))
	for _, s := range m.Op.Steps {
		for _, n := range s.Notes {
			line("  as it says", "%s", n)
		}
	}
	return b.Prove(ctx)
}
