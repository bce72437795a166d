package maint

import (
	"maps"
	"time"
)

// EventID names a scheduled event: a UUID.
type EventID string

// Impact is what a scheduled event does to a guest, in the words of Azure's
// Scheduled Events (Microsoft Learn, "Azure Metadata Service: Scheduled Events
// for Linux VMs").
type Impact string

// The impacts.
const (
	ImpactFreeze    Impact = "Freeze"    // it stands still for a while, and keeps its memory and connections
	ImpactReboot    Impact = "Reboot"    // it boots anew, its disks stay
	ImpactRedeploy  Impact = "Redeploy"  // it boots anew on another host
	ImpactPreempt   Impact = "Preempt"   // it is taken away
	ImpactTerminate Impact = "Terminate" // it is deleted
)

// Impacts are all of them.
var Impacts = []Impact{ImpactFreeze, ImpactReboot, ImpactRedeploy, ImpactPreempt, ImpactTerminate}

// MinimumNotice is how long before its start an event of an impact is announced
// at least; a host may be configured to give longer notice, never shorter.
func MinimumNotice(i Impact) time.Duration {
	switch i {
	case ImpactRedeploy:
		return 10 * time.Minute
	case ImpactPreempt:
		return 30 * time.Second
	case ImpactTerminate:
		return 5 * time.Minute
	}
	return 15 * time.Minute
}

// EventState is where a scheduled event is in its life.
//
//	scheduled ──► started ──► completed
//	    └──────► cancelled
//
// Guests are shown the first two; the others are history.
type EventState string

// The states of a scheduled event.
const (
	EventScheduled EventState = "scheduled"
	EventStarted   EventState = "started"
	EventCompleted EventState = "completed"
	EventCancelled EventState = "cancelled"
)

// Over reports whether the event's life has ended.
func (s EventState) Over() bool { return s == EventCompleted || s == EventCancelled }

// EventSource is who caused an event.
type EventSource string

// The sources of events.
const (
	SourcePlatform EventSource = "Platform" // who runs the host
	SourceUser     EventSource = "User"     // the guest's owner
)

// DurationUnknown is the Duration of an event of which it is not known how long
// it lasts.
const DurationUnknown time.Duration = -1

// ScheduledEvent is something that will happen to guests, is happening, or has
// happened.
type ScheduledEvent struct {
	ID     EventID     `json:"id"`
	Impact Impact      `json:"impact"`
	State  EventState  `json:"state"`
	Source EventSource `json:"source"`
	// Guests are those it is about. They share an owner: each is shown the
	// names of all, and one approval is for all.
	Guests      []EventGuest `json:"guests"`
	Description string       `json:"description,omitempty"`
	// Duration is how long the impact is expected to last; 0: it is not felt.
	Duration time.Duration `json:"duration_ns"`

	Announced time.Time `json:"announced"`
	// NotBefore is when it starts at the earliest, unless approved.
	NotBefore time.Time `json:"not_before"`
	// Boot is the boot of the host (boottime.ID) in which it was announced, or came
	// here, and AnnouncedAt the time since then (CLOCK_BOOTTIME) that goes with
	// Announced: a clock that is set while belayd restarts shortens no notice.
	Boot        string        `json:"boot,omitempty"`
	AnnouncedAt time.Duration `json:"announced_boottime_ns,omitempty"`

	Approval *EventApproval `json:"approval,omitempty"`
	// Emergency says who waived the notice, and why.
	Emergency *EventApproval `json:"emergency,omitempty"`
	// Listeners are the programs that are waited for before it starts.
	Listeners []EventWait `json:"listeners,omitempty"`

	Started time.Time `json:"started,omitzero"`
	Ended   time.Time `json:"ended,omitzero"`
	// Pauses are what was measured, by the guest's UUID: for how long it stood still.
	Pauses map[string]time.Duration `json:"pauses_ns,omitempty"`
	// Note says why it was cancelled, or what it ended with.
	Note string `json:"note,omitempty"`

	Op       OpID       `json:"op,omitempty"`       // the operation that it announces
	Campaign CampaignID `json:"campaign,omitempty"` // the campaign that it is part of
}

// EventGuest is a guest that an event is about.
type EventGuest struct {
	UUID string `json:"uuid"`
	Name string `json:"name"`
}

// EventApproval is somebody's consent to start at once.
type EventApproval struct {
	By     string    `json:"by"` // "guest web-1", "root", "cert:ops-laptop"
	At     time.Time `json:"at"`
	Reason string    `json:"reason,omitempty"`
}

