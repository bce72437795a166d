package leash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"sync"
	"time"

	"belay/agent/maint"
)

// Config is what a Keeper is made of.
type Config struct {
	Dir  string // of the notes
	Op   maint.OpID
	Boot string // BootID
	Host Host
	// Monitor connects to a guest's QMP monitor. It wraps ErrTaken.
	Monitor func(ctx context.Context, path string) (Monitor, error)
	// Find gives the path of a guest's monitor, for orders that do not.
	Find func(g Guest) (string, error)
	// KillLibvirt kills libvirt's daemon, for an order that allows it.
	KillLibvirt func() error
	// Clock is boottime.Now.
	Clock func() time.Duration
	// Keep is how long it waits to be disarmed when it has fired and every
	// guest is seen to; then it ends and leaves its notes. 0 is 10 min.
	Keep time.Duration
	// Warnings are what it lacks of its protections.
	Warnings []string
	Log      *slog.Logger
}

const (
	// tick is how often the deadline is looked at. Timers do not count the
	// time in which the host is suspended; looking does.
	tick = 100 * time.Millisecond
	// idleWait is how long a leash waits for its order.
	idleWait = 30 * time.Second
	// askTimeout bounds one look at one guest when the leash is armed.
	askTimeout = 5 * time.Second
	// maxEvents bounds the notes; what comes after is logged only.
	maxEvents = 5000

	defaultKeep = 10 * time.Minute
)

// Keeper is the leash itself.
type Keeper struct {
	cfg Config

	arming sync.Mutex // one arm or take at a time

	mu      sync.Mutex
	s       *Status       // nil until armed
	quiet   time.Duration // since a holder was heard
	renewed int           // times since the last event
	working int           // goroutines that see to guests
	settled time.Duration // since when nothing is left to be done; 0: not yet
	killed  time.Duration // when libvirt was last killed
	ending  bool          // the process is to end
	heardOf time.Duration // when libvirt has last answered anything
	disarms bool          // it is disarmed, and its holder is being told
	over    chan struct{} // closed when that is done, by once
	once    sync.Once
	life    context.Context
	parts   sync.WaitGroup // all goroutines
}

// NewKeeper makes a leash, and takes up the notes of one before it.
func NewKeeper(cfg Config) (*Keeper, error) {
	if cfg.Keep == 0 {
		cfg.Keep = defaultKeep
	}
	if !inRAM(cfg.Dir) {
		cfg.Warnings = append(cfg.Warnings, "its notes in "+cfg.Dir+" are not in RAM")
	}
	k := &Keeper{cfg: cfg, over: make(chan struct{})}
	s, err := readNotes(cfg.Dir, cfg.Op)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		// Its holder, if it lives, knows the order and tells it again.
		cfg.Log.Error("starting without notes", "op", cfg.Op, "err", err)
	case s.Boot != cfg.Boot:
		cfg.Log.Warn("the notes are of an earlier boot and void", "op", cfg.Op)
	default:
		k.s = s
		k.s.Warnings = cfg.Warnings
		cfg.Log.Warn("taking up the leash where another has left it", "op", cfg.Op, "fired", s.Fired)
	}
	return k, nil
}

// Run serves holders on l and keeps the order. It returns nil when it was
// disarmed, was never armed, or has done what it could and nobody came for its
// notes. When ctx ends, which is what SIGTERM makes of it, it releases
// every guest first and then returns: nobody would do so after it.
func (k *Keeper) Run(ctx context.Context, l net.Listener) error {
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer k.parts.Wait()
	defer end()
	k.mu.Lock()
	k.life = life
	if k.s != nil && k.s.Fired != "" {
		k.sendOut() // where the leash before it left off
	}
	k.mu.Unlock()
	k.parts.Go(func() { k.serve(life, l) })

	begun := k.cfg.Clock()
	last := begun
	ticks := time.NewTicker(tick)
	defer ticks.Stop()
	stop, stopping := ctx.Done(), false
	for {
		select {
		case <-ticks.C:
		case <-stop:
			stop, stopping = nil, true
		case <-k.over:
			return nil
		}
		now := k.cfg.Clock()
		// Where the leash itself was not let run, what its holder sent
		// meanwhile has not been read: that time says nothing about it.
		quiet := min(now-last, 2*tick)
		last = now
		switch done, armed := k.look(now, quiet, stopping); {
		case done:
			return nil
		case !armed && (stopping || now-begun > idleWait):
			_ = remove(k.cfg.Dir, k.cfg.Op) // the socket; there are no notes
			return nil
		}
	}
}

