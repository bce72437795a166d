package observer

import (
	"cmp"
	"slices"
	"time"
)

// Report is what happened to one guest's heartbeats between a mark and the
// call of Since. All durations are in ns in JSON.
type Report struct {
	Guest    string        `json:"guest"`
	Span     time.Duration `json:"span_ns"`     // from the mark to now
	Interval time.Duration `json:"interval_ns"` // the guest's schedule, as last said
	Received int           `json:"received"`

	// Lost counts sequence numbers that did not arrive although a later one
	// did. What was lost at the very end of the span is not known yet.
	Lost       uint64 `json:"lost"`
	Duplicated int    `json:"duplicated"` // arrived before
	Reordered  int    `json:"reordered"`  // arrived after a later one
	Skipped    uint32 `json:"skipped"`    // the guest was late and did not send
	Restarts   int    `json:"restarts"`   // of the guest, or of its probe

	// ReceiverDrops counts datagrams, of any guest, that the observer's own
	// socket had no room for. They are also among the lost: with drops the
	// loss says nothing about the path.
	ReceiverDrops uint32 `json:"receiver_drops"`
	// Truncated is set when the span is longer than the observer's memory;
	// the report then covers its last part only.
	Truncated bool `json:"truncated"`

	LargestGap Gap           `json:"largest_gap"`
	MedianGap  time.Duration `json:"median_gap_ns"` // between arrivals
	P99Gap     time.Duration `json:"p99_gap_ns"`

	// Standstill is by how much the guest's monotonic clock advanced less
	// than the observer's, over the whole span: the sum of all its pauses,
	// and a second opinion on the largest gap.
	Standstill time.Duration `json:"standstill_ns"`

	ClockBefore Offset `json:"clock_before"` // up to the largest gap
	ClockAfter  Offset `json:"clock_after"`  // at the end, after the largest gap
}

// Gap is a time in which no heartbeat arrived. One that began before the mark
// or is still open counts in full.
type Gap struct {
	Length time.Duration `json:"length_ns"`
	Start  time.Duration `json:"start_ns"`         // after the mark; negative: before it
	After  uint64        `json:"after_sequence"`   // the last to arrive before it
	Until  uint64        `json:"until_sequence"`   // the first to arrive after it; 0 while open
	Open   bool          `json:"open,omitempty"`   // nothing has arrived since
	Reboot bool          `json:"reboot,omitempty"` // another incarnation sent after it
}

// Offset is the guest's wall clock minus the observer's.
type Offset struct {
	Value   time.Duration `json:"value_ns"`
	Error   time.Duration `json:"error_ns"` // the true offset is within ± this
	Samples int           `json:"samples"`  // 0: not known
}

// Pause is the best estimate of how long the guest was away: the largest gap
// less the one interval that lies between two heartbeats anyway. It is off by
// at most one interval plus the jitter of the path (P99Gap − Interval).
func (r Report) Pause() time.Duration { return max(0, r.LargestGap.Length-r.Interval) }

// ClockStep is by how much the guest's wall clock moved against the observer's
// over the largest gap (negative: it fell behind), and the error of that. It
// is not ok when there were no heartbeats on one side of the gap.
func (r Report) ClockStep() (step, errorBar time.Duration, ok bool) {
	if r.ClockBefore.Samples == 0 || r.ClockAfter.Samples == 0 {
		return 0, 0, false
	}
	return r.ClockAfter.Value - r.ClockBefore.Value, r.ClockAfter.Error + r.ClockBefore.Error, true
}

// sample is one heartbeat as it is kept.
type sample struct {
	at      int64  // arrival on the observer's CLOCK_MONOTONIC, ns
	offset  int64  // guest's wall clock minus the observer's at arrival, ns
	mono    int64  // guest's CLOCK_MONOTONIC, ns
	seq     uint64 // within the epoch
	epoch   uint32 // counts the incarnations seen
	skipped uint32 // cumulative in the epoch
	drops   uint32 // cumulative, of the observer's socket
}

const (
	// offsetSamples is over how many heartbeats a clock offset is taken.
	offsetSamples = 256
	// offsetFloor is the least error of a clock offset: the time that even
	// the fastest heartbeat was on its way is not known.
	offsetFloor = 100 * time.Microsecond
	// lookBack is how many samples before the mark a report may use.
	lookBack = offsetSamples
)

// analyse computes a report from the samples up to the mark (the last of them
// is the anchor of the first gap), those after it, and the present time. It is
// all the arithmetic of the package and touches nothing else.
func analyse(before, in []sample, mark, now int64) Report {
	r := Report{Span: time.Duration(now - mark), Received: len(in)}
	all := slices.Concat(before, in)
	first := len(before) // index in all of the first sample of the span
	gapEnd := r.gaps(all, first, mark, now)
	r.order(all, first)
	r.clocks(all, first, gapEnd)
	return r
}

