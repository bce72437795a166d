package migrate

import (
	"time"

	"belay/agent/maint"
)

// Begun is what the journal says that an operation has begun.
type Begun string

// What can have been begun, in order.
const (
	// NothingBegun: no copy. Whatever job there is, it is somebody else's.
	NothingBegun Begun = "nothing"
	// CopyBegun: a copy, of which libvirt has not said how it ended.
	CopyBegun Begun = "copy"
	// CopyOver: libvirt has said that the copy failed, or was cancelled.
	CopyOver Begun = "over"
	// PostCopyBegun: the copy was told to go on as post-copy, or was about to be.
	PostCopyBegun Begun = "post-copy"
	// MoveSeen: the guest has been seen to have moved.
	MoveSeen Begun = "moved"
)

// Story is what the journal says of a migration.
type Story struct {
	Begun Begun
	// Persistent: the guest has a definition, that goes with it. libvirt writes it on
	// the destination before it starts the guest there.
	Persistent bool
	// Paused: it was paused before the copy was begun, and arrives so. It never runs by
	// this operation's doing, on either host.
	Paused bool
	// Came: the destination says that it has come by this operation, or has seen it run
	// since. It may have moved on.
	Came bool
	// Watched: the destination has watched without a break since before the copy, and has
	// not seen it run. Without that its absence there proves nothing: somebody may have moved
	// it on by hand before the destination wrote down that it came.
	Watched bool
	// Vigil is the destination's of before the copy.
	Vigil maint.Vigil
	// Rebooted: the source has booted since the copy was begun, with the guest's autostart
	// turned off for it, so that nobody has started the guest that was to start with the
	// host.
	Rebooted bool
}

// State is where a guest is, seen from both hosts at once and with the journal's story.
type State string

// The states of a guest in or after a migration.
const (
	// NotMoved: the source has it, without a job; the destination has no process for it.
	NotMoved State = "not moved"
	// Copying: this operation's copy is in progress. It may be in its switch-over.
	Copying State = "copying"
	// ForeignCopy: a migration that is not this operation's is in progress.
	ForeignCopy State = "being migrated by somebody else"
	// Switching: between the two; the next look will tell.
	Switching State = "switching over"
	// Moved: the destination has it, the source has nothing of it.
	Moved State = "moved"
	// MovedDefined: the same, and the source has its old definition.
	MovedDefined State = "moved, with its definition left on the source"
	// MovedLeftover: the destination has all of it; the source still holds its stopped
	// process, because its libvirtd died before it could remove it.
	MovedLeftover State = "moved, with a stopped leftover on the source"
	// Stranded: stopped on the source for a switch-over that did not come about, and
	// nobody is left to start it: the destination has never run it.
	Stranded State = "stopped for the switch-over, and never started on the destination"
	// Doubtful: the same, but the destination may have run it, and it may have ended
	// there: what it has written since is not in the source's memory.
	Doubtful State = "stopped for the switch-over, and not on the destination, where it may have run and ended"
	// Unstarted: it ended with its host, in the copy, and was kept from starting with it:
	// the destination has never run it.
	Unstarted State = "off since its host went down, and never started on the destination"
	// Gone: the source has it, shut off, and the destination, where it may have run, has
	// nothing of it: it may have moved on, or have ended there.
	Gone State = "shut off, and not on the destination, where it may have run"
	// OldCopy: the source runs it, since the destination's answer was lost, and it has
	// come to the destination, which does not have it any more.
	OldCopy State = "running on the source, although it has come to the destination"
	// PausedTwice: both hosts have it paused. The destination's is the one that goes on,
	// where the migration came to its end.
	PausedTwice State = "paused on both hosts"
	// PostCopyRunning: it runs on the destination, which fetches its memory from the source.
	PostCopyRunning State = "in post-copy"
	// PostCopyBroken: the same, and the way between the hosts is broken.
	PostCopyBroken State = "in post-copy, which is broken"
	// PostCopyLostThere: it has ended on the destination while part of its memory was on
	// the source: neither is whole.
	PostCopyLostThere State = "lost in post-copy: it has ended on the destination"
	// PostCopyLostHere: the source's part of its memory is gone.
	PostCopyLostHere State = "lost in post-copy: the source's part of its memory is gone"
	// Both: both hosts run it. Never to happen.
	Both State = "running on both hosts"
	// SecondCopy: the source runs it, and the destination has a paused process for it.
	SecondCopy State = "running on the source, with a paused copy on the destination"
	// Elsewhere: the destination has it without this operation's doing.
	Elsewhere State = "on the destination, but not by this operation"
	// Off: the source has it, shut off, and the destination has no process for it.
	Off State = "shut off"
	// Neither: no host has it.
	Neither State = "on neither host"
	// Unknown: a host could not be asked and the other one's view does not settle it.
	Unknown State = "unknown"
)

