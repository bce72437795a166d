package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// look finds out where the guest is.
func (r *Replacement) look(ctx context.Context, pl plan) (place, error) {
	ctx, cancel := context.WithTimeout(ctx, r.paced().ask)
	defer cancel()
	g, err := r.Host.Guest(ctx, pl.UUID)
	if err != nil && !errors.Is(err, maint.ErrNoGuest) {
		return "", err
	}
	if err != nil {
		g = maint.Guest{}
	}
	now := r.mover().where(pl.Seat, g)
	switch {
	case now != foreign: // or it is the new one
		return now, nil
	case pl.Method == maint.VMMCopy:
		if g.Reason == "restored" || g.Reason == "migrating" || r.Places.guard(pl.UUID).has(guardResumed) {
			return atNew, nil
		}
		return foreign, nil
	}
	d, err := r.Host.Describe(ctx, pl.UUID)
	if err != nil {
		return "", err
	}
	x, err := parseDomain(d.Live)
	if err != nil {
		return "", err
	}
	if x.token() != string(pl.Op) {
		return foreign, nil
	}
	return atNew, nil
}

// settled looks until there is an answer, libvirt being away for a while, and
// the guest is not on its way out. Once its old QEMU was to be ended it is on its
// way out of that, and there is no way back, unless QEMU says that it runs.
func (r *Replacement) settled(ctx context.Context, pl plan) (now place, err error) {
	pace := r.paced()
	away, cancelAway := context.WithTimeout(ctx, pace.libvirt)
	defer cancelAway()
	limit := pace.gone
	if pl.Method == maint.VMMCopy {
		limit = pace.libvirt // a save takes its time
	}
	gone, cancelGone := context.WithTimeout(ctx, limit)
	defer cancelGone()
	step := 5 * time.Millisecond
	for {
		now, err = r.look(ctx, pl)
		if err == nil && now == atOld && pl.Method == maint.VMMInPlace && r.Places.guard(pl.UUID).has(guardQuit) {
			switch err = r.mover().End(ctx, pl.Seat); {
			case errors.Is(err, ErrResumed):
				return atOld, nil
			case err == nil:
				return atOff, nil
			}
		}
		patience := away
		switch {
		case err == nil && now != leaving:
			return now, nil
		case err == nil:
			patience, err = gone, fmt.Errorf("the guest is %s, and does not get out of it", now)
		case errors.Is(err, maint.ErrNoGuest), now == atOld: // it went between two questions, or is to go
			patience = gone
		}
		if !wait(patience, step) {
			return now, err
		}
		step = min(2*step, time.Second)
	}
}

// Swap puts the new QEMU under the guest. It returns nil when the guest runs in
// it, however often belayd was killed on the way. Before the old QEMU ends, an
// error, or the end of ctx, has the guest run on in that. Afterwards neither ctx
// nor anything else stops it but its own patience; the error then wraps
// ErrStuck, and all that is needed is kept.
func (r *Replacement) Swap(ctx context.Context, s Scratch) error {
	pl, err := r.load(s)
	if err != nil {
		return err
	}
	all := context.WithoutCancel(ctx)
	now, err := r.settled(all, pl)
	if err != nil {
		return r.unknown(pl, err)
	}
	var t timing
	if now == atOld {
		if r.Places.guard(pl.UUID).has(guardPaused) {
			err = errors.New("belayd ended while the guest was being taken out of its old QEMU")
		} else {
			err = r.leave(ctx, pl, &t)
		}
		if now = atOff; err != nil { // by where it is, not by the error
			if now, err = r.left(all, pl, err); err != nil {
				return err
			}
		}
	}
	if now != atNew && !r.Places.guard(pl.UUID).has(guardQuit) {
		return fmt.Errorf("cannot put a new QEMU under guest %s: its old one has ended, and not by Belay", r.Guest)
	}
	return r.finishSwap(all, s, pl, now, &t)
}

