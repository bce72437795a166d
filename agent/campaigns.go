package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"reflect"
	"slices"
	"strings"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/notify/board"
	"belay/notify/campaign"
	"belay/notify/window"
)

// byCampaign is who asks for an operation that a campaign has begun.
const byCampaign = "campaign:"

// campaignOf is the campaign that an operation is part of, "" for none.
func campaignOf(op maint.Op) maint.CampaignID {
	id, _ := strings.CutPrefix(op.By, byCampaign)
	if id == op.By {
		return ""
	}
	return maint.CampaignID(id)
}

// decide has a campaign changed, or nothing on an error.
func (a *Agent) decide(id maint.CampaignID, f func(now time.Time, c maint.Campaign) (maint.Campaign, error)) (c maint.Campaign, err error) {
	err = a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) {
		was, known := b.Campaigns[id]
		if !known {
			return maint.EventChange{}, a.unknownCampaign(id)
		}
		if c, err = f(now, was); err != nil {
			return maint.EventChange{}, err
		}
		return change(was, c), nil
	})
	return c, err
}

// change is what makes one campaign of the other: where it is little, only that is
// journaled.
func change(was, now maint.Campaign) maint.EventChange {
	some := make(map[string]maint.GuestCampaign)
	for uuid, g := range now.Guests {
		if was.Guests[uuid] != g {
			some[uuid] = g
		}
	}
	a, b := was, now
	a.Guests, b.Guests = nil, nil
	switch {
	case len(was.Guests) != len(now.Guests) || !reflect.DeepEqual(a, b):
		return maint.EventChange{Campaigns: []maint.Campaign{now}}
	case len(some) == 0:
		return maint.EventChange{}
	}
	return maint.EventChange{CampaignGuests: map[maint.CampaignID]map[string]maint.GuestCampaign{now.ID: some}}
}

// CheckWindows refuses a configuration whose windows cannot be read.
func CheckWindows(cfg config.Config) error {
	for i, w := range cfg.Events.Windows {
		if _, err := window.Parse(windowOf(w)); err != nil {
			return fmt.Errorf("configuration: events.windows, number %d: %w", i+1, err)
		}
	}
	if _, err := window.Parse(cfg.Policy.Policy().Windows...); err != nil {
		return fmt.Errorf("configuration: policy: %w", err)
	}
	for i, g := range cfg.Policy.Guests {
		if _, err := window.Parse(g.Policy().Windows...); err != nil {
			return fmt.Errorf("configuration: policy.guests, number %d: %w", i+1, err)
		}
	}
	return nil
}

func windowOf(w config.Window) maint.Window {
	return maint.Window{Rule: w.Rule, Zone: w.Zone, Length: w.Length.Duration, From: w.From, Except: w.Except}
}

// windows are when a guest may be disturbed, as the configuration has it.
func (a *Agent) windows(g maint.EventGuest) (window.Schedule, error) {
	var all []maint.Window
	for _, w := range a.cfg.Events.Windows {
		if matches(w.Guests, g) {
			all = append(all, windowOf(w))
		}
	}
	return window.Parse(all...)
}

// matches reports whether a guest is one of those named by name, pattern or UUID.
func matches(patterns []string, g maint.EventGuest) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, _ := path.Match(p, g.Name)
		return ok || p == g.UUID
	})
}

// Campaigns lists the campaigns of this host, the oldest first.
func (a *Agent) Campaigns(context.Context) ([]maint.Campaign, error) {
	all := []maint.Campaign{}
	a.keeper.See(func(b board.Board) {
		for _, c := range b.Campaigns {
			all = append(all, c)
		}
	})
	slices.SortFunc(all, func(x, y maint.Campaign) int {
		return cmp.Or(x.Created.Compare(y.Created), strings.Compare(string(x.ID), string(y.ID)))
	})
	return all, nil
}

// Campaign returns one.
func (a *Agent) Campaign(_ context.Context, id maint.CampaignID) (c maint.Campaign, err error) {
	known := false
	a.keeper.See(func(b board.Board) { c, known = b.Campaigns[id] })
	if !known {
		return c, a.unknownCampaign(id)
	}
	return c, nil
}

func (a *Agent) unknownCampaign(id maint.CampaignID) error {
	return maint.Problemf(maint.CodeNotFound, "campaign "+string(id), "see 'belay maintenance list'", "is not one of host %s", a.cfg.Host)
}

