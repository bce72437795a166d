package observer

import (
	"testing"
	"time"
)

const (
	tick = int64(time.Millisecond)
	// transit is how long heartbeats of a made train are on their way.
	transit = int64(80 * time.Microsecond)
)

// cut makes a train of n heartbeats, one each ms, and divides it at a mark
// between heartbeats numbered markAt and markAt+1 (from 1).
type made struct {
	s    []sample
	mark int64
	now  int64
}

func train1kHz(n, markAt int) *made {
	m := &made{mark: int64(markAt)*tick + tick/2, now: int64(n)*tick + tick/2}
	for i := 1; i <= n; i++ {
		m.s = append(m.s, sample{at: int64(i) * tick, mono: int64(i)*tick - transit, seq: uint64(i), offset: -transit})
	}
	return m
}

// pause holds the guest for d after heartbeat seq: it and its clocks stand
// still.
func (m *made) pause(seq uint64, d time.Duration) *made {
	for i := range m.s {
		if m.s[i].seq > seq {
			m.s[i].at += int64(d)
			m.s[i].offset -= int64(d)
		}
	}
	m.now += int64(d)
	return m
}

// lose drops heartbeats a to b.
func (m *made) lose(a, b uint64) *made {
	var kept []sample
	for _, s := range m.s {
		if s.seq < a || s.seq > b {
			kept = append(kept, s)
		}
	}
	m.s = kept
	return m
}

func (m *made) report() Report {
	i := 0
	for i < len(m.s) && m.s[i].at < m.mark {
		i++
	}
	r := analyse(m.s[:i], m.s[i:], m.mark, m.now)
	r.Interval = time.Millisecond
	return r
}

func TestQuietTrain(t *testing.T) {
	r := train1kHz(1000, 100).report()
	if r.Received != 900 || r.Lost != 0 || r.Duplicated != 0 || r.Reordered != 0 || r.Restarts != 0 || r.Skipped != 0 {
		t.Errorf("counts of a perfect train: %+v", r)
	}
	if r.MedianGap != time.Millisecond || r.P99Gap != time.Millisecond || r.LargestGap.Length != time.Millisecond || r.Pause() != 0 {
		t.Errorf("gaps of a perfect train: %+v", r)
	}
	if r.Standstill != 0 {
		t.Errorf("standstill = %v", r.Standstill)
	}
}

func TestPauseIsGap(t *testing.T) {
	r := train1kHz(1000, 100).pause(400, 300*time.Millisecond).report()
	want := Gap{Length: 301 * time.Millisecond, Start: 299500 * time.Microsecond, After: 400, Until: 401}
	if r.LargestGap != want {
		t.Errorf("gap = %+v, want %+v", r.LargestGap, want)
	}
	if r.Pause() != 300*time.Millisecond || r.Standstill != 300*time.Millisecond || r.Lost != 0 {
		t.Errorf("pause %v, standstill %v, lost %d", r.Pause(), r.Standstill, r.Lost)
	}
	step, bar, ok := r.ClockStep()
	if !ok || step != -300*time.Millisecond || bar != 2*offsetFloor {
		t.Errorf("clock step = %v ± %v, %v", step, bar, ok)
	}
	if r.ClockBefore.Value != -time.Duration(transit) || r.ClockBefore.Samples != offsetSamples {
		t.Errorf("clock before = %+v", r.ClockBefore)
	}
}

// A guest that is still away must not look well.
func TestOpenGap(t *testing.T) {
	m := train1kHz(1000, 100)
	m.now += int64(2 * time.Second)
	r := m.report()
	if g := r.LargestGap; !g.Open || g.Length != 2*time.Second+500*time.Microsecond || g.After != 1000 || g.Until != 0 {
		t.Errorf("gap = %+v", g)
	}
	if r.ClockAfter.Samples != 0 {
		t.Errorf("clock after an open gap = %+v", r.ClockAfter)
	}
	if _, _, ok := r.ClockStep(); ok {
		t.Error("a clock step without heartbeats after it")
	}
}

