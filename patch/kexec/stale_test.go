package kexec_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/kexec"
	"belay/patch/kexec/kexectest"
)

const disk = "/var/lib/libvirt/images/web-1.qcow2"

// withDisk gives the guest a disk, which is a file.
func (b *bed) withDisk() *bed {
	b.t.Helper()
	b.h.PutGuest("web-1", func(g *maint.Guest) {
		g.UUID, g.MemoryBytes, g.Autostart = b.uuid, 1<<20, true
		g.Disks = []maint.Disk{{Target: "vda", Kind: "disk", Type: "file", Source: disk}}
	})
	b.m.Write(disk, "as it was")
	return b
}

// writes has the guest write to its disk, as one does that was started.
func (b *bed) writes() {
	b.t.Helper()
	b.m.Write(disk, "written since")
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(filepath.Join(b.m.Root, disk), later, later); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) has(ext string) bool {
	_, err := os.Lstat(filepath.Join(b.m.Dir(), b.uuid+ext))
	return err == nil
}

func (b *bed) autostart() bool {
	b.t.Helper()
	g, err := b.h.Guest(b.t.Context(), b.uuid)
	if err != nil {
		b.t.Fatal(err)
	}
	return g.Autostart
}

// mustRescue is a rescue in which every guest can be looked at.
func (b *bed) mustRescue() maint.KexecGuest {
	b.t.Helper()
	guests, err := b.rescue()
	if err != nil || len(guests) != 1 {
		b.t.Fatalf("%+v, %v", guests, err)
	}
	return guests[0]
}

// kept checks that the guest is neither restored nor given up, and that its file is there.
func (b *bed) kept(g maint.KexecGuest, code maint.Code, state maint.GuestState) {
	b.t.Helper()
	if g.Fate != maint.KexecKept || g.Problem == nil || g.Problem.Code != code || g.Problem.Remedy == "" || b.state() != state || !b.has(".save") {
		b.t.Errorf("%+v, %v; it is %s, and its file is there: %v", g, g.Problem, b.state(), b.has(".save"))
	}
}

// A guest that somebody has started and ended meanwhile is not put on disks that it has
// written to since, whenever that was.
func TestDiskWrittenSince(t *testing.T) {
	t.Parallel()
	for name, at := range map[string]func(b *bed){
		"after the save": func(b *bed) { b.save(); b.writes() },
		"after a save that nobody has written down": func(b *bed) {
			b.do(kexec.PhasePreflight, b.Preflight)
			b.do(kexec.PhaseLoad, b.Load)
			b.m.FailSave = b.uuid // Save has made the manifest, and died
			if err := b.Save(b.t.Context(), b.s); err == nil {
				b.t.Fatal("it is saved")
			}
			b.m.FailSave = ""
			if err := b.m.Save(b.t.Context(), b.uuid, kexec.DefaultDir+"/"+b.uuid+".save"); err != nil {
				b.t.Fatal(err)
			}
			b.writes()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t).withDisk()
			at(b)
			for range 2 {
				b.kept(b.mustRescue(), maint.CodeStarted, maint.GuestShutoff)
			}
		})
	}
	t.Run("by others", func(t *testing.T) {
		t.Parallel()
		b := newBed(t)
		b.h.PutGuest("web-1", func(g *maint.Guest) {
			g.UUID, g.MemoryBytes = b.uuid, 1<<20
			g.Disks = []maint.Disk{{Target: "vda", Kind: "disk", Type: "file", Source: disk, Shared: true}}
		})
		b.m.Write(disk, "of a cluster")
		b.save()
		b.writes()
		if g := b.mustRescue(); g.Fate != maint.KexecRestored || b.state() != maint.GuestRunning {
			t.Errorf("%+v; it is %s", g, b.state())
		}
	})
	t.Run("not at all", func(t *testing.T) {
		t.Parallel()
		b := newBed(t).withDisk()
		b.save()
		earlier := time.Now().Add(-time.Hour) // of a file system that was not unmounted
		if err := os.Chtimes(filepath.Join(b.m.Root, disk), earlier, earlier); err != nil {
			t.Fatal(err)
		}
		if g := b.mustRescue(); g.Fate != maint.KexecRestored || b.state() != maint.GuestRunning {
			t.Errorf("%+v; it is %s", g, b.state())
		}
	})
}

