package identity

import (
	"fmt"
	"math/bits"
	"time"
)

const (
	// slotBits of a mark name the bridge, so that one routing rule for each
	// bridge will do.
	slotBits = 8
	maxSlots = 1<<slotBits - 1
	// rest is how long a number is not given out again: longer than anything of
	// a connection outlives its end.
	rest = time.Hour
)

// marks gives out packet marks: the bridge's slot in the highest bits of the
// mask, then a number, which is never 0 and grows until it wraps around.
type marks struct {
	mask uint32
	last uint32               // number given out
	busy map[uint32]time.Time // numbers, and when they were given back; zero: in use
}

func newMarks(mask uint32) (*marks, error) {
	if n := bits.OnesCount32(mask); n < 2*slotBits {
		return nil, fmt.Errorf("mark mask %#x has %d bits, which is too few (give it %d at least)", mask, n, 2*slotBits)
	}
	return &marks{mask: mask, busy: make(map[uint32]time.Time)}, nil
}

func (m *marks) numberBits() int { return bits.OnesCount32(m.mask) - slotBits }

// mark is what a slot's packets are marked with.
func (m *marks) mark(slot, number uint32) uint32 {
	return spread(slot<<m.numberBits()|number, m.mask)
}

// slotMask are the bits that name a bridge.
func (m *marks) slotMask() uint32 { return m.mark(maxSlots, 0) }

// number is that of a mark.
func (m *marks) number(mark uint32) uint32 {
	return gather(mark, m.mask) & (1<<m.numberBits() - 1)
}

// take gives out a number that nobody has or had lately.
func (m *marks) take(now time.Time) (uint32, error) {
	most := uint32(1)<<m.numberBits() - 1
	for range most {
		m.last = m.last%most + 1
		back, known := m.busy[m.last]
		if known && (back.IsZero() || now.Sub(back) < rest) {
			continue
		}
		m.busy[m.last] = time.Time{}
		return m.last, nil
	}
	return 0, fmt.Errorf("all %d marks of mask %#x are in use, or were within the last %v (give a mask with more bits)", most, m.mask, rest)
}

// release gives a number back.
func (m *marks) release(number uint32, now time.Time) { m.busy[number] = now }

// seen is told of a number that an earlier gate gave out.
func (m *marks) seen(number uint32, now time.Time) {
	m.busy[number] = now
	m.last = max(m.last, number)
}

// spread puts the lowest bits of v where mask has its bits, and gather takes them
// from there.
func spread(v, mask uint32) (spread uint32) {
	for ; mask != 0; mask &= mask - 1 {
		if v&1 != 0 {
			spread |= mask & -mask
		}
		v >>= 1
	}
	return spread
}

func gather(spread, mask uint32) (v uint32) {
	for i := 0; mask != 0; mask &= mask - 1 {
		if spread&mask&-mask != 0 {
			v |= 1 << i
		}
		i++
	}
	return v
}
