package measure

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
)

// Swap is what was measured of one change of a guest's QEMU.
type Swap struct {
	Outage time.Duration // the longest silence on the LAN
	Pause  time.Duration // the longest standstill by Belay's account, 0 for virsh
	Total  time.Duration // the command, from its start to its exit
	Op     *maint.Op     // nil for virsh
	Report observer.Report
}

// Replace puts a new QEMU under the guest by belay replace-vmm.
func (b *Bed) Replace(ctx context.Context, method maint.VMMMethod) (Swap, error) {
	return b.swap(ctx, string(method), func(s *Swap) error {
		var op maint.Op
		if err := b.At().BelayJSON(ctx, &op, "replace-vmm", b.name(), "--method", string(method)); err != nil {
			return err
		}
		if op.Outcome != maint.OutcomeDone || op.Replaced == nil {
			return fmt.Errorf("operation %s: outcome %s, and no measurements", op.ID, op.Outcome)
		}
		s.Op, s.Pause = &op, op.Replaced.Pause
		return nil
	})
}

// SaveRestore puts a new QEMU under the guest by virsh save and virsh restore,
// its memory meanwhile in a file that is in RAM too.
func (b *Bed) SaveRestore(ctx context.Context) (Swap, error) {
	const file = lab.MemoryDir + "/benchmark.save"
	s, err := b.swap(ctx, "virsh save and restore", func(*Swap) error {
		for _, args := range [][]string{{"save", b.name(), file}, {"restore", file}} {
			if _, err := b.At().Virsh(ctx, args...); err != nil {
				return err
			}
		}
		return nil
	})
	return s, errors.Join(err, os.Remove(b.At().Path(file)))
}

// swap lets f change the guest's QEMU and observes what the LAN sees of it.
func (b *Bed) swap(ctx context.Context, by string, f func(*Swap) error) (s Swap, err error) {
	if err := pause(ctx, rest); err != nil {
		return s, err
	}
	mark, begin := b.Observer.Mark(), time.Now()
	if err := f(&s); err != nil {
		return s, fmt.Errorf("cannot give guest %s another QEMU by %s: %w", b.name(), by, err)
	}
	s.Total = time.Since(begin)
	s.Report, err = b.since(ctx, mark)
	s.Outage = s.Report.Pause()
	return s, err
}

// Choice is belay's word on a method for the guest, without doing it.
func (b *Bed) Choice(ctx context.Context, method maint.VMMMethod) (c maint.VMMChoice, err error) {
	var plans []struct {
		Choices []maint.VMMChoice `json:"choices"`
	}
	if err := b.At().BelayJSON(ctx, &plans, "replace-vmm", b.name(), "--dry-run"); err != nil {
		return c, err
	}
	for _, p := range plans {
		if i := slices.IndexFunc(p.Choices, func(c maint.VMMChoice) bool { return c.Method == method }); i >= 0 {
			return p.Choices[i], nil
		}
	}
	return c, fmt.Errorf("belay replace-vmm --dry-run has no word on %s", method)
}

// Swaps sums up some swaps: the outages, Belay's pauses, and the totals.
func Swaps(all []Swap) (outage, pause, total Range) {
	var o, p, t []time.Duration
	for _, s := range all {
		o, p, t = append(o, s.Outage), append(p, s.Pause), append(t, s.Total)
	}
	return RangeOf(o), RangeOf(p), RangeOf(t)
}