// Action is what may safely be done in a state, and all that may be.
type Action string

// The actions.
const (
	Begin            Action = "begin"             // a copy may be begun; or all is as before
	Watch            Action = "watch"             // libvirt is at it
	Wait             Action = "wait"              // and look again
	Leave            Action = "leave"             // to whom it is
	Finish           Action = "finish"            // it has moved
	RemoveDefinition Action = "remove definition" // it has moved; the source's definition is in the way
	ResumeSource     Action = "resume source"     // nobody else can start it, and it must run
	StartSource      Action = "start source"      // the same, of one that is off
	ResumePostCopy   Action = "resume post-copy"  // libvirt refuses where it still runs
	End              Action = "end"               // nothing is there to be moved
	Alarm            Action = "alarm"             // a person must look; nothing is touched
)

// Verdict is what Reconcile says.
type Verdict struct {
	State  State
	Action Action
}

// Moved reports whether the destination has the guest for good.
func (v Verdict) Moved() bool {
	return v.State == Moved || v.State == MovedDefined || v.State == MovedLeftover
}

// PostCopy reports whether the guest's memory is on two hosts.
func (v Verdict) PostCopy() bool { return v.State == PostCopyRunning || v.State == PostCopyBroken }

// Doubt is for how long a verdict must be seen, without a break, before it is acted on:
// two looks at two hosts are not made at one instant.
func (v Verdict) Doubt() time.Duration {
	switch v.State {
	case Both, Neither, SecondCopy, PausedTwice, Elsewhere, OldCopy:
		return 300 * time.Millisecond
	case MovedLeftover: // its libvirt may be about to remove it
		return 2 * time.Second
	case Stranded, Doubtful, Unstarted, Gone:
		return 3 * time.Second
	case PostCopyLostThere, PostCopyLostHere: // or about to end well
		return 10 * time.Second
	}
	return 0
}

const (
	jobOut = "migration out" // the job words of a migration
	jobIn  = "migration in"
	// jobUnsettled is of a guest that libvirt, just started, does not know yet.
	jobUnsettled = "catching up"

	// reasonResumed is why a guest runs whose migration failed after its
	// vCPUs had been stopped for the switch-over. If the destination's answer
	// was lost at that very moment, the guest may run there as well.
	reasonResumed        = "migration canceled"
	reasonMigrating      = "migrating"
	reasonPostCopy       = "post-copy"
	reasonPostCopyFailed = "post-copy failed"
)

// sight is all that matters of how one host is seen to have a guest.
type sight string

// The sights.
const (
	unknown  sight = "unknown"  // the host could not be asked, or does not know
	absent   sight = "absent"   //
	off      sight = "off"      // defined; no process
	running  sight = "running"  //
	resumed  sight = "resumed"  // running, after a migration that failed in its switch-over
	sending  sight = "sending"  // has an outgoing migration, running or stopped, not in post-copy
	arriving sight = "arriving" // has an incoming migration, has not run yet
	stopped  sight = "stopped"  // paused by a migration that is no more
	paused   sight = "paused"   // has a process that does not run, for another reason
	postcopy sight = "postcopy" // half of a guest, which runs on the destination
	broken   sight = "broken"   // the same, that has lost sight of the other half
)