// left finds out where a guest is after a hand-over that failed, and has it run
// on if that is in its old QEMU.
func (r *Replacement) left(ctx context.Context, pl plan, why error) (place, error) {
	now, err := r.settled(ctx, pl)
	switch {
	case err != nil:
		return now, r.unknown(pl, errors.Join(why, err))
	case now != atOld:
		return now, nil
	}
	if err := r.back(ctx, pl); err != nil {
		return now, errors.Join(why, err)
	}
	return now, fmt.Errorf("cannot take guest %s out of its QEMU, in which it runs on: %w", r.Guest, why)
}

// finishSwap goes on from where the guest is until it runs in the new QEMU.
func (r *Replacement) finishSwap(ctx context.Context, s Scratch, pl plan, now place, t *timing) error {
	starts, failures, err := r.arrive(ctx, pl, now, t)
	for _, f := range failures { // written down when the guest runs, not while it stands still
		if noted := s.Note("a new QEMU could not take the guest over: %v", f); noted != nil {
			return errors.Join(err, noted)
		}
	}
	if err != nil {
		return err
	}
	return s.Save(r.swapped(pl, starts, t))
}

// leave has the guest leave its old QEMU: it is off, and all of it kept, when
// it returns nil.
func (r *Replacement) leave(ctx context.Context, pl plan, t *timing) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if pl.Method == maint.VMMCopy {
		return r.save(ctx, pl, t)
	}
	return r.handOver(ctx, pl, t)
}

// arrive starts new QEMUs until the guest runs in one. It returns how many, and
// why earlier ones failed.
func (r *Replacement) arrive(ctx context.Context, pl plan, now place, t *timing) (starts int, failures []error, err error) {
	pace := r.paced()
	g := r.Places.guard(pl.UUID)
	pause := pace.retry
	for {
		switch {
		case now == foreign:
			return starts, failures, r.stuck(pl, now, nil)
		case now == atOff && g.has(guardResumed):
			return starts, failures, r.stuck(pl, now, errors.New("its new QEMU ended after it had begun to run"))
		case now == atOff:
			if err := r.whole(pl); err != nil {
				return starts, failures, r.stuck(pl, now, err)
			}
			if starts == pace.starts {
				return starts, failures, r.stuck(pl, now, failures[len(failures)-1])
			}
			starts++
			err = r.start(ctx, pl, t)
			if err == nil {
				err = r.wake(ctx, pl, t)
			}
		case now == atNew:
			err = r.wake(ctx, pl, t)
		default:
			return starts, failures, r.stuck(pl, now, err)
		}
		if err == nil {
			return starts, failures, nil
		}
		r.Log.Warn("the new QEMU does not run the guest yet", "guest", r.Guest, "err", err)
		failures = append(failures, err)
		if len(failures) > 2*pace.starts { // a lease that is not given back
			return starts, failures, r.stuck(pl, now, err)
		}
		wait(ctx, pause)
		pause = min(2*pause, 5*time.Second)
		if now, err = r.settled(ctx, pl); err != nil {
			return starts, failures, r.unknown(pl, err)
		}
	}
}

// start starts a new QEMU from what is kept.
func (r *Replacement) start(ctx context.Context, pl plan, t *timing) error {
	ctx, cancel := context.WithTimeout(ctx, r.paced().start)
	defer cancel()
	defer t.mark("start")
	if pl.Method == maint.VMMCopy {
		return r.restore(ctx, pl)
	}
	return r.Host.CreatePaused(ctx, pl.XML)
}