func TestGapOverMark(t *testing.T) {
	m := train1kHz(1000, 100).lose(51, 150)
	r := m.report()
	if g := r.LargestGap; g.Length != 101*time.Millisecond || g.Start >= 0 || g.After != 50 || g.Until != 151 {
		t.Errorf("gap = %+v", g)
	}
	if r.Lost != 100 {
		t.Errorf("lost = %d", r.Lost)
	}
}

func TestNothingArrives(t *testing.T) {
	r := analyse(nil, nil, 5, 5+int64(time.Second))
	if g := r.LargestGap; !g.Open || g.Length != time.Second {
		t.Errorf("gap = %+v", g)
	}
	late := analyse(nil, train1kHz(3, 0).s, -int64(time.Second), 4*tick)
	if g := late.LargestGap; g.Open || g.Length != time.Second+time.Millisecond || late.Lost != 0 {
		t.Errorf("first heartbeat after a second: %+v", late)
	}
}

func TestLossDuplicatesAndOrder(t *testing.T) {
	m := train1kHz(100, 10).lose(20, 24).lose(30, 30)
	// 40 comes after 42; 50 comes twice; 60 comes three times, late.
	s := m.s
	at := func(seq uint64) int {
		for i := range s {
			if s[i].seq == seq {
				return i
			}
		}
		t.Fatalf("no %d", seq)
		return 0
	}
	i := at(40)
	s[i].seq, s[i+1].seq, s[i+2].seq = 41, 42, 40
	copyOf := func(seq uint64, at int64) sample { c := s[0]; c.seq, c.at = seq, at; return c }
	var out []sample
	for _, x := range s {
		if x.seq == 60 {
			continue
		}
		out = append(out, x)
		switch x.seq {
		case 50:
			out = append(out, copyOf(50, x.at+1))
		case 65:
			out = append(out, copyOf(60, x.at+1), copyOf(60, x.at+2), copyOf(60, x.at+3))
		}
	}
	m.s = out
	r := m.report()
	if r.Lost != 6 || r.Duplicated != 3 || r.Reordered != 2 {
		t.Errorf("lost %d, duplicated %d, reordered %d; want 6, 3, 2", r.Lost, r.Duplicated, r.Reordered)
	}
}

// Two guests under one name: everything comes twice.
func TestSplitBrain(t *testing.T) {
	m := train1kHz(100, 10)
	var both []sample
	for _, s := range m.s {
		twin := s
		twin.at += 10
		both = append(both, s, twin)
	}
	m.s = both
	if r := m.report(); r.Duplicated != 90 || r.Lost != 0 {
		t.Errorf("duplicated %d, lost %d", r.Duplicated, r.Lost)
	}
}

func TestReboot(t *testing.T) {
	m := train1kHz(200, 50)
	for i := range m.s[100:] {
		s := &m.s[100+i]
		s.seq -= 100
		s.epoch = 1
		s.mono = int64(i) * tick
		s.at += int64(time.Second)
	}
	m.now += int64(time.Second)
	r := m.report()
	if r.Restarts != 1 || r.Lost != 0 || !r.LargestGap.Reboot || r.Standstill != 0 {
		t.Errorf("reboot: %+v", r)
	}
}

func TestSkippedAndDrops(t *testing.T) {
	m := train1kHz(100, 10)
	for i := range m.s {
		if i >= 5 {
			m.s[i].skipped = 3
		}
		if i >= 40 {
			m.s[i].skipped, m.s[i].drops = 10, 4
		}
	}
	if r := m.report(); r.Skipped != 7 || r.ReceiverDrops != 4 {
		t.Errorf("skipped %d, drops %d; want 7, 4", r.Skipped, r.ReceiverDrops)
	}
}

// Delays on the way shift single heartbeats, but not the offset.
func TestOffsetFiltersDelay(t *testing.T) {
	m := train1kHz(600, 300)
	for i := range m.s {
		delay := int64(i%7) * int64(200*time.Microsecond)
		m.s[i].at += delay
		m.s[i].offset -= delay
	}
	m.pause(450, time.Second)
	r := m.report()
	step, bar, ok := r.ClockStep()
	if !ok || (step+time.Second).Abs() > bar || bar > 3*time.Millisecond {
		t.Errorf("step = %v ± %v", step, bar)
	}
}
