package campaign

import (
	"fmt"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/notify/window"
)

// Book has a guest done at a moment that its owner picks, in its windows. Another
// booking is replaced; it counts as a deferral if the new one is later. A refusal
// names the next slots.
func Book(now time.Time, c maint.Campaign, uuid, by string, at time.Time, windows window.Schedule) (maint.Campaign, error) {
	g, err := picks(now, c, uuid)
	if err != nil {
		return c, err
	}
	at = stamp(at)
	picked := g.State != maint.CampaignPending
	if picked && at.Equal(g.At) {
		return c, nil
	}
	var slots []window.Slot
	for _, slot := range windows.Slots(now, c.Deadline) {
		if slot.Holds(at, need(c)) {
			if picked && at.After(g.At) {
				if g, err = deferred(c, g); err != nil {
					return c, err
				}
			}
			g.State, g.At, g.By = maint.CampaignBooked, at, by
			g.Until = stamp(earlier(at.Add(Grace), slot.End.Add(-need(c))))
			return with(now, c, uuid, g), nil
		}
		if slot.Holds(slot.Start, need(c)) {
			slots = append(slots, slot)
		}
	}
	remedy := "start it now, or leave it to the deadline at " + show(c.Deadline)
	if len(slots) > 0 {
		remedy = "book a moment within " + list(slots, need(c))
	}
	switch {
	case at.Before(now):
		return c, refuse(maint.CodeNoSlot, g, remedy, "%s is past", show(at))
	case !at.Before(c.Deadline):
		return c, refuse(maint.CodeNoSlot, g, remedy, "%s is not before the deadline of campaign %s at %s", show(at), c.ID, show(c.Deadline))
	}
	return c, refuse(maint.CodeNoSlot, g, remedy, "%s is not in its windows, with %s for the work before window and campaign end", show(at), need(c))
}

// list names the first few slots by when work can begin in them.
func list(slots []window.Slot, need time.Duration) string {
	const few = 3
	var all []string
	for _, s := range slots[:min(few, len(slots))] {
		all = append(all, fmt.Sprintf("%s to %s", show(s.Start), show(s.End.Add(-need))))
	}
	return strings.Join(all, ", ")
}

// StartNow has a guest done as soon as can be, on its owner's word. It is no error
// if that has begun, or is done.
func StartNow(now time.Time, c maint.Campaign, uuid, by string) (maint.Campaign, error) {
	g, err := guest(now, c, uuid)
	if err != nil {
		return c, err
	}
	if g.State == maint.CampaignRunning || g.State == maint.CampaignDone {
		return c, nil
	}
	if err := opened(now, c, g); err != nil {
		return c, err
	}
	if g.State == maint.CampaignDue && g.Until.IsZero() {
		return c, nil
	}
	g.State, g.At, g.Until, g.By = maint.CampaignDue, stamp(now), time.Time{}, by
	return with(now, c, uuid, g), nil
}

// Defer takes back what a guest's owner has picked, and leaves it to a later booking
// or the deadline. To name the new moment at once, Book it.
func Defer(now time.Time, c maint.Campaign, uuid string) (maint.Campaign, error) {
	g, err := picks(now, c, uuid)
	if err != nil {
		return c, err
	}
	if g.State == maint.CampaignPending {
		return c, refuse(maint.CodeNothing, g, "", "has nothing booked in campaign %s", c.ID)
	}
	if g, err = deferred(c, g); err != nil {
		return c, err
	}
	return with(now, c, uuid, pending(c.Deadline, g)), nil
}

// Remaining is how often a guest's owner may still put off what is booked.
func Remaining(c maint.Campaign, uuid string) int {
	g, ok := c.Guests[uuid]
	if !ok {
		return 0
	}
	return max(0, c.MaxDefers-g.Defers)
}

// picks finds a guest whose owner may pick a moment.
func picks(now time.Time, c maint.Campaign, uuid string) (maint.GuestCampaign, error) {
	g, err := guest(now, c, uuid)
	if err != nil {
		return g, err
	}
	if err := opened(now, c, g); err != nil {
		return g, err
	}
	switch {
	case !waits(g):
		return g, refuse(maint.CodeCampaign, g, "", "is %s in campaign %s", g.State, c.ID)
	case !now.Before(c.Deadline):
		return g, refuse(maint.CodeCampaign, g, "start it now, or expect it", "the deadline of campaign %s was %s", c.ID, show(c.Deadline))
	}
	return g, nil
}

// opened refuses what comes before the campaign opens, or after it is closed.
func opened(now time.Time, c maint.Campaign, g maint.GuestCampaign) error {
	switch {
	case !c.Closed.IsZero():
		return refuse(maint.CodeCampaign, g, "", "campaign %s is closed since %s", c.ID, show(c.Closed))
	case now.Before(c.Opens):
		return refuse(maint.CodeCampaign, g, "pick then", "campaign %s opens at %s", c.ID, show(c.Opens))
	}
	return nil
}

// deferred counts a deferral.
func deferred(c maint.Campaign, g maint.GuestCampaign) (maint.GuestCampaign, error) {
	if g.Defers >= c.MaxDefers {
		return g, refuse(maint.CodeNoDefers, g, "keep the moment, or book an earlier one",
			"%s is put off no further: campaign %s allows %d deferrals", show(g.At), c.ID, c.MaxDefers)
	}
	g.Defers++
	return g, nil
}
