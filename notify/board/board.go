package board

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/notify/campaign"
)

const (
	// recent is for how long an approval of an event that is over is no error.
	recent = time.Hour
	// maxNotice bounds how far ahead an event may be announced.
	maxNotice = 400 * 24 * time.Hour
	// maxListeners bounds what one guest may register, and MaxListenerWait for
	// how long a program may be waited for.
	maxListeners    = 16
	MaxListenerWait = time.Hour
	maxListenerName = 64 // bytes
	maxDescription  = 512
)

// Board decides about what is scheduled. Its methods change nothing: they give
// the change to be made.
type Board struct {
	maint.Scheduled
	// Notice is the least that an event of an impact is announced before; nil,
	// or shorter than maint.MinimumNotice, is that.
	Notice map[maint.Impact]time.Duration
	// announced has when events were by a clock that nobody can set, where
	// Announced is from another belayd (Keeper.Follow).
	announced map[maint.EventID]time.Time
}

// notice is the least there is for an impact.
func (b Board) notice(i maint.Impact) time.Duration { return max(b.Notice[i], maint.MinimumNotice(i)) }

// Announcement asks for an event.
type Announcement struct {
	ID          maint.EventID
	Impact      maint.Impact
	Guests      []maint.EventGuest // they share an owner
	Source      maint.EventSource  // Platform where it is empty
	Description string
	Duration    time.Duration // 0: not felt; maint.DurationUnknown
	NotBefore   time.Time     // later than the least notice, or zero
	Op          maint.OpID
	Campaign    maint.CampaignID
}

// Announce schedules an event.
func (b Board) Announce(now time.Time, a Announcement) (maint.EventChange, error) {
	bad := func(what, remedy, format string, args ...any) (maint.EventChange, error) {
		return maint.EventChange{}, maint.Problemf(maint.CodeBadRequest, what, remedy, format, args...)
	}
	switch {
	case a.ID == "":
		return bad("event", "give it a new UUID", "has no ID")
	case !slices.Contains(maint.Impacts, a.Impact):
		return bad("impact", fmt.Sprintf("choose one of %v", maint.Impacts), "is %q", a.Impact)
	case len(a.Guests) == 0:
		return bad("guests", "name those that are affected", "are not named")
	case len(a.Description) > maxDescription:
		return bad("description", fmt.Sprintf("use at most %d bytes", maxDescription), "has %d bytes", len(a.Description))
	case a.Duration < 0 && a.Duration != maint.DurationUnknown:
		return bad("duration", "give none, or one that is not negative", "is %s", a.Duration)
	case a.NotBefore.Sub(now) > maxNotice:
		return bad("not_before", "announce it later", "is %s ahead", a.NotBefore.Sub(now).Round(time.Hour))
	}
	if _, there := b.Events[a.ID]; there {
		return bad("event "+string(a.ID), "give it a new UUID", "was announced before")
	}
	e := maint.ScheduledEvent{ID: a.ID, Impact: a.Impact, State: maint.EventScheduled, Source: cmp.Or(a.Source, maint.SourcePlatform),
		Guests: slices.Clone(a.Guests), Description: a.Description, Duration: a.Duration, Announced: now, Op: a.Op, Campaign: a.Campaign}
	// The document has whole seconds: not before the one that it shows.
	e.NotBefore = ceil(now.Add(b.notice(a.Impact)))
	if a.NotBefore.After(e.NotBefore) {
		e.NotBefore = ceil(a.NotBefore)
	}
	for _, g := range a.Guests {
		for _, l := range b.Listeners[g.UUID] {
			e.Listeners = append(e.Listeners, maint.EventWait{Guest: g.UUID, Name: l.Name, Until: now.Add(l.Timeout)})
		}
	}
	return b.change(now, e), nil
}

// ceil is a time in whole seconds, not earlier, without a monotonic reading.
func ceil(t time.Time) time.Time {
	if c := t.Truncate(time.Second); c.Before(t.Round(0)) {
		return c.Add(time.Second)
	}
	return t.Truncate(time.Second)
}

// change has the documents of an event's guests show it as it is now.
func (b Board) change(now time.Time, e maint.ScheduledEvent) maint.EventChange {
	c := maint.EventChange{Events: []maint.ScheduledEvent{e}, Incarnations: make(map[string]uint64)}
	for _, g := range e.Guests {
		c.Incarnations[g.UUID] = b.next(now, g.UUID)
	}
	return c
}

// next is an incarnation that the guest's document never had. The seconds of the
// clock are in it for the case that what was kept is lost on a way to another host.
func (b Board) next(now time.Time, uuid string) uint64 {
	return max(b.Incarnations[uuid]+1, uint64(max(now.Unix(), 0)))
}