// see makes a sight of a view.
func see(v *maint.View) sight {
	switch {
	case v == nil:
		return unknown
	case v.Guest == nil:
		return absent
	}
	g := v.Guest
	switch {
	case !g.State.Active():
		return off
	case g.Job == jobUnsettled:
		return unknown
	case g.Reason == reasonPostCopyFailed:
		return broken
	case g.Reason == reasonPostCopy:
		return postcopy
	case g.Job == jobOut:
		return sending
	case v.Running() && g.Reason == reasonResumed:
		return resumed
	case v.Running():
		return running
	case g.Job == jobIn:
		return arriving
	case g.State == maint.GuestPaused && g.Reason == reasonMigrating:
		return stopped
	}
	return paused
}

// Comes reports whether a guest is coming to the host that has it so, with inPostCopy in
// post-copy only.
func Comes(g maint.Guest, inPostCopy bool) bool {
	s := see(&maint.View{Guest: &g})
	return g.Job == jobIn && (!inPostCopy || s == postcopy || s == broken)
}

// Reconcile names the state of a guest in a migration, from what both hosts show and
// what the journal says, and the one action that is safe in it. A nil view is of a host
// that could not be asked. It is the only place that decides this.
//
// Its rule: nothing is started or resumed, unless it is proven that the other side does
// not run it and cannot come to. Where that cannot be proven, a person is asked.
// The first line that fits holds; an empty field is any.
//
//	begun          source              destination         state              action
//	nothing        unknown                                 Unknown            wait
//	nothing        running, resumed    runs                Both               alarm
//	nothing        running, resumed                        NotMoved           begin
//	nothing        stopped, paused     process             Elsewhere          leave
//	nothing        stopped, paused                         NotMoved           begin
//	nothing        off                 process             Elsewhere          leave
//	nothing        off                                     Off                end
//	nothing        absent              process, off        Elsewhere          leave
//	nothing        absent                                  Neither            end
//	nothing                                                ForeignCopy        leave
//
//	               unknown             postcopy            PostCopyRunning    wait
//	               unknown             broken              PostCopyBroken     wait
//	               unknown                                 Unknown            wait
//
//	               postcopy            broken              PostCopyBroken     watch: the source will see it
//	               postcopy            absent, off         PostCopyLostThere  alarm
//	               postcopy            whole               Switching          wait
//	               postcopy                                PostCopyRunning    watch
//	               broken              absent, off         PostCopyLostThere  alarm
//	               broken              whole               MovedLeftover      finish
//	               broken                                  PostCopyBroken     resume post-copy
//
//	over, moved    sending                                 ForeignCopy        leave
//	               sending                                 Copying            watch
//	               arriving                                ForeignCopy        leave
//
//	               running, resumed    runs                Both               alarm
//	               running, resumed    paused              SecondCopy         alarm
//	               running, resumed    arriving, stopped   Switching          wait: about to be removed
//	               resumed             unknown             Unknown            wait: it was between both
//	came           resumed             absent, off         OldCopy            alarm: it has run there, and may run on a third
//	               running, resumed                        NotMoved           begin
//
//	               stopped, paused     running, sending    MovedLeftover      finish
//	               stopped, paused     paused              PausedTwice        alarm
//	               stopped, paused     arriving, stopped   Switching          wait
//	               stopped, paused     postcopy, broken    Switching          wait
//	moved          stopped, paused     absent, off         MovedLeftover      finish: it has ended there
//	               stopped             unknown             Unknown            wait
//	came           stopped, paused     absent, off         Doubtful           alarm: it has run there, and may run on a third
//	copy, over     stopped             absent, proven      Stranded           resume source
//	               stopped                                 Doubtful           alarm
//	               paused                                  NotMoved           begin: its owner's doing
//	paused before  stopped, paused     paused              MovedLeftover      finish: so it arrives
//	paused before  stopped, paused     unknown             Unknown            wait
//	paused before  stopped, paused     absent, watched     NotMoved           begin
//	paused before  stopped, paused     absent, off         Doubtful           alarm: it may have come, and ended there
//
//	               absent, off         postcopy, broken    PostCopyLostHere   alarm
//	               absent, off         arriving, stopped   Switching          wait
//	               absent, off         unknown             Unknown            wait
//	               absent              process, off        Moved              finish
//	               off                 process             MovedDefined       remove definition
//	moved, came    off                 off                 MovedDefined       remove definition: it has ended there
//	moved          off                 absent              Off                end
//	copy, over     off                 absent, proven      Unstarted          start source, if rebooted
//	               off                 watched             Off                end
//	               off                                     Gone               alarm
//	               absent                                  Neither            alarm
//
// "process" is any sight of one, "runs" one whose vCPUs run, or may at any moment
// (running, resumed, sending, postcopy, broken), "whole" one that has all its memory
// (running, resumed, sending, paused).
//
// Stranded is what a source's libvirtd leaves that is killed after the last pass and
// before it has told the destination to start (libvirt's Perform is done, Finish is not
// begun): the destination's libvirtd kills what it had received, and nobody starts the
// source's, which still has everything. It is proven that the destination has not run it
// where all of this holds: the domain is persistent, libvirt writes its definition there
// before it starts it, and there is none; that host has not noted that it came, as it does
// before it lets it leave again; it has watched since before the copy and not seen it run, so
// that nobody else has moved it on either; its QEMU there is gone; and no migration is left
// on the source that could tell the destination anything. A transient domain leaves no such
// trace, nor does one that the destination had a definition of: Doubtful.
//
// Unstarted is the same of a source that went down as a whole, in the copy: what would have
// started there with the host is off, since a second one must not start with it (see
// keepOff).
//
// The lines "paused before" are in force instead of those of the same sights above. That
// the source does not run says nothing there of whether it has been received.
//
// PausedTwice is what is left when the source's libvirtd dies after Finish (libvirt's
// Confirm is lost) and the guest was paused since on the destination, by its owner or an
// I/O error. Only a domain that has arrived is there paused without a job, since libvirt
// kills any other at its start; so the destination's is the newer one. But why it is
// paused is for its owner to know, and nothing is resumed.
func Reconcile(source, destination *maint.View, story Story) Verdict {
	s, d := see(source), see(destination)
	if half := s == postcopy || s == broken; half && (source.Running() || source.Guest.Job == jobIn) {
		s = arriving // it comes back from elsewhere
	}
	if half := d == postcopy || d == broken; half && destination.Guest.Job == jobOut {
		d = sending // it goes on to elsewhere
	}
	if story.Begun == NothingBegun {
		return reconcileUntouched(s, d)
	}
	begun := story.Begun
	switch s {
	case unknown:
		switch d {
		case postcopy:
			return Verdict{PostCopyRunning, Wait}
		case broken:
			return Verdict{PostCopyBroken, Wait}
		}
		return Verdict{Unknown, Wait}
	case postcopy:
		switch {
		case d == broken:
			return Verdict{PostCopyBroken, Watch}
		case d == absent || d == off:
			return Verdict{PostCopyLostThere, Alarm}
		case d.whole():
			return Verdict{Switching, Wait}
		}
		return Verdict{PostCopyRunning, Watch}
	case broken:
		switch {
		case d == absent || d == off:
			return Verdict{PostCopyLostThere, Alarm}
		case d.whole():
			return Verdict{MovedLeftover, Finish}
		}
		return Verdict{PostCopyBroken, ResumePostCopy}
	case sending:
		if begun == CopyOver || begun == MoveSeen {
			return Verdict{ForeignCopy, Leave}
		}
		return Verdict{Copying, Watch}
	case arriving:
		return Verdict{ForeignCopy, Leave}
	case running, resumed:
		switch {
		case d.runs():
			return Verdict{Both, Alarm}
		case d == paused:
			return Verdict{SecondCopy, Alarm}
		case d == arriving || d == stopped:
			return Verdict{Switching, Wait}
		case s == resumed && d == unknown:
			return Verdict{Unknown, Wait}
		case s == resumed && story.Came:
			return Verdict{OldCopy, Alarm}
		}
		return Verdict{NotMoved, Begin}
	case stopped, paused:
		return reconcileStopped(s, d, story)
	}
	// The source has no process.
	switch {
	case d == postcopy || d == broken:
		return Verdict{PostCopyLostHere, Alarm}
	case d == arriving || d == stopped:
		return Verdict{Switching, Wait}
	case d == unknown:
		return Verdict{Unknown, Wait}
	case s == absent && d != absent:
		return Verdict{Moved, Finish}
	case s == absent:
		return Verdict{Neither, Alarm}
	case d.process() || d == off && (begun == MoveSeen || story.Came):
		return Verdict{MovedDefined, RemoveDefinition}
	case begun == MoveSeen:
		return Verdict{Off, End}
	case story.Rebooted && d == absent && story.neverRan(): // nor in post-copy, which it may have been told
		return Verdict{Unstarted, StartSource}
	case story.Came || !story.Watched:
		return Verdict{Gone, Alarm}
	}
	return Verdict{Off, End}
}

