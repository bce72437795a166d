package measure

import (
	"errors"
	"testing"
	"time"
)

func TestParseEvent(t *testing.T) {
	t.Parallel()
	e, ok := parseEvent("event STOP at 1795331757.000042 for domain 'web-1': (null)")
	if !ok || e.name != "STOP" || e.guest != "web-1" || !e.at.Equal(time.Unix(1795331757, 42_000)) {
		t.Errorf("%+v, %t", e, ok)
	}
	for _, line := range []string{"", "events received: 3", "event RTC_CHANGE at 1.000001 for domain 'web-1': (null)"} {
		if e, ok := parseEvent(line); ok {
			t.Errorf("%q is taken for %+v", line, e)
		}
	}
}

// What was told too late from before, and second pauses, are not counted.
func TestStandstills(t *testing.T) {
	t.Parallel()
	begin := time.Unix(1000, 0)
	q := &qemuEvents{ended: make(chan error, 1), queue: make(chan qemuEvent, 10)}
	for _, e := range []struct {
		name, guest string
		at          time.Duration
	}{{"STOP", "a", -2}, {"RESUME", "a", -1}, {"RESUME", "b", 1}, {"STOP", "a", 2}, {"STOP", "b", 3}, {"RESUME", "a", 5}, {"STOP", "a", 6}, {"RESUME", "b", 9}} {
		q.queue <- qemuEvent{e.name, e.guest, begin.Add(e.at)}
	}
	got, err := q.since(t.Context(), begin, 2)
	if err != nil || got["a"].Length() != 3 || got["b"].Length() != 6 {
		t.Errorf("%+v, %v", got, err)
	}
	gone := errors.New("gone")
	q.ended <- gone
	close(q.queue)
	if _, err := q.since(t.Context(), begin, 1); !errors.Is(err, gone) {
		t.Errorf("a ruler that has ended: %v", err)
	}
}
