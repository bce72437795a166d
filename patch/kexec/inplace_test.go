package kexec_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"belay/agent/maint"
	"belay/patch/kexec"
	"belay/patch/kexec/kexectest"
	"belay/patch/vmm/vmmtest"
)

// newInPlaceBed is a bed whose guest has its memory in the reserved memory.
func newInPlaceBed(t *testing.T) *bed {
	t.Helper()
	b := newBed(t)
	b.h.KillQEMU(t, b.uuid)
	b.uuid = b.m.PutGuest(t, "ram-1", func(g *maint.Guest) { g.MemoryBytes = 1 << 20 })
	return b
}

// whole checks that the guest runs, has gone on from where it was, with nothing left of the change.
func (b *bed) whole() {
	b.t.Helper()
	if b.state() != maint.GuestRunning || b.m.IgnoresShared(b.uuid) {
		b.t.Errorf("it is %s; a migration would leave its memory behind: %v", b.state(), b.m.IgnoresShared(b.uuid))
	}
	if err := b.m.Suspend(b.t.Context(), b.uuid); err != nil { // it has run until now
		b.t.Error(err)
	}
	if err := b.m.Resume(b.t.Context(), b.uuid); err != nil {
		b.t.Error(err)
	}
	if d := b.m.Damage(); len(d) > 0 {
		b.t.Error(d)
	}
	for _, ext := range []string{".save", ".paused", ".quit", ".memory"} {
		if b.has(ext) {
			b.t.Errorf("its %s is left", ext)
		}
	}
}

func (b *bed) begin() {
	b.t.Helper()
	b.do(kexec.PhasePreflight, b.Preflight)
	b.do(kexec.PhaseLoad, b.Load)
}

// The file of its memory is the same one before and after, and is not copied.
func TestInPlace(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	before, err := os.Stat(b.m.Memory()[0])
	if err != nil {
		t.Fatal(err)
	}
	b.save()
	kept, err := os.Stat(filepath.Join(b.m.Dir(), b.uuid+".memory/pc.ram"))
	if err != nil || !os.SameFile(before, kept) {
		t.Fatalf("%v, %v", kept, err)
	}
	if err := b.m.Boot(t.Context(), t, b.uuid); err == nil || !strings.Contains(err.Error(), "belayd -restore") {
		t.Errorf("somebody else can start it: %v", err)
	}
	for range 3 {
		g := b.mustRescue()
		if g.Fate != maint.KexecRestored || g.Memory != maint.KexecInPlace || g.Problem != nil || g.Pause <= 0 {
			t.Fatalf("%+v, %v", g, g.Problem)
		}
		b.whole()
	}
	after, err := os.Stat(b.m.Memory()[0])
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("%v, %v", after, err)
	}
	// Once more, and back under the same kernel.
	b.Op = "kexec-2"
	b.m.Write("/proc/sys/kernel/osrelease", kexectest.Old+"\n")
	b.begin()
	b.do(kexec.PhaseSave, b.Save)
	if problems, err := b.Back(t.Context(), b.s); err != nil || len(problems) > 0 {
		t.Fatalf("%v, %v", problems, err)
	}
	b.whole()
}

// Memory that is damaged is told, and not used.
func TestMemoryDamaged(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(b *bed){
		"memory": func(b *bed) { b.m.SpoilMemory(b.uuid) },
		"state":  func(b *bed) { b.m.Spoil(b.uuid) },
		"gone":   func(b *bed) { b.m.Remove(kexec.DefaultDir + "/" + b.uuid + ".memory") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newInPlaceBed(t)
			b.save()
			spoil(b)
			if g := b.mustRescue(); g.Fate != maint.KexecLost || b.state() != maint.GuestShutoff || b.has(".memory") || b.has(".save") {
				t.Errorf("%+v, %v", g, g.Problem)
			}
		})
	}
}

// text is a file of the host's.
func (b *bed) text(path string) string {
	b.t.Helper()
	text, err := os.ReadFile(filepath.Join(b.m.Root, path))
	if err != nil {
		b.t.Fatal(err)
	}
	return string(text)
}

