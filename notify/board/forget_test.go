package board

import (
	"testing"
	"time"

	"belay/agent/maint"
)

// nowhere is a store that keeps all it is given.
type nowhere struct{}

func (nowhere) Append(maint.EventChange) error { return nil }

// What ended long ago is not kept in memory for ever, what goes on is.
func TestForget(t *testing.T) {
	k := New(nowhere{}, maint.NewScheduled(), nil)
	do := func(decide func(b Board, now time.Time) (maint.EventChange, error)) {
		t.Helper()
		if err := k.Do(decide); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []maint.EventID{"over", "open"} {
		do(func(b Board, now time.Time) (maint.EventChange, error) {
			return b.Announce(now, Announcement{ID: id, Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{{UUID: "u", Name: "web-1"}}})
		})
	}
	do(func(b Board, now time.Time) (maint.EventChange, error) { return b.Cancel(now, "over", "") })
	all := func() int { return len(k.Events(func(maint.ScheduledEvent) bool { return true })) }
	if k.Forget(time.Now().Add(-time.Hour)); all() != 2 {
		t.Errorf("of what ended just now %d are left", all())
	}
	if k.Forget(time.Now().Add(time.Hour)); all() != 1 || len(k.History("u")) != 0 {
		t.Errorf("of what ended long ago %d are left", all())
	}
}
