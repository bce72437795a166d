package maint

import "time"

// HoldRequest asks to hold guests (their vCPUs stopped, their memory kept)
// while the host is serviced, and to release them afterwards: rung B1.
type HoldRequest struct {
	// Guests are names or UUIDs; none with All. They are released group by
	// group, in the order of Groups, and all at once without Groups.
	Guests []string `json:"guests,omitempty"`
	All    bool     `json:"all,omitempty"` // every guest that runs
	// Groups is the order of release, each group a list of names or UUIDs:
	// a group is released when the one before it runs. Guests in no group
	// come last.
	Groups [][]string `json:"groups,omitempty"`

	Step   HostStep  `json:"step"`             // what is done to the host
	Verify *HostStep `json:"verify,omitempty"` // sees that it worked, while the guests are still held
	Undo   *HostStep `json:"undo,omitempty"`   // takes it back when it or Verify failed

	// MaxPause is the longest a guest may be held; 0 is the host's default.
	// When it has passed the guests are released whatever the step does.
	MaxPause time.Duration `json:"max_pause_ns,omitempty"`
	Reason   string        `json:"reason,omitempty"`
	// Emergency waives the guests' notice, and says why.
	Emergency string `json:"emergency,omitempty"`
}

// HostStep is one thing done to the host: a command or a job of a systemd unit.
type HostStep struct {
	Command []string `json:"command,omitempty"` // program and arguments; no shell
	Dir     string   `json:"dir,omitempty"`     // where Command runs; default /

	Unit string `json:"unit,omitempty"` // "openvswitch-switch.service"
	Job  string `json:"job,omitempty"`  // "restart" (default), "reload", "start", "stop"

	// Timeout ends the step; 0 leaves that to the pause's deadline.
	Timeout time.Duration `json:"timeout_ns,omitempty"`
}

// StepRun is how a HostStep went.
type StepRun struct {
	Started  time.Time `json:"started"`
	Ended    time.Time `json:"ended,omitzero"`
	ExitCode int       `json:"exit_code"`           // the command's; 128+n when signal n ended it; -1 when it has none
	TimedOut bool      `json:"timed_out,omitempty"` // it was ended because its time was up
	// Output is what it wrote on stdout and stderr, in order: the beginning
	// and the end of it where it is long, with OutputDropped bytes left out.
	Output        string `json:"output,omitempty"`
	OutputDropped uint64 `json:"output_dropped_bytes,omitempty"`
	// Error says why it could not be run or its end not be learnt.
	Error string `json:"error,omitempty"`
}

// OK reports that the step ended by itself, successfully.
func (r StepRun) OK() bool { return r.Error == "" && !r.TimedOut && r.ExitCode == 0 }

// HeldGuest is what a hold did to one guest.
type HeldGuest struct {
	Guest string `json:"guest"`
	UUID  string `json:"uuid"`
	// Left says why the guest was not paused: it was so already, by
	// somebody else, or did not run. All that follows is empty then.
	Left string `json:"left,omitempty"`

	Paused   time.Time     `json:"paused,omitzero"`   // before its vCPUs were asked to stop
	Released time.Time     `json:"released,omitzero"` // when they were known to run again
	Pause    time.Duration `json:"pause_ns,omitempty"`
	// AtMost: when it began to run again was not seen, as libvirt had died, so
	// Released is later than that and Pause longer.
	AtMost bool `json:"at_most,omitempty"`
	// ReleasedBy is "belayd", "leash", or "somebody else".
	ReleasedBy string       `json:"released_by,omitempty"`
	Clock      *ClockReport `json:"clock,omitempty"`
	Problem    *Problem     `json:"problem,omitempty"`
}

// HoldResult is what a hold did.
type HoldResult struct {
	Guests []HeldGuest `json:"guests"`
	Step   *StepRun    `json:"step,omitempty"`
	Verify *StepRun    `json:"verify,omitempty"`
	Undo   *StepRun    `json:"undo,omitempty"`
}

// The kinds of LeashEvent.
const (
	LeashArmed    = "armed"
	LeashRenewed  = "renewed"  // Count times since the event before
	LeashFired    = "fired"    // it releases the guests by itself: an alarm
	LeashReleased = "released" // it released Guest
	LeashFailed   = "failed"   // it could not release Guest (yet); Text says why
	LeashDisarmed = "disarmed"
)

// LeashEvent is one thing the leash did. The leash notes them, and belayd
// takes them over into the journal, if need be at its next start.
type LeashEvent struct {
	Time  time.Time `json:"time"`
	Kind  string    `json:"kind"`
	Guest string    `json:"guest,omitempty"` // name
	UUID  string    `json:"uuid,omitempty"`
	Count int       `json:"count,omitempty"`
	// Way is how a guest was released: "libvirt", "monitor" (QMP, past
	// libvirt: its disk leases are not held until libvirt is back).
	Way  string `json:"way,omitempty"`
	Text string `json:"text,omitempty"`
}
