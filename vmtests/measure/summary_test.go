package measure

import (
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

func TestRangeOf(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		in   []time.Duration
		want Range
	}{
		{nil, Range{}},
		{[]time.Duration{7}, Range{7, 7, 7}},
		{[]time.Duration{9, 1, 2}, Range{1, 2, 9}},
		{[]time.Duration{9, 1, 2, 5}, Range{1, 3.5, 9}},
	} {
		if got := RangeOf(c.in); got != c.want {
			t.Errorf("%v: %v, want %v", c.in, got, c.want)
		}
	}
	if got := Median([]uint64{3, 1, 2}); got != 2 {
		t.Errorf("median %d, want 2", got)
	}
}

func TestComparison(t *testing.T) {
	t.Parallel()
	move := func(tool string, ms, mib int) Move {
		d := time.Duration(ms) * time.Millisecond
		return Move{Tool: tool, Outage: d, Downtime: d / 2, Total: 10 * d, Copy: 8 * d, MemorySent: uint64(mib) << 20}
	}
	moves := []Move{move(Belay, 30, 100), move(Virsh, 20, 100), move(Virsh, 40, 120), move(Belay, 60, 100)}
	b := Summarise(Belay, moves)
	if b.Rounds != 2 || b.Outage.Median != float64(45*time.Millisecond) {
		t.Errorf("%+v", b)
	}
	var out strings.Builder
	if err := PrintComparison(&out, b, Summarise(Virsh, moves)); err != nil {
		t.Fatal(err)
	}
	want := strings.TrimPrefix(`
                            belay                     virsh                     belay/virsh
outage seen on the LAN      45 (30 to 60) ms          30 (20 to 40) ms          1.50
downtime reported by QEMU   22 (15 to 30) ms          15 (10 to 20) ms          1.50
total time of the command   450 (300 to 600) ms       300 (200 to 400) ms       1.50
  of that libvirt's job     360 (240 to 480) ms       240 (160 to 320) ms       1.50
memory sent                 100 (100 to 100) MiB      110 (100 to 120) MiB      0.91
`, "\n")
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

func TestPhases(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	op := maint.Op{Steps: []maint.Step{
		{Name: "preflight", Started: begin, Ended: begin.Add(4)},
		{Name: "perform", Started: begin, Ended: begin.Add(9)}}}
	got := Phases([]Move{{Tool: Virsh}, {Tool: Belay, Op: &op}})
	if len(got) != 2 || got[0].Name != "preflight" || got[0].Took.Median != 4 || got[1].Took.Median != 9 {
		t.Errorf("%+v", got)
	}
}

func TestParseJobStatistics(t *testing.T) {
	t.Parallel()
	var m Move
	stats := "operation: 6\ntime_elapsed: 781\ndowntime: 150\nmemory_processed: 123456789\nerrmsg: none\n"
	if err := m.parse(stats); err != nil {
		t.Fatal(err)
	}
	if m.Downtime != 150*time.Millisecond || m.Copy != 781*time.Millisecond || m.MemorySent != 123456789 {
		t.Errorf("%+v", m)
	}
	if err := m.parse("operation: 0\n"); err == nil {
		t.Error("statistics without a downtime are taken")
	}
}

func TestAgree(t *testing.T) {
	t.Parallel()
	move := func(reported, measured time.Duration) Move {
		return Move{Downtime: reported * time.Millisecond, Outage: measured * time.Millisecond, Op: &maint.Op{}}
	}
	moves := []Move{move(100, 109), move(200, 221), move(20, 25), move(20, 26), {Tool: Virsh, Outage: time.Hour}}
	got := Agree(moves, func(m Move) time.Duration { return m.Outage })
	// 9 of 109 and 21 of 221 are less than 10 %, 5 ms is 5 ms, and 6 of 26 is neither.
	want := Agreement{Within: 3, Of: 4, Median: -7500 * time.Microsecond}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
