package leash

import (
	"testing"
	"time"

	"belay/agent/maint"
)

// A leash that has fired answers for as long as it works, which may be longer
// than its silence, and then tells what it did.
func TestFiredIsNotDead(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const silence = 300 * time.Millisecond
	l := s.hold(500*time.Millisecond, silence)
	s.lost(l)
	renewed := func() (n int) {
		events, err := l.Events(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			if e.Kind == maint.LeashRenewed {
				n += e.Count
			}
		}
		return n
	}
	before := renewed()
	select {
	case <-l.life.Done():
		t.Fatal("the line has given up a leash that lives")
	case <-time.After(5 * silence):
	}
	if after := renewed(); after != before {
		t.Errorf("renewed %d times after it fired", after-before)
	}
	if _, err := l.Disarm(t.Context()); err != nil {
		t.Error(err)
	}
}
