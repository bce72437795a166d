package twin

import "belay/agent/maint"

// situation is where a guest is on one way of a live migration, seen at both
// sides.
type situation string

const (
	here      situation = "where it was"
	copying   situation = "being copied"
	switching situation = "switching over"
	there     situation = "on the other side"
	// leftover: it runs on the other side, and the first still holds its
	// stopped process.
	leftover situation = "on the other side, with a stopped process left behind"
	both     situation = "running on both sides"
	off      situation = "shut off"
	unknown  situation = "unknown"
)

const (
	jobOut = "migration out"
	jobIn  = "migration in"
	// reasonResumed is why a guest runs whose migration failed after its
	// vCPUs had been stopped. If the answer of the other side was lost at
	// that moment, it may run there as well.
	reasonResumed = "migration canceled"
)

// classify names the situation. A nil view means that the side could not be
// asked.
//
//	from              to                    situation
//	job runs          any                   copying
//	incoming          runs, job runs        there (and on its way back)
//	incoming          else                  switching, unknown
//	running           running               both
//	running           active, not running   switching (about to be cleaned up)
//	running, resumed  unknown               unknown
//	running           unknown, off          here
//	stopped           running               leftover
//	stopped for move  else                  switching
//	paused            active                switching
//	paused            off, unknown          here
//	off               unknown               unknown
//	off               incoming              switching
//	off               active                there
//	off               off                   off
//	unknown           any                   unknown
//
// "off" stands for absent as well: the twin has no definitions.
func classify(from, to *maint.View) situation {
	if from == nil {
		return unknown
	}
	f, t := active(from), active(to)
	incoming := t != nil && t.State == maint.GuestPaused && (t.Reason == "migrating" || t.Job == jobIn)
	switch {
	case f != nil && f.Job == jobOut:
		return copying
	case f != nil && f.Job == jobIn:
		switch {
		case to == nil:
			return unknown
		case t != nil && (to.Running() || t.Job == jobOut):
			return there
		}
		return switching
	case f != nil && from.Running():
		switch {
		case t != nil && to.Running():
			return both
		case t != nil:
			return switching
		case to == nil && f.Reason == reasonResumed:
			return unknown
		}
		return here
	case f != nil:
		switch {
		case t != nil && to.Running():
			return leftover
		case t != nil, f.State == maint.GuestPaused && (f.Reason == "migrating" || f.Reason == "post-copy"):
			return switching
		}
		return here
	case to == nil:
		return unknown
	case incoming:
		return switching
	case t != nil:
		return there
	}
	return off
}

// active is the guest in a view if it has a process there.
func active(v *maint.View) *maint.Guest {
	if v == nil || v.Guest == nil || !v.Guest.State.Active() {
		return nil
	}
	return v.Guest
}