// find gives an event.
func (b Board) find(id maint.EventID) (maint.ScheduledEvent, error) {
	e, there := b.Events[id]
	if !there {
		return e, fmt.Errorf("event %s: %w", id, maint.ErrUnknownEvent)
	}
	e.Guests, e.Listeners = slices.Clone(e.Guests), slices.Clone(e.Listeners)
	return e, nil
}

// of gives an event that is one of the guest's.
func (b Board) of(guest string, id maint.EventID) (maint.ScheduledEvent, error) {
	e, err := b.find(id)
	if err == nil && !About(e, guest) {
		return e, fmt.Errorf("event %s: %w", id, maint.ErrUnknownEvent)
	}
	return e, err
}

// About reports whether an event is about a guest.
func About(e maint.ScheduledEvent, guest string) bool {
	return slices.ContainsFunc(e.Guests, func(g maint.EventGuest) bool { return g.UUID == guest })
}

// Approve has an event start as soon as it can. It changes nothing where that has
// started, is approved, or has ended recently. A guest approves its own; with
// guest "" it is somebody who answers for all.
func (b Board) Approve(now time.Time, guest string, id maint.EventID, by maint.EventApproval) (maint.EventChange, error) {
	e, err := b.find(id)
	if guest != "" {
		e, err = b.of(guest, id)
	}
	switch {
	case err != nil:
		return maint.EventChange{}, err
	case e.State.Over() && now.Sub(e.Ended) > recent:
		return maint.EventChange{}, fmt.Errorf("event %s ended at %s: %w", id, e.Ended.Format(time.RFC3339), maint.ErrUnknownEvent)
	case e.State != maint.EventScheduled || e.Approval != nil:
		return maint.EventChange{}, nil
	}
	e.Approval = &by
	return b.change(now, e), nil
}

// Startable is when an event may start at the earliest: now or before, it may.
func (b Board) Startable(now time.Time, id maint.EventID) (at time.Time, err error) {
	e, err := b.find(id)
	if err != nil {
		return at, err
	}
	if e.State != maint.EventScheduled {
		return at, maint.Problemf(maint.CodeEventState, "event "+string(id), "see 'belay events show'", "is %s", e.State)
	}
	at = e.NotBefore
	// A clock that was set forward does not shorten the notice: Announced has
	// a monotonic reading as long as belayd lives, which NotBefore has not.
	announced, taken := b.announced[id]
	if !taken {
		announced = e.Announced
	}
	least := announced.Add(max(b.notice(e.Impact), e.NotBefore.Sub(e.Announced)))
	if now.Before(least) && (least.After(at) || !now.Before(at)) {
		at = least
	}
	if e.Approval != nil {
		at = now
	}
	for _, w := range e.Listeners {
		if until := announced.Add(w.Until.Sub(e.Announced)); w.Ready.IsZero() && until.After(at) {
			at = until
		}
	}
	return at, nil
}

// Start has an event start that will have the impact, which may be less than was
// announced. An emergency waives the notice, and names who does and why.
func (b Board) Start(now time.Time, id maint.EventID, impact maint.Impact, emergency *maint.EventApproval) (maint.EventChange, error) {
	at, err := b.Startable(now, id)
	if err != nil {
		return maint.EventChange{}, err
	}
	e, err := b.find(id)
	if err != nil {
		return maint.EventChange{}, err
	}
	if !campaign.Fits(e.Impact, impact) {
		return maint.EventChange{}, maint.Problemf(maint.CodeEventState, "event "+string(id), "announce that, with its own notice",
			"was announced as %s, and would be %s", e.Impact, impact)
	}
	switch {
	case !now.Before(at):
	case emergency == nil:
		return maint.EventChange{}, maint.Problemf(maint.CodeEventState, "event "+string(id), "wait, or have it approved",
			"may not start before %s", at.Format(time.RFC3339))
	case emergency.Reason == "" || emergency.By == "":
		return maint.EventChange{}, maint.Problemf(maint.CodeBadRequest, "event "+string(id), "say why the notice is waived", "has no reason to start in an emergency")
	default:
		e.Emergency = emergency
		e.Description = clip("Emergency, started without notice: "+emergency.Reason+". "+e.Description, maxDescription)
	}
	e.State, e.Started = maint.EventStarted, now.Round(0)
	return b.change(now, e), nil
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && s[n]&0xc0 == 0x80 { // not within a character
		n--
	}
	return s[:n]
}

// End has an event end that has started. pauses are what was measured, by UUID.
func (b Board) End(now time.Time, id maint.EventID, pauses map[string]time.Duration, note string) (maint.EventChange, error) {
	e, err := b.find(id)
	switch {
	case err != nil || e.State == maint.EventCompleted:
		return maint.EventChange{}, err
	case e.State != maint.EventStarted:
		return maint.EventChange{}, maint.Problemf(maint.CodeEventState, "event "+string(id), "cancel it", "is %s, and was not started", e.State)
	}
	e.State, e.Ended, e.Pauses, e.Note = maint.EventCompleted, now.Round(0), pauses, note
	return b.change(now, e), nil
}

