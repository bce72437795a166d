package kexec

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"belay/agent/maint"
	"belay/patch/internal/linux"
	"belay/patch/vmm"
)

// leave has a guest leave its QEMU, its memory staying where it is, and names it. One that cannot
// runs on.
func (k *keeping) leave(ctx context.Context, g member, s vmm.Seat) error {
	j := k.j
	l := leaving{Token: string(j.Op), Guest: g, Seat: s}
	var err error
	if l.Boot, err = j.Tree.Boot(); err != nil {
		return err
	}
	if err := j.Mover.Keep(l.Seat); err != nil {
		return err
	}
	defer j.Mover.Linger(l.Seat)()
	err = k.empty(ctx, &l)
	if err == nil {
		err = j.part(ctx, l)
	}
	now, active, failed := j.takeUp(context.WithoutCancel(ctx), g) // by what is written down, not by the error
	switch {
	case failed != nil:
		return errors.Join(err, failed)
	case err != nil:
		return err
	case active:
		return vmm.ErrResumed
	}
	g.Disks = disks(now)
	_, err = k.put(ctx, g, l.Begun, j.Tree.written(g.Disks))
	return err
}

// empty takes what is to be kept out of a guest's QEMU, which then waits to be ended.
func (k *keeping) empty(ctx context.Context, l *leaving) (err error) {
	j := k.j
	l.State, err = j.Mover.Leave(ctx, l.Seat, func(context.Context) error {
		l.Begun = time.Now().Round(0)
		return writeSealed(j.file(l.Seat.UUID, pausedExt), l)
	})
	if err != nil {
		return err
	}
	if l.Memory, err = j.sumMemory(ctx, l.Seat); err != nil {
		return err
	}
	text, err := l.encode()
	if err != nil {
		return err
	}
	if err := linux.WriteFile(j.file(l.Seat.UUID, saveExt), text); err != nil {
		return err
	}
	return linux.Sync(j.dir())
}

// part writes down that a guest's QEMU is to be ended, all of the guest being kept. One that its owner
// ends meanwhile is an error.
func (j *Job) part(ctx context.Context, l leaving) error {
	now, err := j.Host.Guest(ctx, l.Seat.UUID)
	switch {
	case err != nil:
		return err
	case !now.State.Active() || j.Mover.Ending(l.Seat, now):
		return errors.New("somebody has ended it in its pause")
	}
	return j.rename(l.Seat.UUID, pausedExt, quitExt)
}

// rename gives a file of a guest's another name, if it is there, and has that on disk.
func (j *Job) rename(uuid, from, to string) error {
	err := os.Rename(j.file(uuid, from), j.file(uuid, to))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return linux.Sync(j.dir())
}

// outdate has what is saved of a guest be out of date.
func (j *Job) outdate(uuid string) error { return j.rename(uuid, saveExt, lostExt) }

// held is what is written down of a guest that Belay has paused in its QEMU, in this boot, and whether
// that was to be ended. It gives an error that is fs.ErrNotExist where there is nothing.
func (j *Job) held(uuid string) (l leaving, quit bool, err error) {
	err = readSealed(j.file(uuid, quitExt), &l)
	if quit = !errors.Is(err, fs.ErrNotExist); !quit {
		err = readSealed(j.file(uuid, pausedExt), &l)
	}
	if err != nil {
		return l, quit, err
	}
	boot, err := j.Tree.Boot()
	if err == nil && boot != l.Boot {
		err = fs.ErrNotExist
	}
	return l, quit, err
}

// takeUp has a guest that Belay has paused in its QEMU go on to where it was going: out of that, if it was
// to be ended, and else back. It tells how the guest is then, and does nothing to any other. It wraps
// vmm.ErrForeign; what keeps the guest where it is, is a *maint.Problem, and all that is kept of it stays.
func (j *Job) takeUp(ctx context.Context, g member) (now maint.Guest, active bool, err error) {
	now, active, err = j.unsaving(ctx, g)
	if err != nil || !active {
		return now, active, err
	}
	l, quit, err := j.held(g.UUID)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return now, true, nil
	case err != nil:
		return now, true, err
	case !quit:
		return now, true, j.runOn(ctx, l)
	}
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), j.Pace.Healed)
	defer cancel()
	err = j.Mover.End(limit, l.Seat)
	switch {
	case err == nil:
		return j.unsaving(ctx, g)
	case errors.Is(err, vmm.ErrForeign):
		return now, true, err
	case !errors.Is(err, vmm.ErrResumed):
		return now, true, j.stays(g, err)
	}
	if err := j.rename(g.UUID, quitExt, pausedExt); err != nil {
		return now, true, err
	}
	return now, true, j.runOn(ctx, l)
}

