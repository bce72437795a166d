package maint

import "time"

// CampaignID names a maintenance campaign.
type CampaignID string

// Campaign is work on hosts that guests feel, in two phases: in the first the
// owner of each guest picks the moment; in the second it is done at the deadline.
type Campaign struct {
	ID          CampaignID `json:"id"`
	Description string     `json:"description"`
	Impact      Impact     `json:"impact"` // the most that a guest feels
	// Duration is how long the impact is expected to last.
	Duration time.Duration `json:"duration_ns"`
	Created  time.Time     `json:"created"`
	By       string        `json:"by"`
	// Security: it closes a hole, and owners have less time to pick.
	Security bool `json:"security,omitempty"`
	// Opens is when owners may begin to pick, Deadline when the second phase begins.
	Opens    time.Time `json:"opens"`
	Deadline time.Time `json:"deadline"`
	// MaxDefers is how often a guest's owner may put off what is booked.
	MaxDefers int `json:"max_defers"`
	// Guests are the state of each, by UUID: it stays with guest and campaign
	// over restarts and moves.
	Guests map[string]GuestCampaign `json:"guests"`
	// Action is what is done to each.
	Action CampaignAction `json:"action"`
	// Closed is when it was called off, or all guests were done.
	Closed time.Time `json:"closed,omitzero"`
}

// CampaignState is where a guest is in a campaign; see package notify/campaign.
type CampaignState string

// The states of a guest in a campaign.
const (
	CampaignPending CampaignState = "pending" // its owner has not picked; it is done at the deadline
	CampaignBooked  CampaignState = "booked"  // done at the moment that its owner has picked
	CampaignDue     CampaignState = "due"     // its moment has come, or its owner said now
	CampaignRunning CampaignState = "running"
	CampaignDone    CampaignState = "done"
	CampaignClosed  CampaignState = "closed" // called off
)

// GuestCampaign is a guest in a campaign.
type GuestCampaign struct {
	Guest string        `json:"guest"` // name
	State CampaignState `json:"state"`
	// At is when it will be done: the booked moment, the deadline, or the next
	// try after it.
	At time.Time `json:"at"`
	// Until is the last moment at which what is booked may begin; if it has not
	// by then, it is left to the deadline.
	Until  time.Time `json:"until,omitzero"`
	Defers int       `json:"defers,omitempty"`
	By     string    `json:"by,omitempty"` // who picked
	Op     OpID      `json:"op,omitempty"` // the operation that does it, or tried to
}

// Policy is whose approval an operation that guests feel waits for.
type Policy string

// The policies.
const (
	// PolicyAll, the default on a shared host: it starts when every guest has
	// approved, or its notice has passed.
	PolicyAll Policy = "all"
	// PolicyAny: guests that share an owner are a group, and the approval of any
	// is for all of them.
	PolicyAny Policy = "any"
	// PolicyHostOwner, on a dedicated host: as PolicyAny, and for whatever is felt,
	// if only as a pause, the notice alone is not enough. It starts when the owner
	// approves, or at the deadline.
	PolicyHostOwner Policy = "host-owner"
)

// Window is when a guest may be disturbed: from every occurrence of a rule on the
// wall clock of a zone, for a length of time. Package notify/window reads it.
type Window struct {
	// Rule is an RFC 5545 recurrence rule without DTSTART, such as
	// "FREQ=WEEKLY;BYDAY=SA,SU;BYHOUR=2;BYMINUTE=0".
	Rule string `json:"rule"`
	// Zone is an IANA time zone: "Europe/Berlin".
	Zone string `json:"zone"`
	// Length is how long each occurrence lasts, from two hours to a week. It is
	// real time, also when clocks are set meanwhile.
	Length time.Duration `json:"length_ns"`
	// From is the first day, "2026-12-01", by the zone's calendar. A rule with an
	// INTERVAL counts from it.
	From string `json:"from,omitempty"`
	// Except are dates, "2026-12-24", on which no occurrence begins, by the
	// zone's calendar.
	Except []string `json:"except,omitempty"`
}

// CampaignAction is what is done to each guest of a campaign: one of them, whose
// guest is left empty.
type CampaignAction struct {
	Migrate *MigrateRequest `json:"migrate,omitempty"`
	Replace *ReplaceRequest `json:"replace,omitempty"`
	Hold    *HoldRequest    `json:"hold,omitempty"`
}

// Impact is what a guest feels of it.
func (CampaignAction) Impact() Impact { return ImpactFreeze }

// CampaignRequest asks for a campaign.
type CampaignRequest struct {
	ID          CampaignID `json:"id"`
	Description string     `json:"description"`
	// Guests are names or UUIDs; none: all that run.
	Guests    []string       `json:"guests,omitempty"`
	Duration  time.Duration  `json:"duration_ns"`
	Security  bool           `json:"security,omitempty"`
	Opens     time.Time      `json:"opens,omitzero"`
	Deadline  time.Time      `json:"deadline,omitzero"`
	MaxDefers int            `json:"max_defers"`
	Action    CampaignAction `json:"action"`
}
