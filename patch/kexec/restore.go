package kexec

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"belay/agent/maint"
	"belay/patch/vmm"
)

// bring has every guest go on that the reserved memory holds, each once, and tells what
// became of all that were planned. It may be done over, by whomever: a nil plan is the
// manifest's own. An error says that not all could be looked at.
func (j *Job) bring(ctx context.Context, pl *plan) (guests []maint.KexecGuest, err error) {
	boot, err := j.Tree.Boot()
	if err != nil {
		return nil, err
	}
	k := &keeping{j: j}
	reason := j.Tree.OnPmem(j.Dir)
	for giveUp := time.Now().Add(j.Pace.Healed); reason != "" && time.Now().Before(giveUp) && wait(ctx, j.Pace.Poll); {
		reason = j.Tree.OnPmem(j.Dir) // it comes late in a boot
	}
	unseen, others := reason != "", false
	if !unseen {
		unlock, err := j.lock(ctx)
		if err != nil {
			return nil, err
		}
		defer unlock()
		k.m, err = readManifest(j.dir())
		if isGone(err) {
			if k.m = j.rebuilt(ctx, err); len(k.m.Planned) > 0 {
				err = nil
			}
			if pl != nil && k.m.Op == "" {
				k.m.Op = j.Op
			}
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			reason = "the reserved memory is empty"
		case err != nil:
			reason = err.Error()
		case pl != nil && k.m.Op != j.Op:
			reason, others, k.m = fmt.Sprintf("the reserved memory has what operation %s saved", k.m.Op), true, manifest{}
		case pl != nil && k.m.Damaged != "":
			k.m.Boot, k.m.Old, k.m.New, k.m.Planned = pl.Boot, pl.Old, pl.New, pl.Guests
		}
	}
	rescue := pl == nil
	if rescue {
		if reason != "" {
			return nil, fmt.Errorf("nothing can be restored: %s", reason)
		}
		pl = &plan{Boot: k.m.Boot, Old: k.m.Old, New: k.m.New, Guests: k.m.Planned}
	}
	retry := time.Now().Add(j.Pace.Healed)
	m, back := k.m, make([]*bringing, len(pl.Guests))
	var all errgroup.Group
	all.SetLimit(atOnce)
	for i, g := range pl.Guests {
		absent := reason
		if m.Damaged != "" && !j.told(m, g.UUID) {
			absent = m.Damaged
		}
		b := &bringing{keeping: k, member: g, boot: boot, same: boot == pl.Boot, left: slices.Contains(m.Left, g.UUID), damaged: m.Damaged != "", absent: absent, unseen: unseen, others: others, rescue: rescue, retry: retry,
			out: maint.KexecGuest{Guest: g.Name, UUID: g.UUID}}
		back[i] = b
		all.Go(func() error { return b.bring(ctx) })
	}
	if err := all.Wait(); err != nil {
		return nil, err
	}
	for _, b := range back {
		if b.out.Fate == "" { // nothing is written down of what nobody knows
			return nil, fmt.Errorf("what became of guest %s is not known", b.Name)
		}
	}
	all.SetLimit(20) // as many as libvirtd has workers
	for _, b := range back {
		all.Go(func() error { return b.settle(ctx) })
	}
	err = all.Wait()
	for _, b := range back {
		guests = append(guests, b.out)
	}
	return guests, err
}

// bringing is one guest on its way back.
type bringing struct {
	*keeping
	member
	boot    string // the host's, now
	same    bool   // it is the one in which guests were saved
	left    bool   // its owner had ended it before it was to be saved
	damaged bool   // the manifest was; see rebuilt
	absent  string // why nothing is there, "" if it is
	unseen  bool   // it could not be looked
	others  bool   // what is there is another operation's
	rescue  bool   // there is no plan but the manifest's
	retry   time.Time
	settled bool
	out     maint.KexecGuest
}