// look fires when it is time to, and reports whether all is done that can be.
func (k *Keeper) look(now, quiet time.Duration, stopping bool) (done, armed bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ending = stopping
	if k.s == nil {
		return false, k.disarms // which ends it soon
	}
	if k.s.Fired == "" {
		k.quiet += quiet
		switch {
		case now >= k.s.Deadline:
			k.fire("the longest pause has passed")
		case k.quiet >= k.s.Silence:
			k.fire(fmt.Sprintf("nothing was heard from belayd for %s", k.quiet.Round(tick)))
		case stopping:
			k.fire("the leash was told to end")
		}
		return false, true
	}
	if k.working > 0 {
		k.settled = 0
		return false, true
	}
	if k.settled == 0 {
		k.settled = now
		k.cfg.Log.Info("every guest is seen to", "op", k.cfg.Op)
	}
	return stopping || now-k.settled > k.cfg.Keep, true
}

// fire begins the release. k.mu is held.
func (k *Keeper) fire(why string) {
	k.s.Fired = why
	held := 0
	for i := range k.s.Guests {
		if k.s.Guests[i].Fate.Held() {
			held++
		}
	}
	if held > 0 {
		k.note(maint.LeashEvent{Kind: maint.LeashFired, Text: why})
		k.cfg.Log.Error("releasing guests that belayd has paused", "op", k.cfg.Op, "why", why, "guests", held)
	} else {
		k.cfg.Log.Info("the hold is over, nobody is to be released", "op", k.cfg.Op, "why", why)
	}
	k.save()
	k.sendOut()
}

// sendOut has every guest seen to that needs it. k.mu is held.
func (k *Keeper) sendOut() {
	for i := range k.s.Guests {
		g := &k.s.Guests[i]
		if g.busy || !g.Fate.Held() && !g.Unleased {
			continue
		}
		g.busy = true
		k.working++
		k.parts.Go(func() {
			k.see(k.life, g)
			k.mu.Lock()
			defer k.mu.Unlock()
			g.busy = false
			k.working--
			if g.Fate.Held() && k.life.Err() == nil { // paused again in the meantime
				k.sendOut()
			}
		})
	}
}

// note adds an event. k.mu is held.
func (k *Keeper) note(e maint.LeashEvent) {
	if len(k.s.Events) >= maxEvents {
		return
	}
	if k.renewed > 0 {
		k.s.Events = append(k.s.Events, renewals(k.renewed))
		k.renewed = 0
	}
	e.Time = time.Now()
	k.s.Events = append(k.s.Events, e)
}

// renewals is one event for all renewals since the last one.
func renewals(n int) maint.LeashEvent {
	return maint.LeashEvent{Time: time.Now(), Kind: maint.LeashRenewed, Count: n}
}

// save writes the notes down. That they cannot be written stops nothing: they
// are for a leash that comes after this one. k.mu is held.
func (k *Keeper) save() {
	if err := k.s.write(k.cfg.Dir); err != nil {
		k.cfg.Log.Error("going on without notes", "op", k.cfg.Op, "err", err)
	}
}

