package agent

import (
	"fmt"
	"slices"
	"strings"

	"belay/agent/maint"
	"belay/patch/leash"
)

// Sweeper is a preserve.Leash that tells what leashes have left behind, and
// discards what is not to be kept.
type Sweeper interface {
	Sweep(keep func(name maint.OpID) bool) ([]leash.Status, error)
}

// Sweep implements Sweeper.
func (l leashes) Sweep(keep func(name maint.OpID) bool) ([]leash.Status, error) {
	return leash.Sweep(l.client.Dir, keep)
}

// Remnants is a preserve.Leash that tells which leashes have notes.
type Remnants interface {
	Leftovers() ([]leash.Leftover, error)
}

// Leftovers implements Remnants.
func (l leashes) Leftovers() ([]leash.Leftover, error) { return leash.Leftovers(l.client.Dir) }

// abandoned are the conditions of guests whose leash died before it had seen to
// them, and whose operation has ended, so that nobody takes it up again. Nor does
// belayd by itself: a guest that was resumed and paused again by somebody else
// since looks the same.
func (a *Agent) abandoned(all []leash.Leftover, guests []maint.Guest) (cs []maint.Condition) {
	for _, l := range all {
		if op, known := a.journal.Op(leashedOp(l.Op)); l.Alive || l.Void || known && op.State != maint.OpEnded {
			continue
		}
		for _, g := range l.Guests {
			i := slices.IndexFunc(guests, func(now maint.Guest) bool { return now.UUID == g.UUID })
			switch held := g.Fate.Held(); {
			case i < 0:
			case held && guests[i].State == maint.GuestPaused:
				cs = append(cs, maint.Condition{Code: maint.CodePaused,
					Text:   fmt.Sprintf("guest %s is still paused, and the leash of operation %s has died, which would resume it", g.Name, l.Op),
					Remedy: fmt.Sprintf("virsh resume %s, unless somebody has paused it since", maint.ShellWord(g.Name))})
			case g.Unleased && maint.View{Guest: &guests[i]}.Running():
				cs = append(cs, maint.Condition{Code: maint.CodeLeash,
					Text:   fmt.Sprintf("guest %s may run without the leases of its disks: the leash of operation %s has died, which would have them taken again", g.Name, l.Op),
					Remedy: fmt.Sprintf("virsh suspend %[1]s && virsh resume %[1]s", maint.ShellWord(g.Name))})
			}
		}
	}
	return cs
}

// leftovers are the leashes that there are, and what others have left.
func (a *Agent) leftovers() []leash.Leftover {
	r, ok := a.preserve.Leash.(Remnants)
	if !ok {
		return nil
	}
	all, _ := r.Leftovers() // notes that cannot be read were logged by the sweep
	return all
}

// sweepLeashes discards what the leashes of operations that have ended, or that
// nobody knows, have left behind. Those of open ones are taken up by their
// operations. It is called before any operation is begun.
func (a *Agent) sweepLeashes() {
	s, ok := a.preserve.Leash.(Sweeper) // the twin's leashes are in the same folder
	if !ok {
		return
	}
	swept, err := s.Sweep(func(name maint.OpID) bool {
		op, known := a.journal.Op(leashedOp(name))
		return known && op.State != maint.OpEnded
	})
	for _, l := range swept {
		a.log.Info("what a leash had left behind is discarded", "op", l.Op, "fired", l.Fired)
		for _, e := range l.Events { // which the operation may not have written down
			a.log.Info(describeLeash(e), "op", l.Op, "at", e.Time)
		}
	}
	if err != nil {
		a.log.Error("not all that leashes have left behind can be discarded", "err", err)
	}
}

// leashedOp is the operation that a leash is of.
func leashedOp(name maint.OpID) maint.OpID {
	for _, suffix := range []string{homeSuffix, awaySuffix} {
		if op, ok := strings.CutSuffix(string(name), suffix); ok {
			return maint.OpID(op)
		}
	}
	return name
}