// stays is that a guest's QEMU has been ending for too long. Whether the guest is to go on elsewhere then is
// written down.
func (j *Job) stays(g member, err error) *maint.Problem {
	remedy := fmt.Sprintf("see /var/log/libvirt/qemu/%s.log; when it is shut off (virsh domstate %s): belayd -restore", g.Name, maint.ShellWord(g.Name))
	if _, quit, held := j.held(g.UUID); held == nil && quit {
		remedy = "it is no more in that QEMU: virsh destroy " + maint.ShellWord(g.Name) + "; then: belayd -restore"
	}
	return maint.Problemf(maint.CodeBetween, "guest "+g.Name, remedy, "is in a QEMU that is ending, and does not get out of it; what is kept of it stays: %v", err)
}

// runOn has a guest run on that is in its old QEMU, if that is there. What was saved of it is out of date
// with its first instruction, and goes before; its memory is kept until it is seen to run.
func (j *Job) runOn(ctx context.Context, l leaving) error {
	uuid := l.Seat.UUID
	if err := j.outdate(uuid); err != nil {
		return err
	}
	if j.Mover.Alive(l.Seat) { // else it is another QEMU
		err := j.Mover.Back(ctx, l.Seat)
		if err == nil {
			var now maint.Guest
			if now, err = j.Host.Guest(ctx, uuid); err == nil && now.State != maint.GuestRunning {
				err = fmt.Errorf("it is %s", now.State)
			}
		}
		if err != nil {
			return maint.Problemf(maint.CodePaused, "guest "+l.Seat.Guest, "virsh resume "+maint.ShellWord(l.Seat.Guest)+", once what it names is put right",
				"is paused in its QEMU, whole, and could not be resumed: %v", err)
		}
	}
	return j.forget(uuid)
}

// forget removes what is kept of a guest beside UUID.save and its mark: nothing of that is needed.
func (j *Job) forget(uuid string) error {
	return errors.Join(remove(j.file(uuid, quitExt)), remove(j.file(uuid, pausedExt)), os.RemoveAll(j.file(uuid, memoryExt)))
}

// destroyed reports whether a guest that is off was ended by its owner, while Belay had it paused: it is to
// stay off, also where all of it is saved.
func (j *Job) destroyed(now maint.Guest) bool {
	_, quit, err := j.held(now.UUID)
	return err == nil && !quit && now.Reason == "destroyed"
}

// ending reports whether a guest is on its way out of the QEMU that Belay has paused it in.
func (j *Job) ending(uuid string, now maint.Guest) (bool, error) {
	l, _, err := j.held(uuid)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errDamaged) { // as a power cut leaves it
		return false, nil
	}
	return err == nil && j.Mover.Ending(l.Seat, now), err
}

// gone sees that a guest that was saved by a belayd that died has left its QEMU, and has not run in it
// since. One whose restore was begun had.
func (j *Job) gone(ctx context.Context, g member, begun bool) error {
	file := filepath.Join(j.Dir, g.UUID+saveExt)
	stale := func(err error) error {
		return maint.Problemf(maint.CodeStarted, "guest "+g.Name, "see who has ended it; then remove "+file+", and: belayd -restore",
			"has run since its state was saved, or what is kept of it was damaged (%v), and is not restored", err)
	}
	l, err := readLeaving(j.file(g.UUID, saveExt))
	if isGone(err) {
		return stale(err)
	}
	if err != nil || begun {
		return err
	}
	intact, err := j.intact(ctx, l)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case isGone(err):
		return stale(err)
	case err != nil:
		return err
	case !intact:
		return stale(errors.New("the checksum of its memory is another"))
	}
	return nil
}
