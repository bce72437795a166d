package campaign

import (
	"maps"
	"regexp"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/notify/window"
)

const (
	// SelfServicePhase is how long owners have to pick, unless the campaign is
	// for a security update or gives more.
	SelfServicePhase = 35 * 24 * time.Hour
	// Grace is how much later than booked a guest may be begun.
	Grace = 2 * time.Hour
	// Retry is after how long a guest is tried again for which the deadline has
	// passed.
	Retry = 15 * time.Minute

	maxAhead  = 366 * 24 * time.Hour
	maxDefers = 100
	maxText   = 1000 // bytes
)

var idForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// Request is what a campaign is made of.
type Request struct {
	ID          maint.CampaignID
	Description string
	Impact      maint.Impact
	Duration    time.Duration // or maint.DurationUnknown
	By          string
	Security    bool
	Opens       time.Time // zero: at once
	Deadline    time.Time // zero: a SelfServicePhase after it opens
	MaxDefers   int
	Guests      []Guest
}

// Guest is a guest that a campaign is for.
type Guest struct {
	UUID, Name string
	Windows    window.Schedule
}

// Create makes a campaign. It is refused if a guest has no slot before the deadline
// that is long enough and leaves time for the notice: its owner could book nothing.
func Create(now time.Time, r Request) (maint.Campaign, error) {
	opens := later(now, r.Opens)
	deadline := r.Deadline
	if deadline.IsZero() {
		deadline = opens.Add(SelfServicePhase)
	}
	bad := func(remedy, reason string, args ...any) (maint.Campaign, error) {
		return maint.Campaign{}, maint.Problemf(maint.CodeBadRequest, "campaign "+string(r.ID), remedy, reason, args...)
	}
	switch phase := deadline.Sub(opens); {
	case !idForm.MatchString(string(r.ID)):
		return bad("letters, digits, dots, dashes and underscores, at most 64", "that is no ID of a campaign")
	case !slices.Contains(maint.Impacts, r.Impact):
		return bad("choose one of them", "the impact %q is none of %v", r.Impact, maint.Impacts)
	case r.Duration < 0 && r.Duration != maint.DurationUnknown:
		return bad("give none, or one that is not negative", "a duration of %s", r.Duration)
	case r.MaxDefers < 0 || r.MaxDefers > maxDefers:
		return bad("choose a number between", "%d deferrals are not between 0 and %d", r.MaxDefers, maxDefers)
	case len(r.Description) > maxText:
		return bad("make it shorter", "the description has more than %d bytes", maxText)
	case phase <= 0:
		return bad("give a later deadline", "the deadline, %s, is not after %s", show(deadline), show(opens))
	case phase < SelfServicePhase && !r.Security:
		return bad("give a later deadline, or say that it is for security", "owners have only %s to pick, less than %d days", phase.Round(time.Minute), SelfServicePhase/(24*time.Hour))
	case deadline.Sub(now) > maxAhead:
		return bad("give an earlier deadline", "the deadline, %s, is more than %d days ahead", show(deadline), maxAhead/(24*time.Hour))
	case len(r.Guests) == 0:
		return bad("name guests, or start some", "it is for no guest")
	}
	c := maint.Campaign{
		ID: r.ID, Description: r.Description, Impact: r.Impact, Duration: r.Duration,
		Created: stamp(now), By: r.By, Security: r.Security,
		Opens: stamp(opens), Deadline: stamp(deadline), MaxDefers: r.MaxDefers,
		Guests: make(map[string]maint.GuestCampaign, len(r.Guests)),
	}
	var without []maint.Problem
	notice := maint.MinimumNotice(r.Impact)
	for _, g := range r.Guests {
		if _, twice := c.Guests[g.UUID]; twice || g.UUID == "" {
			return bad("", "guest %q has no UUID of its own", g.Name)
		}
		c.Guests[g.UUID] = maint.GuestCampaign{Guest: g.Name, State: maint.CampaignPending, At: c.Deadline}
		if _, ok := g.Windows.Slot(need(c), c.Opens.Add(notice), c.Deadline); !ok {
			without = append(without, *maint.Problemf(maint.CodeNoSlot, "guest "+g.Name, "give it more or longer windows, or a later deadline",
				"has no slot of %s between %s, with %s of notice, and the deadline at %s", need(c), show(c.Opens), notice, show(c.Deadline)))
		}
	}
	if err := maint.Refuse("cannot create campaign "+string(r.ID), without); err != nil {
		return maint.Campaign{}, err
	}
	return c, nil
}

// Close calls a campaign off. Operations that run go on: they are aborted, if at
// all, as operations. It may be done over.
func Close(now time.Time, c maint.Campaign) maint.Campaign {
	if !c.Closed.IsZero() {
		return c
	}
	c.Guests = maps.Clone(c.Guests)
	for uuid, g := range c.Guests {
		if waits(g) {
			c.Guests[uuid] = closed(g)
		}
	}
	c.Closed = stamp(now)
	return c
}

// pending is a guest that is done at a moment which nobody has picked.
func pending(at time.Time, g maint.GuestCampaign) maint.GuestCampaign {
	g.State, g.At, g.Until, g.By = maint.CampaignPending, stamp(at), time.Time{}, ""
	return g
}

// closed is a guest that will not be disturbed by the campaign any more.
func closed(g maint.GuestCampaign) maint.GuestCampaign {
	g.State, g.At, g.Until = maint.CampaignClosed, time.Time{}, time.Time{}
	return g
}

// with is the campaign with a guest's new state, and closed if all are done.
func with(now time.Time, c maint.Campaign, uuid string, g maint.GuestCampaign) maint.Campaign {
	c.Guests = maps.Clone(c.Guests)
	c.Guests[uuid] = g
	return settled(now, c)
}

func settled(now time.Time, c maint.Campaign) maint.Campaign {
	for _, g := range c.Guests {
		if g.State != maint.CampaignDone {
			return c
		}
	}
	if c.Closed.IsZero() {
		c.Closed = stamp(now)
	}
	return c
}

// guest finds a guest as it is by now.
func guest(now time.Time, c maint.Campaign, uuid string) (maint.GuestCampaign, error) {
	g, ok := c.Guests[uuid]
	if !ok {
		return g, maint.Problemf(maint.CodeUnknownGuest, "guest "+uuid, "", "is not in campaign %s", c.ID)
	}
	return advanced(now, c, g), nil
}

// waits reports whether a guest has yet to be begun.
func waits(g maint.GuestCampaign) bool {
	return g.State == maint.CampaignPending || g.State == maint.CampaignBooked || g.State == maint.CampaignDue
}

// need is how much room the work takes in a slot: if nothing else, it begins in it.
func need(c maint.Campaign) time.Duration { return max(time.Second, c.Duration) }

// refuse says why a guest's state does not allow something.
func refuse(code maint.Code, g maint.GuestCampaign, remedy, reason string, args ...any) error {
	return maint.Problemf(code, "guest "+g.Guest, remedy, reason, args...)
}

// stamp is a time that comes through JSON as it is.
func stamp(t time.Time) time.Time { return t.Round(0).UTC() }

func show(t time.Time) string { return t.Format("2006-01-02 15:04 MST") }

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
