package agent

import (
	"context"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"belay/agent/maint"
)

const (
	// refreshEvery is how often everything is listed again although no
	// event asked for it: free memory and agent states change silently.
	refreshEvery = time.Minute
	// refreshAfter is how long after an event, so that a burst is one refresh,
	// and that it does not get in the way of guests that have just been released.
	refreshAfter = 250 * time.Millisecond
	// refreshTimeout bounds one listing.
	refreshTimeout = 20 * time.Second
)

// snapshot is what was last seen of this host. It is never changed once it is
// published.
type snapshot struct {
	host   maint.Host
	guests []maint.Guest
	asOf   time.Time
	err    error     // why it could not be renewed, nil when it could
	since  time.Time // of err
}

// inventory follows the hypervisor and publishes snapshots.
type inventory struct {
	hyp  Hypervisor
	log  *slog.Logger
	last atomic.Pointer[snapshot]
	// ready is closed when the host has been listed for the first time.
	ready  chan struct{}
	listed herald
}

func newInventory(hyp Hypervisor, log *slog.Logger) *inventory {
	v := &inventory{hyp: hyp, log: log, ready: make(chan struct{})}
	v.last.Store(&snapshot{err: errNotYet, since: time.Now()})
	return v
}

// errNotYet is a snapshot's error until the first listing.
var errNotYet = maint.Problemf(maint.CodeHypervisorDown, "libvirt", "", "has not answered yet")

// has reports whether a guest was last seen in a state.
func (v *inventory) has(uuid string, s maint.GuestState) bool {
	return slices.ContainsFunc(v.last.Load().guests, func(g maint.Guest) bool { return g.UUID == uuid && g.State == s })
}

// changed gives a channel that is closed at the next listing. Take it before
// reading the last.
func (v *inventory) changed() <-chan struct{} { return v.listed.next() }

// follow keeps the snapshot true until ctx ends.
func (v *inventory) follow(ctx context.Context) {
	events, cancel := v.hyp.Subscribe()
	defer cancel()
	tick := time.NewTicker(refreshEvery)
	defer tick.Stop()
	soon := time.NewTimer(0)
	defer soon.Stop()
	for due := true; ; {
		select {
		case e, open := <-events:
			if !open {
				events = nil
				continue
			}
			v.log.Debug("libvirt event", "kind", e.Kind, "guest", e.Name, "change", e.Change, "detail", e.Detail)
			if !due { // a steady stream of events must not put it off
				due = true
				soon.Reset(refreshAfter)
			}
		case <-soon.C:
			due = false
			v.refresh(ctx)
		case <-tick.C:
			v.refresh(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// refresh lists the host once and publishes what it found.
func (v *inventory) refresh(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	old := v.last.Load()
	now := &snapshot{asOf: time.Now()}
	var err error
	if now.host, err = v.hyp.Info(ctx); err == nil {
		now.guests, err = v.hyp.Guests(ctx)
	}
	if err != nil {
		now.host, now.guests, now.asOf, now.err, now.since = old.host, old.guests, old.asOf, err, old.since
		if old.err == nil {
			now.since = time.Now()
			v.log.Warn("libvirt cannot be asked", "err", err)
		}
	} else if old.err != nil {
		v.log.Info("libvirt answers", "guests", len(now.guests))
	}
	v.last.Store(now)
	v.listed.tell()
	if old.asOf.IsZero() && err == nil {
		close(v.ready)
	}
}

// Inventory returns the guests: from libvirt while it answers, else as they
// were last seen.
func (a *Agent) Inventory(ctx context.Context) (maint.Inventory, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	guests, err := a.hyp.Guests(ctx)
	if err == nil {
		return maint.Inventory{Guests: a.complete(guests), AsOf: time.Now()}, nil
	}
	s := a.view.last.Load()
	return maint.Inventory{Guests: a.complete(s.guests), AsOf: s.asOf, Stale: err.Error()}, nil
}
