package campaign

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"

	"belay/agent/maint"
)

// Advance brings a campaign to the present: guests whose moment has come are due,
// bookings that could not be kept are left to the deadline.
func Advance(now time.Time, c maint.Campaign) maint.Campaign {
	c.Guests = maps.Clone(c.Guests)
	for uuid, g := range c.Guests {
		c.Guests[uuid] = advanced(now, c, g)
	}
	return c
}

func advanced(now time.Time, c maint.Campaign, g maint.GuestCampaign) maint.GuestCampaign {
	if !waits(g) {
		return g
	}
	if !g.Until.IsZero() && now.After(g.Until) {
		g = pending(c.Deadline, g)
	}
	if !now.Before(g.At) {
		g.State = maint.CampaignDue
	}
	return g
}

// Due is the UUIDs of the guests that are to be begun, the longest due first. Of
// those that have moved away, their new host knows.
func Due(c maint.Campaign) []string {
	var due []string
	for uuid, g := range c.Guests {
		if g.State == maint.CampaignDue {
			due = append(due, uuid)
		}
	}
	slices.SortFunc(due, func(a, b string) int {
		return cmp.Or(c.Guests[a].At.Compare(c.Guests[b].At), strings.Compare(a, b))
	})
	return due
}

// Wake is when Advance changes something next; zero: never.
func Wake(c maint.Campaign) time.Time {
	var at time.Time
	for _, g := range c.Guests {
		var next time.Time
		switch g.State {
		case maint.CampaignPending, maint.CampaignBooked:
			next = g.At
		case maint.CampaignDue:
			if g.Until.IsZero() {
				continue
			}
			next = g.Until.Add(1)
		default:
			continue
		}
		if at.IsZero() || next.Before(at) {
			at = next
		}
	}
	return at
}

// Begin says that an operation has been begun for a guest that is due. For the
// operation that it runs in it may be done over.
func Begin(now time.Time, c maint.Campaign, uuid string, op maint.OpID) (maint.Campaign, error) {
	g, err := guest(now, c, uuid)
	switch {
	case err != nil:
		return c, err
	case g.State == maint.CampaignRunning && g.Op == op:
		return c, nil
	case g.State == maint.CampaignRunning:
		return c, refuse(maint.CodeBusy, g, "wait for it", "campaign %s has operation %s at work on it", c.ID, g.Op)
	case g.State == maint.CampaignPending, g.State == maint.CampaignBooked:
		return c, refuse(maint.CodeCampaign, g, "wait until "+show(g.At), "is not due in campaign %s", c.ID)
	case g.State != maint.CampaignDue:
		return c, refuse(maint.CodeCampaign, g, "", "is %s in campaign %s", g.State, c.ID)
	}
	g.State, g.Op = maint.CampaignRunning, op
	return with(now, c, uuid, g), nil
}

// Done says that nothing is left to be done for a guest, whether an operation has
// done it or its owner, say by restarting it. With the last one the campaign closes.
func Done(now time.Time, c maint.Campaign, uuid string) (maint.Campaign, error) {
	g, err := guest(now, c, uuid)
	switch {
	case err != nil:
		return c, err
	case g.State == maint.CampaignClosed:
		return c, refuse(maint.CodeCampaign, g, "", "campaign %s is closed for it", c.ID)
	case g.State == maint.CampaignDone:
		return c, nil
	}
	g.State, g.At, g.Until = maint.CampaignDone, stamp(now), time.Time{}
	return with(now, c, uuid, g), nil
}

// Failed says that a guest's operation has ended and it is not done. Its owner may
// pick anew; after the deadline it is tried again.
func Failed(now time.Time, c maint.Campaign, uuid string) (maint.Campaign, error) {
	g, err := guest(now, c, uuid)
	switch {
	case err != nil:
		return c, err
	case g.State != maint.CampaignRunning:
		return c, refuse(maint.CodeCampaign, g, "", "is %s, not running, in campaign %s", g.State, c.ID)
	case !c.Closed.IsZero():
		return with(now, c, uuid, closed(g)), nil
	}
	return with(now, c, uuid, pending(later(c.Deadline, now.Add(Retry)), g)), nil
}