// CreateCampaign announces work to the owners of guests, who pick the moment.
func (a *Agent) CreateCampaign(ctx context.Context, by string, r maint.CampaignRequest) (maint.Campaign, error) {
	what := "cannot create campaign " + string(r.ID)
	if !a.cfg.Events.Enabled {
		return maint.Campaign{}, refuse(what, maint.Problemf(maint.CodeForbidden, "host "+a.cfg.Host, "set events.enabled in belayd's configuration", "tells guests nothing"))
	}
	if err := a.checkAction(by, r); err != nil {
		return maint.Campaign{}, err
	}
	guests, err := a.hyp.Guests(ctx)
	if err != nil {
		return maint.Campaign{}, a.cannotAsk(what, err)
	}
	for _, name := range r.Guests {
		if !slices.ContainsFunc(guests, func(g maint.Guest) bool { return name == g.Name || name == g.UUID }) {
			return maint.Campaign{}, a.unknownGuest(what, name)
		}
	}
	if r.Duration == 0 {
		r.Duration = maint.DurationUnknown
	}
	q := campaign.Request{ID: r.ID, Description: r.Description, Impact: r.Action.Impact(), Duration: r.Duration, By: by,
		Security: r.Security, Opens: r.Opens, Deadline: r.Deadline, MaxDefers: r.MaxDefers}
	for _, g := range guests {
		if len(r.Guests) > 0 && !slices.Contains(r.Guests, g.Name) && !slices.Contains(r.Guests, g.UUID) || len(r.Guests) == 0 && !g.State.Active() {
			continue
		}
		windows, err := a.windows(maint.EventGuest{UUID: g.UUID, Name: g.Name})
		if err != nil {
			return maint.Campaign{}, err
		}
		q.Guests = append(q.Guests, campaign.Guest{UUID: g.UUID, Name: g.Name, Windows: windows})
	}
	var c maint.Campaign
	err = a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) {
		if _, taken := b.Campaigns[r.ID]; taken {
			return maint.EventChange{}, maint.Problemf(maint.CodeBadRequest, "campaign "+string(r.ID), "choose another ID", "is there already")
		}
		if c, err = campaign.Create(now, q); err != nil {
			return maint.EventChange{}, err
		}
		c.Action = r.Action
		return maint.EventChange{Campaigns: []maint.Campaign{c}}, nil
	})
	return c, err
}

// checkAction refuses what an operation would be refused for anyway, months later.
func (a *Agent) checkAction(by string, r maint.CampaignRequest) error {
	if err := checkLine("description", r.Description); err != nil {
		return err
	}
	given, emergency := 0, ""
	var err error
	do := actionFor(maint.Campaign{Description: r.Description, Action: r.Action}, "any")
	if do.Migrate != nil {
		given++
		emergency += r.Action.Migrate.Emergency
		if err = a.checkRequest(*do.Migrate); err == nil && a.peers[do.Migrate.To] == nil {
			err = refuse("cannot create the campaign", a.unknownPeer(do.Migrate.To))
		}
	}
	if do.Replace != nil {
		given++
		emergency += r.Action.Replace.Emergency
		err = checkReplace(*do.Replace)
	}
	if do.Hold != nil {
		given++
		emergency += r.Action.Hold.Emergency
		if by != "root" && a.cfg.Hold.CommandsBy != "operators" {
			return maint.Problemf(maint.CodeForbidden, "caller "+by, `ask root, or set hold.commands_by = "operators"`, "may not have belayd run a command, which it runs as root")
		}
		do.Hold.MaxPause = cmp.Or(do.Hold.MaxPause, a.cfg.Hold.MaxPause.Duration)
		err = cmp.Or(a.checkHold(*do.Hold), maint.Refuse("cannot create the campaign", checkShapes(*do.Hold)))
	}
	switch {
	case given != 1:
		return badRequest("action", "give migrate, replace or hold", "has %d things to do, not one", given)
	case emergency != "":
		return badRequest("emergency", "leave it out; for an emergency begin an operation", "cannot be: owners pick the moment")
	}
	return err
}

// actionFor is what is done to a guest in a campaign.
func actionFor(c maint.Campaign, uuid string) maint.CampaignAction {
	do := c.Action
	if do.Migrate != nil {
		r := *do.Migrate
		r.Guest, r.Reason, r.Emergency = uuid, c.Description, ""
		do.Migrate = &r
	}
	if do.Replace != nil {
		r := *do.Replace
		r.Guest, r.Reason, r.Emergency = uuid, c.Description, ""
		do.Replace = &r
	}
	if do.Hold != nil {
		r := *do.Hold
		r.Guests, r.All, r.Groups, r.Reason, r.Emergency = []string{uuid}, false, nil, c.Description, ""
		do.Hold = &r
	}
	return do
}

