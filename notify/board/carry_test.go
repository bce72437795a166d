package board

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

// What another host sends with a guest is not believed beyond what a host makes, and
// touches no event of others.
func TestAdoptGarbage(t *testing.T) {
	t.Parallel()
	now := time.Now().Round(0)
	mine, other := web(1), web(2)
	good := func() maint.ScheduledEvent {
		return maint.ScheduledEvent{ID: "mine", Impact: maint.ImpactFreeze, State: maint.EventScheduled, Op: "mig-a",
			Guests: []maint.EventGuest{mine}, Announced: now, NotBefore: now.Add(time.Hour)}
	}
	host := func() Board {
		b := Board{Scheduled: maint.NewScheduled()}
		c, err := b.Announce(now.Add(-time.Minute), Announcement{ID: "theirs", Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{other}, Op: "hold-1"})
		if err != nil {
			t.Fatal(err)
		}
		b.Fold(c)
		return b
	}
	b := host()
	b.Fold(b.Adopt(now, maint.GuestEvents{UUID: mine.UUID, Incarnation: 7, Events: []maint.ScheduledEvent{good()}}))
	if _, err := b.of(mine.UUID, "mine"); err != nil {
		t.Fatalf("what is good is not taken over: %v", err)
	}
	for name, spoil := range map[string]func(*maint.ScheduledEvent){
		"the ID of another's": func(e *maint.ScheduledEvent) { e.ID = "theirs" },
		"another's":           func(e *maint.ScheduledEvent) { e.Guests = []maint.EventGuest{other} },
		"the guest twice":     func(e *maint.ScheduledEvent) { e.Guests = []maint.EventGuest{mine, mine} },
		"no ID":               func(e *maint.ScheduledEvent) { e.ID = "" },
		"no such state":       func(e *maint.ScheduledEvent) { e.State = "garbage" },
		"no such impact":      func(e *maint.ScheduledEvent) { e.Impact = "Explode" },
		"a negative duration": func(e *maint.ScheduledEvent) { e.Duration = math.MinInt64 },
		"far ahead":           func(e *maint.ScheduledEvent) { e.NotBefore = now.AddDate(5000, 0, 0) },
		"no year of JSON's":   func(e *maint.ScheduledEvent) { e.Ended = now.AddDate(9000, 0, 0) },
		"a long description":  func(e *maint.ScheduledEvent) { e.Description = strings.Repeat("x", 1<<20) },
		"many listeners":      func(e *maint.ScheduledEvent) { e.Listeners = make([]maint.EventWait, 100) },
	} {
		e := good()
		if spoil(&e); name == "many listeners" {
			for i := range e.Listeners {
				e.Listeners[i].Guest = mine.UUID
			}
		}
		b := host()
		b.Fold(b.Adopt(now, maint.GuestEvents{UUID: mine.UUID, Incarnation: 7, Events: []maint.ScheduledEvent{e}}))
		if len(b.Events) != 1 || About(b.Events["theirs"], mine.UUID) {
			t.Errorf("%s: there are %+v", name, b.Events)
		}
	}

	b = host()
	g := maint.GuestEvents{UUID: mine.UUID, Listeners: []maint.Listener{{Name: "slow", Timeout: math.MaxInt64}, {Name: "app", Timeout: time.Minute},
		{Name: strings.Repeat("x", 1000), Timeout: time.Minute}}}
	for i := range 5000 {
		e := good()
		e.ID = maint.EventID(fmt.Sprint(i))
		if e.State = maint.EventCompleted; i == 0 {
			e.State = maint.EventScheduled
		}
		g.Events = append(g.Events, e)
	}
	b.Fold(b.Adopt(now, g))
	if _, err := b.of(mine.UUID, "0"); err != nil || len(b.Events) != 1+maxCarried {
		t.Errorf("of thousands there are %d; the one that is not over: %v", len(b.Events), err)
	}
	if l := b.Listeners[mine.UUID]; len(l) != 1 || l[0].Name != "app" {
		t.Errorf("the listeners are %+v", l)
	}
}

// Documents go on changing their numbers, whatever number a guest has brought.
func TestAdoptedIncarnationGoesOn(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for _, n := range []uint64{0, 1, 1 << 53, 1<<53 + 1, math.MaxInt64, math.MaxUint64 - 1, math.MaxUint64} {
		b := Board{Scheduled: maint.NewScheduled()}
		b.Fold(b.Adopt(now, maint.GuestEvents{UUID: web(1).UUID, Incarnation: n}))
		seen := map[uint64]bool{b.incarnation(web(1).UUID): true}
		for i := range 3 {
			c, err := b.Announce(now, Announcement{ID: maint.EventID(fmt.Sprint(i)), Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{web(1)}})
			if err != nil {
				t.Fatal(err)
			}
			b.Fold(c)
			if now := b.incarnation(web(1).UUID); seen[now] || now > math.MaxInt64 {
				t.Errorf("brought %d: number %d again, or beyond what clients read", n, now)
			}
			seen[b.incarnation(web(1).UUID)] = true
		}
	}
}

// A guest that was told something here before its document came does not find that
// under the number that it knows.
func TestAdoptedAfterAnnouncement(t *testing.T) {
	t.Parallel()
	now := time.Now()
	b := Board{Scheduled: maint.NewScheduled()}
	c, err := b.Announce(now, Announcement{ID: "e", Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{web(1)}})
	if err != nil {
		t.Fatal(err)
	}
	b.Fold(c)
	known := b.incarnation(web(1).UUID) + 1000 // by a clock that is ahead
	b.Fold(b.Adopt(now, maint.GuestEvents{UUID: web(1).UUID, Incarnation: known}))
	if got := b.incarnation(web(1).UUID); got <= known {
		t.Errorf("it knows %d with no event, and is shown %d with one", known, got)
	}
}