// arm takes an order: a new one, or (again) one whose holder comes back.
func (k *Keeper) arm(ctx context.Context, order *Status, again bool) error {
	k.arming.Lock()
	defer k.arming.Unlock()
	if order == nil || order.Op != k.cfg.Op {
		return maint.Problemf(maint.CodeBadRequest, "leash "+string(k.cfg.Op), "", "is armed with an order of its own operation only")
	}
	if order.Boot != k.cfg.Boot {
		return maint.Problemf(maint.CodeBadRequest, "leash "+string(k.cfg.Op), "", "the order is of another boot")
	}
	if err := order.check(k.cfg.Clock()); err != nil {
		return err
	}
	k.mu.Lock()
	if k.s != nil {
		defer k.mu.Unlock()
		return k.merge(order, again)
	}
	k.mu.Unlock()

	s := order.clone()
	s.Fired, s.Events, s.Warnings = "", nil, append([]string(nil), k.cfg.Warnings...)
	for i := range s.Guests {
		g := &s.Guests[i]
		if g.Monitor != "" || k.cfg.Find == nil {
			continue
		}
		var err error
		if g.Monitor, err = k.cfg.Find(g.Guest); err != nil {
			s.Warnings = append(s.Warnings, fmt.Sprintf("guest %s can be released by libvirt only: %v", g.Name, err))
		}
	}
	// A holder that comes back may have paused guests, and libvirt may be
	// what is being restarted.
	if !again {
		if err := k.lookFirst(ctx, s); err != nil {
			return err
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.s, k.quiet = s, 0
	k.note(maint.LeashEvent{Kind: maint.LeashArmed, Text: fmt.Sprintf("%d guests, for %s at most",
		len(s.Guests), (s.Deadline - k.cfg.Clock()).Round(time.Millisecond))})
	if err := s.write(k.cfg.Dir); err != nil {
		k.s = nil
		return err
	}
	k.cfg.Log.Info("armed", "op", k.cfg.Op, "guests", len(s.Guests), "again", again)
	return nil
}

// lookFirst sees that every guest can be asked for, by the connection that is
// to release it, and leaves those that do not run: whoever stopped them, it was
// not Belay.
func (k *Keeper) lookFirst(ctx context.Context, s *Status) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	errs := make([]error, len(s.Guests))
	var all sync.WaitGroup
	for i := range s.Guests {
		g := &s.Guests[i]
		if !g.Fate.Held() {
			continue
		}
		all.Go(func() {
			state, reason, err := k.cfg.Host.State(ctx, g.UUID)
			if err != nil {
				errs[i] = err
			} else if !runs(state) {
				g.Fate, g.Text = Left, fmt.Sprintf("it was %s (%s) before", state, reason)
			}
		})
	}
	all.Wait()
	for i, err := range errs {
		code := maint.CodeFailed
		switch {
		case err == nil:
			continue
		case errors.Is(err, maint.ErrNoGuest):
			code = maint.CodeUnknownGuest
		case errors.Is(err, maint.ErrHypervisorDown):
			code = maint.CodeHypervisorDown
		}
		return maint.Problemf(code, "guest "+s.Guests[i].Name, "see that libvirt runs", "the leash cannot look at it: %v", err)
	}
	return nil
}

// merge brings what a holder knows together with what the leash knows. The
// deadline stays. k.mu is held.
func (k *Keeper) merge(order *Status, again bool) error {
	if !again && k.s.Fired != "" {
		return maint.Problemf(maint.CodeBusy, "leash "+string(k.s.Op), "", "has fired already")
	}
	for _, o := range order.Guests {
		if k.s.guest(o.UUID) == nil {
			return maint.Problemf(maint.CodeBadRequest, "guest "+o.Name, "", "is not in the order that the leash has")
		}
	}
	for _, o := range order.Guests {
		g := k.s.guest(o.UUID)
		if g.Fate == Armed || g.Fate == Paused && !o.Fate.Held() {
			k.mark(g, o.Fate)
		}
	}
	k.quiet = 0
	k.save()
	if k.s.Fired != "" {
		k.sendOut()
	}
	return nil
}

// mark notes a guest's fate. k.mu is held.
func (k *Keeper) mark(g *GuestStatus, f Fate) {
	if f == g.Fate {
		return
	}
	g.Fate, g.Text = f, ""
	if f == Released {
		g.Text = "by belayd"
	}
}

// tell takes a holder's word on guests, all or none.
func (k *Keeper) tell(uuids []string, f Fate) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.s == nil {
		return errIdle(k.cfg.Op)
	}
	if len(uuids) == 0 {
		return maint.Problemf(maint.CodeBadRequest, "leash "+string(k.cfg.Op), "", "no guest is named")
	}
	for _, u := range uuids {
		if k.s.guest(u) == nil {
			return maint.Problemf(maint.CodeBadRequest, "guest "+u, "", "is not in the leash's order")
		}
	}
	for _, u := range uuids {
		k.mark(k.s.guest(u), f)
	}
	k.save()
	if k.s.Fired != "" {
		k.sendOut() // paused by a holder that had not heard of it
	}
	return nil
}

func (k *Keeper) renew() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.s == nil {
		return errIdle(k.cfg.Op)
	}
	if k.s.Fired == "" {
		k.renewed++
	}
	return nil
}

// disarm ends the leash, unless a guest is paused or being seen to. The caller
// closes k.over when the holder has its answer.
func (k *Keeper) disarm() (*Status, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.s == nil {
		return nil, errIdle(k.cfg.Op)
	}
	for _, g := range k.s.Guests {
		switch {
		case g.busy:
			return nil, maint.Problemf(maint.CodeBusy, "guest "+g.Name, "try again", "is just being released by the leash, or its disks' leases are being taken again")
		case g.Fate == Paused:
			return nil, maint.Problemf(maint.CodeGuestPaused, "guest "+g.Name, "release it", "is still paused")
		}
	}
	// Before the holder is told: a leash that is started again must not find them.
	if err := remove(k.cfg.Dir, k.cfg.Op); err != nil {
		return nil, err
	}
	k.note(maint.LeashEvent{Kind: maint.LeashDisarmed})
	s := k.s
	k.s, k.disarms = nil, true
	k.cfg.Log.Info("disarmed", "op", k.cfg.Op)
	return s, nil
}

// status is a copy of what is known.
func (k *Keeper) status() (*Status, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.s == nil {
		return nil, errIdle(k.cfg.Op)
	}
	s := k.s.clone()
	if k.renewed > 0 {
		s.Events = append(s.Events, renewals(k.renewed))
	}
	return s, nil
}

func errIdle(op maint.OpID) error {
	return maint.Problemf(maint.CodeNotFound, "leash "+string(op), "arm it", "has no order")
}

// heard notes that a holder lives.
func (k *Keeper) heard() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.quiet = 0
}

// fired gives the reason if it has fired.
func (k *Keeper) fired() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.s == nil {
		return ""
	}
	return k.s.Fired
}
