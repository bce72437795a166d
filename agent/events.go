package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"

	"belay/agent/maint"
	"belay/agent/run"
	"belay/notify/board"
	"belay/notify/campaign"
)

// phaseAnnounce is the step of an operation in which guests are told of it, and
// waited for.
const phaseAnnounce = "announce"

// eventsStore keeps scheduled events in the journal.
type eventsStore struct{ journal Journal }

func (s eventsStore) Append(c maint.EventChange) error {
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	r := maint.Record{Kind: maint.RecEvent, Data: data}
	if len(c.Events) == 1 {
		r.Op = c.Events[0].Op
	}
	return s.journal.Append(r)
}

func newKeeper(a *Agent) *board.Keeper {
	least := make(map[maint.Impact]time.Duration)
	for impact, d := range a.cfg.Events.Notice {
		least[maint.Impact(impact)] = d.Duration
	}
	k := board.New(eventsStore{a.journal}, a.journal.Scheduled(), least)
	if a.preserve.Boot.ID != "" {
		k.Follow(a.preserve.Boot)
	}
	return k
}

// tell has an operation's guests be told of it, if this host tells guests.
func (a *Agent) tell(op *maint.Op) {
	if op.Told = a.cfg.Events.Enabled; op.Told {
		op.Deadline = op.Deadline.Add(a.longestNotice())
	}
}

// longestNotice is how long an operation may have to wait for its guests at most.
func (a *Agent) longestNotice() time.Duration {
	least := maint.MinimumNotice(maint.ImpactFreeze)
	return max(least, a.cfg.Events.Notice[string(maint.ImpactFreeze)].Duration) + board.MaxListenerWait
}

// told has the guests of an operation be told of it before its first step that
// they feel, which is effect, and wait for their notice. What stands in the way
// is found out before they are told, by what is the operation's first step anyway.
func (a *Agent) told(op maint.Op, effect string, steps []run.Step) []run.Step {
	if !op.Told {
		return steps
	}
	i := slices.IndexFunc(steps, func(s run.Step) bool { return s.Name == effect })
	do := steps[i].Do
	steps[i].Do = func(ctx context.Context, s *run.Scratch) error {
		if err := a.startEvents(ctx, op); err != nil {
			return err
		}
		return do(ctx, s)
	}
	look := steps[0].Do
	return append([]run.Step{{Name: phaseAnnounce, Do: func(ctx context.Context, s *run.Scratch) error {
		if err := look(ctx, s); err != nil {
			return err
		}
		if err := a.announce(ctx, op, s); err != nil {
			return err
		}
		return a.turn(ctx, op)
	}}}, steps...)
}

// announce tells the guests and waits until all have approved, or had their
// notice. Who has started meanwhile is told, too.
func (a *Agent) announce(ctx context.Context, op maint.Op, s *run.Scratch) error {
	for {
		missing, err := a.untold(ctx, op)
		if err != nil {
			return err
		}
		usual := a.usualPause(op)
		for _, guests := range campaign.Partition(missing, a.ownerOf(missing), a.policy()) {
			if err := a.announceTo(op, guests, usual, time.Time{}); err != nil {
				return err
			}
		}
		var ids []maint.EventID
		for _, e := range a.openEvents(op.ID) {
			ids = append(ids, e.ID)
		}
		if len(ids) == 0 || emergencyOf(op) != "" {
			return nil
		}
		if len(missing) > 0 {
			if err := s.Note("%d guests have been told", len(missing)); err != nil {
				return err
			}
		}
		if err := a.keeper.Wait(ctx, ids); err != nil {
			return err
		}
		if missing, err = a.untold(ctx, op); err != nil || len(missing) == 0 {
			return err
		}
	}
}

