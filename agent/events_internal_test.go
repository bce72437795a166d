package agent

import (
	"testing"

	"belay/agent/maint"
)

// What was not measured is not told as a pause of nothing: an event of no duration
// is one that is not felt.
func TestPauseThatWasNotMeasured(t *testing.T) {
	for name, op := range map[string]maint.Op{
		"move":        {GuestUUID: "u", Move: &maint.MoveResult{}},
		"replacement": {GuestUUID: "u", Replaced: &maint.VMMResult{}},
	} {
		if p := pausesOf(op); len(p) != 0 {
			t.Errorf("%s: %v", name, p)
		}
	}
}