// bring finds out where the guest is, and has it go on. An error is one of looking, or of
// writing down.
func (b *bringing) bring(ctx context.Context) error {
	var m mark
	if b.absent == "" {
		var err error
		if m, err = readMark(b.j.dir(), b.UUID); err != nil {
			b.keep(maint.CodeKeptGuest, "see whether it has run since (its own log, its disks); if not, remove "+filepath.Join(b.j.Dir, b.UUID+markExt)+", then: belayd -restore",
				fmt.Sprintf("may have run since it was saved, which nobody can tell: %v", err))
			return nil
		}
	}
	// That a guest had its QEMU, or none, says nothing once the host has gone down.
	passing := m.Guest.Fate == maint.KexecRan || m.Guest.Fate == maint.KexecLeft
	if m.Stage == stageDone && (!passing || b.rescue || m.Boot == b.boot) {
		b.out, b.settled = m.Guest, m.Settled
		return b.drop()
	}
	now, active, err := b.look(ctx)
	e := b.has(b.UUID)
	if err == nil && e == nil {
		if e, err = b.unnamed(ctx, now, active, m); err == nil && e == nil {
			return nil
		}
		active = active && m.begun()
	}
	if p := new(maint.Problem); errors.As(err, &p) {
		b.out.Fate, b.out.Problem = maint.KexecKept, p
		return nil
	}
	if err != nil {
		return err
	}
	b.out.Bytes, b.out.Save, b.out.Memory = uint64(e.Size)+e.InPlace, e.Took, e.way()
	switch {
	case m.Stage == stageReleased && active && m.Boot == b.boot:
		return b.release(ctx, e)
	case m.Stage == stageReleased:
		what := "it had been restored, and ran, when the host went down once more"
		if m.Boot == b.boot {
			what = "it had been restored, and has ended since"
		}
		return b.lost(what)
	case active && m.Stage == stageRestoring && m.Boot == b.boot && e.Memory == inPlace:
		return b.restore(ctx, e, true) // its QEMU may not have its state yet
	case active && m.Stage == stageRestoring && m.Boot == b.boot && now.Reason != booted:
		return b.release(ctx, e)
	case active, m.Stage == stageStarted:
		return b.started(e)
	}
	return b.restore(ctx, e, m.Failed && m.Boot == b.boot)
}

// booted is why a guest runs that was started from its disks.
const booted = "booted"

// started is a guest that somebody has started from its disks. What was saved of it does not
// belong to them any more, also when it has ended; but it is not for Belay to remove.
func (b *bringing) started(e *entry) error {
	if _, err := os.Stat(e.file(b.j.dir())); errors.Is(err, fs.ErrNotExist) {
		b.out.Fate = maint.KexecLeft
		return b.done()
	}
	b.keep(maint.CodeStarted, fmt.Sprintf("see that it is well; when what was saved of it is of no more use: remove %s, then: belayd -restore", b.path()),
		"somebody has started it meanwhile, so that what is saved of it is out of date, and not restored")
	return writeMark(b.j.dir(), b.UUID, mark{Stage: stageStarted, Boot: b.boot})
}

func (b *bringing) path() string { return filepath.Join(b.j.Dir, b.UUID+saveExt) }

// look reports how the guest is, and whether it has a QEMU, when libvirt answers.
func (b *bringing) look(ctx context.Context) (now maint.Guest, active bool, err error) {
	for giveUp := time.Now().Add(b.j.Pace.Healed); ; {
		now, active, err = b.j.unsaving(ctx, b.member)
		if err == nil || ctx.Err() != nil || time.Now().After(giveUp) {
			return now, active, err
		}
		wait(ctx, b.j.Pace.Poll)
	}
}

// unnamed is of a guest that the manifest does not have. It gives an entry for one that was
// saved by a belayd that died before it could write that down, or whose manifest was damaged since.
func (b *bringing) unnamed(ctx context.Context, now maint.Guest, active bool, m mark) (*entry, error) {
	if active && b.same && !m.begun() && !b.unseen && !b.others {
		var err error
		now, active, err = b.j.takeUp(ctx, b.member)
		if errors.Is(err, vmm.ErrForeign) {
			return nil, b.started(&entry{File: b.UUID + saveExt})
		}
		if err != nil {
			return nil, err
		}
	}
	// Another operation's files are out of date: this one has not come to saving.
	there, inPlace := false, false
	if name := b.j.file(b.UUID, saveExt); !b.unseen && !b.others {
		var err error
		if there, _, err = saved(name); err == nil && there {
			inPlace, err = stayed(name)
		}
		if err != nil {
			return nil, err
		}
	}
	mine := inPlace || b.same && !b.damaged // in place, it has its checksum
	switch {
	case active && b.same && !m.begun():
		// A save that libvirt took back at the last moment: never to be taken for the guest.
		if there {
			if err := b.j.outdate(b.UUID); err != nil {
				return nil, err
			}
		}
		b.out.Fate = maint.KexecRan
	case active && !b.left && !m.begun():
		b.out.Fate, b.out.Started = maint.KexecLost, true
		b.out.Problem = maint.Problemf(maint.CodeLostGuest, "guest "+b.Name, "see that it is well", "ran when the host went down, before it was saved, and was booted afresh")
	case there && b.absent == "" && !m.begun() && b.j.destroyed(now):
		b.out.Fate = maint.KexecLeft
	case there && b.absent == "" && mine:
		e, err := b.adopt(ctx, b.member, m)
		if p := new(maint.Problem); errors.As(err, &p) && !b.same {
			return nil, b.lost(p.Reason)
		} else if errors.As(err, &p) {
			b.out.Fate, b.out.Problem = maint.KexecKept, p
			return nil, nil
		}
		return e, err
	case there:
		why := "the host went down before its checksum was written"
		if b.absent != "" {
			why = b.absent
		}
		b.keep(maint.CodeKeptGuest, "look at it, and if you trust it, and it has not run since: virsh restore "+b.path()+"; then remove the file", "was saved, but "+why)
		return nil, nil
	case b.unseen:
		b.keep(maint.CodeKeptGuest, "see what keeps "+b.j.Dir+" from being mounted, with this kernel or another; then: belayd -restore. If there is no file system on /dev/pmem0 any more, as after a power cut, its memory is lost: virsh start "+maint.ShellWord(b.Name),
			"may be in the reserved memory, which cannot be looked at: "+b.absent)
		return nil, nil
	case b.same, b.left:
		b.out.Fate = maint.KexecLeft
	case b.absent != "":
		return nil, b.lost(b.absent)
	default:
		return nil, b.lost("it was not saved when the host went down")
	}
	if b.absent != "" {
		return nil, nil // there is nothing to mark
	}
	return nil, b.done()
}

