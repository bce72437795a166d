package kexec_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"belay/agent/maint"
	"belay/patch/kexec"
	"belay/patch/kexec/kexectest"
)

// What a guest is to be restored from, and cannot be read now, as by a process that has too many
// files open, is not given up.
func TestUnreadableForNow(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		bed  func(*testing.T) *bed
		file string
	}{
		"copied": {newBed, ".save"},
		"state":  {newInPlaceBed, ".save"},
		"memory": {newInPlaceBed, ".memory/pc.ram"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := c.bed(t)
			b.save()
			file := filepath.Join(b.m.Dir(), b.uuid+c.file)
			aside := filepath.Join(b.m.Root, "aside")
			if err := errors.Join(os.Rename(file, aside), os.Mkdir(file, 0o700)); err != nil { // reads with an error
				t.Fatal(err)
			}
			if guests, err := b.rescue(); err == nil {
				t.Errorf("%+v, %v", guests, guests[0].Problem)
			}
			if err := errors.Join(os.Remove(file), os.Rename(aside, file)); err != nil {
				t.Fatal(err)
			}
			if g := b.mustRescue(); g.Fate != maint.KexecRestored || b.state() != maint.GuestRunning {
				t.Errorf("%+v, %v; it is %s", g, g.Problem, b.state())
			}
		})
	}
}

// hasty is a host on which a guest's owner starts it while it is to be restored, when libvirt has asked
// the hook for the restore already.
type hasty struct {
	*kexectest.Machine
	t *testing.T
}

func (h hasty) Restore(ctx context.Context, path string, _ bool) error {
	if err := h.Launch(ctx, strings.TrimSuffix(filepath.Base(path), ".save")); err != nil {
		h.t.Error(err)
	}
	return errors.New("operation failed: domain is already active")
}

// refusing is a host whose libvirt asks the hook for a restore, and then has none.
type refusing struct{ *kexectest.Machine }

func (r refusing) Restore(_ context.Context, path string, _ bool) error {
	r.Write(strings.TrimSuffix(path, ".save")+".restoring", "")
	return errors.New("operation failed: cannot restore domain")
}

// What the hook notes of a restore that did not come to anything allows nobody to start the guest.
func TestRestoreRefused(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.save()
	j := &kexec.Job{Host: refusing{b.m}, Mover: b.m.Mover(), Log: b.Log, Inside: inside{}, Tree: b.m.Tree(), Dir: kexec.DefaultDir, Life: t.Context(), Pace: b.Pace}
	guests, err := j.Rescue(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.kept(guests[0], maint.CodeKeptGuest, maint.GuestShutoff)
	if b.has(".restoring") {
		t.Error("the hook would let it be started afresh")
	}
}

// A guest that is booted afresh under Belay's hands is not taken for the one that was saved, whose memory
// stays.
func TestStartedWithinRestore(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.save()
	j := &kexec.Job{Host: hasty{b.m, t}, Mover: b.m.Mover(), Log: b.Log, Inside: inside{}, Tree: b.m.Tree(), Dir: kexec.DefaultDir, Life: t.Context(), Pace: b.Pace}
	guests, err := j.Rescue(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.kept(guests[0], maint.CodeStarted, maint.GuestRunning)
}

// A guest that was saved, by a belayd that died before it could put that into the manifest, is in the way
// of another operation: that would empty the folder.
func TestSavedButNotNamed(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.failsToSave()
	b.m.FailSave = ""
	if err := b.m.Save(t.Context(), b.uuid, kexec.DefaultDir+"/"+b.uuid+".save"); err != nil {
		t.Fatal(err)
	}
	b.h.Reboot()
	b.m.Boots(kexectest.Next)
	b.kept(b.mustRescue(), maint.CodeKeptGuest, maint.GuestShutoff)
	if op, guests := b.m.Tree().Kept(kexec.DefaultDir); op != b.Op || !slices.Equal(guests, []string{"web-1"}) {
		t.Errorf("%s has kept %q", op, guests)
	}
	next := *b.Job
	next.Op = "kexec-2"
	b.h.PutGuest("web-2")
	if p, err := next.Plan(t.Context()); err != nil || !slices.ContainsFunc(p.Problems, func(p maint.Problem) bool { return p.Code == maint.CodeKeptGuest }) {
		t.Errorf("%+v, %v", p.Problems, err)
	}
	if err := next.Save(t.Context(), b.s); err == nil || !b.has(".save") {
		t.Errorf("%v; what was saved is there: %v", err, b.has(".save"))
	}
	// Given up, it is in no one's way.
	if err := os.Remove(filepath.Join(b.m.Dir(), b.uuid+".save")); err != nil {
		t.Fatal(err)
	}
	if _, guests := b.m.Tree().Kept(kexec.DefaultDir); len(guests) > 0 {
		t.Errorf("%q are kept", guests)
	}
}

// A guest that its owner ends before it is saved is not lost with the host, nor booted for that.
func TestEndedBeforeItIsSaved(t *testing.T) {
	t.Parallel()
	for _, autostart := range []bool{false, true} { // libvirt boots it with the host
		t.Run(fmt.Sprint(autostart), func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			b.ColdStart = true
			if err := b.h.SetAutostart(t.Context(), b.uuid, autostart); err != nil {
				t.Fatal(err)
			}
			b.do(kexec.PhasePreflight, b.Preflight)
			b.do(kexec.PhaseLoad, b.Load)
			b.h.KillQEMU(t, b.uuid)
			for range 2 { // once more, by the next belayd
				if err := b.Save(t.Context(), b.s); err != nil {
					t.Fatal(err)
				}
			}
			b.h.Reboot()
			b.m.Boots(kexectest.Next)
			if g := b.mustRescue(); g.Fate != maint.KexecLeft || g.Problem != nil || g.Started {
				t.Errorf("%+v", g)
			}
			if now, err := b.h.Guest(t.Context(), b.uuid); err != nil || now.State.Active() != autostart || b.autostart() != autostart {
				t.Errorf("%+v (%v)", now, err)
			}
		})
	}
}