// Storage may come late in a boot: a disk is looked at when it is there, and until then the
// guest is not put on it.
func TestDiskComesLate(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		written time.Duration // after the save
		want    maint.KexecFate
	}{
		"as it was":     {-time.Hour, maint.KexecRestored},
		"written since": {time.Hour, maint.KexecKept},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t).withDisk()
			b.save()
			file := filepath.Join(b.m.Root, disk)
			if err := os.Rename(file, file+".away"); err != nil {
				t.Fatal(err)
			}
			b.kept(b.mustRescue(), maint.CodeKeptGuest, maint.GuestShutoff)
			b.Pace.Healed = time.Minute
			at := time.Now().Add(c.written)
			if err := os.Chtimes(file+".away", at, at); err != nil {
				t.Fatal(err)
			}
			back := make(chan error, 1)
			go func() { back <- os.Rename(file+".away", file) }()
			g := b.mustRescue()
			if err := <-back; err != nil || g.Fate != c.want || (b.state() == maint.GuestRunning) != (c.want == maint.KexecRestored) {
				t.Errorf("%+v, %v, %v; it is %s", g, g.Problem, err, b.state())
			}
		})
	}
}

// A guest that could not be restored, and that its owner then boots afresh, is not taken for one
// that was restored.
func TestStartedAfterFailedRestore(t *testing.T) {
	t.Parallel()
	b := newBed(t).withDisk()
	b.save()
	b.m.FailRestore = 1 << 30
	b.kept(b.mustRescue(), maint.CodeKeptGuest, maint.GuestShutoff)
	if err := b.h.Launch(t.Context(), b.uuid); err != nil {
		t.Fatal(err)
	}
	b.kept(b.mustRescue(), maint.CodeStarted, maint.GuestRunning)
}

// A guest that was seen to run afresh is not taken back later, when it happens to be off, by
// a rescue that systemd starts. Its file is for the operator to remove, which ends it.
func TestStartedMeanwhile(t *testing.T) {
	t.Parallel()
	b := newBed(t).withDisk()
	b.save()
	if err := b.h.Launch(t.Context(), b.uuid); err != nil {
		t.Fatal(err)
	}
	b.kept(b.mustRescue(), maint.CodeStarted, maint.GuestRunning)
	b.h.KillQEMU(t, b.uuid)
	b.kept(b.mustRescue(), maint.CodeStarted, maint.GuestShutoff)
	b.h.Reboot()
	b.m.Boots(kexectest.Next)
	b.kept(b.mustRescue(), maint.CodeStarted, maint.GuestShutoff)
	if err := os.Remove(filepath.Join(b.m.Dir(), b.uuid+".save")); err != nil {
		t.Fatal(err)
	}
	if g := b.mustRescue(); g.Fate != maint.KexecLeft || !b.autostart() {
		t.Errorf("%+v; autostart: %v", g, b.autostart())
	}
}

// Whether a guest ran is what the file of its memory says: its owner may have paused or
// resumed it after the plan was made.
func TestPausedSincePlan(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		before, after func(b *bed)
		want          maint.GuestState
	}{
		"resumed": {func(b *bed) { b.h.Pause(b.t, b.uuid) }, func(b *bed) {
			if err := b.h.Resume(b.t.Context(), b.uuid); err != nil {
				b.t.Fatal(err)
			}
		}, maint.GuestRunning},
		"paused": {func(*bed) {}, func(b *bed) { b.h.Pause(b.t, b.uuid) }, maint.GuestPaused},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			c.before(b)
			b.do(kexec.PhasePreflight, b.Preflight)
			b.do(kexec.PhaseLoad, b.Load)
			c.after(b)
			b.do(kexec.PhaseSave, b.Save)
			b.h.Reboot()
			b.m.Boots(kexectest.Next)
			if g := b.mustRescue(); g.Fate != maint.KexecRestored || b.state() != c.want {
				t.Errorf("%+v; it is %s, want %s", g, b.state(), c.want)
			}
		})
	}
}

