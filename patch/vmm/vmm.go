package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"time"

	"belay/agent/maint"
)

// Looker sees guests and host.
type Looker interface {
	Guest(ctx context.Context, nameOrUUID string) (maint.Guest, error)
	Info(ctx context.Context) (maint.Host, error)
	Describe(ctx context.Context, uuid string) (Description, error)
}

// Description is a guest's XML in the forms that a replacement needs.
type Description struct {
	Live     string // as it is now
	Portable string // fit to start it from, with its secrets
	Inactive string // the definition, "" for a transient guest
	CPU      string // <cpu> of the portable XML, "" without
}

// Prober asks libvirt whether the QEMU that it would start for a guest can run
// its CPU. libvirt takes seconds for that when QEMU was updated, and else takes
// them while the guest stands still.
type Prober interface {
	CompareCPU(ctx context.Context, domainType, arch, machine, cpuXML string) error
}

// VCPUs stops and starts vCPUs.
type VCPUs interface {
	State(ctx context.Context, uuid string) (state maint.GuestState, reason string, err error)
	Suspend(ctx context.Context, uuid string) error
	// Resume is a success for a guest that runs. It wraps maint.ErrLocked
	// when a disk's lease is taken.
	Resume(ctx context.Context, uuid string) error
}

// QEMU is a guest's QEMU.
type QEMU interface {
	QMP(ctx context.Context, uuid, command string, args any) (json.RawMessage, error)
	// QuitMigrated ends a QEMU that is in "postmigrate", QuitIncoming one
	// that is in "inmigrate", and no other.
	QuitMigrated(ctx context.Context, uuid string) error
	QuitIncoming(ctx context.Context, uuid string) error
}

// Starter starts a guest from what was kept of it. Its calls have no deadline
// but their context's, and go on when that ends.
type Starter interface {
	CreatePaused(ctx context.Context, xml string) error
	Save(ctx context.Context, uuid, path string) error
	Restore(ctx context.Context, path string, paused bool) error
}

// Host is this host's hypervisor; see package hypervisor.
type Host interface {
	Looker
	Prober
	VCPUs
	QEMU
	Starter
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
	PhasePrepare   = "prepare"
	PhaseSwap      = "swap"
	PhaseProve     = "prove"
	PhaseFinish    = "finish"
)

// ErrStuck marks an error after which there must be no automatic undo: the
// guest has left its old QEMU and does not run in a new one.
var ErrStuck = errors.New("the guest is between two QEMUs")

// Replacement puts a new QEMU under one guest. The phases are its methods.
type Replacement struct {
	Op     maint.OpID
	Guest  string // name, for messages and libvirt's files
	UUID   string
	Method maint.VMMMethod // in-place or copy
	// MaxPause refuses a method whose estimate is longer; 0 is no limit.
	MaxPause time.Duration
	Host     Host
	Places   Places
	Log      *slog.Logger

	// BeforePause, unless nil, is called right before the guest is paused. A
	// leash armed there is to resume the guest through libvirt if belayd
	// dies or hangs. An error calls the swap off.
	BeforePause func(ctx context.Context) error
	// PointOfNoReturn, unless nil, is called right before the old QEMU ends.
	// When it has returned nil, nobody must resume the guest but this
	// package. An error (the leash has fired) has the old QEMU run on.
	PointOfNoReturn func(ctx context.Context) error

	// pace is how patient it is; tests shorten it.
	pace *pace
}

// pace has all that is waited for.
type pace struct {
	ask      time.Duration // one look
	handOver time.Duration // from the pause to the QEMU's having left
	start    time.Duration // a new QEMU's start, or a restore of a guest
	load     time.Duration // the loading of the devices' state
	gone     time.Duration // libvirt's taking a domain down
	libvirt  time.Duration // libvirt's being away
	prove    time.Duration // the vCPUs' first sign of life
	retry    time.Duration // after the first failed start; doubled each time
	starts   int           // of the new QEMU, at most
}

// usual: handOver takes 20 ms, start half a second; libvirt kills a QEMU that
// does not end after 10 s and gives up after 40.
func usual() pace {
	return pace{ask: 10 * time.Second, handOver: 15 * time.Second, start: 2 * time.Minute, load: 30 * time.Second,
		gone: time.Minute, libvirt: 10 * time.Minute, prove: 30 * time.Second, retry: 250 * time.Millisecond, starts: 5}
}

func (r *Replacement) paced() pace {
	if r.pace != nil {
		return *r.pace
	}
	return usual()
}

func (r *Replacement) mover() Mover {
	p := r.paced()
	return Mover{r.Host, r.Places, &p}
}

// wait waits for d and reports whether ctx is still alive.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
