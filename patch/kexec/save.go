package kexec

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/internal/linux"
	"belay/patch/vmm"
)

// atOnce is how many guests are saved or restored at once: it is memory that is copied.
const atOnce = 4

// Load has the running kernel keep the new one: what is wrong with that shows before any guest
// feels something.
func (j *Job) Load(ctx context.Context, s Scratch) error {
	pl, err := j.load(s)
	if err != nil {
		return err
	}
	if err := j.unlessBooted(pl); err != nil {
		return err
	}
	return j.loadImage(ctx, pl.New)
}

func (j *Job) loadImage(ctx context.Context, k maint.KernelImage) error {
	if err := j.Loader.KexecLoad(ctx, k); err != nil {
		var p *maint.Problem
		if errors.As(err, &p) {
			return err
		}
		return maint.Problemf(maint.CodeKexec, "kernel "+k.Kernel, "see the kernel's log (dmesg)", "the running kernel does not take it: %v", err)
	}
	return nil
}

// Unload is the undo of Load.
func (j *Job) Unload(ctx context.Context, s Scratch) error {
	pl, err := j.load(s)
	if err != nil || j.unlessBooted(pl) != nil {
		return err // a boot has forgotten it
	}
	return j.Loader.KexecUnload(ctx)
}

// unlessBooted is an error if the host has booted since the plan was made.
func (j *Job) unlessBooted(pl plan) error {
	boot, err := j.Tree.Boot()
	if err == nil && boot != pl.Boot {
		err = maint.Problemf(maint.CodeKernelOld, host, "see why (journalctl -b -1 -e), and begin again", "went down before the new kernel was to be started")
	}
	return err
}

// Save saves every guest. From the first on, guests are off: whoever finds the host so goes
// on, or has Back restore them.
func (j *Job) Save(ctx context.Context, s Scratch) error {
	pl, err := j.load(s)
	if err != nil {
		return err
	}
	if err := j.unlessBooted(pl); err != nil {
		return err
	}
	unlock, err := j.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	m, err := j.open(pl)
	if err != nil {
		return err
	}
	k := &keeping{j: j, m: m}
	var all errgroup.Group
	all.SetLimit(atOnce)
	for _, g := range pl.Guests {
		all.Go(func() error {
			if err := k.save(ctx, g); err != nil {
				return fmt.Errorf("cannot save guest %s: %w", g.Name, err)
			}
			return nil
		})
	}
	return all.Wait()
}

// open begins the manifest of this operation, or takes it up. What an earlier one has left
// there, and is settled, is removed.
func (j *Job) open(pl plan) (manifest, error) {
	m, err := readManifest(j.dir())
	switch {
	case err == nil && m.Op == j.Op:
		return m, nil
	case err == nil && !m.settled(j.dir()):
		return m, j.unsettled(m)
	}
	if p := j.damaged(err); p != nil {
		return m, p
	}
	// In this order what is out of date is never there without a word that it is.
	var clean error
	for _, pattern := range []string{"*" + saveExt, "*" + lostExt, manifestName, "*" + markExt, "*" + quitExt, "*" + pausedExt, "*" + memoryExt, "*" + restoringExt, "*~"} {
		files, err := filepath.Glob(filepath.Join(j.dir(), pattern))
		for _, f := range files {
			err = errors.Join(err, os.RemoveAll(f))
		}
		clean = errors.Join(clean, err, linux.Sync(j.dir()))
		if clean != nil {
			return m, clean
		}
	}
	m = manifest{Op: j.Op, Boot: pl.Boot, Old: pl.Old, New: pl.New, Planned: pl.Guests, Guests: []entry{}}
	return m, writeManifest(j.dir(), m)
}

// damaged is why nothing is begun where guests may be kept, and the manifest, which was read
// with err, does not tell; nil: none is.
func (j *Job) damaged(err error) *maint.Problem {
	if err == nil {
		return nil
	}
	files, _ := filepath.Glob(filepath.Join(j.dir(), "*"+saveExt))
	if len(files) == 0 {
		return nil
	}
	return maint.Problemf(maint.CodeKeptGuest, "folder "+j.Dir, "belayd -restore: guests with their memory in place go on, and of others it says what you can do",
		"has what was saved of %d guests, and %v", len(files), err)
}

// unsettled is why nothing is begun while guests of an earlier operation are kept.
func (j *Job) unsettled(m manifest) *maint.Problem {
	_, names := j.Tree.Kept(j.Dir)
	return maint.Problemf(maint.CodeKeptGuest, "folder "+j.Dir, "belayd -restore; to give one up, remove its UUID.save there, then: belayd -restore",
		"has guests that operation %s has saved and that were not restored: %s", m.Op, strings.Join(names, ", "))
}