// Cancel calls an event off that has not started.
func (b Board) Cancel(now time.Time, id maint.EventID, why string) (maint.EventChange, error) {
	e, err := b.find(id)
	switch {
	case err != nil || e.State == maint.EventCancelled:
		return maint.EventChange{}, err
	case e.State != maint.EventScheduled:
		return maint.EventChange{}, maint.Problemf(maint.CodeEventState, "event "+string(id), "abort its operation", "is %s, and can no longer be cancelled", e.State)
	}
	e.State, e.Ended, e.Note = maint.EventCancelled, now.Round(0), why
	return b.change(now, e), nil
}

// Listen has later events of a guest wait for a program; one of the same name is
// replaced.
func (b Board) Listen(guest string, l maint.Listener) (maint.EventChange, error) {
	all := slices.DeleteFunc(slices.Clone(b.Listeners[guest]), func(k maint.Listener) bool { return k.Name == l.Name })
	if err := checkListener(l); err != nil {
		return maint.EventChange{}, err
	}
	switch {
	case len(all) == maxListeners:
		return maint.EventChange{}, maint.Problemf(maint.CodeBadRequest, "listener "+l.Name, "unregister one", "is one too many: there are %d", maxListeners)
	case slices.Contains(b.Listeners[guest], l):
		return maint.EventChange{}, nil
	}
	return maint.EventChange{Listeners: map[string][]maint.Listener{guest: append(all, l)}}, nil
}

// checkListener refuses what cannot be registered.
func checkListener(l maint.Listener) error {
	switch {
	case l.Name == "" || len(l.Name) > maxListenerName:
		return maint.Problemf(maint.CodeBadRequest, "listener", fmt.Sprintf("use 1 to %d bytes", maxListenerName), "has a name of %d bytes", len(l.Name))
	case l.Timeout <= 0 || l.Timeout > MaxListenerWait:
		return maint.Problemf(maint.CodeBadRequest, "listener "+l.Name, "choose a time-out up to "+MaxListenerWait.String(), "has a time-out of %s", l.Timeout)
	}
	return nil
}

// Unlisten has later events wait no longer, nor those that are scheduled.
func (b Board) Unlisten(now time.Time, guest, name string) maint.EventChange {
	left := slices.DeleteFunc(slices.Clone(b.Listeners[guest]), func(k maint.Listener) bool { return k.Name == name })
	if len(left) == len(b.Listeners[guest]) {
		return maint.EventChange{}
	}
	c := maint.EventChange{Listeners: map[string][]maint.Listener{guest: left}}
	for id := range b.Events {
		if ready, err := b.Ready(now, guest, name, id); err == nil && !ready.Empty() {
			c.Events = append(c.Events, ready.Events...)
			c.Incarnations = ready.Incarnations // the same for each
		}
	}
	return c
}

// Ready has an event wait no longer for a program that it waits for.
func (b Board) Ready(now time.Time, guest, name string, id maint.EventID) (maint.EventChange, error) {
	e, err := b.of(guest, id)
	if err != nil {
		return maint.EventChange{}, err
	}
	i := slices.IndexFunc(e.Listeners, func(w maint.EventWait) bool { return w.Guest == guest && w.Name == name })
	if i < 0 {
		return maint.EventChange{}, maint.Problemf(maint.CodeNotFound, "listener "+name, "register it before the event", "is not waited for by event %s", id)
	}
	if e.State != maint.EventScheduled || !e.Listeners[i].Ready.IsZero() {
		return maint.EventChange{}, nil
	}
	e.Listeners[i].Ready = now.Round(0)
	return b.change(now, e), nil
}

// incarnation is that of a guest's document.
func (b Board) incarnation(guest string) uint64 { return max(b.Incarnations[guest], 1) }

// open are the events that are not over, by guest, the oldest first.
func (b Board) open() map[string][]maint.ScheduledEvent {
	all := make(map[string][]maint.ScheduledEvent)
	for _, e := range b.Events {
		if e.State.Over() {
			continue
		}
		for _, g := range e.Guests {
			all[g.UUID] = append(all[g.UUID], e)
		}
	}
	for _, events := range all {
		slices.SortFunc(events, older)
	}
	return all
}

// History is a guest's events that are over, the latest first.
func (b Board) History(guest string) []maint.ScheduledEvent {
	var all []maint.ScheduledEvent
	for _, e := range b.Events {
		if e.State.Over() && About(e, guest) {
			all = append(all, e)
		}
	}
	slices.SortFunc(all, func(x, y maint.ScheduledEvent) int { return older(y, x) })
	return all
}

// older orders events by when they were announced.
func older(x, y maint.ScheduledEvent) int {
	return cmp.Or(x.Announced.Compare(y.Announced), cmp.Compare(x.ID, y.ID))
}