// announceTo tells guests of an operation that begins at some moment, or when they have had
// their notice.
func (a *Agent) announceTo(op maint.Op, guests []maint.EventGuest, usual time.Duration, at time.Time) error {
	e := board.Announcement{ID: maint.EventID(uuid.NewString()), Impact: maint.ImpactFreeze, Guests: guests,
		Description: descriptions[op.Kind], Duration: usual, Op: op.ID, Campaign: campaignOf(op)}
	now := time.Now()
	e.NotBefore = campaign.NotBefore(a.policy(), e.Impact, e.Duration, now, op.Deadline.Add(-ownersMargin))
	if at.After(e.NotBefore) {
		e.NotBefore = at
	}
	if err := a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) { return b.Announce(now, e) }); err != nil {
		return err
	}
	by, picked := a.picked(op, guests[0].UUID)
	if !picked {
		return nil
	}
	return a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) {
		return b.Approve(now, "", e.ID, maint.EventApproval{By: by, At: now.Round(0), Reason: "the moment was picked"})
	})
}

// descriptions are what guests read of an operation. Its reason is for operators.
var descriptions = map[maint.OpKind]string{
	maint.OpMigrate: "Virtual machine is being moved to another host with its memory. It stands still for a moment.",
	maint.OpHold:    "Host server is undergoing maintenance. Virtual machine is paused meanwhile, with its memory preserved.",
	maint.OpKexec:   "Host server is getting a new kernel. Virtual machine stands still meanwhile, with its memory preserved.",
	maint.OpReplace: "Virtual machine monitor is being updated. Virtual machine is paused meanwhile, with its memory preserved.",
}

// untold are the guests of an operation that run and that no event of it is about.
// It is an error if one was cancelled: that ends the operation, also one that did not
// live to see it.
func (a *Agent) untold(ctx context.Context, op maint.Op) (missing []maint.EventGuest, err error) {
	if err := a.calledOff(op.ID); err != nil {
		return nil, err
	}
	guests, err := a.hyp.Guests(ctx)
	if err != nil {
		return nil, err
	}
	told := a.openEvents(op.ID)
	for _, g := range guests {
		concerned := g.UUID == op.GuestUUID || slices.Contains(op.Guests, g.UUID) || ofAll(op)
		if !concerned || !works(g) {
			continue
		}
		if !slices.ContainsFunc(told, func(e maint.ScheduledEvent) bool { return board.About(e, g.UUID) }) {
			missing = append(missing, maint.EventGuest{UUID: g.UUID, Name: g.Name})
		}
	}
	return missing, nil
}

// calledOff is an error if an event of an operation was cancelled.
func (a *Agent) calledOff(op maint.OpID) error {
	for _, e := range a.keeper.Events(func(e maint.ScheduledEvent) bool { return e.Op == op && e.State == maint.EventCancelled }) {
		return maint.Problemf(maint.CodeEventState, "event "+string(e.ID), "begin the operation again", "was called off: %s", e.Note)
	}
	return nil
}

// policy is whose approval operations wait for.
func (a *Agent) policy() maint.Policy { return maint.Policy(a.cfg.Events.Policy) }

// ownerOf tells whom the configuration has as the owner of one of the guests, by
// UUID, "" for nobody.
func (a *Agent) ownerOf(guests []maint.EventGuest) func(uuid string) string {
	return func(uuid string) string {
		for _, g := range guests {
			for _, name := range slices.Sorted(maps.Keys(a.cfg.Events.Owners)) {
				if g.UUID == uuid && matches(a.cfg.Events.Owners[name].Guests, g) {
					return name
				}
			}
		}
		return ""
	}
}

// openEvents are the events of an operation that are not over.
func (a *Agent) openEvents(op maint.OpID) []maint.ScheduledEvent {
	return a.keeper.Events(func(e maint.ScheduledEvent) bool { return e.Op == op && !e.State.Over() })
}