// keeping is a manifest that several guests are put into at once.
type keeping struct {
	j        *Job
	mu       sync.Mutex
	m        manifest
	promised uint64 // room, bytes, to guests that are copied although they were to stay in place
}

// instead is an error if there is no room to copy a guest that was to stay in place: what the guests
// take that are not saved yet is theirs, also what those in place have not written to. done gives back
// what it has promised.
func (k *keeping) instead(g member) (done func(), err error) {
	j := k.j
	if err := j.forget(g.UUID); err != nil { // or its memory is there twice
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	need := Needs(g.Bytes)
	others := k.promised + grows(j.Tree.memory(j.Dir, "*/*")...)
	for _, p := range k.m.Planned {
		saved := slices.ContainsFunc(k.m.Guests, func(e entry) bool { return e.UUID == p.UUID })
		switch {
		case saved || p.UUID == g.UUID:
		case p.InPlace:
			others += stateRoom
		default:
			others += Needs(p.Bytes)
		}
	}
	free, err := room(j.dir())
	if err != nil {
		return nil, err
	}
	if free < need+others {
		return nil, fmt.Errorf("it needs %d MiB in %s, and others %d MiB, and %d MiB are free", need>>20, j.Dir, others>>20, free>>20)
	}
	k.promised += need
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.promised -= need
	}, nil
}

func (k *keeping) has(uuid string) *entry {
	k.mu.Lock()
	defer k.mu.Unlock()
	if i := slices.IndexFunc(k.m.Guests, func(e entry) bool { return e.UUID == uuid }); i >= 0 {
		return &k.m.Guests[i]
	}
	return nil
}

// put names a guest whose file is complete, and was written since begun.
func (k *keeping) put(ctx context.Context, g member, begun time.Time, written map[string]time.Time) (*entry, error) {
	e := entry{member: g, File: g.UUID + saveExt, Begun: begun.Round(0), Memory: bySave, Written: written}
	if l, err := readLeaving(e.file(k.j.dir())); g.InPlace {
		if err != nil {
			return nil, err
		}
		e.Memory, e.Begun = inPlace, l.Begun
		for _, f := range l.Memory {
			e.InPlace += uint64(f.Size)
		}
	}
	name := e.file(k.j.dir())
	_, ran, err := saved(name)
	if err != nil {
		return nil, err
	}
	e.Paused = !ran // as it was in the end: its owner may have paused or resumed it since the plan
	if err := linux.Sync(name); err != nil {
		return nil, err
	}
	if e.Sum, e.Size, err = sum(ctx, name); err != nil {
		return nil, err
	}
	e.Took = time.Since(begun)
	if err := k.change(func(m *manifest) { m.Guests = append(slices.Clip(m.Guests), e) }); err != nil {
		return nil, err
	}
	return &e, nil
}

// left notes that a guest's owner had ended it before it was saved.
func (k *keeping) left(g member) error {
	return k.change(func(m *manifest) {
		if !slices.Contains(m.Left, g.UUID) {
			m.Left = append(slices.Clip(m.Left), g.UUID)
		}
	})
}

// change writes the manifest anew.
func (k *keeping) change(how func(*manifest)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.m
	how(&m)
	if err := writeManifest(k.j.dir(), m); err != nil {
		return err
	}
	k.m = m
	return nil
}

// adopt names a guest that was saved by a belayd that died before it could. A file that is
// older than what the guest has written is not its memory any more. Of one whose restore was begun, by its
// mark, that is judged already.
func (k *keeping) adopt(ctx context.Context, g member, m mark) (*entry, error) {
	name := k.j.file(g.UUID, saveExt)
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if g.InPlace, err = stayed(name); err != nil {
		return nil, err
	}
	if g.InPlace {
		if err := k.j.gone(ctx, g, m.begun()); err != nil {
			return nil, err
		}
	}
	written := k.j.Tree.written(g.Disks)
	for f, at := range written {
		if m.Stage != stageReleased && at.After(info.ModTime()) {
			return nil, k.j.stale(g, f)
		}
	}
	return k.put(ctx, g, born(info, name), written)
}

// born is when a file was made: libvirt makes that of a save when the guest stands still. By
// its last change the guest would have lost less time than it has, and its clock, too far off
// for that, would be left alone.
func born(info fs.FileInfo, name string) time.Time {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, name, 0, unix.STATX_BTIME, &st); err != nil || st.Mask&unix.STATX_BTIME == 0 {
		return info.ModTime()
	}
	return time.Unix(st.Btime.Sec, int64(st.Btime.Nsec))
}

