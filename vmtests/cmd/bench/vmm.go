package main

import (
	"context"
	"errors"
	"math"
	"os"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/measure"
)

// benchVMM puts new QEMUs under a guest of 512 MiB and one of 2 GiB.
func benchVMM(ctx context.Context, bin cluster.Binaries, rounds int) error {
	small, err := benchSwaps(ctx, bin, 512, rounds, true)
	if err != nil {
		return err
	}
	large, err := benchSwaps(ctx, bin, 2048, rounds, false)
	if err != nil {
		return err
	}
	growth := large.Median/small.Median - 1
	heading("in place, pause with 2 GiB less that with 512 MiB: %+.0f %%", 100*growth)
	verdict("within 20 %", math.Abs(growth) <= .2)
	return nil
}

// benchSwaps changes the QEMU of a guest with so much memory by Belay in place
// and by virsh in turn; with all, by the other methods too. It gives the pauses
// of those in place.
func benchSwaps(ctx context.Context, bin cluster.Binaries, mib, rounds int, all bool) (inPlace measure.Range, err error) {
	b, err := measure.Up(ctx, measure.Config{Bin: bin,
		Lab:  lab.Config{Name: "bench", Hooks: "dist/hooks"},
		Spec: guest.Spec{MemoryMiB: mib, FileMemory: true}})
	if err != nil {
		return inPlace, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err = errors.Join(err, b.Down(ctx))
	}()
	s := swaps{b, rounds}
	if inPlace, err = s.inPlace(ctx, mib); err != nil || !all {
		return inPlace, err
	}
	for _, f := range []func(context.Context, int) error{s.copied, s.bounced, s.prewarmed} {
		if err := f(ctx, mib); err != nil {
			return inPlace, err
		}
	}
	if err := b.Prove(ctx); err != nil {
		return inPlace, err
	}
	line("proved after", "boot ID, memory checksums, one copy, definition")
	return inPlace, nil
}

type swaps struct {
	*measure.Bed
	rounds int
}

// beside runs both ways in turn and prints what they cost.
func (s swaps) beside(ctx context.Context, aName string, a func(context.Context) (measure.Swap, error), bName string, b func(context.Context) (measure.Swap, error)) (pause, outage, plain measure.Range, err error) {
	var as, bs []measure.Swap
	for range s.rounds {
		m, err := a(ctx)
		if err != nil {
			return pause, outage, plain, err
		}
		n, err := b(ctx)
		if err != nil {
			return pause, outage, plain, err
		}
		as, bs = append(as, m), append(bs, n)
	}
	outage, pause, total := measure.Swaps(as)
	plain, _, plainTotal := measure.Swaps(bs)
	const msec = float64(time.Millisecond)
	err = measure.PrintTable(os.Stdout, aName, bName, []measure.Row{
		{Name: "outage seen on the LAN", A: outage, B: plain, Scale: msec, Unit: "ms"},
		{Name: "total time of the command", A: total, B: plainTotal, Scale: msec, Unit: "ms"},
	})
	line("pause as belayd recorded", "%s", pause.In(msec, "ms"))
	return pause, outage, plain, err
}

func (s swaps) by(m maint.VMMMethod) func(context.Context) (measure.Swap, error) {
	return func(ctx context.Context) (measure.Swap, error) { return s.Replace(ctx, m) }
}

func (s swaps) inPlace(ctx context.Context, mib int) (measure.Range, error) {
	heading("new QEMU in place, guest of %d MiB, %d rounds by each, alternating, medians (min to max)", mib, s.rounds)
	pause, outage, plain, err := s.beside(ctx, "belay in-place", s.by(maint.VMMInPlace), "virsh save, restore", s.SaveRestore)
	if err != nil {
		return pause, err
	}
	if mib == 512 {
		verdict("pause at most 1.5 s", max(pause.Median, outage.Median) <= float64(1500*time.Millisecond))
	}
	verdict("shorter than virsh save and restore", outage.Median < plain.Median)
	return pause, nil
}

func (s swaps) copied(ctx context.Context, mib int) error {
	heading("new QEMU by a copy in RAM, guest of %d MiB, %d rounds by each, alternating, medians (min to max)", mib, s.rounds)
	_, _, _, err := s.beside(ctx, "belay copy", s.by(maint.VMMCopy), "virsh save, restore", s.SaveRestore)
	return err
}

func (s swaps) bounced(ctx context.Context, mib int) error {
	heading("new QEMU by a bounce, guest of %d MiB, %d rounds by each, alternating, medians (min to max)", mib, s.rounds)
	_, outage, plain, err := s.beside(ctx, "belay bounce", s.by(maint.VMMBounce), "belay migrate", s.migrate)
	if err != nil {
		return err
	}
	verdict("outage at most 1.2 times that of a live migration", outage.Median <= 1.2*plain.Median)
	return nil
}

// migrate is a live migration to another host, for comparison.
func (s swaps) migrate(ctx context.Context) (measure.Swap, error) {
	m, err := s.Bed.Belay(ctx)
	return measure.Swap{Outage: m.Outage, Total: m.Total, Report: m.Report}, err
}

func (s swaps) prewarmed(ctx context.Context, mib int) error {
	heading("new QEMU, prewarmed, guest of %d MiB, %d rounds by each, alternating, medians (min to max)", mib, s.rounds)
	c, err := s.Choice(ctx, maint.VMMPrewarmed)
	if err != nil {
		return err
	}
	if len(c.Problems) > 0 {
		line("not possible here", "%s", c.Problems[0].Reason)
		return nil
	}
	pause, outage, _, err := s.beside(ctx, "belay prewarmed", s.by(maint.VMMPrewarmed), "belay in-place", s.by(maint.VMMInPlace))
	if err != nil {
		return err
	}
	verdict("pause at most 50 ms", max(pause.Median, outage.Median) <= float64(50*time.Millisecond))
	return nil
}