// wake has a guest run that is in its new QEMU, whatever that does as yet.
func (r *Replacement) wake(ctx context.Context, pl plan, t *timing) error {
	g := r.Places.guard(pl.UUID)
	state, err := runState(ctx, r.Host, pl.UUID)
	if err != nil {
		return err
	}
	if state == runIncoming && pl.Method == maint.VMMInPlace {
		if err := r.pour(ctx, pl); err != nil {
			return err
		}
		t.mark("state in")
	}
	if pl.Method == maint.VMMInPlace {
		// From then on somebody may save it. Again in Finish, where it must succeed.
		if err := setIgnoreShared(ctx, r.Host, pl.UUID, false); err != nil {
			r.Log.Warn("cannot switch a migration capability off yet", "guest", r.Guest, "err", err)
		}
	}
	// From here on the guest's memory may be ahead of the state that is kept.
	again := g.has(guardResumed)
	if !again {
		// A guest does not stand still for want of room: the state itself, renamed, says that it is void.
		if err := g.stamp(guardResumed); err != nil && os.Rename(g.file(guardState), g.file(guardResumed)) != nil {
			return err
		}
	}
	err = r.Host.Resume(ctx, pl.UUID)
	if errors.Is(err, maint.ErrLocked) { // it has not run, then
		return errors.Join(fmt.Errorf("it is complete in its new QEMU, and cannot run: %w", err), g.drop(guardResumed))
	}
	if err != nil {
		return err
	}
	t.end()
	if again && state != runRunning { // an earlier belayd died before it did
		if err := g.stamp(guardResumed); err != nil {
			r.Log.Warn("the record will tell too short a pause", "guest", r.Guest, "err", err)
		}
	}
	return nil
}

// Back has the guest run on in its old QEMU. It is the undo of Swap, and may be
// done over. A guest whose old QEMU was to be ended cannot: it goes on to a new one,
// and the error wraps ErrStuck, since the operation is yet to be finished.
func (r *Replacement) Back(ctx context.Context, s Scratch) error {
	pl, err := r.load(s)
	if err != nil {
		return err
	}
	now, err := r.settled(ctx, pl)
	switch {
	case err != nil:
		return r.unknown(pl, err)
	case now == atOld:
		return r.back(ctx, pl)
	case !r.Places.guard(pl.UUID).has(guardQuit):
		return nil // it has ended by itself
	}
	if _, _, err := r.arrive(ctx, pl, now, new(timing)); err != nil {
		return err
	}
	p := maint.Problemf(maint.CodeBetween, "guest "+r.Guest, "belay replace-vmm "+maint.ShellWord(r.Guest), "runs in its new QEMU: it had left its old one when this was called off; that is yet to be finished")
	return fmt.Errorf("%w: %w", ErrStuck, p)
}

// back does it, for a guest that is in its old QEMU. What was kept of the state
// is out of date with the first instruction, and goes before.
func (r *Replacement) back(ctx context.Context, pl plan) error {
	fail := func(err error) error {
		return maint.Problemf(maint.CodePaused, "guest "+r.Guest, "virsh resume "+maint.ShellWord(r.Guest)+", once what it names is put right",
			"is paused in its old QEMU, whole, and could not be resumed: %v", err)
	}
	g := r.Places.guard(pl.UUID)
	if err := g.drop(guardState, guardQuit); err != nil {
		return fail(err)
	}
	if g.has(guardPaused) {
		try := r.mover().tryOld
		if pl.Method == maint.VMMCopy {
			try = func(ctx context.Context, s Seat) error { return r.Host.Resume(ctx, s.UUID) }
		}
		if err := r.mover().resume(ctx, pl.Seat, try); err != nil {
			return fail(err)
		}
	}
	if pl.Method == maint.VMMInPlace {
		if err := r.mover().resetOld(ctx, pl.Seat); err != nil {
			return fmt.Errorf("cannot put the migration settings of guest %s back: %w", r.Guest, err)
		}
	}
	return g.drop(guardPaused)
}