// failsToSave goes on to a save that libvirt takes back.
func (b *bed) failsToSave() {
	b.t.Helper()
	b.do(kexec.PhasePreflight, b.Preflight)
	b.do(kexec.PhaseLoad, b.Load)
	b.m.FailSave = b.uuid
	if err := b.Save(b.t.Context(), b.s); err == nil {
		b.t.Fatal("it is saved")
	}
}

// A save that libvirt took back at the last moment leaves a whole file of a guest that runs
// on: it is never taken for the guest, also when that is off.
func TestSaveTakenBack(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.failsToSave()
	b.m.Write(kexec.DefaultDir+"/"+b.uuid+".save", kexectest.Saved(b.uuid, true))
	if g := b.mustRescue(); g.Fate != maint.KexecRan || b.has(".save") {
		t.Errorf("%+v", g)
	}
	b.h.KillQEMU(t, b.uuid)
	if g := b.mustRescue(); g.Fate != maint.KexecRan || b.state() != maint.GuestShutoff {
		t.Errorf("%+v; it is %s", g, b.state())
	}
	// belayd, which was not dead, saves it after all.
	if err := b.h.Launch(t.Context(), b.uuid); err != nil {
		t.Fatal(err)
	}
	b.m.FailSave = ""
	b.do(kexec.PhaseSave, b.Save)
	b.h.Reboot()
	b.m.Boots(kexectest.Next)
	b.do(kexec.PhaseBoot, b.Boot)
	b.do(kexec.PhaseRestore, b.Restore)
	if b.state() != maint.GuestRunning {
		t.Errorf("it is %s", b.state())
	}
}

// What cannot be seen is not gone, also in the boot in which it was saved.
func TestUnmountedInTheSameBoot(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.do(kexec.PhasePreflight, b.Preflight)
	b.do(kexec.PhaseLoad, b.Load)
	b.do(kexec.PhaseSave, b.Save)
	b.m.Mount(false)
	var r maint.KexecResult
	b.Record = func(got maint.KexecResult) error { r = got; return nil }
	if _, err := b.Back(t.Context(), b.s); err == nil || len(r.Guests) != 1 || r.Guests[0].Fate != maint.KexecKept {
		t.Errorf("%+v, %v", r, err)
	}
}

// A manifest or a mark that is damaged has nothing be forgotten, nor removed.
func TestDamagedNotes(t *testing.T) {
	t.Parallel()
	t.Run("mark", func(t *testing.T) {
		t.Parallel()
		b := newBed(t)
		b.save()
		b.mustRescue()
		b.m.Write(kexec.DefaultDir+"/"+b.uuid+".save", kexectest.Saved(b.uuid, true)) // as if it could not be removed
		b.h.KillQEMU(t, b.uuid)
		mark := filepath.Join(b.m.Dir(), b.uuid+".mark")
		text, err := os.ReadFile(mark)
		if err != nil {
			t.Fatal(err)
		}
		b.m.Write(kexec.DefaultDir+"/"+b.uuid+".mark", strings.Replace(string(text), `"done"`, `"dome"`, 1))
		b.kept(b.mustRescue(), maint.CodeKeptGuest, maint.GuestShutoff)
	})
	t.Run("manifest", func(t *testing.T) {
		t.Parallel()
		b := newBed(t)
		b.save()
		b.m.Write(kexec.DefaultDir+"/manifest.json", "{}")
		var r maint.KexecResult
		b.Record = func(got maint.KexecResult) error { r = got; return nil }
		if _, err := b.Back(t.Context(), b.s); err == nil || len(r.Guests) != 1 {
			t.Fatalf("%+v, %v", r, err)
		}
		b.kept(r.Guests[0], maint.CodeKeptGuest, maint.GuestShutoff)
		// The next operation does not take the place of what nobody has looked at.
		b.Op = "kexec-2"
		var p *maint.Problem
		b.m.Boots(kexectest.Old)
		if err := b.Preflight(t.Context(), b.s); err == nil || !strings.Contains(err.Error(), "saved of 1 guests") {
			t.Errorf("%v", err)
		}
		b.s.step = kexec.PhasePreflight
		if err := b.s.Save(map[string]any{"boot": "boot-3"}); err != nil {
			t.Fatal(err)
		}
		if err := b.Save(t.Context(), b.s); !errors.As(err, &p) || p.Code != maint.CodeKeptGuest || !b.has(".save") {
			t.Errorf("%v", err)
		}
	})
}

