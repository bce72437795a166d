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
	unseen := reason != ""
	if !unseen {
		unlock, err := j.lock(ctx)
		if err != nil {
			return nil, err
		}
		defer unlock()
		switch k.m, err = readManifest(j.dir()); {
		case errors.Is(err, fs.ErrNotExist):
			reason = "the reserved memory is empty"
		case err != nil:
			reason = err.Error()
		case pl != nil && k.m.Op != j.Op:
			reason, k.m = fmt.Sprintf("the reserved memory has what operation %s saved", k.m.Op), manifest{}
		}
	}
	if pl == nil {
		if reason != "" {
			return nil, fmt.Errorf("nothing can be restored: %s", reason)
		}
		pl = &plan{Boot: k.m.Boot, Old: k.m.Old, New: k.m.New, Guests: k.m.Planned}
	}
	guests = make([]maint.KexecGuest, len(pl.Guests))
	var all errgroup.Group
	all.SetLimit(atOnce)
	for i, g := range pl.Guests {
		all.Go(func() (err error) {
			b := &bringing{keeping: k, member: g, boot: boot, same: boot == pl.Boot, absent: reason, unseen: unseen,
				out: maint.KexecGuest{Guest: g.Name, UUID: g.UUID}}
			err = b.bring(ctx)
			guests[i] = b.out
			return err
		})
	}
	if err := all.Wait(); err != nil {
		return nil, err
	}
	all.SetLimit(20) // as many as libvirtd has workers
	for i, g := range pl.Guests {
		all.Go(func() error { return j.settle(ctx, g, boot, &guests[i]) })
	}
	return guests, all.Wait()
}

// bringing is one guest on its way back.
type bringing struct {
	*keeping
	member
	boot   string // the host's, now
	same   bool   // it is the one in which guests were saved
	absent string // why nothing is there, "" if it is
	unseen bool   // it could not be looked
	out    maint.KexecGuest
}

// bring finds out where the guest is, and has it go on. An error is one of looking, or of
// writing down.
func (b *bringing) bring(ctx context.Context) error {
	active, err := b.look(ctx)
	if err != nil {
		return err
	}
	e := b.has(b.UUID)
	if e == nil {
		if e, err = b.unnamed(ctx, active); e == nil || err != nil {
			return err
		}
		active = false
	}
	b.out.Bytes, b.out.Save = uint64(e.Size), e.Took
	m, err := readMark(b.j.dir(), b.UUID)
	if err != nil {
		return err
	}
	switch {
	case m.Stage == stageDone:
		b.out = m.Guest
		return nil
	case m.Stage == stageReleased && active && m.Boot == b.boot:
		return b.release(ctx, e)
	case m.Stage == stageReleased:
		what := "it had been restored, and ran, when the host went down once more"
		if m.Boot == b.boot {
			what = "it had been restored, and has ended since"
		}
		return b.lost(ctx, what)
	case active && m.Stage == stageRestoring && m.Boot == b.boot:
		return b.release(ctx, e)
	case active:
		b.keep(maint.CodeStarted, fmt.Sprintf("see which of the two is wanted: what runs was booted afresh; if that is to be given up, stop it, then: belayd -restore; else remove %s", b.path()),
			"somebody has started it meanwhile, so that what is saved of it is not restored")
		return nil
	}
	return b.restore(ctx, e)
}

func (b *bringing) path() string { return filepath.Join(b.j.Dir, b.UUID+".save") }

// look reports whether the guest has a QEMU, when libvirt answers.
func (b *bringing) look(ctx context.Context) (bool, error) {
	giveUp := time.Now().Add(b.j.Pace.Healed)
	for {
		active, err := b.j.unsaving(ctx, b.member)
		if err == nil || ctx.Err() != nil || time.Now().After(giveUp) {
			return active, err
		}
		wait(ctx, b.j.Pace.Poll)
	}
}

// unnamed is of a guest that the manifest does not have. It gives an entry for one that was
// saved by a belayd that died before it could write that down.
func (b *bringing) unnamed(ctx context.Context, active bool) (*entry, error) {
	file := filepath.Join(b.j.dir(), b.UUID+".save")
	there := b.absent == "" && complete(file)
	switch {
	case active && b.same:
		b.out.Fate = maint.KexecRan
	case active:
		b.out.Fate, b.out.Started = maint.KexecLost, true
		b.out.Problem = maint.Problemf(maint.CodeLostGuest, "guest "+b.Name, "see that it is well", "ran when the host went down, before it was saved, and was booted afresh")
	case there && b.same:
		return b.put(ctx, b.member, time.Now())
	case there:
		b.keep(maint.CodeKeptGuest, "look at it, and if you trust it: virsh restore "+b.path()+"; then remove the file", "was saved, but the host went down before its checksum was written")
	case b.same:
		b.out.Fate = maint.KexecLeft
	case b.unseen:
		b.keep(maint.CodeKeptGuest, "see what keeps "+b.j.Dir+" from being mounted, with this kernel or another; then: belayd -restore. If there is no file system on /dev/pmem0 any more, as after a power cut, its memory is lost: virsh start "+maint.ShellWord(b.Name),
			"may be in the reserved memory, which cannot be looked at: "+b.absent)
	case b.absent != "":
		return nil, b.lost(ctx, b.absent)
	default:
		return nil, b.lost(ctx, "it was not saved when the host went down")
	}
	return nil, nil
}

