package probe

import (
	"context"
	"testing"
	"time"
)

func newMemory(t *testing.T) *Memory {
	t.Helper()
	m, err := NewMemory(1, 2*mib, mib)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestMemoryVerifies(t *testing.T) {
	m := newMemory(t)
	r := m.Verify()
	if !r.OK() || r.Pages != 3*mib/pageSize {
		t.Errorf("fresh memory: %+v", r)
	}
	for _, random := range []bool{false, true} {
		if err := m.Set(DirtySettings{RateMiBs: 1, Random: random}); err != nil {
			t.Fatal(err)
		}
		for range 50 {
			m.dirty(chunk, m.since)
		}
		d := m.Verify()
		if !d.OK() || d.Checksum == r.Checksum || d.FixedChecksum != r.FixedChecksum {
			t.Errorf("dirtied memory, random %v: %+v, was %+v", random, d, r)
		}
		if again := m.Verify(); again.Checksum != d.Checksum || again.FixedChecksum != d.FixedChecksum {
			t.Errorf("checksums are not stable: %+v, %+v", d, again)
		}
	}
}

// Each way in which a migration can spoil a page must show.
func TestMemoryCatchesCorruption(t *testing.T) {
	spoil := map[string]func(m *Memory){
		"one bit in the last word": func(m *Memory) { page(m.working, 7)[pageWords-1] ^= 1 << 40 },
		"one bit by command": func(m *Memory) {
			if err := m.Corrupt(CorruptSettings{Page: 7}); err != nil {
				t.Error(err)
			}
		},
		"a zero page": func(m *Memory) { clear(page(m.working, 7)) },
		"a stale page": func(m *Memory) {
			old := append([]uint64(nil), page(m.working, 7)...)
			m.next = 7
			m.dirty(1, m.since)
			copy(page(m.working, 7), old)
		},
		"a torn page": func(m *Memory) {
			old := append([]uint64(nil), page(m.working, 7)...)
			m.next = 7
			m.dirty(1, m.since)
			copy(page(m.working, 7)[pageWords/2:], old[pageWords/2:])
		},
		"a page of the other part": func(m *Memory) { copy(page(m.working, 7), page(m.fixed, 7)) },
	}
	for name, do := range spoil {
		m := newMemory(t)
		do(m)
		if r := m.Verify(); r.BadPages != 1 || len(r.BadSample) != 1 || r.BadSample[0] != 7 {
			t.Errorf("%s: %+v", name, r)
		}
	}

	m := newMemory(t)
	page(m.working, 1)[0], page(m.working, 2)[0] = page(m.working, 2)[0], page(m.working, 1)[0]
	if r := m.Verify(); r.BadPages != 2 {
		t.Errorf("swapped words: %+v", r)
	}

	m = newMemory(t)
	if err := m.Corrupt(CorruptSettings{Page: 3, Fixed: true}); err != nil {
		t.Fatal(err)
	}
	if r := m.Verify(); r.BadPages != 1 || r.BadSample[0] != 2*mib/pageSize+3 {
		t.Errorf("fixed part: %+v", r)
	}
	if err := m.Corrupt(CorruptSettings{Page: 3, Fixed: true}); err != nil {
		t.Fatal(err)
	}
	if r := m.Verify(); !r.OK() {
		t.Errorf("flipped back: %+v", r)
	}
	if m.Corrupt(CorruptSettings{Page: 1 << 40}) == nil {
		t.Error("a page that does not exist was corrupted")
	}
}

// A page and its entry in the table lost together are consistent, page by
// page; the sum is not.
func TestMemoryCatchesLostLedger(t *testing.T) {
	m := newMemory(t)
	for range 20 {
		m.dirty(chunk, m.since)
	}
	m.gens[7]--
	fill(page(m.working, 7), m.word(7, uint64(m.gens[7])))
	if r := m.Verify(); r.BadPages != 0 || !r.BadLedger || r.OK() {
		t.Errorf("%+v", r)
	}
}

func TestDirtyRate(t *testing.T) {
	m := newMemory(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); m.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	const rate = 40.0
	if err := m.Set(DirtySettings{RateMiBs: rate}); err != nil {
		t.Fatal(err)
	}
	// 20 MiB at 40 MiB/s take half a second.
	var s MemoryStatus
	for deadline := time.Now().Add(10 * time.Second); s.Dirtied < 20*mib; s = m.Status() {
		if time.Now().After(deadline) {
			t.Fatalf("too slow: %+v", s)
		}
		time.Sleep(time.Millisecond)
	}
	got := float64(s.Dirtied) / mib / s.Dirtying.Seconds()
	if got < rate*0.8 || got > rate*1.05 {
		t.Errorf("dirtied %.1f MiB/s, want %.1f", got, rate)
	}
	if r := m.Verify(); !r.OK() {
		t.Errorf("while dirtying: %+v", r)
	}
	if err := m.Set(DirtySettings{WorkingSetMiB: 4}); err != nil {
		t.Fatal(err)
	}
	if s := m.Status(); s.Dirtied != 0 || s.WorkingSet != 4*mib || s.RateMiBs != 0 {
		t.Errorf("after new settings: %+v", s)
	}
	if r := m.Verify(); !r.OK() || r.Pages != 5*mib/pageSize {
		t.Errorf("after resizing: %+v", r)
	}
}

func TestMemorySettings(t *testing.T) {
	m := newMemory(t)
	for _, bad := range []DirtySettings{{RateMiBs: -1}, {WorkingSetMiB: -1}, {WorkingSetMiB: 1 << 30}} {
		if m.Set(bad) == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
	if r := m.Verify(); !r.OK() || r.Pages != 3*mib/pageSize {
		t.Errorf("refused settings changed something: %+v", r)
	}
}
