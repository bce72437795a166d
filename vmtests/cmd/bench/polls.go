package main

import (
	"context"
	"errors"
	"time"

	"belay/vmtests/crowd"
)

const (
	pollingGuests = 1000
	// pollSlice is for how many seconds guests poll each server in a round.
	pollSlice = 3
	// flood is how often a guest asks in a second that floods.
	flood = 10_000
)

// polled is what a server of polls has cost.
type polled struct {
	took  []time.Duration
	cpu   time.Duration // in user and system mode
	lasts time.Duration
	kib   int // of memory, the most seen
}

func (p *polled) share() float64 { return 100 * p.cpu.Seconds() / p.lasts.Seconds() }

// run has guests poll a server for a slice.
func (p *polled) run(ctx context.Context, s *crowd.Server, g *crowd.Polling) error {
	before, err := cpuTime(s.PID())
	if err != nil {
		return err
	}
	begun := time.Now()
	took, err := g.Run(ctx, pollSlice)
	if err != nil {
		return err
	}
	p.lasts += time.Since(begun)
	after, err := cpuTime(s.PID())
	if err != nil {
		return err
	}
	kib, err := residentKiB(s.PID())
	p.took, p.cpu, p.kib = append(p.took, took...), p.cpu+after-before, max(p.kib, kib)
	return err
}

// benchPolls has guests ask once a second that each have an event: Belay, a plain
// handler, and Belay while another guest floods it.
func benchPolls(ctx context.Context, rounds int) (err error) {
	c, err := crowd.New(ctx, pollingGuests+1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	belay, err := c.Belay(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, belay.Close()) }()
	guests, flooder := numbers(0, pollingGuests), pollingGuests
	if err := belay.Announce(guests...); err != nil {
		return err
	}
	length, err := belay.Length(ctx, 0)
	if err != nil {
		return err
	}
	plain, err := c.Plain(ctx, length)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, plain.Close()) }()
	toBelay, err := belay.Poll(ctx, guests)
	if err != nil {
		return err
	}
	defer toBelay.Close()
	toPlain, err := plain.Poll(ctx, guests)
	if err != nil {
		return err
	}
	defer toPlain.Close()

	var quiet, beside, flooded polled
	sent, answered := 0, 0
	turns := []func() error{
		func() error { return quiet.run(ctx, belay, toBelay) },
		func() error { return beside.run(ctx, plain, toPlain) },
		func() error {
			n, m, err := during(ctx, belay, flooder, func() error { return flooded.run(ctx, belay, toBelay) })
			sent, answered = sent+n, answered+m
			return err
		},
	}
	for i := range rounds * len(turns) {
		// Each goes first in a round about as often.
		if err := turns[(i+i/len(turns))%len(turns)](); err != nil {
			return err
		}
	}
	heading("%d guests that poll once a second, for %d s each in slices of %d s, alternating", pollingGuests, rounds*pollSlice, pollSlice)
	tell := func(name string, p polled) {
		line(name, "p50 %s, p99 %s of %d", ms(quantile(p.took, .5)), ms(quantile(p.took, .99)), len(p.took))
		line("  processor, memory", "%.1f %% of one core, %.1f MiB", p.share(), float64(p.kib)/1024)
	}
	tell("belay", quiet)
	tell("plain net/http, same bytes", beside)
	line("belay/plain", "p99 %.2f, processor %.2f, memory %.2f", ratio(quantile(quiet.took, .99), quantile(beside.took, .99)), ratio(quiet.cpu, beside.cpu), float64(quiet.kib)/float64(beside.kib))
	verdict("at most 10 % of one core", quiet.share() <= 10)
	verdict("at most 60 MiB", quiet.kib <= 60<<10)
	verdict("p99 at most 10 ms", quantile(quiet.took, .99) <= 10*time.Millisecond)
	tell("belay while one more floods", flooded)
	of := time.Duration(rounds*pollSlice) * time.Second
	line("  who sent", "%.0f requests/s, and got %.0f answers/s; it wanted to send %d", float64(sent)/of.Seconds(), float64(answered)/of.Seconds(), flood)
	change := ratio(quantile(flooded.took, .99), quantile(quiet.took, .99)) - 1
	line("  p99 of the others", "%+.0f %%", 100*change)
	verdict("p99 of the others changes by less than 20 %", change < .2)
	return nil
}

// during has a guest flood a server while f runs.
func during(ctx context.Context, s *crowd.Server, guest int, f func() error) (sent, answered int, err error) {
	flooding, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		var err error
		sent, answered, err = s.Flood(flooding, guest, flood)
		ended <- err
	}()
	err = f()
	stop()
	return sent, answered, errors.Join(err, <-ended)
}