// startEvents has all events of an operation start together, right before guests
// feel it. It is the last that can refuse, and does nothing when they have started:
// guests may be held by then.
func (a *Agent) startEvents(ctx context.Context, op maint.Op) error {
	events := a.openEvents(op.ID)
	if slices.ContainsFunc(events, func(e maint.ScheduledEvent) bool { return e.State == maint.EventStarted }) {
		return nil
	}
	if err := a.awaitRecoveries(ctx, op); err != nil {
		return err
	}
	late, err := a.untold(ctx, op)
	if err != nil {
		return err
	}
	if len(late) > 0 && emergencyOf(op) == "" {
		return maint.Problemf(maint.CodeEventState, "guest "+late[0].Name, "begin the operation again", "has started since the others were told, and has not had its notice")
	}
	var emergency *maint.EventApproval
	if why := emergencyOf(op); why != "" {
		emergency = &maint.EventApproval{By: op.By, At: time.Now().Round(0), Reason: why}
	}
	return a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) {
		all := maint.EventChange{Incarnations: make(map[string]uint64)}
		for _, e := range events {
			c, err := b.Start(now, e.ID, e.Impact, emergency)
			if err != nil {
				return maint.EventChange{}, err
			}
			all.Events = append(all.Events, c.Events...)
			for uuid, n := range c.Incarnations {
				all.Incarnations[uuid] = n
			}
		}
		return all, nil
	})
}

// awaitRecoveries waits for operations that were let in while this one waited, and
// are about the same guests. None is let in any more.
func (a *Agent) awaitRecoveries(ctx context.Context, op maint.Op) error {
	return a.until(ctx, func() bool {
		return !slices.ContainsFunc(a.journal.Ops(), func(o maint.Op) bool {
			return o.ID != op.ID && o.State != maint.OpEnded && recovers(o) && inCommon(op, o) != ""
		})
	})
}

// emergencyOf is the reason for which an operation waives its guests' notice, ""
// for none.
func emergencyOf(op maint.Op) string {
	switch {
	case op.Hold != nil:
		return op.Hold.Emergency
	case op.Replace != nil:
		return op.Replace.Emergency
	case op.Migrate != nil:
		return op.Migrate.Emergency
	case op.Kexec != nil:
		return op.Kexec.Emergency
	}
	return ""
}

// endEvents ends what an operation that is over has announced, with what was
// measured of it.
func (a *Agent) endEvents(op maint.Op) {
	if op.Kind == maint.OpApply {
		a.callOff(op)
	}
	for _, e := range a.openEvents(op.ID) {
		err := a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) {
			if e.State == maint.EventStarted {
				return b.End(now, e.ID, pausesOf(op), string(op.Outcome))
			}
			return b.Cancel(now, e.ID, "operation "+string(op.ID)+": "+string(op.Outcome))
		})
		if err != nil {
			a.log.Error("cannot end a scheduled event", "event", e.ID, "op", op.ID, "err", err)
		}
	}
}

// endOldEvents does so for operations that ended without it: belayd died in between.
func (a *Agent) endOldEvents() {
	seen := make(map[maint.OpID]bool)
	for _, e := range a.keeper.Events(func(e maint.ScheduledEvent) bool { return e.Op != "" && !e.State.Over() }) {
		op, known := a.journal.Op(e.Op)
		if seen[e.Op] || known && op.State != maint.OpEnded {
			continue
		}
		if r, arriving := a.journal.Reservation(e.Op); arriving && time.Now().Before(r.Expires) {
			continue // another host's, which tells when it is over
		}
		if a.toCome(e.Op) {
			continue
		}
		seen[e.Op] = true
		op.ID = e.Op
		a.endEvents(op)
	}
}

// pausesOf is for how long each guest stood still in an operation, by UUID, where
// that could be measured.
func pausesOf(op maint.Op) map[string]time.Duration {
	pauses := make(map[string]time.Duration)
	switch {
	case op.Held != nil:
		for _, g := range op.Held.Guests {
			if g.Pause > 0 {
				pauses[g.UUID] = g.Pause
			}
		}
	case op.Kexeced != nil:
		for _, g := range op.Kexeced.Guests {
			if g.Pause > 0 {
				pauses[g.UUID] = g.Pause
			}
		}
	case op.Replaced != nil && op.Replaced.Pause > 0:
		pauses[op.GuestUUID] = op.Replaced.Pause
	case op.Move != nil && op.Move.Downtime > 0:
		pauses[op.GuestUUID] = op.Move.Downtime
	}
	return pauses
}

