package board

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"belay/agent/maint"
	"belay/notify"
)

// Store makes changes durable: when Append returns nil they are.
type Store interface {
	Append(maint.EventChange) error
}

// Keeper is a board that lives: what it decides is durable before anybody sees
// it, and who waits for it is told. It is what guests' requests end at; a guest's
// methods are those of notify.Source. Its methods may be called concurrently.
type Keeper struct {
	store Store
	now   func() time.Time
	boot  Boot // zero: not followed

	deciding sync.Mutex // held until a decision is durable; who looks does not wait for the disk

	mu    sync.Mutex
	board Board // changed with both held
	// open are the events that guests are shown, nil until somebody asks again
	// after a change.
	open map[string][]maint.ScheduledEvent
	// waiting has a channel for each guest whose document somebody waits for,
	// closed when it changes; changed is one for everything.
	waiting map[string]chan struct{}
	changed chan struct{}
}

// New gives a keeper of what the store has folded so far.
func New(s Store, so maint.Scheduled, least map[maint.Impact]time.Duration) *Keeper {
	return &Keeper{store: s, now: time.Now, board: Board{Scheduled: so, Notice: least},
		waiting: make(map[string]chan struct{}), changed: make(chan struct{})}
}

// Boot is the host's, as all its processes know it.
type Boot struct {
	ID    string               // tells it from others (boottime.ID)
	Since func() time.Duration // which nobody can set (boottime.Now)
}

// Follow has the notice of events go on by the time since boot under the next belayd,
// as it does by the monotonic clock under this one: what is kept has moments of the
// wall clock alone, which somebody may set meanwhile. It is to be called first.
func (k *Keeper) Follow(b Boot) {
	k.boot, k.board.announced = b, make(map[maint.EventID]time.Time)
	now, since := k.now(), b.Since()
	for id, e := range k.board.Events {
		if e.State == maint.EventScheduled && e.Boot == b.ID {
			k.board.announced[id] = now.Add(e.AnnouncedAt - since)
		}
	}
}

// stamp notes when the events of a change were announced, for the next belayd.
func (k *Keeper) stamp(c maint.EventChange) {
	for i := range c.Events {
		if e := &c.Events[i]; k.boot.ID != "" && e.State == maint.EventScheduled && e.Boot != k.boot.ID {
			// One of another boot, or host, goes by a clock that may have been ahead.
			e.Boot, e.AnnouncedAt = k.boot.ID, k.boot.Since()-max(k.now().Sub(e.Announced), 0)
		}
	}
}

// Do has a decision made, kept and seen.
func (k *Keeper) Do(decide func(b Board, now time.Time) (maint.EventChange, error)) error {
	k.deciding.Lock()
	defer k.deciding.Unlock()
	c, err := decide(k.board, k.now())
	if err != nil || c.Empty() {
		return err
	}
	k.stamp(c)
	if err := k.store.Append(c); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.board.Fold(c)
	k.open = nil
	for uuid := range c.Incarnations {
		if ch := k.waiting[uuid]; ch != nil {
			close(ch)
			delete(k.waiting, uuid)
		}
	}
	close(k.changed)
	k.changed = make(chan struct{})
	return nil
}

// See lets f look at the board, and gives a channel that is closed when it has
// changed. f must keep nothing of it.
func (k *Keeper) See(f func(Board)) <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	f(k.board)
	return k.changed
}

// Forget drops what ended before a moment, as its store has.
func (k *Keeper) Forget(before time.Time) {
	k.deciding.Lock()
	defer k.deciding.Unlock()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.board.Forget(before)
}

// Event gives one event.
func (k *Keeper) Event(id maint.EventID) (e maint.ScheduledEvent, err error) {
	k.See(func(b Board) { e, err = b.find(id) })
	return e, err
}

// Events are those that are so, the oldest first.
func (k *Keeper) Events(so func(maint.ScheduledEvent) bool) (all []maint.ScheduledEvent) {
	k.See(func(b Board) {
		for _, e := range b.Events {
			if so(e) {
				all = append(all, e)
			}
		}
	})
	slices.SortFunc(all, older)
	return all
}

// Wait returns nil when all the events may start together: each is approved or
// its notice has passed, and no listener is waited for. An event that is
// cancelled meanwhile is an error.
func (k *Keeper) Wait(ctx context.Context, ids []maint.EventID) error {
	for {
		var left time.Duration // moments are compared with now alone: not all have a monotonic reading
		var errs []error
		changed := k.See(func(b Board) {
			now := k.now()
			for _, id := range ids {
				at, err := b.Startable(now, id)
				errs = append(errs, err)
				left = max(left, at.Sub(now))
			}
		})
		if err := errors.Join(errs...); err != nil {
			return err
		}
		if left <= 0 {
			return nil
		}
		t := time.NewTimer(left)
		select {
		case <-t.C:
		case <-changed:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// Document implements notify.Source.
func (k *Keeper) Document(guest string) (notify.Document, <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	ch := k.waiting[guest]
	if ch == nil {
		ch = make(chan struct{})
		k.waiting[guest] = ch
	}
	if k.open == nil {
		k.open = k.board.open()
	}
	return notify.Document{Incarnation: k.board.incarnation(guest), Events: k.open[guest]}, ch
}

// History implements notify.Source.
func (k *Keeper) History(guest string) (all []maint.ScheduledEvent) {
	k.See(func(b Board) { all = b.History(guest) })
	return all
}

// Approve implements notify.Source.
func (k *Keeper) Approve(_ context.Context, guest string, id maint.EventID) error {
	return k.Do(func(b Board, now time.Time) (maint.EventChange, error) {
		return b.Approve(now, guest, id, maint.EventApproval{By: "guest " + b.name(guest, id), At: now.Round(0)})
	})
}

// name is what an event calls a guest.
func (b Board) name(guest string, id maint.EventID) string {
	for _, g := range b.Events[id].Guests {
		if g.UUID == guest {
			return g.Name
		}
	}
	return guest
}

// Listen implements notify.Source.
func (k *Keeper) Listen(_ context.Context, guest string, l maint.Listener) error {
	return k.Do(func(b Board, _ time.Time) (maint.EventChange, error) { return b.Listen(guest, l) })
}

// Unlisten implements notify.Source.
func (k *Keeper) Unlisten(_ context.Context, guest, name string) error {
	return k.Do(func(b Board, now time.Time) (maint.EventChange, error) { return b.Unlisten(now, guest, name), nil })
}

// Ready implements notify.Source.
func (k *Keeper) Ready(_ context.Context, guest, name string, id maint.EventID) error {
	return k.Do(func(b Board, now time.Time) (maint.EventChange, error) { return b.Ready(now, guest, name, id) })
}