// What was lost is put aside, so that no later operation, killed while it clears up, leaves
// it where a rescue would find it.
func TestLostIsPutAside(t *testing.T) {
	t.Parallel()
	b := newBed(t).withDisk()
	b.save()
	b.m.Spoil(b.uuid)
	if g := b.mustRescue(); g.Fate != maint.KexecLost || b.has(".save") || !b.has(".lost") {
		t.Errorf("%+v", g)
	}
	if err := os.Remove(filepath.Join(b.m.Dir(), b.uuid+".mark")); err != nil { // the last that is cleared up
		t.Fatal(err)
	}
	if g := b.mustRescue(); g.Fate != maint.KexecLost || b.state() != maint.GuestShutoff {
		t.Errorf("%+v; it is %s", g, b.state())
	}
}

// A kernel that somebody has unloaded: the host would go down by its firmware.
func TestUnloadedByOthers(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.m.OnKexec = func(string) { t.Error("the host goes down") }
	b.do(kexec.PhasePreflight, b.Preflight)
	b.do(kexec.PhaseLoad, b.Load)
	b.do(kexec.PhaseSave, b.Save)
	b.m.Write("/sys/kernel/kexec_loaded", "0\n")
	var p *maint.Problem
	if err := b.Boot(t.Context(), b.s); !errors.As(err, &p) || p.Code != maint.CodeKexec || b.m.IsGoing() {
		t.Errorf("%v", err)
	}
	if _, err := b.Back(t.Context(), b.s); err != nil || b.state() != maint.GuestRunning {
		t.Errorf("%v; it is %s", err, b.state())
	}
}

// What a guest needs of the host may come later in a boot than libvirt.
func TestNetworkComesLate(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.Pace.Healed = time.Minute
	b.save()
	b.m.FailRestore = 3
	if g := b.mustRescue(); g.Fate != maint.KexecRestored || b.state() != maint.GuestRunning {
		t.Errorf("%+v; it is %s", g, b.state())
	}
}

// What is over is left alone: a rescue, weeks later, does not undo what the owner has done since.
func TestSettledOnce(t *testing.T) {
	t.Parallel()
	b := newBed(t).withDisk()
	b.save()
	if g := b.mustRescue(); g.Fate != maint.KexecRestored || !b.autostart() {
		t.Fatalf("%+v; autostart: %v", g, b.autostart())
	}
	if err := b.h.SetAutostart(t.Context(), b.uuid, false); err != nil {
		t.Fatal(err)
	}
	if g := b.mustRescue(); g.Fate != maint.KexecRestored || b.autostart() {
		t.Errorf("%+v; autostart: %v", g, b.autostart())
	}
}