// What makes a guest be copied that could be in place, and why, is told.
func TestCopiedAndWhy(t *testing.T) {
	t.Parallel()
	const mounts = "22 1 254:1 / / rw - ext4 /dev/vda1 rw\n40 22 259:0 / " + kexec.DefaultDir + " rw - ext4 /dev/pmem0 rw,dax=always\n"
	const elsewhere = kexectest.Backing
	for name, c := range map[string]struct {
		spoil func(b *bed)
		why   string
	}{
		"nothing": {func(*bed) {}, ""},
		"other memory": {func(b *bed) {
			b.m.Write("/proc/self/mountinfo", mounts+"41 22 0:31 / "+elsewhere+" rw - tmpfs tmpfs rw\n")
		}, "not in reserved memory"},
		"the page cache": {func(b *bed) {
			b.m.Write("/proc/self/mountinfo", mounts+"41 22 259:0 / "+elsewhere+" rw - ext4 /dev/pmem0 rw\n")
		}, "page cache"},
		"until a boot": {func(b *bed) {
			b.m.Write("/etc/fstab", "/dev/pmem0 "+kexec.DefaultDir+" ext4 dax 0 0\n")
		}, "/etc/fstab"},
		"from libvirt's next start on": {func(b *bed) { b.m.Remove("/etc/libvirt/qemu.conf") }, "/var/lib/libvirt/qemu/ram is not in reserved memory"},
		"paused":                       {func(b *bed) { b.h.Pause(b.t, b.uuid) }, "is paused"},
		"plain memory":                 {func(b *bed) { b.h.Edit(b.t, b.uuid, func(g *maint.Guest) { g.MemorySource = "" }) }, "in no shared file"},
		"switched off":                 {func(b *bed) { b.InPlace = false }, "kexec.in_place"},
		"an older hook": {func(b *bed) {
			b.m.Write(vmmtest.HookFile, strings.ReplaceAll(b.text(vmmtest.HookFile), "BelayMemoryInPlace", "BelayMemoryOfLater"))
		}, "of another version"},
		"a hook for another folder": {func(b *bed) {
			b.m.Write(vmmtest.HookFile, strings.ReplaceAll(b.text(vmmtest.HookFile), "\nkept=", "\nkept=/srv"))
		}, "kexec.dir"},
		"memory of its owner's": {func(b *bed) { b.m.PlugMemory(b.uuid, "memnvdimm0", "/srv/pmem.img") }, "memnvdimm0 is a file of its owner's, /srv/pmem.img"},
		"an emulated TPM": {func(b *bed) {
			b.h.Edit(b.t, b.uuid, func(g *maint.Guest) { g.Devices = append(g.Devices, maint.Device{Kind: "tpm", Type: "emulator"}) })
		}, "TPM"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newInPlaceBed(t)
			c.spoil(b)
			v, err := b.Plan(t.Context())
			if err != nil || len(v.Guests) != 1 || len(v.Problems) > 0 {
				t.Fatalf("%+v, %v", v, err)
			}
			g := v.Guests[0]
			if (g.Memory == maint.KexecCopied) != (c.why != "") || !strings.Contains(g.Why, c.why) || (g.Why == "") != (c.why == "") {
				t.Errorf("%+v", g)
			}
			if c.why != "" {
				b.save()
				if g := b.mustRescue(); g.Fate != maint.KexecRestored || g.Memory != maint.KexecCopied {
					t.Errorf("%+v", g)
				}
			}
		})
	}
}

// A plan puts nothing to the QEMU of a guest whose memory cannot be in the reserved memory.
func TestPlanLeavesQEMUAlone(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(b *bed){
		"plain memory":                        func(b *bed) { b.h.Edit(b.t, b.uuid, func(g *maint.Guest) { g.MemorySource = "" }) },
		"a private file":                      func(b *bed) { b.h.Edit(b.t, b.uuid, func(g *maint.Guest) { g.MemoryShared = false }) },
		"memory that libvirt makes elsewhere": func(b *bed) { b.m.Remove("/etc/libvirt/qemu.conf") },
		"memory that libvirt has made elsewhere": func(b *bed) {
			b.h.KillQEMU(b.t, b.uuid)
			b.m.Backing = "/ram"
			b.uuid = b.m.PutGuest(b.t, "ram-2", func(g *maint.Guest) { g.MemoryBytes = 1 << 20 })
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newInPlaceBed(t)
			asked := 0
			b.m.Intercept(func(string) (any, bool) { asked++; return nil, false })
			if v, err := b.Plan(t.Context()); err != nil || v.Guests[0].Memory != maint.KexecInPlace || asked == 0 {
				t.Fatalf("%+v, %v; its QEMU was asked %d times", v, err, asked)
			}
			spoil(b)
			asked = 0
			if v, err := b.Plan(t.Context()); err != nil || v.Guests[0].Memory != maint.KexecCopied || asked > 0 {
				t.Errorf("%+v, %v; its QEMU was asked %d times", v, err, asked)
			}
		})
	}
}

