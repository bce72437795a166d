package agent

import (
	"testing"
	"time"

	"belay/agent/maint"
)

func TestByOneClock(t *testing.T) {
	t.Parallel()
	const ms = time.Millisecond
	for _, c := range []struct {
		name               string
		said, off, latency time.Duration
		asked              bool
		want               time.Duration
	}{
		{"clocks alike", 100 * ms, 0, 2 * ms, true, 100 * ms},
		{"a difference that may be none", 100 * ms, ms, 2 * ms, true, 100 * ms},
		{"the destination is ahead", 140 * ms, 40 * ms, 2 * ms, true, 100 * ms},
		{"the destination is behind", 60 * ms, -40 * ms, 2 * ms, true, 100 * ms},
		{"so far behind that libvirt took another end", 95 * ms, -400 * ms, 2 * ms, true, 95 * ms},
		{"further ahead than can be", 20 * ms, 40 * ms, 2 * ms, true, 20 * ms},
		{"not known", 140 * ms, 40 * ms, 2 * ms, false, 140 * ms},
	} {
		if got := byOneClock(c.said, maint.PeerStatus{OK: c.asked, ClockOffset: c.off, Latency: c.latency}); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