// whole says why the guest must not be started from what is kept.
func (r *Replacement) whole(pl plan) error {
	g := r.Places.guard(pl.UUID)
	boot, err := r.Places.bootID()
	if err != nil {
		return err
	}
	if boot != pl.Boot {
		return errors.New("the host has booted since, and the guest's memory is gone")
	}
	if !g.has(guardQuit) {
		return errors.New("nothing of the guest was kept: it ended by itself")
	}
	left := g.stamped(guardQuit)
	switch pl.Method {
	case maint.VMMInPlace:
		if !g.has(guardState) {
			return errors.New("the state of its devices is not there")
		}
		for _, path := range pl.Memory {
			if _, err := os.Stat(filepath.Join(r.Places.at(pl.Kept), filepath.Base(path))); err != nil {
				return fmt.Errorf("its memory is not there: %w", err)
			}
		}
	case maint.VMMCopy:
		if left, err = saved(r.Places.at(pl.image())); err != nil {
			return err
		}
	}
	for _, disk := range pl.Disks {
		if writtenSince(r.Places.at(disk), left) {
			return fmt.Errorf("%s was written after the guest had left its QEMU: somebody else has run it", disk)
		}
	}
	return nil
}

// writtenSince reports whether a file has changed since a moment. Only file
// systems of this machine have its clock; of others, nothing is known.
func writtenSince(path string, since time.Time) bool {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return false
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
	default:
		return false
	}
	info, err := os.Stat(path)
	return err == nil && info.ModTime().After(since)
}

// unknown is the error of a guest whose place cannot be told.
func (r *Replacement) unknown(pl plan, err error) error {
	p := maint.Problemf(maint.CodeUnverified, "guest "+r.Guest, "virsh domstate --reason "+maint.ShellWord(r.Guest)+"; "+r.howOn(pl),
		"where it is on its way to a new QEMU could not be found out: %v", err)
	return fmt.Errorf("%w: %w", ErrStuck, p)
}

// stuck is the error of a guest that can go neither on nor back.
func (r *Replacement) stuck(pl plan, now place, err error) error {
	p := maint.Problemf(maint.CodeBetween, "guest "+r.Guest, r.howOn(pl), "is %s: %v", now, err)
	g := r.Places.guard(pl.UUID)
	whole := r.whole(pl)
	switch {
	case now == foreign:
		p.Code = maint.CodeStarted
		p.Reason = "is " + string(now) + " while its own was being replaced; that is left alone, and what was kept is of no use any more"
		p.Remedy = fmt.Sprintf("see whether it is as it should be; then remove %s", strings.Join(r.folders(pl), " and "))
	case now == atNew && !g.has(guardResumed) && !errors.Is(err, maint.ErrLocked):
		p.Reason = fmt.Sprintf("is in its new QEMU, which has not got the guest's state: %v", err)
		p.Remedy = fmt.Sprintf("end that QEMU, in which nothing has run yet (virsh destroy %s); then %s", maint.ShellWord(r.Guest), r.howOn(pl))
	case now == atNew:
		p.Reason = fmt.Sprintf("is complete in its new QEMU, and does not run: %v", err)
		p.Remedy = "put right what it names; then virsh resume " + maint.ShellWord(r.Guest) + ", or " + r.howOn(pl)
	case now == atOff && (g.has(guardResumed) || whole != nil):
		p.Reason = fmt.Sprintf("is off, and cannot be gone on with: %v", err)
		p.Remedy = fmt.Sprintf("remove %s, and start it afresh (virsh start %s)", strings.Join(r.folders(pl), " and "), maint.ShellWord(r.Guest))
	}
	return fmt.Errorf("%w: %w", ErrStuck, p)
}

func (r *Replacement) folders(pl plan) []string {
	return []string{filepath.Join(r.Places.guards(), pl.UUID), pl.Kept}
}

// howOn tells a person how a guest that is between two QEMUs goes on.
func (r *Replacement) howOn(pl plan) string {
	return fmt.Sprintf("see /var/log/libvirt/qemu/%s.log for the reason; its memory and state are kept in %s; when it is put right: belay replace-vmm %s",
		r.Guest, strings.Join(r.folders(pl), " and "), maint.ShellWord(r.Guest))
}

// missing reports whether a file is not there.
func missing(err error) bool { return errors.Is(err, fs.ErrNotExist) }
