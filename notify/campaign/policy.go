package campaign

import (
	"slices"
	"time"

	"belay/agent/maint"
)

// Fits reports whether guests to whom one impact was announced may be given another:
// the ladder is chosen again at the start, and less than announced is fine. More
// takes another event, with its notice. "" is no impact.
func Fits(announced, actual maint.Impact) bool {
	if actual == "" {
		return announced == "" || slices.Contains(maint.Impacts, announced)
	}
	// maint.Impacts has the lesser ones first.
	most, is := slices.Index(maint.Impacts, announced), slices.Index(maint.Impacts, actual)
	return is >= 0 && is <= most
}

// Partition divides an operation's guests into events, whose approvals are for all
// of their guests: each guest by itself, or under maint.PolicyAny and
// maint.PolicyHostOwner those with the same owner, in the order of their first.
// Never are two owners in one event: each is shown the names of all. Guests whose
// owner is "" are not known to share it.
func Partition(guests []maint.EventGuest, owner func(uuid string) string, policy maint.Policy) [][]maint.EventGuest {
	var events [][]maint.EventGuest
	byOwner := make(map[string]int)
	for _, g := range guests {
		o := ""
		if policy == maint.PolicyAny || policy == maint.PolicyHostOwner {
			o = owner(g.UUID)
		}
		n, known := byOwner[o]
		if o == "" || !known {
			n = len(events)
			byOwner[o] = n
			events = append(events, nil)
		}
		events[n] = append(events[n], g)
	}
	return events
}

// NotBefore is when an event starts at the earliest without approval: when its
// notice has passed, and under maint.PolicyHostOwner not before the deadline, if it is
// felt at all (maint.ScheduledEvent.Duration).
func NotBefore(policy maint.Policy, impact maint.Impact, duration time.Duration, announced, deadline time.Time) time.Time {
	at := announced.Add(maint.MinimumNotice(impact))
	if policy == maint.PolicyHostOwner && duration != 0 {
		at = later(at, deadline)
	}
	return at
}
