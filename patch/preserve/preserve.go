package preserve

import (
	"context"
	"log/slog"
	"time"

	"belay/agent/maint"
)

// VCPUs stops and starts guests' vCPUs; see package hypervisor.
type VCPUs interface {
	State(ctx context.Context, uuid string) (state maint.GuestState, reason string, err error)
	Suspend(ctx context.Context, uuid string) error
	// Resume is a success for a guest that runs. It wraps maint.ErrLocked
	// when a disk's lease is taken.
	Resume(ctx context.Context, uuid string) error
}

// Host is this host's hypervisor.
type Host interface {
	VCPUs
	Guests(ctx context.Context) ([]maint.Guest, error)
	// Warm opens connections for n calls at once.
	Warm(ctx context.Context, n int) error
}

// Leash releases guests when nobody else does; see package leash.
type Leash interface {
	// Arm returns when the leash has the order and has shown that it could
	// carry it out.
	Arm(ctx context.Context, o Order) (Line, error)
	// Attach takes up the leash of an operation whose belayd has died. nil
	// without an error: there is none, so that nothing is paused.
	Attach(ctx context.Context, op maint.OpID) (Line, error)
}

// Mark is what the leash is told of a guest.
type Mark string

// The marks.
const (
	Armed    Mark = "armed"    // from the start: it may have been paused since
	Paused   Mark = "paused"   // by us
	Left     Mark = "left"     // not ours to release
	Released Mark = "released" // by us
)

// Line is an armed leash. It renews itself while it is held, and replaces a
// leash that dies.
type Line interface {
	Deadline() time.Time
	// Check is asked right before vCPUs are stopped: nil if the leash has
	// just answered.
	Check() error
	// Mark costs the caller no round trip.
	Mark(m Mark, uuid string)
	// Marks are those of all guests of the order, by UUID.
	Marks() map[string]Mark
	// Lost is closed when no leash holds any more and none could be had: the
	// pause is to end at once.
	Lost() <-chan struct{}
	// Disarm ends it and gives everything it did; it is an error that a
	// guest is still paused.
	Disarm(ctx context.Context) ([]maint.LeashEvent, error)
	// Leave lets go of it without disarming: it goes on trying to release.
	Leave() []maint.LeashEvent
}

// Steps runs what is done to the host; see package hoststep.
type Steps interface {
	Check(ctx context.Context, step maint.HostStep) []maint.Problem
	// Prepare does ahead what takes time before a step can begin; Run or End
	// must follow. An error leaves nothing behind.
	Prepare(ctx context.Context, name string, step maint.HostStep) error
	Run(ctx context.Context, name string, step maint.HostStep, env []string) maint.StepRun
	// End ends what still runs under a name since an earlier belayd, or was
	// prepared, and says how it went; nil: it was never begun, nor will be.
	End(ctx context.Context, name string) (*maint.StepRun, error)
	// Forget drops what is known of a step that has ended.
	Forget(name string)
}

// Clocks puts guests' clocks right; see package guestclock.
type Clocks interface {
	// Prepare is called before the pause. A problem refuses the hold.
	Prepare(ctx context.Context, g maint.Guest) (Clock, *maint.Problem)
	// Restore is for a guest that nothing was prepared for, and that is known
	// to have stood still for no longer than lost: a clock that is further
	// off is so on purpose. Of the guest it needs names and agent.
	Restore(ctx context.Context, g maint.Guest, lost time.Duration) maint.ClockReport
}

// Clock is one guest's clock.
type Clock interface {
	// Correct is called right after the release, resumed being when the
	// vCPUs began to run, and stood for how long they did not at least.
	Correct(ctx context.Context, resumed time.Time, stood time.Duration) maint.ClockReport
}

// Scratch is where a phase writes down what people should read (Note) and what
// it must know after a crash (Save, Load).
type Scratch interface {
	Note(format string, args ...any) error
	Save(v any) error
	Load(phase string, v any) (bool, error)
}

// The names of the phases.
const (
	PhasePreflight = "preflight"
	PhaseHold      = "hold"
	PhaseVerify    = "verify"
)

// Order is who is to be held, and for how long at most.
type Order struct {
	Op       maint.OpID    `json:"op"`
	MaxPause time.Duration `json:"max_pause_ns"`
	Guests   []Member      `json:"guests"`
}

// Member is one guest of an order.
type Member struct {
	Guest string `json:"guest"`
	UUID  string `json:"uuid"`
	ID    int    `json:"id"`             // libvirt's
	Group int    `json:"group"`          // released in this order, 0 first
	Left  string `json:"left,omitempty"` // why it is not to be held
	// Agent says whether it has a guest agent that could set its clock.
	Agent maint.AgentState `json:"agent"`
}

// Hold is one hold. Its phases are its methods.
type Hold struct {
	Op       maint.OpID
	Request  maint.HoldRequest
	MaxPause time.Duration
	Host     Host
	Leash    Leash
	Steps    Steps
	Clocks   Clocks
	Log      *slog.Logger

	clocks map[string]Clock // by UUID; from Preflight in the same life
	// out and failure are how Perform went in this life; nil until it has.
	out     *Outcome
	failure error
}

// Outcome is what Perform and Recover have to write down when no guest is held
// any more.
type Outcome struct {
	Result maint.HoldResult
	Leash  []maint.LeashEvent
}