// Listener is a program in a guest that wants to be waited for.
type Listener struct {
	Name string `json:"name"`
	// Timeout is how long it is waited for, from the announcement of an event.
	Timeout time.Duration `json:"timeout_ns"`
}

// EventWait is a listener that an event waits for.
type EventWait struct {
	Guest string    `json:"guest"` // UUID
	Name  string    `json:"name"`
	Until time.Time `json:"until"`          // it is waited for no longer
	Ready time.Time `json:"ready,omitzero"` // when it said that it is
}

// ErrUnknownEvent: there is, and was recently, no such event for the guest.
var ErrUnknownEvent = errorString("no such event")

// errorString is an error that is a constant text.
type errorString string

func (e errorString) Error() string { return string(e) }

// Scheduled is what is known of scheduled events on a host: the fold of all
// EventChanges.
type Scheduled struct {
	Events map[EventID]ScheduledEvent
	// Incarnations are those of the guests' documents, by UUID.
	Incarnations map[string]uint64
	// Listeners are the programs that want to be waited for, by their guest's UUID.
	Listeners map[string][]Listener
	Campaigns map[CampaignID]Campaign
}

// EventChange is one change of what is scheduled, as the journal keeps it: what
// it names is from now on as it says.
type EventChange struct {
	Events       []ScheduledEvent      `json:"events,omitempty"`
	Incarnations map[string]uint64     `json:"incarnations,omitempty"`
	Listeners    map[string][]Listener `json:"listeners,omitempty"` // an empty list: none any more
	Campaigns    []Campaign            `json:"campaigns,omitempty"`
	// CampaignGuests are where some guests are now, by UUID, in campaigns that are
	// known.
	CampaignGuests map[CampaignID]map[string]GuestCampaign `json:"campaign_guests,omitempty"`
	// Gone are events that this host has no more to do with, and GuestsGone
	// guests: they have moved.
	Gone       []EventID `json:"gone,omitempty"`
	GuestsGone []string  `json:"guests_gone,omitempty"`
}

// Empty reports whether nothing changes.
func (c EventChange) Empty() bool {
	return len(c.Events)+len(c.Incarnations)+len(c.Listeners)+len(c.Campaigns)+len(c.CampaignGuests)+len(c.Gone)+len(c.GuestsGone) == 0
}

// NewScheduled is that nothing is scheduled.
func NewScheduled() Scheduled {
	return Scheduled{Events: make(map[EventID]ScheduledEvent), Incarnations: make(map[string]uint64),
		Listeners: make(map[string][]Listener), Campaigns: make(map[CampaignID]Campaign)}
}

// Fold applies a change.
func (s Scheduled) Fold(c EventChange) {
	for _, id := range c.Gone {
		delete(s.Events, id)
	}
	for _, uuid := range c.GuestsGone {
		delete(s.Listeners, uuid)
	}
	for _, e := range c.Events {
		s.Events[e.ID] = e
	}
	for uuid, n := range c.Incarnations {
		// One that has gone may come back, and is not to see an old one.
		s.Incarnations[uuid] = max(n, s.Incarnations[uuid])
	}
	for uuid, l := range c.Listeners {
		if s.Listeners[uuid] = l; len(l) == 0 {
			delete(s.Listeners, uuid)
		}
	}
	for _, k := range c.Campaigns {
		s.Campaigns[k.ID] = k
	}
	for id, guests := range c.CampaignGuests {
		k, known := s.Campaigns[id]
		if !known {
			continue
		}
		was := k.Guests // others may look at it
		k.Guests = make(map[string]GuestCampaign, len(was))
		maps.Copy(k.Guests, was)
		maps.Copy(k.Guests, guests)
		s.Campaigns[id] = k
	}
}

// Forget drops what ended before a moment.
func (s Scheduled) Forget(before time.Time) {
	maps.DeleteFunc(s.Events, func(_ EventID, e ScheduledEvent) bool { return e.State.Over() && e.Ended.Before(before) })
	maps.DeleteFunc(s.Campaigns, func(_ CampaignID, k Campaign) bool { return !k.Closed.IsZero() && k.Closed.Before(before) })
}

// GuestEvents is what belongs to a guest and goes with it to another host.
type GuestEvents struct {
	UUID        string           `json:"uuid"`
	Incarnation uint64           `json:"incarnation"`
	Events      []ScheduledEvent `json:"events,omitempty"`
	Listeners   []Listener       `json:"listeners,omitempty"`
	Campaigns   []Campaign       `json:"campaigns,omitempty"` // with this guest alone
}