// BookCampaign picks the moment for a guest; the zero time is now.
func (a *Agent) BookCampaign(_ context.Context, by string, id maint.CampaignID, guest string, at time.Time) (maint.Campaign, error) {
	return a.decide(id, func(now time.Time, c maint.Campaign) (maint.Campaign, error) {
		uuid, g, err := inCampaign(c, guest)
		if err != nil {
			return c, err
		}
		if at.IsZero() {
			return campaign.StartNow(now, c, uuid, by)
		}
		windows, err := a.windows(maint.EventGuest{UUID: uuid, Name: g.Guest})
		if err != nil {
			return c, err
		}
		return campaign.Book(now, c, uuid, by, at, windows)
	})
}

// DeferCampaign takes back what was picked for a guest.
func (a *Agent) DeferCampaign(_ context.Context, id maint.CampaignID, guest string) (maint.Campaign, error) {
	return a.decide(id, func(now time.Time, c maint.Campaign) (maint.Campaign, error) {
		uuid, _, err := inCampaign(c, guest)
		if err != nil {
			return c, err
		}
		return campaign.Defer(now, c, uuid)
	})
}

// CloseCampaign calls one off. Operations that it has begun go on.
func (a *Agent) CloseCampaign(_ context.Context, id maint.CampaignID) (maint.Campaign, error) {
	return a.decide(id, func(now time.Time, c maint.Campaign) (maint.Campaign, error) { return campaign.Close(now, c), nil })
}

func inCampaign(c maint.Campaign, guest string) (uuid string, g maint.GuestCampaign, err error) {
	if g, in := c.Guests[guest]; in {
		return guest, g, nil
	}
	for uuid, g := range c.Guests {
		if g.Guest == guest {
			return uuid, g, nil
		}
	}
	return "", g, maint.Problemf(maint.CodeUnknownGuest, "guest "+guest, "see 'belay maintenance show "+string(c.ID)+"'", "is not in campaign %s", c.ID)
}

// campaignsRest is the least time between two looks at campaigns that nothing has
// changed in: what is due and cannot begin is tried again.
const campaignsRest = time.Second

// followCampaigns begins what is due, and learns how it ended, until ctx ends.
func (a *Agent) followCampaigns(ctx context.Context) {
	if !a.cfg.Events.Enabled {
		return
	}
	told := make(map[string]string) // why a guest's operation cannot begin, by UUID
	for ctx.Err() == nil {
		changed := a.journal.Changed()
		next := time.Now().Add(eventsEvery)
		all, _ := a.Campaigns(ctx)
		for _, c := range all {
			if !c.Closed.IsZero() && !slices.ContainsFunc(running(c), func(string) bool { return true }) {
				continue
			}
			c = a.advance(ctx, c, told)
			if at := campaign.Wake(c); !at.IsZero() && at.Before(next) {
				next = at
			}
		}
		wake := time.NewTimer(max(time.Until(next), campaignsRest))
		select {
		case <-wake.C:
		case <-changed:
		case <-ctx.Done():
		}
		wake.Stop()
	}
}

// running are the guests of a campaign that an operation is at work on.
func running(c maint.Campaign) (uuids []string) {
	for uuid, g := range c.Guests {
		if g.State == maint.CampaignRunning {
			uuids = append(uuids, uuid)
		}
	}
	return uuids
}

