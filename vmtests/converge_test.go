package vmtests

import (
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/lab"
)

// A guest that writes faster than the network takes it stays where it is, unmoved and as
// quick as before, unless more is allowed; then it moves, and the record says what was
// done for that.
func TestWritesFasterThanTheNetwork(t *testing.T) {
	t.Parallel()
	b := newBed(t, lab.Config{})
	b.dirty(b.a, 60)
	for _, c := range []struct {
		name     string
		from, to *cluster.Node
		timeout  time.Duration
		allow    []maint.Means
		outcome  maint.Outcome
		said     []string
	}{
		{"nothing is allowed", b.a, b.b, 12 * time.Second, []maint.Means{}, maint.OutcomeFailed,
			[]string{"the copy does not get on: it dirties", "it may end with a pause of 300ms"}},
		{"the limit may be lifted", b.a, b.b, 2 * time.Minute, []maint.Means{maint.MeansBandwidth}, maint.OutcomeDone,
			[]string{"it may end with a pause of 300ms, and the limit of its bandwidth is lifted"}},
		{"the guest may be slowed down", b.b, b.a, 2 * time.Minute, []maint.Means{maint.MeansSlow}, maint.OutcomeDone,
			[]string{"begun anew, with the guest slowed down as far as it must be", "the guest was slowed down by up to"}},
	} {
		op, err := c.from.Client().Migrate(b.ctx(time.Minute), maint.MigrateRequest{Guest: "web-1", To: c.to.Name, BandwidthMiBs: 20, Timeout: c.timeout, Allow: c.allow})
		if err != nil {
			t.Fatal(err)
		}
		op = b.end(c.from, op.ID)
		var notes []string
		for _, s := range op.Steps {
			notes = append(notes, s.Notes...)
		}
		all := strings.Join(notes, "\n")
		t.Logf("%s: %s after %s: %v\n%s", c.name, op.Outcome, op.Ended.Sub(op.Started).Round(time.Millisecond), op.Problems, all)
		if op.Outcome != c.outcome {
			t.Fatalf("%s: %q, want %q", c.name, op.Outcome, c.outcome)
		}
		for _, s := range c.said {
			if !strings.Contains(all, s) {
				t.Errorf("%s: the record does not say %q", c.name, s)
			}
		}
		at := c.to
		if c.outcome == maint.OutcomeFailed {
			at = c.from
			if p := op.Problems[0]; p.Code != maint.CodeTimeout || !strings.Contains(p.Reason, "over its memory le") {
				t.Errorf("%s: %+v", c.name, p)
			}
		}
		b.isWhole(at)
	}
}