const (
	// ownersMargin is what is left for the operation itself when the owner of a
	// dedicated host has not approved it by its deadline.
	ownersMargin = 15 * time.Minute
	// usualOf is how many of the latest operations of a kind are looked at for
	// what a pause usually is.
	usualOf = 20
	// assumedPause is what is announced before there is any.
	assumedPause = 2 * time.Second
)

// usualPause is the median of what guests have felt of operations of this kind on
// this host.
func (a *Agent) usualPause(op maint.Op) time.Duration {
	var pauses []time.Duration
	n := 0
	for _, old := range slices.Backward(a.journal.Ops()) {
		if n == usualOf {
			break
		}
		if old.Kind != op.Kind || op.Replace != nil && old.Replace != nil && old.Replace.Method != op.Replace.Method {
			continue
		}
		of := pausesOf(old)
		if len(of) > 0 {
			n++
		}
		for _, p := range of {
			pauses = append(pauses, p)
		}
	}
	if len(pauses) == 0 {
		return assumedPause
	}
	slices.Sort(pauses)
	return pauses[len(pauses)/2]
}

// Events lists scheduled events, the oldest first; those that are over only with
// all.
func (a *Agent) Events(_ context.Context, all bool) ([]maint.ScheduledEvent, error) {
	events := a.keeper.Events(func(e maint.ScheduledEvent) bool { return all || !e.State.Over() })
	if events == nil {
		events = []maint.ScheduledEvent{}
	}
	return events, nil
}

// Event returns one.
func (a *Agent) Event(_ context.Context, id maint.EventID) (maint.ScheduledEvent, error) {
	e, err := a.keeper.Event(id)
	return e, a.unknownEvent(id, err)
}

func (a *Agent) unknownEvent(id maint.EventID, err error) error {
	if errors.Is(err, maint.ErrUnknownEvent) {
		return maint.Problemf(maint.CodeNotFound, "event "+string(id), "see 'belay events list --all' for the IDs", "is not, and was not recently, one of host %s", a.cfg.Host)
	}
	return err
}

// ApproveEvent has an event start as soon as it can: by an operator, who answers
// for the guests' owner.
func (a *Agent) ApproveEvent(ctx context.Context, by string, id maint.EventID, reason string) (maint.ScheduledEvent, error) {
	err := checkReason(reason)
	if err == nil {
		err = a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) {
			return b.Approve(now, "", id, maint.EventApproval{By: by, At: now.Round(0), Reason: reason})
		})
	}
	if err != nil {
		return maint.ScheduledEvent{}, a.unknownEvent(id, err)
	}
	return a.Event(ctx, id)
}

// CancelEvent calls an event off that has not started; an operation that waits for
// it ends, with nothing done.
func (a *Agent) CancelEvent(ctx context.Context, by string, id maint.EventID, reason string) (maint.ScheduledEvent, error) {
	err := checkReason(reason)
	if err == nil {
		why := "cancelled by " + by
		if reason != "" {
			why = fmt.Sprintf("%s: %s", why, reason)
		}
		err = a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) { return b.Cancel(now, id, why) })
	}
	if err != nil {
		return maint.ScheduledEvent{}, a.unknownEvent(id, err)
	}
	return a.Event(ctx, id)
}

// WatchEvents calls f with the events now, and after every change, until f fails
// or ctx ends.
func (a *Agent) WatchEvents(ctx context.Context, all bool, f func([]maint.ScheduledEvent) error) error {
	for {
		changed := a.keeper.See(func(board.Board) {})
		events, err := a.Events(ctx, all)
		if err != nil {
			return err
		}
		if err := f(events); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-a.life.Done():
			return errors.New("belayd is shutting down")
		}
	}
}