func (b *bringing) keep(code maint.Code, remedy, reason string) {
	b.out.Fate, b.out.Problem = maint.KexecKept, maint.Problemf(code, "guest "+b.Name, remedy, "%s", reason)
}

// lost gives a guest up.
func (b *bringing) lost(why string) error {
	b.out.Fate = maint.KexecLost
	b.out.Problem = maint.Problemf(maint.CodeLostGuest, "guest "+b.Name, "start it afresh: virsh start "+maint.ShellWord(b.Name), "its memory is lost: %s", why)
	if b.absent != "" {
		return nil // there is nothing to mark
	}
	return b.done()
}

// afresh boots a guest that is lost, unless it runs. Whether it does counts, not what libvirt says.
func (b *bringing) afresh(ctx context.Context) {
	_, active, err := b.look(ctx)
	var failed error
	if err == nil && !active {
		failed = b.j.Host.Launch(ctx, b.UUID)
		_, active, err = b.look(ctx)
	}
	switch {
	case err == nil && active:
		b.out.Started, b.out.Problem.Remedy = true, "see that it is well: it was started afresh"
	case failed != nil:
		b.out.Problem.Reason += fmt.Sprintf("; it could not be started afresh: %v", failed)
	}
}

// restore starts the guest from its file, with its vCPUs stopped, and releases it. What it
// needs of the host, such as networks and storage, may come later in a boot than libvirt. tried: a QEMU
// has begun to take it in, in this boot, and has not run it.
func (b *bringing) restore(ctx context.Context, e *entry, tried bool) error {
	begun := time.Now()
	l, lost, err := b.whole(ctx, e, tried)
	b.out.Check = time.Since(begun)
	switch {
	case err != nil:
		return err
	case lost != "":
		return b.lost(lost)
	}
	for {
		disk, failed := b.j.Tree.since(e.Written)
		if disk != "" {
			b.out.Fate, b.out.Problem = maint.KexecKept, b.j.stale(b.member, disk)
			return nil
		}
		begins := failed == nil
		if begins {
			if err := writeMark(b.j.dir(), b.UUID, mark{Stage: stageRestoring, Boot: b.boot}); err != nil {
				return err
			}
		}
		begun = time.Now()
		if begins && e.Memory == inPlace {
			failed = b.enter(ctx, l)
		} else if begins {
			failed = b.j.Host.Restore(ctx, b.path(), true)
			if failed != nil { // else it would let the guest's owner start it afresh
				failed = errors.Join(failed, remove(b.j.file(b.UUID, restoringExt)))
			}
		}
		b.out.Restore = time.Since(begun)
		now, active, err := b.look(ctx)
		switch {
		case err != nil:
			return errors.Join(failed, err)
		case errors.Is(failed, vmm.ErrForeign), active && e.Memory != inPlace && now.Reason == booted:
			return b.started(e)
		case active && (failed == nil || e.Memory != inPlace):
			return b.release(ctx, e)
		}
		if begins && failed != nil && !active {
			if err := writeMark(b.j.dir(), b.UUID, mark{Stage: stageRestoring, Boot: b.boot, Failed: true}); err != nil {
				return err
			}
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(b.retry):
			b.keep(maint.CodeKeptGuest, "mend that, then: belayd -restore", fmt.Sprintf("is saved, whole, and cannot be restored: %v", failed))
			return nil
		}
		wait(ctx, 10*b.j.Pace.Poll)
	}
}

