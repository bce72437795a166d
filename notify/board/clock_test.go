package board

import (
	"testing"
	"time"
	"unsafe"

	"belay/agent/maint"
)

// setForward is t as a clock shows it that was set forward meanwhile: its monotonic
// reading stays.
func setForward(t *testing.T, at time.Time, by time.Duration) time.Time {
	t.Helper()
	// The first word of a Time that has a monotonic reading: a bit that says so, 33
	// bits of seconds, 30 of nanoseconds (package time, type Time).
	*(*uint64)(unsafe.Pointer(&at)) += uint64(by/time.Second) << 30
	return at
}

// A clock that is set forward shortens no notice, be it the least or a longer one.
func TestClockSetForward(t *testing.T) {
	const hour = time.Hour
	now := time.Now()
	if jumped := setForward(t, now, hour); jumped.Sub(now) != 0 || jumped.Round(0).Sub(now.Round(0)) != hour {
		t.Fatalf("%v and %v cannot tell anything", now, jumped)
	}
	for name, notice := range map[string]time.Duration{"the least notice": 15 * time.Minute, "a longer one": 40 * time.Minute} {
		b := Board{Scheduled: maint.NewScheduled()}
		c, err := b.Announce(now, Announcement{ID: "e", Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{{UUID: "u", Name: "web-1"}}, NotBefore: now.Add(notice)})
		if err != nil {
			t.Fatal(err)
		}
		b.Fold(c)
		for _, passed := range []time.Duration{time.Second, notice - time.Second} {
			if _, err := b.Start(setForward(t, now.Add(passed), hour), "e", maint.ImpactFreeze, nil); err == nil {
				t.Errorf("%s: it starts after %s of %s", name, passed, notice)
			}
		}
		if _, err := b.Start(setForward(t, now.Add(notice+time.Second), hour), "e", maint.ImpactFreeze, nil); err != nil {
			t.Errorf("%s has passed: %v", name, err)
		}
	}
}

// A clock that is set while no belayd lives shortens no notice either, as long as the
// host stays up.
func TestClockSetBetweenTwoBelayds(t *testing.T) {
	now := time.Now()
	since := 5 * time.Hour
	boot := func(id string, passed time.Duration) Boot {
		return Boot{ID: id, Since: func() time.Duration { return since + passed }}
	}
	for name, notice := range map[string]time.Duration{"the least notice": 15 * time.Minute, "a longer one": 40 * time.Minute} {
		kept := &memory{t: t}
		k := New(kept, maint.NewScheduled(), nil)
		k.Follow(boot("this", 0))
		announce(t, k, Announcement{ID: "e", Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{web(1)}, NotBefore: now.Add(notice)})
		for _, test := range []struct {
			boot   string
			passed time.Duration // in truth
			starts bool
		}{
			{"this", time.Second, false},
			{"this", notice - 2*time.Second, false},
			{"this", notice + 2*time.Second, true},
			{"another", time.Second, true}, // nobody can know
		} {
			next := New(&memory{t: t}, kept.again(), nil)
			next.now = func() time.Time { return now.Round(0).Add(test.passed + time.Hour) }
			next.Follow(boot(test.boot, test.passed))
			if err := start(next, "e", maint.ImpactFreeze, nil); (err == nil) != test.starts {
				t.Errorf("%s, after %s in boot %q: %v", name, test.passed, test.boot, err)
			}
		}
	}
}

// Who is to start by an approval, or when a program has had its time, does so by the
// time that has passed, however the clock was set while no belayd lived.
func TestClockSetBetweenTwoBelaydsOfListener(t *testing.T) {
	now := time.Now()
	for _, set := range []time.Duration{time.Hour, -24 * time.Hour} {
		for _, test := range []struct {
			wait, passed time.Duration // 0: there is no program
			starts       bool
		}{
			{0, time.Minute, true},
			{30 * time.Minute, 29 * time.Minute, false},
			{30 * time.Minute, 31 * time.Minute, true},
		} {
			kept := &memory{t: t}
			k := New(kept, maint.NewScheduled(), nil)
			k.Follow(Boot{ID: "this", Since: func() time.Duration { return time.Hour }})
			if test.wait > 0 {
				if err := k.Listen(t.Context(), web(1).UUID, maint.Listener{Name: "db", Timeout: test.wait}); err != nil {
					t.Fatal(err)
				}
			}
			announce(t, k, Announcement{ID: "e", Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{web(1)}})
			next := New(&memory{t: t}, kept.again(), nil)
			next.now = func() time.Time { return now.Round(0).Add(test.passed + set) }
			next.Follow(Boot{ID: "this", Since: func() time.Duration { return time.Hour + test.passed }})
			if err := next.Approve(t.Context(), web(1).UUID, "e"); err != nil {
				t.Fatal(err)
			}
			if err := start(next, "e", maint.ImpactFreeze, nil); (err == nil) != test.starts {
				t.Errorf("the clock was set by %s, %s of %s have passed: %v", set, test.passed, test.wait, err)
			}
		}
	}
}

// A clock that is far behind after a boot, until it is put right, holds up no event
// for longer than its notice.
func TestClockBehindAfterBoot(t *testing.T) {
	now := time.Now()
	kept := &memory{t: t}
	k := New(kept, maint.NewScheduled(), nil)
	k.Follow(Boot{ID: "before", Since: func() time.Duration { return time.Hour }})
	if err := k.Listen(t.Context(), web(1).UUID, maint.Listener{Name: "db", Timeout: time.Minute}); err != nil {
		t.Fatal(err)
	}
	announce(t, k, Announcement{ID: "e", Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{web(1)}})
	k = New(kept, kept.again(), nil)
	k.now = func() time.Time { return time.Unix(0, 0) }
	k.Follow(Boot{ID: "this", Since: func() time.Duration { return time.Minute }})
	if err := k.Ready(t.Context(), web(1).UUID, "db", "e"); err != nil {
		t.Fatal(err)
	}
	k = New(kept, kept.again(), nil)
	k.now = func() time.Time { return now.Round(0).Add(17 * time.Minute) }
	k.Follow(Boot{ID: "this", Since: func() time.Duration { return 17 * time.Minute }})
	if err := start(k, "e", maint.ImpactFreeze, nil); err != nil {
		t.Error(err)
	}
}