// stale is that a guest has run since it was saved.
func (j *Job) stale(g member, disk string) *maint.Problem {
	file := filepath.Join(j.Dir, g.UUID+saveExt)
	unless := "; if nobody has, virsh restore " + file
	if g.InPlace {
		unless = ""
	}
	return maint.Problemf(maint.CodeStarted, "guest "+g.Name, "see who has started it; if that is so, remove "+file+", then: belayd -restore"+unless,
		"has run since it was saved: its disk %s was written to. What is saved of it does not belong to its disks, and is not restored", disk)
}

// save saves one guest. One that its owner has ended is left so.
func (k *keeping) save(ctx context.Context, g member) error {
	if k.has(g.UUID) != nil {
		return nil // and if somebody has restored it, Boot will see that
	}
	j := k.j
	file := filepath.Join(j.dir(), g.UUID+saveExt)
	// What a rescue meanwhile has seen of it is over.
	if err := remove(markFile(j.dir(), g.UUID)); err != nil {
		return err
	}
	now, active, err := j.takeUp(ctx, g) // of a belayd that died in it
	if err != nil {
		return err
	}
	if !active {
		complete, _, err := saved(file)
		if complete && j.destroyed(now) {
			if err = errors.Join(j.outdate(g.UUID), j.forget(g.UUID)); err == nil {
				err = k.left(g)
			}
		} else if complete {
			_, err = k.adopt(ctx, g, mark{})
		} else if _, none := os.Lstat(file); err == nil && errors.Is(none, fs.ErrNotExist) {
			err = k.left(g)
		}
		return err // where there is a part, its QEMU has ended in the middle: see bring
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	// Its owner may have turned it on since the plan: libvirt would boot it beside its memory.
	if g.Autostart = g.Autostart || now.Autostart; g.Autostart {
		if err := j.Host.SetAutostart(ctx, g.UUID, false); err != nil {
			return fmt.Errorf("cannot turn off its autostart: %w", err)
		}
	}
	if g.InPlace {
		s, why := j.seat(ctx, now, string(j.Op))
		if why == "" {
			err := k.leave(ctx, g, s)
			if !errors.Is(err, vmm.ErrPaused) {
				return err
			}
			why = err.Error()
		}
		done, err := k.instead(g)
		if err != nil {
			return fmt.Errorf("its memory cannot stay in place any more: %s; and it cannot be copied: %w", why, err)
		}
		defer done()
		j.Log.Warn("its memory is copied, as it cannot stay in place any more", "guest", g.Name, "why", why)
		g.InPlace = false
	}
	if err := j.Mover.TakesMemory(ctx, now); err != nil {
		return err
	}
	if err := remove(file); err != nil {
		return err
	}
	begun := time.Now()
	failed := j.Host.Save(context.WithoutCancel(ctx), g.UUID, filepath.Join(j.Dir, g.UUID+saveExt))
	g.Disks = disks(now)
	if _, active, err = j.unsaving(ctx, g); active || err != nil {
		return cmp.Or(failed, err, errors.New("it has not left its QEMU"))
	}
	written := j.Tree.written(g.Disks)
	if complete, _, err := saved(file); !complete {
		return cmp.Or(err, failed) // its QEMU has ended in the middle: the host does not go down on that
	}
	_, err = k.put(ctx, g, begun, written)
	return err
}

// catchingUp is a guest of a libvirt that was started anew and has not seen its QEMU yet.
const catchingUp = "catching up"

// unsettledJobs are those after which a guest may have its QEMU no more, or again.
var unsettledJobs = []string{"save", "restore", "start", catchingUp}

// unsaving waits for the end of a job of the guest's, such as a save, and of a QEMU that it is leaving,
// and reports whether it has one then.
func (j *Job) unsaving(ctx context.Context, g member) (now maint.Guest, active bool, err error) {
	for begun := time.Now(); ; {
		now, err := j.Host.Guest(ctx, g.UUID)
		if errors.Is(err, maint.ErrNoGuest) {
			now, err = maint.Guest{}, nil
		}
		ending := false
		if err == nil {
			ending, err = j.ending(g.UUID, now)
		}
		if err != nil {
			return now, false, err
		}
		active := now.State.Active()
		saving := active && now.Reason == "saving"
		if !saving && !ending && !slices.Contains(unsettledJobs, now.Job) {
			return now, active, nil
		}
		if late := time.Since(begun) > j.Pace.Healed; late && ending {
			return now, true, j.stays(g, fmt.Errorf("libvirt says that it is %s", now.State))
		} else if late && now.Job == catchingUp {
			return now, true, fmt.Errorf("libvirt does not know yet how guest %s is", g.Name)
		}
		if !wait(ctx, j.Pace.Poll) {
			return now, true, context.Cause(ctx)
		}
	}
}