// What libvirt is to be told for memory to be in place is told.
func TestNotInPlace(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	b.m.Remove("/etc/libvirt/qemu.conf")
	if p := b.m.Tree().NotInPlace(kexec.DefaultDir); p == nil || !strings.Contains(p.Reason, "/var/lib/libvirt/qemu/ram is not in reserved memory") || !strings.Contains(p.Remedy, "memory_backing_dir") {
		t.Errorf("%v", p)
	}
	b.m.Write("/etc/libvirt/qemu.conf", "#memory_backing_dir = \"/dev/shm\"\nmemory_backing_dir = \""+kexectest.Backing+"\"\n")
	if p := b.m.Tree().NotInPlace(kexec.DefaultDir); p != nil {
		t.Error(p)
	}
}

// A guest in place takes room for its state, and for what it has not written to yet.
func TestRoomInPlace(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	const size = 1 << 40
	if err := os.Truncate(b.m.Memory()[0], size); err != nil {
		t.Fatal(err)
	}
	v, err := b.Plan(t.Context())
	if err != nil || v.NeedBytes < size || len(v.Problems) != 1 || v.Problems[0].Code != maint.CodeNoRoom {
		t.Errorf("%+v, %v", v, err)
	}
	if err := os.Truncate(b.m.Memory()[0], 8); err != nil {
		t.Fatal(err)
	}
	if v, err = b.Plan(t.Context()); err != nil || v.NeedBytes > 64<<20 || len(v.Problems) > 0 {
		t.Errorf("%+v, %v", v, err)
	}
}

// A guest that does not leave its QEMU runs on in it, and is told as that.
func TestStaysInItsQEMU(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	b.begin()
	b.m.FailMigrate = true
	pid := b.m.PID(b.uuid)
	if err := b.Save(t.Context(), b.s); err == nil {
		t.Fatal("it is saved")
	}
	b.whole()
	if g := b.mustRescue(); g.Fate != maint.KexecRan || b.m.PID(b.uuid) != pid {
		t.Errorf("%+v", g)
	}
	b.m.FailMigrate = false
	b.do(kexec.PhaseSave, b.Save)
	b.h.Reboot()
	b.m.Boots(kexectest.Next)
	if g := b.mustRescue(); g.Fate != maint.KexecRestored {
		t.Errorf("%+v", g)
	}
	b.whole()
}

// A QEMU that does not start, or does not take the state, is followed by another one.
func TestEntersAtLast(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	b.save()
	b.Pace.Healed = 1 << 40
	b.m.FailStarts, b.m.FailLoads = 1, 2
	if g := b.mustRescue(); g.Fate != maint.KexecRestored {
		t.Errorf("%+v, %v", g, g.Problem)
	}
	b.whole()
}

// mortal is a guest's host, whose Belay dies at one of its calls.
type mortal struct {
	*kexectest.Machine
	t  testing.TB
	at string
}

