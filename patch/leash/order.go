package leash

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"time"

	"belay/agent/maint"
)

// Guest is a guest that may be paused.
type Guest struct {
	UUID string `json:"uuid"`
	Name string `json:"name"`
	ID   int    `json:"id,omitempty"` // libvirt's, of the running domain
	// Monitor is the path of its QMP socket; where it is empty the leash
	// looks for it.
	Monitor string `json:"monitor,omitempty"`
}

// Order is what a leash is armed with.
type Order struct {
	Op     maint.OpID
	Guests []Guest
	// MaxPause runs from Arm on. When it has passed the guests are released.
	MaxPause time.Duration
	// Silence is how long belayd may be silent before the guests are
	// released; 0 is 3 s.
	Silence time.Duration
	// KillLibvirt is how long guests may be overdue because libvirt's daemon
	// hangs with their monitors in its hand; then it is killed. Guests go on
	// without it, jobs of libvirt's do not. 0 is never: the guests stay
	// paused until somebody else ends it. The least is 3 s.
	KillLibvirt time.Duration
}

// Fate is what is known of a guest.
type Fate string

// The fates. The first two are those of a guest that is the leash's to release.
const (
	Armed    Fate = "armed"    // it may have been paused since
	Paused   Fate = "paused"   // by Belay
	Left     Fate = "left"     // not Belay's to release
	Released Fate = "released" // it ran again
)

// Held reports whether the guest is the leash's to release.
func (f Fate) Held() bool { return f == Armed || f == Paused }

// Status is an order and what became of it. The file has it, and its holder can
// ask for it.
type Status struct {
	Op   maint.OpID `json:"op"`
	Boot string     `json:"boot_id"`
	// Deadline is a time of CLOCK_BOOTTIME.
	Deadline time.Duration `json:"deadline_boottime_ns"`
	Silence  time.Duration `json:"silence_ns"`
	// KillLibvirt is that of the Order.
	KillLibvirt time.Duration `json:"kill_libvirt_ns,omitempty"`
	// Fired says why the leash began to release; "" while it has not.
	Fired  string             `json:"fired,omitempty"`
	Guests []GuestStatus      `json:"guests"`
	Events []maint.LeashEvent `json:"events"`
	// Warnings are what the leash lacks of its protections.
	Warnings []string `json:"warnings,omitempty"`
}

// GuestStatus is what is known of one guest.
type GuestStatus struct {
	Guest
	Fate Fate   `json:"fate"`
	Text string `json:"text,omitempty"` // why it was left, how it was released
	// Locked: libvirt has said that somebody else has a lease of its disks.
	// It is then never released past libvirt.
	Locked bool `json:"locked,omitempty"`
	// Unleased: it was released past libvirt and runs without the leases
	// of its disks.
	Unleased bool `json:"unleased,omitempty"`

	busy bool // a goroutine sees to it
}

// guest finds a guest, nil if the order has none of that UUID.
func (s *Status) guest(uuid string) *GuestStatus {
	for i := range s.Guests {
		if s.Guests[i].UUID == uuid {
			return &s.Guests[i]
		}
	}
	return nil
}

// clone is a copy that nobody else writes to.
func (s *Status) clone() *Status {
	c := *s
	c.Guests = append([]GuestStatus(nil), s.Guests...)
	c.Events = append([]maint.LeashEvent(nil), s.Events...)
	return &c
}

const (
	defaultSilence = 3 * time.Second
	minSilence     = 100 * time.Millisecond
	maxSilence     = time.Minute
	maxPause       = 24 * time.Hour
	// minKill has at least two looks in it that libvirt does not answer.
	minKill   = 3 * time.Second
	maxGuests = 4096
)

// opName keeps an operation's name fit for files, units and cgroups.
var opName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$`)

// checkOp refuses a name that could lead elsewhere.
func checkOp(op maint.OpID) error {
	if !opName.MatchString(string(op)) {
		return maint.Problemf(maint.CodeBadRequest, "leash", "", "%q is no name of an operation", op)
	}
	return nil
}

// check refuses an order that cannot be meant. now is of CLOCK_BOOTTIME.
func (s *Status) check(now time.Duration) error {
	bad := func(format string, args ...any) error {
		return maint.Problemf(maint.CodeBadRequest, "leash "+string(s.Op), "", "%s", fmt.Sprintf(format, args...))
	}
	switch {
	case s.Silence < minSilence || s.Silence > maxSilence:
		return bad("a silence of %s is not between %s and %s", s.Silence, minSilence, maxSilence)
	case s.KillLibvirt != 0 && s.KillLibvirt < minKill:
		return bad("libvirt is not killed within %s", minKill)
	case s.Deadline > now+maxPause:
		return bad("a pause of more than %s", maxPause)
	case len(s.Guests) == 0 || len(s.Guests) > maxGuests:
		return bad("%d guests, not between 1 and %d", len(s.Guests), maxGuests)
	}
	seen := make(map[string]bool)
	for _, g := range s.Guests {
		switch {
		case g.UUID == "" || seen[g.UUID]:
			return bad("guest %q has no UUID of its own", g.Name)
		case !g.Fate.Held() && g.Fate != Left && g.Fate != Released:
			return bad("guest %s has no fate %q", g.Name, g.Fate)
		}
		seen[g.UUID] = true
	}
	return nil
}

// Host is libvirt on this host; see package hypervisor.
type Host interface {
	// State wraps maint.ErrNoGuest and maint.ErrHypervisorDown.
	State(ctx context.Context, uuid string) (state maint.GuestState, reason string, err error)
	Suspend(ctx context.Context, uuid string) error
	// Resume wraps maint.ErrLocked too.
	Resume(ctx context.Context, uuid string) error
}

// ErrTaken: a guest's monitor serves somebody else, which is libvirt.
var ErrTaken = errors.New("the monitor is taken")

// Monitor is a connection to a guest's QMP monitor; see package
// hypervisor/monitor.
type Monitor interface {
	UUID(ctx context.Context) (string, error)   // query-uuid
	Status(ctx context.Context) (string, error) // query-status: "paused", "running", …
	Cont(ctx context.Context) error             // cont
	Close() error
}
