package identity

import (
	"math/bits"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestMarksKeepToTheirMask(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		mask := rapid.Uint32().Filter(func(m uint32) bool { return bits.OnesCount32(m) >= 16 }).Draw(t, "mask")
		m, err := newMarks(mask)
		if err != nil {
			t.Fatal(err)
		}
		slot := rapid.Uint32Range(1, maxSlots).Draw(t, "slot")
		number, err := m.take(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		mark := m.mark(slot, number)
		switch {
		case mark&^mask != 0:
			t.Errorf("mark %#x is outside of mask %#x", mark, mask)
		case mark&m.slotMask() != m.mark(slot, 0):
			t.Errorf("mark %#x does not name slot %d", mark, slot)
		case m.number(mark) != number || number == 0:
			t.Errorf("mark %#x has number %d instead of %d", mark, m.number(mark), number)
		}
	})
	if _, err := newMarks(0x7fff); err == nil || !strings.Contains(err.Error(), "too few") {
		t.Errorf("a mask of 15 bits: %v", err)
	}
}

func TestMarksRestBeforeTheyAreReused(t *testing.T) {
	t.Parallel()
	m, err := newMarks(0xffff) // 255 numbers
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	m.seen(7, now) // by an earlier gate
	taken := map[uint32]bool{7: true}
	for range 254 {
		n, err := m.take(now)
		if err != nil || taken[n] {
			t.Fatalf("number %d is given out twice (%v)", n, err)
		}
		taken[n] = true
	}
	if n, err := m.take(now); err == nil {
		t.Errorf("number %d is given out twice", n)
	}
	m.release(42, now)
	if n, err := m.take(now.Add(rest - 1)); err == nil {
		t.Errorf("number %d is given out too early", n)
	}
	got := map[uint32]bool{}
	for range 2 {
		n, err := m.take(now.Add(rest))
		if err != nil {
			t.Fatal(err)
		}
		got[n] = true
	}
	if !got[7] || !got[42] {
		t.Errorf("numbers %v are given out instead of 7 and 42", got)
	}
}