// Guest is asked right before it is written down that a guest's QEMU is to end.
func (m mortal) Guest(ctx context.Context, uuid string) (maint.Guest, error) {
	if name := filepath.Join(m.Dir(), uuid); exists(name+".save") && !exists(name+".quit") {
		m.die("all is saved")
	}
	return m.Machine.Guest(ctx, uuid)
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

func (m mortal) QuitMigrated(ctx context.Context, uuid string) error {
	m.die("QuitMigrated")
	return m.Machine.QuitMigrated(ctx, uuid)
}

func (m mortal) Resume(ctx context.Context, uuid string) error {
	m.die("Resume")
	return m.Machine.Resume(ctx, uuid)
}

func (m mortal) Save(ctx context.Context, uuid, path string) error {
	defer m.die("after Save")
	return m.Machine.Save(ctx, uuid, path)
}

func (m mortal) CreatePaused(ctx context.Context, xml string) error {
	defer m.die("after CreatePaused")
	return m.Machine.CreatePaused(ctx, xml)
}

func (m mortal) die(call string) {
	if m.at == call {
		runtime.Goexit()
	}
}

// dies has Belay die in f before a call.
func (b *bed) dies(at string, f func()) {
	host, mover := b.Host, b.Mover
	defer func() { b.Host, b.Mover = host, mover }()
	m := mortal{Machine: b.m, t: b.t, at: at}
	b.Host, b.Mover.Host = m, m
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	<-done
}

// A guest that was being restored when the host went down is restored: its vCPUs have not run.
func TestDownWhileItIsRestored(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	b.save()
	b.dies("Resume", func() { _, _ = b.Rescue(t.Context()) })
	b.rewrite("restoring") // its vCPUs have not run
	b.h.Reboot()
	b.m.Boots(kexectest.Old)
	if g := b.mustRescue(); g.Fate != maint.KexecRestored {
		t.Errorf("%+v, %v", g, g.Problem)
	}
	b.whole()
}

// A QEMU that was started for it and has not got its state yet gets it.
func TestDiesBeforeItHasItsState(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	b.save()
	b.dies("after CreatePaused", func() { _, _ = b.Rescue(t.Context()) })
	pid := b.m.PID(b.uuid)
	if g := b.mustRescue(); g.Fate != maint.KexecRestored || pid == 0 || b.m.PID(b.uuid) != pid {
		t.Errorf("%+v, %v; QEMU %d, was %d", g, g.Problem, b.m.PID(b.uuid), pid)
	}
	b.whole()
}

// careful sees that a guest is not resumed in its old QEMU beside state that would be out of date, nor where
// a save would leave its memory behind.
type careful struct {
	*kexectest.Machine
	b *bed
}

func (c careful) Resume(ctx context.Context, uuid string) error {
	if c.b.has(".save") {
		c.b.t.Error("it is resumed beside what was saved of it")
	}
	if c.IgnoresShared(uuid) {
		c.b.t.Error("it is resumed in a QEMU that would leave its memory behind")
	}
	return c.Machine.Resume(ctx, uuid)
}

// Memory that has run since its state was saved does not go with it.
func TestRanInItsNewQEMU(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	b.save()
	b.dies("Resume", func() { _, _ = b.Rescue(t.Context()) })
	if err := b.m.Resume(t.Context(), b.uuid); err != nil {
		t.Fatal(err)
	}
	b.h.Reboot()
	b.m.Boots(kexectest.Old)
	if g := b.mustRescue(); g.Fate != maint.KexecLost || b.state() != maint.GuestShutoff || b.has(".memory") {
		t.Errorf("%+v, %v", g, g.Problem)
	}
}

// A guest that somebody has started from its disks, where the hook is not: it is left alone.
func TestStartedWithoutTheHook(t *testing.T) {
	t.Parallel()
	b := newInPlaceBed(t)
	b.save()
	b.m.NoHook = true
	b.dies("Resume", func() {
		// Enter finds it there.
		b.Host = starting{b.m, t}
		b.Mover.Host = starting{b.m, t}
		_, _ = b.Rescue(t.Context())
	})
	g := b.mustRescue()
	b.kept(g, maint.CodeStarted, maint.GuestRunning)
}

// starting is a host on which somebody starts a guest first.
type starting struct {
	*kexectest.Machine
	t *testing.T
}

func (s starting) CreatePaused(ctx context.Context, xml string) error {
	for _, g := range must(s.Guests(ctx)) {
		if !g.State.Active() && g.Name == "ram-1" {
			if err := s.Boot(ctx, s.t, g.UUID); err != nil {
				return err
			}
		}
	}
	return errors.Join(errors.New("already active"), s.Machine.CreatePaused(ctx, xml))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
