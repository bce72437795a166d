package vmm

import (
	"fmt"
	"strings"
	"time"
)

// timing is how long the phases of a pause took. The pause is measured with the
// monotonic clock, unless belayd was killed within it.
type timing struct {
	began, last, ended time.Time
	phases             []string
}

func (t *timing) begin() { t.began = time.Now(); t.last = t.began }

// mark ends a phase.
func (t *timing) mark(phase string) {
	if t.began.IsZero() {
		return // belayd was killed before
	}
	now := time.Now()
	t.phases = append(t.phases, fmt.Sprintf("%s %d ms", phase, now.Sub(t.last).Milliseconds()))
	t.last = now
}

// end is when the guest runs.
func (t *timing) end() {
	t.mark("resume")
	t.ended = time.Now()
}

// String is "suspend 4 ms, state out 15 ms, …".
func (t *timing) String() string { return strings.Join(t.phases, ", ") }