func (b *bringing) keep(code maint.Code, remedy, reason string) {
	b.out.Fate, b.out.Problem = maint.KexecKept, maint.Problemf(code, "guest "+b.Name, remedy, "%s", reason)
}

// lost gives a guest up, and boots it afresh where that is wanted.
func (b *bringing) lost(ctx context.Context, why string) error {
	b.out.Fate = maint.KexecLost
	b.out.Problem = maint.Problemf(maint.CodeLostGuest, "guest "+b.Name, "start it afresh: virsh start "+maint.ShellWord(b.Name), "its memory is lost: %s", why)
	if b.j.ColdStart && b.Autostart {
		if active, err := b.look(ctx); err == nil && !active {
			if err := b.j.Host.Launch(ctx, b.UUID); err != nil {
				b.out.Problem.Reason += fmt.Sprintf("; it could not be started afresh: %v", err)
			}
		}
		if active, err := b.look(ctx); err == nil && active {
			b.out.Started, b.out.Problem.Remedy = true, "see that it is well: it was started afresh"
		}
	}
	if b.absent != "" || b.has(b.UUID) == nil {
		return nil // there is nothing to mark
	}
	return b.done()
}

// restore starts the guest from its file, with its vCPUs stopped, and releases it.
func (b *bringing) restore(ctx context.Context, e *entry) error {
	begun := time.Now()
	got, size, err := sum(ctx, e.file(b.j.dir()))
	b.out.Check = time.Since(begun)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return b.lost(ctx, err.Error())
	case got != e.Sum || size != e.Size:
		return b.lost(ctx, "its checksum is another: the reserved memory was damaged")
	}
	if err := writeMark(b.j.dir(), b.UUID, mark{Stage: stageRestoring, Boot: b.boot}); err != nil {
		return err
	}
	begun = time.Now()
	failed := b.j.Host.Restore(ctx, b.path(), true)
	b.out.Restore = time.Since(begun)
	active, err := b.look(ctx)
	if err != nil {
		return errors.Join(failed, err)
	}
	if !active {
		b.keep(maint.CodeKeptGuest, "mend that, then: belayd -restore", fmt.Sprintf("is saved, whole, and cannot be restored: %v", failed))
		return nil
	}
	return b.release(ctx, e)
}

// release has the guest run. That it may have is written down before.
func (b *bringing) release(ctx context.Context, e *entry) error {
	if err := writeMark(b.j.dir(), b.UUID, mark{Stage: stageReleased, Boot: b.boot}); err != nil {
		return err
	}
	if !e.Paused {
		if err := b.j.Host.Resume(ctx, b.UUID); err != nil {
			b.keep(maint.CodePaused, "mend that, then: virsh resume "+maint.ShellWord(b.Name), fmt.Sprintf("is restored, and cannot be resumed: %v", err))
			return nil
		}
		b.out.Pause = time.Since(e.Begun)
	}
	b.out.Fate = maint.KexecRestored
	if err := b.done(); err != nil {
		return err
	}
	return os.Remove(e.file(b.j.dir())) // it is out of date
}

func (b *bringing) done() error {
	return writeMark(b.j.dir(), b.UUID, mark{Stage: stageDone, Boot: b.boot, Guest: b.out})
}

// settle turns a guest's autostart on again, puts its clock right, and asks whether it is the
// one that it was. It may be done over.
func (j *Job) settle(ctx context.Context, g member, boot string, out *maint.KexecGuest) error {
	if g.Autostart && out.Fate != maint.KexecKept {
		if err := j.Host.SetAutostart(ctx, g.UUID, true); err != nil && !errors.Is(err, maint.ErrNoGuest) && out.Problem == nil {
			out.Problem = maint.Problemf(maint.CodeAutostart, "guest "+g.Name, "virsh autostart "+maint.ShellWord(g.Name), "its autostart was turned off, and cannot be turned on again: %v", err)
		}
	}
	if out.Fate != maint.KexecRestored || out.Clock != nil || g.Paused {
		return ctx.Err()
	}
	now, err := j.Host.Guest(ctx, g.UUID)
	if err != nil {
		return err
	}
	clock := j.Inside.Clock(ctx, now, out.Pause)
	out.Clock = &clock
	if after := j.Inside.BootID(ctx, now); after != "" && g.BootID != "" {
		same := after == g.BootID
		if out.SameBoot = &same; !same {
			out.Problem = maint.Problemf(maint.CodeOtherBoot, "guest "+g.Name, "see its own log", "has another boot ID than before: it has booted")
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return writeMark(j.dir(), g.UUID, mark{Stage: stageDone, Boot: boot, Guest: *out})
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
