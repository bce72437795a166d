package main

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/measure"
)

const (
	held     = 20          // guests
	holdStep = time.Second // what sleep is asked for
)

// ward runs f in a ward of n guests.
func ward(ctx context.Context, bin cluster.Binaries, n int, f func(*measure.Ward) error) (err error) {
	w, err := measure.WardUp(ctx, bin, "bench", n)
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err = errors.Join(err, w.Down(ctx))
	}()
	return f(w)
}

// benchHold holds 20 guests while a command runs, by Belay and by a loop of
// the shell in turn. Each guest's pause is one sample. It is told by three
// rulers: QEMU, whose events STOP and RESUME bear its own time; the guest's clock,
// which stands still with it, as the LAN sees it by the heartbeats; and, for Belay,
// belayd. What a pause has beyond the second that was asked for is
// the tool's overhead.
func benchHold(ctx context.Context, bin cluster.Binaries, rounds int) error {
	return ward(ctx, bin, held, func(w *measure.Ward) error {
		heading("hold, %d guests around sleep 1, %d rounds by each, alternating, medians (min to max)", held, rounds)
		var belay, virsh []measure.Hold
		for i := range rounds {
			// Belay goes first every other time. Clocks are put right after
			// virsh, which leaves them behind.
			for _, byBelay := range []bool{i%2 == 0, i%2 != 0} {
				if byBelay {
					m, err := w.Belay(ctx, holdStep)
					if err != nil {
						return err
					}
					belay = append(belay, m)
					continue
				}
				m, err := w.Virsh(ctx, holdStep)
				if err == nil {
					err = w.Sync(ctx)
				}
				if err != nil {
					return err
				}
				virsh = append(virsh, m)
			}
		}
		if err := tellHolds(belay, virsh); err != nil {
			return err
		}
		tellStale(belay)
		if err := w.Prove(ctx); err != nil {
			return err
		}
		line("proved after", "boot IDs, memory checksums")
		return tellLeash(ctx, w, belay)
	})
}

func tellHolds(belay, virsh []measure.Hold) error {
	overhead := func(h measure.Hold, g measure.Held) time.Duration { return g.Length() - holdStep }
	row := func(name string, f func(measure.Hold, measure.Held) time.Duration) measure.Row {
		return measure.Row{Name: name, A: measure.RangeOf(each(belay, f)), B: measure.RangeOf(each(virsh, f)), Scale: float64(time.Millisecond), Unit: "ms"}
	}
	over := row("overhead: pause less 1 s", overhead)
	if err := measure.PrintTable(os.Stdout, "belay", "shell loop", []measure.Row{
		row("pause by QEMU's events", func(_ measure.Hold, g measure.Held) time.Duration { return g.Length() }),
		over,
		row("lost by the guest's clock", func(_ measure.Hold, g measure.Held) time.Duration { return g.Lost }),
	}); err != nil {
		return err
	}
	// belayd's record is an upper bound: it goes from before the pause was
	// asked for until it was known to be over.
	beyond := each(belay, func(h measure.Hold, g measure.Held) time.Duration { return g.Length() - h.Step })
	line("the step really took", "%s", inMs(each(belay, func(h measure.Hold, _ measure.Held) time.Duration { return h.Step })))
	line("pause beyond the step", "%s, by QEMU's events", inMs(beyond))
	line("  as belayd recorded it", "%s", inMs(each(belay, func(h measure.Hold, g measure.Held) time.Duration { return g.Recorded - h.Step })))
	tellParts(belay)
	verdict("pause within 50 ms of the step at the median", measure.Median(beyond) <= 50*time.Millisecond)
	verdict("pause within 150 ms of the step at the worst", slices.Max(beyond) <= 150*time.Millisecond)
	verdict("overhead at most a quarter of the shell loop's", over.A.Median <= over.B.Median/4)
	return nil
}

// tellParts tells where the time goes beyond the step.
func tellParts(belay []measure.Hold) {
	var stopping, begin, end, resuming []time.Duration
	for _, h := range belay {
		byStop := func(a, b measure.Held) int { return a.Stopped.Compare(b.Stopped) }
		byResume := func(a, b measure.Held) int { return a.Resumed.Compare(b.Resumed) }
		stopped, first, last := slices.MaxFunc(h.Guests, byStop).Stopped, slices.MinFunc(h.Guests, byResume).Resumed, slices.MaxFunc(h.Guests, byResume).Resumed
		step := h.Op.Held.Step
		stopping = append(stopping, stopped.Sub(slices.MinFunc(h.Guests, byStop).Stopped))
		begin = append(begin, step.Started.Sub(stopped))
		end = append(end, first.Sub(step.Ended))
		resuming = append(resuming, last.Sub(first))
	}
	line("  from first to last stop", "%s", inMs(stopping))
	line("  to the step's beginning", "%s", inMs(begin))
	line("  from its end to a release", "%s", inMs(end))
	line("  from first to last release", "%s", inMs(resuming))
}

// tellStale tells how long guests ran with a wrong clock, by belayd, and by the
// guest, which noted when its clock was set.
func tellStale(belay []measure.Hold) {
	stale := each(belay, func(_ measure.Hold, g measure.Held) time.Duration { return g.Stale })
	seen := each(belay, func(_ measure.Hold, g measure.Held) time.Duration { return g.Clock.Stale })
	line("ran with a stale clock", "%s", inMs(stale))
	line("  by the guests' own notes", "%s", inMs(seen))
	line("clock off afterwards", "%s", inMs(each(belay, func(_ measure.Hold, g measure.Held) time.Duration { return g.Clock.Offset })))
	for i, h := range belay {
		for _, g := range h.Op.Held.Guests {
			if g.Clock.State != maint.ClockSynchronised {
				line("  not synchronised", "round %d, %s: %s", i+1, g.Guest, g.Clock.Reason)
			}
		}
	}
	both := slices.Concat(stale, seen)
	verdict("stale for at most 100 ms at the median", max(measure.Median(stale), measure.Median(seen)) <= 100*time.Millisecond)
	verdict("stale for at most 100 ms at the worst", slices.Max(both) <= 100*time.Millisecond)
}

func tellLeash(ctx context.Context, w *measure.Ward, belay []measure.Hold) error {
	var armed, arming []time.Duration
	for _, m := range belay {
		at, err := m.Armed()
		if err != nil {
			return err
		}
		armed = append(armed, at.Sub(m.Asked))
		for _, s := range m.Op.Steps {
			if s.Name == "hold" {
				arming = append(arming, at.Sub(s.Started))
			}
		}
	}
	kib, err := w.LeashKiB(ctx)
	if err != nil {
		return err
	}
	line("leash, request to armed", "%s; after preflight %s", inMs(armed), inMs(arming))
	line("leash, resident memory", "%.1f MiB", float64(kib)/1024)
	return nil
}

// each is what f tells of each guest in each hold.
func each(holds []measure.Hold, f func(measure.Hold, measure.Held) time.Duration) (all []time.Duration) {
	for _, h := range holds {
		for _, g := range h.Guests {
			all = append(all, f(h, g))
		}
	}
	return all
}

func inMs(d []time.Duration) string {
	return measure.RangeOf(d).In(float64(time.Millisecond), "ms")
}