// release has the guest run. That it may have is written down before.
func (b *bringing) release(ctx context.Context, e *entry) error {
	if err := writeMark(b.j.dir(), b.UUID, mark{Stage: stageReleased, Boot: b.boot}); err != nil {
		return err
	}
	if !e.Paused {
		if err := b.j.Host.Resume(ctx, b.UUID); err != nil {
			if now, _, lookErr := b.look(ctx); lookErr != nil || now.State != maint.GuestRunning {
				b.keep(maint.CodePaused, "mend that, then: virsh resume "+maint.ShellWord(b.Name), fmt.Sprintf("is restored, and cannot be resumed: %v", err))
				return nil
			}
		}
		b.out.Pause = max(time.Since(e.Begun), 0) // the clocks of two boots
	}
	b.out.Fate = maint.KexecRestored
	if e.Memory == inPlace {
		if err := b.settleQEMU(ctx, e); err != nil {
			b.out.Problem = err
		}
	}
	return b.done()
}

// done writes down that a guest is settled, and removes what is not needed any more.
func (b *bringing) done() error {
	if err := writeMark(b.j.dir(), b.UUID, mark{Stage: stageDone, Boot: b.boot, Guest: b.out}); err != nil {
		return err
	}
	return b.drop()
}

// drop removes what is saved of a guest that runs, and puts that of one that is lost aside.
func (b *bringing) drop() error {
	if err := b.j.forget(b.UUID); err != nil {
		b.j.Log.Warn("cannot remove what is not needed any more", "err", err)
	}
	name := filepath.Join(b.j.dir(), b.UUID+saveExt)
	if b.out.Fate == maint.KexecRestored {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			b.j.Log.Warn("cannot remove what is out of date", "err", err) // its mark says that it is
		}
		return nil
	}
	return b.j.outdate(b.UUID)
}

// settle turns a guest's autostart on again, boots it afresh where it is lost and that is wanted,
// puts its clock right, and asks whether it is the one that it was.
func (b *bringing) settle(ctx context.Context) error {
	j, out := b.j, &b.out
	if b.settled || out.Fate == maint.KexecKept {
		return ctx.Err()
	}
	e := b.has(b.UUID)
	b.Autostart = b.Autostart || e != nil && e.Autostart
	if b.Autostart {
		if err := j.Host.SetAutostart(ctx, b.UUID, true); err != nil && !errors.Is(err, maint.ErrNoGuest) && out.Problem == nil {
			out.Problem = maint.Problemf(maint.CodeAutostart, "guest "+b.Name, "virsh autostart "+maint.ShellWord(b.Name), "its autostart was turned off, and cannot be turned on again: %v", err)
		}
	}
	if out.Fate == maint.KexecLost && !out.Started && j.ColdStart && b.Autostart {
		b.afresh(ctx)
	}
	if out.Fate == maint.KexecRestored && e != nil && !e.Paused {
		now, active, err := b.look(ctx)
		if err != nil {
			return err
		}
		if active { // or it has ended, or moved, since it ran again
			b.ask(ctx, now, e)
		}
	}
	if b.absent != "" || ctx.Err() != nil {
		return ctx.Err()
	}
	return writeMark(j.dir(), b.UUID, mark{Stage: stageDone, Boot: b.boot, Guest: *out, Settled: true})
}

// ask has a guest that runs again set its clock and tell its boot ID. It has lost no more time
// than has passed since it stood still, by the host's clock of this moment: after a boot that may
// be put right, too.
func (b *bringing) ask(ctx context.Context, now maint.Guest, e *entry) {
	lost := max(time.Since(e.Begun), 0)
	clock := b.j.Inside.Clock(ctx, now, lost)
	if b.out.Clock = &clock; b.out.Problem == nil && now.Agent != maint.AgentNone {
		b.out.Problem = clock.Behind(lost)
	}
	if after := b.j.Inside.BootID(ctx, now); after != "" && b.BootID != "" {
		same := after == b.BootID
		if b.out.SameBoot = &same; !same {
			b.out.Problem = maint.Problemf(maint.CodeOtherBoot, "guest "+b.Name, "see its own log", "has another boot ID than before: it has booted")
		}
	}
}

// Rescue is what "belayd -restore" does: all that the manifest has, without a journal.
func (j *Job) Rescue(ctx context.Context) ([]maint.KexecGuest, error) { return j.bring(ctx, nil) }

// result is what there is to tell of the host and its guests.
func (j *Job) result(pl plan, guests []maint.KexecGuest) maint.KexecResult {
	r := maint.KexecResult{Before: pl.Old.Release, BootBefore: pl.Boot, Guests: guests}
	r.After, _ = j.Tree.Release()
	r.BootAfter, _ = j.Tree.Boot()
	return r
}

// Problems are what is wrong with guests.
func Problems(guests []maint.KexecGuest) (all []maint.Problem) {
	for _, g := range guests {
		if g.Problem != nil {
			all = append(all, *g.Problem)
		}
	}
	return all
}

// Kept reports whether a guest is off, and could go on.
func Kept(guests []maint.KexecGuest) bool {
	return slices.ContainsFunc(guests, func(g maint.KexecGuest) bool { return g.Fate == maint.KexecKept })
}