// gaps measures the times between arrivals. It returns the index of the sample
// that ended the largest, len(all) if that is open, or 0 if there is none.
func (r *Report) gaps(all []sample, first int, mark, now int64) (end int) {
	var between []time.Duration
	if first == 0 && len(all) > 0 {
		// Not heard of before: it was away from the mark on at least.
		r.LargestGap = Gap{Length: time.Duration(all[0].at - mark), Until: all[0].seq}
	}
	for i := max(first, 1); i < len(all); i++ {
		a, b := all[i-1], all[i]
		d := time.Duration(max(0, b.at-a.at))
		between = append(between, d)
		if d > r.LargestGap.Length {
			end = i
			r.LargestGap = Gap{
				Length: d, Start: time.Duration(a.at - mark),
				After: a.seq, Until: b.seq, Reboot: a.epoch != b.epoch,
			}
		}
	}
	if n := len(all); n > 0 {
		last := all[n-1]
		if d := time.Duration(now - last.at); d > r.LargestGap.Length {
			end = n
			r.LargestGap = Gap{Length: d, Start: time.Duration(last.at - mark), After: last.seq, Open: true}
		}
	} else {
		// Never heard of: it has been away for the whole span at least.
		r.LargestGap = Gap{Length: time.Duration(now - mark), Open: true}
	}
	if len(between) > 0 {
		slices.Sort(between)
		r.MedianGap = between[len(between)/2]
		r.P99Gap = between[(len(between)*99)/100]
	}
	return end
}

// order counts what was lost, doubled, late, skipped and dropped, one epoch
// after the other.
func (r *Report) order(all []sample, first int) {
	if first == len(all) {
		return
	}
	// The anchor, or else the first sample, is what the span starts from.
	base := all[max(0, first-1)]
	top := base.epoch
	// A late one of an old epoch may stand among those of a new one.
	byEpoch := map[uint32][]int{}
	for i, s := range all {
		byEpoch[s.epoch] = append(byEpoch[s.epoch], i)
		top = max(top, s.epoch)
	}
	r.Restarts = int(top - base.epoch)
	r.ReceiverDrops = all[len(all)-1].drops - base.drops
	for _, index := range byEpoch {
		r.orderEpoch(all, index, first)
	}
}

// orderEpoch counts for the samples of one epoch, which are given by index in
// order of arrival.
func (r *Report) orderEpoch(all []sample, index []int, first int) {
	// base: up to here, things happened before the mark.
	var base, top uint64
	var skipBase, skipTop uint32
	late := map[int]bool{} // arrived after a later one
	for n, i := range index {
		s := all[i]
		if n == 0 || s.seq > top {
			top = s.seq
		} else {
			late[i] = true
		}
		if n == 0 || s.skipped > skipTop {
			skipTop = s.skipped
		}
		if i < first || n == 0 {
			skipBase = skipTop
		}
		if i < first {
			base = top
		}
	}
	if index[len(index)-1] < first {
		return // all of it before the mark
	}
	r.Skipped += skipTop - skipBase

	slices.SortStableFunc(index, func(a, b int) int { return cmp.Compare(all[a].seq, all[b].seq) })
	if index[0] >= first {
		// No anchor: what came before the first is not ours to miss.
		base = all[index[0]].seq - 1
	}
	var distinct uint64
	for n, i := range index {
		seen := n > 0 && all[index[n-1]].seq == all[i].seq
		if i >= first {
			switch {
			case seen:
				r.Duplicated++
			case late[i]:
				r.Reordered++
			}
		}
		if !seen && all[i].seq > base {
			distinct++
		}
	}
	r.Lost += top - base - distinct
}

// clocks compares the guest's clocks with the observer's. gapEnd is the index
// of the first sample after the largest gap.
func (r *Report) clocks(all []sample, first, gapEnd int) {
	r.ClockBefore = offsetOf(all[max(0, gapEnd-offsetSamples):gapEnd])
	r.ClockAfter = offsetOf(all[max(gapEnd, len(all)-offsetSamples):])
	start := max(0, first-1)
	for i := start + 1; i < len(all); i++ {
		a, b := all[i-1], all[i]
		// Over a reboot the guest's clock says nothing.
		if a.epoch == b.epoch {
			r.Standstill += time.Duration((b.at - a.at) - (b.mono - a.mono))
		}
	}
}

// offsetOf filters the offsets of some heartbeats. Each is the true offset
// less the time the heartbeat was on its way, so the largest is the best, and
// how far the others are from it tells how far it may itself be from the
// truth.
func offsetOf(s []sample) Offset {
	if len(s) == 0 {
		return Offset{}
	}
	v := make([]int64, len(s))
	for i := range s {
		v[i] = s[i].offset
	}
	slices.Sort(v)
	best := v[len(v)-1]
	spread := time.Duration(best - v[len(v)/2])
	return Offset{Value: time.Duration(best), Error: max(offsetFloor, spread), Samples: len(s)}
}