// Arrive adds a guest that comes to the host, with the state that came with it, nil
// for none. It may be known from an earlier stay: then what is further on counts,
// and the larger number of deferrals; else what came is the newer. It has its notice
// also when it comes after the deadline. What cannot be is refused, and what cannot
// be booked here is left to the deadline.
func Arrive(now time.Time, c maint.Campaign, who maint.EventGuest, came *maint.GuestCampaign) (maint.Campaign, error) {
	g, known := c.Guests[who.UUID]
	switch {
	case !c.Closed.IsZero():
		return c, maint.Problemf(maint.CodeCampaign, "guest "+who.Name, "", "campaign %s is closed since %s", c.ID, show(c.Closed))
	case !possible(now, c):
		return c, maint.Problemf(maint.CodeBadRequest, "guest "+who.Name, "", "it brings a campaign that no host has made")
	case who.UUID == "":
		return c, maint.Problemf(maint.CodeBadRequest, "guest "+who.Name, "", "has no UUID")
	case known && came == nil:
		return c, nil
	case came == nil:
		g = pending(later(c.Deadline, now.Add(maint.MinimumNotice(c.Impact))), g)
	default:
		brought, err := brought(now, c, *came)
		if err != nil {
			return c, maint.Problemf(maint.CodeBadRequest, "guest "+who.Name, "", "its state in campaign %s is void: %s", c.ID, err)
		}
		brought.Defers = max(brought.Defers, g.Defers)
		if g.State != maint.CampaignDone && (g.State != maint.CampaignRunning || brought.State == maint.CampaignDone) {
			g = brought
		}
		g.Defers = brought.Defers
	}
	g.Guest = who.Name
	return with(now, c, who.UUID, g), nil
}

// possible reports whether a campaign can be one that Create has made, on another
// host, whose clock may differ.
func possible(now time.Time, c maint.Campaign) bool {
	return idForm.MatchString(string(c.ID)) && slices.Contains(maint.Impacts, c.Impact) && c.Deadline.Sub(now) <= maxAhead+24*time.Hour &&
		(c.Duration >= 0 || c.Duration == maint.DurationUnknown) && c.MaxDefers >= 0 && c.MaxDefers <= maxDefers &&
		len(c.Description) <= maxText && !strings.ContainsFunc(c.Description, unicode.IsControl) && len(c.By) <= maxText
}

// brought is the state that a guest came with, as far as it can be here: another
// host wrote it.
func brought(now time.Time, c maint.Campaign, g maint.GuestCampaign) (maint.GuestCampaign, error) {
	g.At, g.Until = stamp(g.At), stamp(g.Until)
	if g.Defers < 0 {
		return g, fmt.Errorf("%d deferrals", g.Defers)
	}
	switch g.State {
	case maint.CampaignDone:
		g.Until = time.Time{}
		return g, nil
	case maint.CampaignRunning:
		if g.Op == "" {
			return g, errors.New("it runs in no operation")
		}
		return g, nil
	case maint.CampaignBooked:
		if g.At.Before(c.Deadline) && !g.Until.Before(g.At) && !g.Until.After(g.At.Add(Grace)) {
			return g, nil
		}
	case maint.CampaignDue:
		g.At = earlier(g.At, stamp(now))
		return g, nil
	case maint.CampaignPending, maint.CampaignClosed:
	default:
		return g, fmt.Errorf("no state %q", g.State)
	}
	return pending(later(c.Deadline, earlier(g.At, now.Add(Retry))), g), nil
}

// Remove forgets a guest that is deleted, or has moved and does not come back.
// Guests that have moved stay else: campaigns are not over without them.
func Remove(now time.Time, c maint.Campaign, uuid string) maint.Campaign {
	c.Guests = maps.Clone(c.Guests)
	delete(c.Guests, uuid)
	return settled(now, c)
}