// A libvirt that was started anew and has not seen a guest's QEMU yet says nothing of it: what
// is saved may be all that there is.
func TestLibvirtCatchesUp(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.failsToSave()
	b.m.Write(kexec.DefaultDir+"/"+b.uuid+".save", kexectest.Saved(b.uuid, true))
	b.h.Lag(t, b.uuid, true)
	if guests, err := b.rescue(); err == nil || !b.has(".save") {
		t.Errorf("%+v", guests)
	}
	b.h.Lag(t, b.uuid, false)
	if g := b.mustRescue(); g.Fate != maint.KexecRan || b.has(".save") {
		t.Errorf("%+v", g)
	}
}

// A guest whose file the operator has removed is given up, as it is told, and in nobody's way.
func TestGivenUp(t *testing.T) {
	t.Parallel()
	b := newBed(t).withDisk()
	b.save()
	if err := os.Remove(filepath.Join(b.m.Dir(), b.uuid+".save")); err != nil {
		t.Fatal(err)
	}
	if g := b.mustRescue(); g.Fate != maint.KexecLost || !b.autostart() {
		t.Errorf("%+v; autostart: %v", g, b.autostart())
	}
	if _, left := b.m.Tree().Kept(kexec.DefaultDir); len(left) > 0 {
		t.Errorf("%v", left)
	}
	b.m.Boots(kexectest.Old)
	b.Op = "kexec-2"
	if v, err := b.Plan(t.Context()); err != nil || len(v.Problems) > 0 {
		t.Errorf("%+v, %v", v.Problems, err)
	}
}

// A guest whose autostart its owner has turned on after the plan was made is not booted with the
// host, and has its autostart afterwards.
func TestAutostartSincePlan(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.do(kexec.PhasePreflight, b.Preflight)
	b.do(kexec.PhaseLoad, b.Load)
	if err := b.h.SetAutostart(t.Context(), b.uuid, true); err != nil {
		t.Fatal(err)
	}
	b.do(kexec.PhaseSave, b.Save)
	if b.autostart() {
		t.Error("it would be booted beside its memory")
	}
	b.h.Reboot()
	b.m.Boots(kexectest.Next)
	if g := b.mustRescue(); g.Fate != maint.KexecRestored || !b.autostart() {
		t.Errorf("%+v; autostart: %v", g, b.autostart())
	}
}

// A file that cannot be read is not one that is not there: nothing is called gone for it.
func TestUnreadable(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.failsToSave()
	b.h.KillQEMU(t, b.uuid)
	image := filepath.Join(b.m.Dir(), b.uuid+".save")
	if err := errors.Join(os.Remove(image), os.Mkdir(image, 0o700)); err != nil { // reads with an error
		t.Fatal(err)
	}
	b.m.FailSave = ""
	if err := b.Save(t.Context(), b.s); err == nil {
		t.Error("it is passed over")
	}
	if guests, err := b.rescue(); err == nil {
		t.Errorf("%+v", guests)
	}
}

// dying is a host on which the QEMU of a guest ends in the middle of its save.
type dying struct {
	*kexectest.Machine
	t *testing.T
}

func (d dying) Save(_ context.Context, uuid, path string) error {
	d.Write(path, "LibvirtQemudPart")
	d.KillQEMU(d.t, uuid)
	return errors.New("operation failed: domain is no longer running")
}

// A guest that ends while it is saved ends the operation: in the new kernel nobody could say
// whether it was lost.
func TestEndsWhileItIsSaved(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.do(kexec.PhasePreflight, b.Preflight)
	b.do(kexec.PhaseLoad, b.Load)
	b.Host = dying{b.m, t}
	if err := b.Save(t.Context(), b.s); err == nil || !strings.Contains(err.Error(), "no longer running") {
		t.Errorf("%v", err)
	}
	var r maint.KexecResult
	b.Record = func(got maint.KexecResult) error { r = got; return nil }
	if _, err := b.Back(t.Context(), b.s); err != nil || len(r.Guests) != 1 || r.Guests[0].Fate != maint.KexecLeft {
		t.Errorf("%+v, %v", r, err)
	}
}
