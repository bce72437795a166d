package migrate

import "belay/agent/maint"

// Situation is where a guest is, seen from both hosts at once.
type Situation string

// The situations of a guest in or after a migration.
const (
	// NotMoved: the source has it, no job runs, the destination runs no copy.
	NotMoved Situation = "not moved"
	// Copying: the source's migration job is in progress.
	Copying Situation = "copying"
	// Switching: between the two; the next look will tell.
	Switching Situation = "switching over"
	// Moved: the destination has it, the source has no process for it.
	Moved Situation = "moved"
	// MovedLeftover: the destination runs it; the source still holds its
	// stopped process, because its libvirtd died before it could remove it.
	MovedLeftover Situation = "moved, with a stopped leftover on the source"
	// Both: both hosts run it. Never to happen.
	Both Situation = "running on both hosts"
	// Off: the source has it, shut off, and the destination has none.
	Off Situation = "shut off"
	// Neither: no host has it.
	Neither Situation = "on neither host"
	// Unknown: a host could not be asked and the other one's view does not
	// settle it.
	Unknown Situation = "unknown"
)

const (
	// jobOut is the job word of an outgoing migration.
	jobOut = "migration out"
	// reasonResumed is why a guest runs whose migration failed after its
	// vCPUs had been stopped for the switch-over. If the destination's answer
	// was lost at that very moment, the guest may run there as well.
	reasonResumed = "migration canceled"
)

// Classify names the situation. A nil view means that host could not be
// asked.
//
//	source            destination           situation
//	job runs          any                   copying
//	running           running               both
//	running           absent, off           not moved
//	running           unknown               not moved: its vCPUs were never stopped
//	running, resumed  unknown               unknown: they were, for the switch-over
//	running           incoming (paused)     switching (about to be cleaned up)
//	stopped for move  running               moved, leftover
//	stopped for move  else                  switching
//	paused            running               both hosts hold it: moved, leftover
//	paused            absent, off, unknown  not moved
//	paused            incoming (paused)     switching
//	absent, off       active                moved
//	absent            defined, off          moved (and shut down since)
//	absent            absent                neither
//	off               absent or off         off
//	absent, off       unknown               unknown
//	unknown           any                   unknown
func Classify(src, dst *maint.View) Situation {
	if src == nil {
		return Unknown
	}
	s := src.Guest
	var d *maint.Guest
	if dst != nil {
		d = dst.Guest
	}
	dstActive := d != nil && d.State.Active()
	dstIncoming := dstActive && d.State == maint.GuestPaused && (d.Reason == "migrating" || d.Job == "migration in")

	switch {
	case s != nil && s.State.Active() && s.Job == jobOut:
		return Copying
	case s != nil && s.State.Active():
		movedAway := s.State == maint.GuestPaused && (s.Reason == "migrating" || s.Reason == "post-copy")
		switch {
		case dst != nil && dst.Running() && src.Running():
			return Both
		case dst != nil && dst.Running():
			return MovedLeftover
		case dstIncoming, dstActive, movedAway:
			return Switching
		case dst == nil && s.Reason == reasonResumed:
			return Unknown
		}
		return NotMoved
	case dst == nil:
		return Unknown
	case dstIncoming:
		return Switching
	case dstActive:
		return Moved
	case s != nil:
		return Off
	case d != nil:
		return Moved
	}
	return Neither
}
