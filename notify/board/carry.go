package board

import (
	"encoding/json"
	"maps"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/notify/campaign"
)

// Carry is what goes with a guest to another host.
func (b Board) Carry(now time.Time, guest string) maint.GuestEvents {
	c := maint.GuestEvents{UUID: guest, Incarnation: b.Incarnations[guest], Listeners: slices.Clone(b.Listeners[guest])}
	for _, e := range b.Events {
		if !About(e, guest) || e.State.Over() && now.Sub(e.Ended) > recent {
			continue
		}
		c.Events = append(c.Events, only(e, guest))
	}
	c.Events = few(c.Events)
	slices.SortFunc(c.Events, older)
	for _, k := range b.Campaigns {
		if g, in := k.Guests[guest]; in && k.Closed.IsZero() {
			k.Guests = map[string]maint.GuestCampaign{guest: g}
			c.Campaigns = append(c.Campaigns, k)
		}
	}
	slices.SortFunc(c.Campaigns, func(x, y maint.Campaign) int { return x.Created.Compare(y.Created) })
	return c
}

// only is an event as that of one guest: the others do not move with it.
func only(e maint.ScheduledEvent, guest string) maint.ScheduledEvent {
	e.Guests = slices.DeleteFunc(slices.Clone(e.Guests), func(g maint.EventGuest) bool { return g.UUID != guest })
	e.Listeners = slices.DeleteFunc(slices.Clone(e.Listeners), func(w maint.EventWait) bool { return w.Guest != guest })
	if p, measured := e.Pauses[guest]; measured {
		e.Pauses = map[string]time.Duration{guest: p}
	} else {
		e.Pauses = nil
	}
	return e
}

// Adopt takes over what has come with a guest. It may be done over: what is
// known better here stays.
func (b Board) Adopt(now time.Time, g maint.GuestEvents) maint.EventChange {
	c := maint.EventChange{Incarnations: make(map[string]uint64)}
	open := len(b.open()[g.UUID]) > 0 // it was told here before its own came
	if g.Incarnation > maxIncarnation {
		g.Incarnation = 0 // no host has counted that far
	}
	for _, e := range few(g.Events) {
		if e = only(e, g.UUID); !sound(now, e) {
			continue // another's, or what no host makes
		}
		open = open || !e.State.Over()
		have, there := b.Events[e.ID]
		switch {
		case !there:
		case !About(have, g.UUID) && !e.State.Over() && have.Op == e.Op && have.Announced.Equal(e.Announced): // of others of its group, who were here before
			maps.Copy(c.Incarnations, b.change(now, have).Incarnations) // they see that it is not theirs alone
			have.Guests = append(slices.Clone(have.Guests), e.Guests...)
			have.Listeners = append(slices.Clone(have.Listeners), e.Listeners...)
			e = have
		default:
			continue
		}
		c.Events = append(c.Events, e)
	}
	for _, k := range g.Campaigns[:min(len(g.Campaigns), maxCarried)] {
		mine, in := k.Guests[g.UUID]
		have, there := b.Campaigns[k.ID]
		if !there {
			// Who may have this host run a command is not for another host to say.
			if k.Action.Hold != nil {
				continue
			}
			have = k
			have.Guests = make(map[string]maint.GuestCampaign)
		}
		if !in {
			continue
		}
		// What cannot be is left out: the guest is more than a campaign.
		if have, err := campaign.Arrive(now, have, maint.EventGuest{UUID: g.UUID, Name: mine.Guest}, &mine); err == nil {
			c.Campaigns = append(c.Campaigns, have)
		}
	}
	if listeners := slices.DeleteFunc(slices.Clone(g.Listeners), func(l maint.Listener) bool { return checkListener(l) != nil }); len(listeners) > 0 && len(b.Listeners[g.UUID]) == 0 {
		c.Listeners = map[string][]maint.Listener{g.UUID: listeners[:min(len(listeners), maxListeners)]}
	}
	switch mine := b.Incarnations[g.UUID]; {
	case !open && g.Incarnation > mine: // the same document, with no events
		c.Incarnations[g.UUID] = g.Incarnation
	case open || mine > 0: // it was here before, and had another then
		b.Incarnations = map[string]uint64{g.UUID: max(mine, g.Incarnation)}
		c.Incarnations[g.UUID] = b.next(now, g.UUID)
	}
	return c
}

const (
	// maxCarried bounds the events that go with a guest, and the campaigns.
	maxCarried = 100
	// maxEvent bounds one that has come, as JSON, bytes.
	maxEvent = 16 << 10
	// maxIncarnation is the largest number that all clients read as it is: those
	// that have no other numbers than IEEE 754's.
	maxIncarnation = 1 << 53
)

// few are as many events as go with a guest: first those that are not over, then
// the latest.
func few(events []maint.ScheduledEvent) []maint.ScheduledEvent {
	if len(events) <= maxCarried {
		return events
	}
	events = slices.Clone(events)
	slices.SortFunc(events, func(x, y maint.ScheduledEvent) int {
		if x.State.Over() != y.State.Over() {
			if y.State.Over() {
				return -1
			}
			return 1
		}
		return older(y, x)
	})
	return events[:maxCarried]
}

// sound reports whether an event of one guest, which another host has sent, is what
// a host makes.
func sound(now time.Time, e maint.ScheduledEvent) bool {
	text, err := json.Marshal(e)
	switch {
	case err != nil, len(text) > maxEvent, e.ID == "", len(e.Guests) != 1, len(e.Listeners) > maxListeners,
		!slices.Contains(maint.Impacts, e.Impact), e.Duration < 0 && e.Duration != maint.DurationUnknown,
		e.NotBefore.Sub(now) > maxNotice:
		return false
	}
	switch e.State {
	case maint.EventScheduled, maint.EventStarted, maint.EventCompleted, maint.EventCancelled:
		return true
	}
	return false
}

// Leave forgets a guest that has moved to another host. Its incarnation stays
// known, should it come back, and so does what became of it in campaigns.
func (b Board) Leave(now time.Time, guest string) maint.EventChange {
	var c maint.EventChange
	if len(b.Listeners[guest]) > 0 {
		c.GuestsGone = []string{guest}
	}
	for id, e := range b.Events {
		if !About(e, guest) {
			continue
		}
		e.Guests = slices.DeleteFunc(slices.Clone(e.Guests), func(g maint.EventGuest) bool { return g.UUID == guest })
		e.Listeners = slices.DeleteFunc(slices.Clone(e.Listeners), func(w maint.EventWait) bool { return w.Guest == guest })
		switch {
		case len(e.Guests) > 0:
			shown := b.change(now, e) // the others see that it is theirs alone
			c.Events = append(c.Events, shown.Events...)
			if c.Incarnations == nil {
				c.Incarnations = make(map[string]uint64)
			}
			maps.Copy(c.Incarnations, shown.Incarnations)
		case !e.State.Over(): // what is over stays, as this host's history
			c.Gone = append(c.Gone, id)
		}
	}
	return c
}
