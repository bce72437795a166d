package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/agent/run"
	"belay/migrate"
	"belay/notify/board"
)

// A guest's events go with it in its definition (<metadata>), as a note that is
// written before the copy. The settlement has them a second time, in case libvirt
// did not bring them along.

// carrying is a destination that is told of the guest's events, and may be older
// than this belayd.
type carrying struct {
	migrate.Destination
	agent *Agent
}

// unknownThere reports whether a peer has refused a request as an older belayd refuses
// what it does not know.
func unknownThere(err error) bool {
	var p *maint.Problem
	return errors.As(err, &p) && p.Code == maint.CodeBadRequest
}

// Check asks an older belayd, which refuses what it does not know, for its memory
// and CPU only. Whatever else the guest needs libvirt finds out there, as it did
// for that belayd's own guests.
func (c carrying) Check(ctx context.Context, r maint.Arrival) ([]maint.Problem, error) {
	r.AntiAffinity = c.agent.groupsAt(ctx, r.GuestUUID, r.Guest)
	var own []maint.Problem
	if p := inGroups(r); p != nil { // the peer would refuse to be asked
		own, r.AntiAffinity = []maint.Problem{*p}, nil
	}
	ps, err := c.Destination.Check(ctx, r)
	if (r.Needs != nil || r.AntiAffinity != nil || r.Way != nil) && unknownThere(err) {
		c.agent.log.Warn("a peer does not look at all that a guest needs", "guest", r.Guest, "err", err)
		r.Needs, r.AntiAffinity, r.Way = nil, nil, nil
		ps, err = c.Destination.Check(ctx, r)
	}
	return append(own, ps...), err
}

// inGroups is why no peer could keep a guest apart from others, nil if one could.
func inGroups(r maint.Arrival) *maint.Problem {
	why := maint.CheckGroups(r.AntiAffinity)
	if why == "" {
		return nil
	}
	return maint.Problemf(maint.CodeAntiAffinity, "guest "+r.Guest,
		"take it out of some: they are in [anti_affinity] of belayd's configuration, and in its <metadata> (virsh metadata "+maint.ShellWord(r.Guest)+" urn:belay:placement:1)",
		"is in anti-affinity groups that no peer can keep: %s", why)
}

// Reserve tells of the groups that the guest is in, too. An older belayd is asked for room
// only.
func (c carrying) Reserve(ctx context.Context, r maint.Arrival) (maint.Landing, error) {
	r.AntiAffinity = c.agent.groupsAt(ctx, r.GuestUUID, r.Guest)
	if p := inGroups(r); p != nil {
		return maint.Landing{}, refuse(fmt.Sprintf("cannot migrate guest %s", r.Guest), p)
	}
	l, err := c.Destination.Reserve(ctx, r)
	if (r.AntiAffinity != nil || r.Way != nil) && unknownThere(err) {
		r.AntiAffinity, r.Way = nil, nil
		l, err = c.Destination.Reserve(ctx, r)
	}
	return l, err
}

func (c carrying) Settle(ctx context.Context, s maint.Settlement) error {
	s.Events = c.agent.carried(s.GuestUUID)
	err := c.Destination.Settle(ctx, s)
	if s.Events != nil && unknownThere(err) {
		// An older belayd refuses what it does not know. The guest has moved: it
		// is to be kept there as it was.
		c.agent.log.Warn("a guest's events could not be given to its new host", "guest", s.GuestUUID, "op", s.Op, "err", err)
		s.Events = nil
		err = c.Destination.Settle(ctx, s)
	}
	return err
}

// carried is what goes with a guest, nil for nothing.
func (a *Agent) carried(uuid string) *maint.GuestEvents {
	var g maint.GuestEvents
	a.keeper.See(func(b board.Board) { g = b.Carry(time.Now(), uuid) })
	if g.Incarnation == 0 && len(g.Listeners)+len(g.Campaigns) == 0 {
		return nil
	}
	return &g
}

// noted has a step write the note before it does anything, unless the guest is on
// its way already.
func (a *Agent) noted(op maint.Op, do func(context.Context, *run.Scratch) error) func(context.Context, *run.Scratch) error {
	return func(ctx context.Context, s *run.Scratch) error {
		g, err := a.hyp.Guest(ctx, op.GuestUUID)
		events := a.carried(op.GuestUUID)
		if err == nil && g.State.Active() && g.Job == "" && events != nil {
			text, err := json.Marshal(events)
			if err != nil {
				return err
			}
			if err := a.hyp.SetNote(ctx, op.GuestUUID, string(text)); err != nil {
				return err
			}
		}
		return do(ctx, s)
	}
}

// leave forgets the events of a guest that has moved.
func (a *Agent) leave(uuid string) error {
	return a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) { return b.Leave(now, uuid), nil })
}

// adopt takes over the events of a guest that has arrived.
func (a *Agent) adopt(ctx context.Context, s maint.Settlement) error {
	g := maint.GuestEvents{UUID: s.GuestUUID}
	note, err := a.hyp.Note(ctx, s.GuestUUID)
	if errors.Is(err, maint.ErrHypervisorDown) {
		return err
	} else if err != nil {
		a.log.Warn("the note of an arrived guest's events cannot be had", "guest", s.GuestUUID, "err", err)
	}
	if note != "" {
		if err := json.Unmarshal([]byte(note), &g); err != nil || g.UUID != s.GuestUUID {
			a.log.Warn("the note of an arrived guest's events cannot be read", "guest", s.GuestUUID, "err", err)
			g = maint.GuestEvents{UUID: s.GuestUUID}
		}
	}
	if s.Events != nil && s.Events.UUID == s.GuestUUID && s.Events.Incarnation >= g.Incarnation {
		if s.Events.Incarnation > g.Incarnation {
			a.log.Warn("an arrived guest's events have not come with it, they are taken from its source", "guest", s.GuestUUID, "op", s.Op)
		}
		g = *s.Events
	}
	// An operation of this host announces what it does, and waits for that; nobody
	// else adds to it. What no operation has announced nobody would end.
	events := slices.DeleteFunc(slices.Clone(g.Events), func(e maint.ScheduledEvent) bool {
		_, own := a.journal.Op(e.Op)
		return !e.State.Over() && (own || e.Op == "")
	})
	if len(events) < len(g.Events) {
		g.Events, g.Incarnation = events, g.Incarnation+1 // it knows its document with them
	}
	return a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) { return b.Adopt(now, g), nil })
}

// endArrival ends the events of the operation by which a guest has come here.
func (a *Agent) endArrival(ctx context.Context, id maint.OpID, uuid string) {
	a.arrivedInCampaigns(id, uuid)
	if len(a.openEvents(id)) == 0 {
		return
	}
	op := maint.Op{ID: id, Kind: maint.OpMigrate, GuestUUID: uuid, Outcome: maint.OutcomeDone}
	if job, err := a.hyp.CompletedJob(ctx, uuid); err == nil {
		op.Move = &maint.MoveResult{Downtime: job.Downtime}
	} else if !errors.Is(err, maint.ErrNoGuest) {
		a.log.Warn("what an arrival took cannot be read", "guest", uuid, "err", err)
	}
	a.endEvents(op)
}

// eventsEvery is how often events are looked for whose operation is over.
const eventsEvery = time.Minute

// followEvents ends events that nobody else ends any more.
func (a *Agent) followEvents(ctx context.Context) {
	tick := time.NewTicker(eventsEvery)
	defer tick.Stop()
	for {
		a.endOldEvents()
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
