package plan_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/agent/plan"
)

// TestCalibrates: pauses that vary by a known law are within the predicted range about as
// often as the range says, after as many as it takes to know them.
func TestCalibrates(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	for _, spread := range []float64{0.05, 0.5, 3} {
		var history []maint.Felt
		for i := range 400 {
			pause := time.Duration(float64(100*time.Millisecond) * (1 + spread*r.Float64()))
			history = append(history, maint.Felt{Rung: D, UUID: fmt.Sprint(i % 40), At: now.Add(-time.Duration(400-i) * time.Hour), Pause: pause})
		}
		u := update("u", maint.UrgencyNormal, change("leave", maint.ChangeLeave, D))
		l := ladder(u, guest("web-1"), peer("host-b", 64*gib), history)
		p := plan.Make(u, l, maint.PlanOptions{})
		c := p.Calibration[0]
		if share := float64(c.Within) / float64(c.Of); share < 0.8 || share > 0.99 && spread > 1 {
			t.Errorf("spread %v: %d of %d were within the range", spread, c.Within, c.Of)
		}
		e := p.Guests[0].Blackout
		if wide := float64(e.High) / float64(e.Low); wide > 1.3*(1+spread) {
			t.Errorf("spread %v: the range is %v to %v, which says nothing", spread, e.Low, e.High)
		}
	}
}

// BenchmarkPlan: 500 guests, 8 peers, a year's history; see TestPlanIsQuick.
func BenchmarkPlan(b *testing.B) {
	u, l := crowd()
	for b.Loop() {
		plan.Make(u, l, maint.PlanOptions{})
	}
}

// crowd is 500 guests of which a third has to move, and 8 peers with room for not quite all
// of these, so that the search goes to its limit.
func crowd() (maint.Update, maint.Ladder) {
	u := update("kernel", maint.UrgencySecurity, change("kernel", maint.ChangeKernel, B3, D), change("qemu", maint.ChangeQEMU, B2, B3, D))
	var parts []any
	for i := range 8 {
		parts = append(parts, peer(fmt.Sprintf("host-%d", i), uint64(90+i)*gib))
	}
	for i := range 500 {
		g := guest(fmt.Sprintf("guest-%03d", i), size(uint64(1+i%13)*gib), priority(i%3))
		switch i % 6 {
		case 0, 1:
			not(B3, maint.CodeVolatile, "", "has a disk in memory")(&g)
		case 2:
			nightly(i % 24)(&g)
		}
		if i%11 == 0 {
			apart(fmt.Sprintf("group-%d", i%44))(&g)
		}
		parts = append(parts, g)
	}
	var history []maint.Felt
	for i := range 2000 {
		history = append(history, maint.Felt{Rung: []maint.Rung{B1, B2, B3, D}[i%4], UUID: fmt.Sprintf("%08d-1111-1111-1111-111111111111", i%500),
			At: now.Add(-time.Duration(i) * time.Hour), Pause: time.Duration(100+i%70) * time.Millisecond})
	}
	return u, ladder(u, append(parts, history)...)
}

// TestPlanIsQuick has a limit far above what the benchmark measures: machines differ.
func TestPlanIsQuick(t *testing.T) {
	u, l := crowd()
	start := time.Now()
	p := plan.Make(u, l, maint.PlanOptions{})
	if d := time.Since(start); d > time.Second {
		t.Errorf("a plan for 500 guests took %s", d)
	}
	if len(p.Guests) != 500 || len(p.Blockers) == 0 {
		t.Errorf("%d guests, %d blockers", len(p.Guests), len(p.Blockers))
	}
}

// TestPredictionsWaver: a plan that is made again when a little more has been felt of the same
// kind does not tell of standstills beyond what the first has told, however narrow its range;
// one of another kind does, once it counts.
func TestPredictionsWaver(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(3, 4))
	u := update("u", maint.UrgencyNormal, change("leave", maint.ChangeLeave, D))
	outlasts := func(history []maint.Felt, is, told int) bool {
		at := func(n int) maint.PlannedGuest {
			return plan.Make(u, ladder(u, guest("web-1"), peer("host-b", 64*gib), history[:n]), maint.PlanOptions{}).Guests[0]
		}
		return at(is).Outlasts(at(told))
	}
	for _, spread := range []float64{0.001, 0.05, 0.5, 3} {
		const enough, all = 20, 80
		var history []maint.Felt
		for i := range all {
			history = append(history, maint.Felt{Rung: D, UUID: fmt.Sprint(i % 10), At: now.Add(time.Duration(i-all) * time.Hour),
				Pause: time.Duration(float64(50*time.Millisecond) * (1 + spread*r.Float64()))})
		}
		for n := enough; n+3 <= all; n++ {
			for more := 1; more <= 3; more++ {
				if outlasts(history, n+more, n) {
					t.Errorf("spread %v: %d more after %d", spread, more, n)
				}
			}
		}
		for i := range all {
			if history[i].At.After(now.Add(-all / 4 * 3 * time.Hour)) {
				history[i].Pause *= 10
			}
		}
		if !outlasts(history, all, all/4) {
			t.Errorf("spread %v: ten times as long is not told", spread)
		}
	}
}