// advance brings one campaign to the present. told is what was said already.
func (a *Agent) advance(ctx context.Context, c maint.Campaign, told map[string]string) maint.Campaign {
	keep := func(f func(time.Time, maint.Campaign) (maint.Campaign, error)) {
		now, err := a.decide(c.ID, f)
		if err != nil {
			a.log.Error("cannot go on with a campaign", "campaign", c.ID, "err", err)
			return
		}
		c = now
	}
	for _, uuid := range running(c) {
		op, known := a.journal.Op(c.Guests[uuid].Op)
		r, arriving := a.journal.Reservation(c.Guests[uuid].Op)
		switch {
		case arriving && time.Now().Before(r.Expires): // another host's operation, which tells when it is over
		case arriving: // it does not: the guest is here, or nothing would be known of it
			keep(func(now time.Time, c maint.Campaign) (maint.Campaign, error) { return campaign.Done(now, c, uuid) })
		case known && op.State != maint.OpEnded:
		case known && op.Outcome.TookEffect():
			keep(func(now time.Time, c maint.Campaign) (maint.Campaign, error) { return campaign.Done(now, c, uuid) })
		default:
			keep(func(now time.Time, c maint.Campaign) (maint.Campaign, error) { return campaign.Failed(now, c, uuid) })
		}
	}
	if now := campaign.Advance(time.Now(), c); len(campaign.Due(now)) > len(campaign.Due(c)) || !campaign.Wake(now).Equal(campaign.Wake(c)) {
		keep(func(now time.Time, c maint.Campaign) (maint.Campaign, error) { return campaign.Advance(now, c), nil })
	}
	for _, uuid := range campaign.Due(c) {
		if !a.view.has(uuid, maint.GuestRunning) {
			continue // it is off, or on another host, which knows
		}
		if do := c.Action.Migrate; do != nil && do.To == a.cfg.Host { // somebody else has moved it here
			keep(func(now time.Time, c maint.Campaign) (maint.Campaign, error) { return campaign.Done(now, c, uuid) })
			continue
		}
		op, err := a.beginFor(ctx, c, uuid)
		if err != nil {
			if told[uuid] != err.Error() {
				told[uuid] = err.Error()
				a.log.Warn("a guest's moment in a campaign has come, and its operation cannot begin yet", "campaign", c.ID, "guest", c.Guests[uuid].Guest, "err", err)
			}
			continue // tried again
		}
		begun, err := a.decide(c.ID, func(now time.Time, c maint.Campaign) (maint.Campaign, error) {
			return campaign.Begin(now, c, uuid, op.ID)
		})
		if err == nil {
			c = begun
			continue
		}
		a.log.Error("cannot go on with a campaign", "campaign", c.ID, "err", err)
		// What cannot be written down is found the next time. Else it was put off
		// or called off meanwhile.
		if refused := (*maint.Problem)(nil); errors.As(err, &refused) {
			if _, err := a.Abort(ctx, byCampaign+string(c.ID), op.ID); err != nil {
				a.log.Error("cannot abort what a campaign has begun and does not want any more", "campaign", c.ID, "op", op.ID, "err", err)
			}
		}
	}
	return c
}

// beginFor begins a campaign's operation for a guest, or finds the one that a
// belayd has begun that died before it could write that down.
func (a *Agent) beginFor(ctx context.Context, c maint.Campaign, uuid string) (maint.Op, error) {
	by := byCampaign + string(c.ID)
	g := c.Guests[uuid]
	for _, op := range slices.Backward(a.journal.Ops()) {
		about := op.GuestUUID == uuid || slices.Contains(op.Guests, uuid)
		if op.By == by && about && op.ID != g.Op && op.Started.After(g.At) {
			return op, nil
		}
	}
	switch do := actionFor(c, uuid); {
	case do.Migrate != nil:
		return a.Migrate(ctx, by, *do.Migrate)
	case do.Replace != nil:
		return a.Replace(ctx, by, *do.Replace)
	case do.Hold != nil:
		return a.Hold(ctx, by, *do.Hold)
	}
	return maint.Op{}, maint.Problemf(maint.CodeInternal, "campaign "+string(c.ID), "close it", "has nothing to do")
}

// arrivedInCampaigns says that what was to be done for a guest was to bring it here.
func (a *Agent) arrivedInCampaigns(op maint.OpID, uuid string) {
	all, _ := a.Campaigns(context.Background())
	for _, c := range all {
		if g := c.Guests[uuid]; g.State != maint.CampaignRunning || g.Op != op {
			continue
		}
		if _, err := a.decide(c.ID, func(now time.Time, c maint.Campaign) (maint.Campaign, error) { return campaign.Done(now, c, uuid) }); err != nil {
			a.log.Error("cannot note that a campaign is done with a guest", "campaign", c.ID, "guest", uuid, "err", err)
		}
	}
}

// picked reports whether a guest's owner has picked the moment of an operation:
// that is an approval.
func (a *Agent) picked(op maint.Op, uuid string) (by string, is bool) {
	a.keeper.See(func(b board.Board) {
		if g, in := b.Campaigns[campaignOf(op)].Guests[uuid]; in && g.By != "" {
			by, is = g.By, true
		}
	})
	return by, is
}

// Maintenance implements notify.Source: a guest sees itself alone.
func (s guestSource) Maintenance(guest string) (all []maint.Campaign) {
	every, _ := s.server.agent.Campaigns(context.Background())
	for _, c := range every {
		if g, in := c.Guests[guest]; in && c.Closed.IsZero() {
			c.Guests = map[string]maint.GuestCampaign{guest: g}
			c.Action = maint.CampaignAction{}
			all = append(all, c)
		}
	}
	return all
}

// Book implements notify.Source.
func (s guestSource) Book(ctx context.Context, guest string, id maint.CampaignID, at time.Time) error {
	_, err := s.server.agent.BookCampaign(ctx, "guest", id, guest, at)
	return err
}

// Defer implements notify.Source.
func (s guestSource) Defer(ctx context.Context, guest string, id maint.CampaignID) error {
	_, err := s.server.agent.DeferCampaign(ctx, id, guest)
	return err
}