// neverRan reports whether a guest's absence from the destination proves that it has never
// run there, see Reconcile.
func (s Story) neverRan() bool {
	return s.Persistent && s.Watched && !s.Came
}

// reconcileStopped is for a process on the source that does not run and that no
// migration is at work on.
func reconcileStopped(s, d sight, story Story) Verdict {
	switch {
	case d == running || d == resumed || d == sending:
		return Verdict{MovedLeftover, Finish}
	case d == paused && story.Paused:
		return Verdict{MovedLeftover, Finish}
	case d == paused:
		return Verdict{PausedTwice, Alarm}
	case d.process():
		return Verdict{Switching, Wait}
	case story.Begun == MoveSeen && d != unknown:
		return Verdict{MovedLeftover, Finish}
	case d != unknown && story.Came:
		return Verdict{Doubtful, Alarm}
	case s == paused && !story.Paused:
		return Verdict{NotMoved, Begin}
	case d == unknown:
		return Verdict{Unknown, Wait}
	case d == absent && story.Paused && story.Watched:
		return Verdict{NotMoved, Begin}
	case d == absent && !story.Paused && story.neverRan() && story.Begun != PostCopyBegun:
		return Verdict{Stranded, ResumeSource}
	}
	return Verdict{Doubtful, Alarm}
}

// reconcileUntouched is for an operation that has begun no copy: what there is, is
// somebody else's.
func reconcileUntouched(s, d sight) Verdict {
	switch s {
	case unknown:
		return Verdict{Unknown, Wait}
	case running, resumed:
		if d.runs() {
			return Verdict{Both, Alarm}
		}
		return Verdict{NotMoved, Begin}
	case stopped, paused:
		if d.process() {
			return Verdict{Elsewhere, Leave}
		}
		return Verdict{NotMoved, Begin}
	case off:
		if d.process() {
			return Verdict{Elsewhere, Leave}
		}
		return Verdict{Off, End}
	case absent:
		if d.process() || d == off {
			return Verdict{Elsewhere, Leave}
		}
		return Verdict{Neither, End}
	}
	return Verdict{ForeignCopy, Leave}
}

// process reports whether a host is known to have a process for the guest.
func (s sight) process() bool { return s != unknown && s != absent && s != off }

// runs reports whether vCPUs run, or may at any moment, on the destination.
func (s sight) runs() bool {
	return s == running || s == resumed || s == sending || s == postcopy || s == broken
}

// whole reports whether the destination has all of a guest.
func (s sight) whole() bool {
	return s == running || s == resumed || s == sending || s == paused
}
