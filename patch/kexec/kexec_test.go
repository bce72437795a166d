package kexec_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/kexec"
	"belay/patch/kexec/kexectest"
)

func TestReserved(t *testing.T) {
	t.Parallel()
	for cmdline, want := range map[string][]kexec.Region{
		"":                                      nil,
		"root=/dev/vda1 memmap=512M!4G":         {{4 << 30, 512 << 20}},
		"memmap=1G!8G memmap=0x1000!0x1000":     {{0x1000, 0x1000}, {8 << 30, 1 << 30}},
		"memmap=1G!8G,2g!16g":                   {{8 << 30, 1 << 30}, {16 << 30, 2 << 30}},
		"memmap=64K$0x18690000 memmap=1G@4G":    nil, // reserved in other ways
		"memmap=x!4G memmap=!  memmap=exactmap": nil,
		"memmap=1G!99999999999G":                nil, // no number of the kernel's
	} {
		if got := kexec.Reserved(cmdline); !cmp.Equal(got, want) {
			t.Errorf("%q: %v, want %v", cmdline, got, want)
		}
	}
}

func TestAdvise(t *testing.T) {
	t.Parallel()
	ram := []kexec.Region{{0x1000, 0x9e000}, {1 << 20, 2<<30 - 1<<20}, {4 << 30, 8 << 30}}
	for _, c := range []struct {
		ram  []kexec.Region
		need uint64
		want string
	}{
		{ram, 1 << 30, "1G!11G"},
		{ram, 1<<30 + 1, "2G!10G"},
		{ram, 8 << 30, "8G!4G"},
		{ram, 9 << 30, ""},
		{ram[:2], 1 << 30, ""}, // below the hole
		{nil, 1 << 30, ""},
	} {
		r, ok := kexec.Advise(c.ram, c.need)
		if ok != (c.want != "") || ok && r.String() != c.want {
			t.Errorf("for %d bytes: %s, %v; want %s", c.need, r, ok, c.want)
		}
	}
	if kexec.Within(ram, kexec.Region{Start: 2 << 30, Size: 512 << 20}) || !kexec.Within(ram, kexec.Region{Start: 4 << 30, Size: 512 << 20}) {
		t.Error("the machine's hole is not told from memory")
	}
	if kexec.Within(ram, kexec.Region{Start: 4 << 30, Size: 1<<64 - 4<<30}) {
		t.Error("a region is within memory that goes round")
	}
}

// notes is what a journal keeps of an operation's steps.
type notes struct {
	step string
	data map[string][]byte
}

func (n *notes) Note(string, ...any) error { return nil }
func (n *notes) Save(v any) (err error)    { n.data[n.step], err = json.Marshal(v); return err }
func (n *notes) Load(step string, v any) (bool, error) {
	b, ok := n.data[step]
	if !ok {
		return false, nil
	}
	return true, json.Unmarshal(b, v)
}

// inside has guests tell nothing but that their clocks are right.
type inside struct{}

func (inside) BootID(_ context.Context, g maint.Guest) string { return "boot of " + g.UUID }
func (inside) Clock(_ context.Context, g maint.Guest, _ time.Duration) maint.ClockReport {
	return maint.ClockReport{Guest: g.Name, State: maint.ClockSynchronised}
}

type bed struct {
	*kexec.Job
	t    *testing.T
	m    *kexectest.Machine
	h    *hypervisortest.Host
	uuid string
	s    *notes
}

func newBed(t *testing.T) *bed {
	t.Helper()
	w := hypervisortest.NewWorld()
	t.Cleanup(w.Close)
	h := w.AddHost("a", hypervisortest.HostOptions{CannotRun: []string{"EPYC"}})
	m := kexectest.New(t, h)
	b := &bed{t: t, m: m, h: h, s: &notes{data: make(map[string][]byte)}}
	b.uuid = h.PutGuest("web-1", func(g *maint.Guest) { g.MemoryBytes = 1 << 20 })
	b.Job = &kexec.Job{Op: "kexec-1", Host: m, Mover: m.Mover(), InPlace: true, Loader: m, Rebooter: m, Inside: inside{}, Tree: m.Tree(), Dir: kexec.DefaultDir, Life: t.Context(),
		Request: maint.KexecRequest{Kernel: "/boot/vmlinuz-" + kexectest.Next, Initrd: "/boot/initrd.img-" + kexectest.Next, All: true},
		Record:  func(maint.KexecResult) error { return nil }, Log: slog.New(slog.DiscardHandler),
		Pace: kexec.Pace{Poll: time.Millisecond, Going: 20 * time.Millisecond, Healed: 50 * time.Millisecond}}
	return b
}

func (b *bed) do(step string, f func(context.Context, kexec.Scratch) error) {
	b.t.Helper()
	b.s.step = step
	if err := f(b.t.Context(), b.s); err != nil {
		b.t.Fatalf("%s: %v", step, err)
	}
}

// save saves the guest and has the host come up with the new kernel.
func (b *bed) save() {
	b.t.Helper()
	b.do(kexec.PhasePreflight, b.Preflight)
	b.do(kexec.PhaseLoad, b.Load)
	b.do(kexec.PhaseSave, b.Save)
	b.do(kexec.PhaseSave, b.Save) // over
	b.h.Reboot()
	b.m.Boots(kexectest.Next)
}

// rescue is belayd -restore: it knows nothing but what the memory has.
func (b *bed) rescue() ([]maint.KexecGuest, error) {
	j := &kexec.Job{Host: b.m, Mover: b.m.Mover(), Log: b.Log, Inside: inside{}, Tree: b.m.Tree(), Dir: kexec.DefaultDir, Life: b.t.Context(), Pace: b.Pace}
	return j.Rescue(b.t.Context())
}

func (b *bed) state() maint.GuestState {
	b.t.Helper()
	g, err := b.h.Guest(b.t.Context(), b.uuid)
	if err != nil {
		b.t.Fatal(err)
	}
	return g.State
}

// Without belayd's journal, and over and over.
func TestRescue(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	if _, err := b.rescue(); err == nil {
		t.Error("nothing is there, and that is no error")
	}
	b.save()
	for range 3 {
		guests, err := b.rescue()
		if err != nil || len(guests) != 1 || guests[0].Fate != maint.KexecRestored || guests[0].SameBoot == nil || !*guests[0].SameBoot || b.state() != maint.GuestRunning {
			t.Fatalf("%+v, %v; it is %s", guests, err, b.state())
		}
	}
	// What belayd does then finds it done.
	b.do(kexec.PhaseBoot, b.Boot)
	b.do(kexec.PhaseCheck, b.Check)
	b.do(kexec.PhaseRestore, b.Restore)
}

// A save that goes on after belayd has died counts from when the guest stood still, not from
// its end: else its clock is behind by more than the guest can have lost, and is left alone.
func TestSaveOutlivesBelayd(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.do(kexec.PhasePreflight, b.Preflight)
	b.do(kexec.PhaseLoad, b.Load)
	b.m.FailSave = b.uuid
	if err := b.Save(t.Context(), b.s); err == nil { // it has begun
		t.Fatal("it is saved")
	}
	b.m.FailSave = ""
	file := filepath.Join(kexec.DefaultDir, b.uuid+".save")
	if err := b.m.Save(t.Context(), b.uuid, file); err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(time.Hour)
	if err := os.Chtimes(filepath.Join(b.m.Root, file), end, end); err != nil {
		t.Fatal(err)
	}
	b.do(kexec.PhaseSave, b.Save)
	b.h.Reboot()
	b.m.Boots(kexectest.Next)
	guests, err := b.rescue()
	if err != nil || len(guests) != 1 || guests[0].Fate != maint.KexecRestored || guests[0].Pause <= 0 {
		t.Errorf("%+v, %v", guests, err)
	}
}

// The host does not go down under a guest that runs: one that was started since, or restored by
// somebody who took belayd for dead.
func TestNobodyEndsWithTheHost(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(b *bed) error{
		"another guest": func(b *bed) error { b.h.PutGuest("new-1"); return nil },
		"a rescue":      func(b *bed) error { _, err := b.rescue(); return err },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			b.m.OnKexec = func(string) { t.Error("the host goes down") }
			b.do(kexec.PhasePreflight, b.Preflight)
			b.do(kexec.PhaseLoad, b.Load)
			b.do(kexec.PhaseSave, b.Save)
			if err := start(b); err != nil {
				t.Fatal(err)
			}
			var p *maint.Problem
			if err := b.Boot(t.Context(), b.s); !errors.As(err, &p) || p.Code != maint.CodeStarted {
				t.Errorf("%v", err)
			}
			if problems, err := b.Back(t.Context(), b.s); err != nil || len(problems) > 0 || b.state() != maint.GuestRunning {
				t.Errorf("%v, %v; it is %s", problems, err, b.state())
			}
		})
	}
}

// asked is a systemd that tells how often it was asked whether it goes down.
type asked struct {
	kexec.Rebooter
	times int
	then  func(times int)
}

func (a *asked) Going(ctx context.Context) (bool, error) {
	a.times++
	a.then(a.times)
	return a.Rebooter.Going(ctx)
}

// A host that goes down is not taken for one that stays up by a belayd that has stood still
// meanwhile: the guests that it restored would end with the host.
func TestBelaydStandsStill(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	life, end := context.WithCancel(t.Context())
	b.Life, b.Pace.Poll = life, 3*b.Pace.Going // it asks less often than it should
	b.m.OnKexec = func(string) {}              // which takes longer
	b.Rebooter = &asked{Rebooter: b.m, then: func(times int) {
		if times == 3 { // before, after, and once more
			end()
		}
	}}
	b.do(kexec.PhasePreflight, b.Preflight)
	b.do(kexec.PhaseLoad, b.Load)
	b.do(kexec.PhaseSave, b.Save)
	if err := b.Boot(t.Context(), b.s); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// A guest that has run again is never taken back to what was saved of it.
func TestNeverTwice(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		after func(b *bed)
		want  maint.KexecFate
	}{
		"it ended":                {func(b *bed) { b.h.KillQEMU(b.t, b.uuid) }, maint.KexecRestored},
		"the host went down, too": {func(b *bed) { b.h.Reboot(); b.m.Boots(kexectest.Next) }, maint.KexecRestored},
		"it ended, before that was written down": {func(b *bed) {
			b.h.KillQEMU(b.t, b.uuid)
			b.rewrite("released")
		}, maint.KexecLost},
		"the host went down, before that was written down": {func(b *bed) {
			b.rewrite("released")
			b.h.Reboot()
			b.m.Boots(kexectest.Next)
		}, maint.KexecLost},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			b.save()
			image := filepath.Join(b.m.Dir(), b.uuid+".save")
			text, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := b.rescue(); err != nil {
				t.Fatal(err)
			}
			// As if it could not be removed.
			if err := os.WriteFile(image, text, 0o600); err != nil {
				t.Fatal(err)
			}
			c.after(b)
			guests, err := b.rescue()
			if err != nil || guests[0].Fate != c.want || b.state() != maint.GuestShutoff {
				t.Errorf("%+v, %v; it is %s", guests, err, b.state())
			}
		})
	}
}

// rewrite has the guest's mark be an earlier one.
func (b *bed) rewrite(stage string) {
	b.t.Helper()
	name := filepath.Join(b.m.Dir(), b.uuid+".mark")
	text, err := os.ReadFile(name)
	if err != nil {
		b.t.Fatal(err)
	}
	var sealed struct {
		SHA256 string         `json:"sha256"`
		Text   map[string]any `json:"text"`
	}
	if err := json.Unmarshal(text, &sealed); err != nil {
		b.t.Fatal(err)
	}
	sealed.Text["stage"] = stage
	inner, _ := json.Marshal(sealed.Text)
	sealed.SHA256 = fmt.Sprintf("%x", sha256.Sum256(inner))
	if text, err = json.Marshal(sealed); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(name, text, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// Each thing that is missing is told, by itself.
func TestPreflight(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil func(b *bed)
		want  maint.Code
	}{
		"no memory is reserved": {func(b *bed) { b.m.Write("/proc/cmdline", "root=/dev/vda1 ro") }, maint.CodeNoRegion},
		"a hole is reserved": {func(b *bed) {
			b.m.Write("/proc/cmdline", "root=/dev/vda1 memmap=512M!2G")
			b.m.Remove("/boot/grub/grub.cfg")
		}, maint.CodeNoRegion},
		"it is not mounted": {func(b *bed) { b.m.Mount(false) }, maint.CodeNoRegion},
		"others could replace what is kept": {func(b *bed) {
			if err := os.Chmod(b.m.Dir(), 0o777); err != nil {
				b.t.Fatal(err)
			}
		}, maint.CodeNoRegion},
		"it is mounted by hand":   {func(b *bed) { b.m.Write("/etc/fstab", "#/dev/pmem0 "+kexec.DefaultDir+" ext4") }, maint.CodeNoRegion},
		"kexec is switched off":   {func(b *bed) { b.m.Write("/proc/sys/kernel/kexec_load_disabled", "1\n") }, maint.CodeKexec},
		"the kernel has no kexec": {func(b *bed) { b.m.Remove("/sys/kernel/kexec_loaded") }, maint.CodeKexec},
		"kexec_file_load is not built in": {func(b *bed) {
			b.m.Write("/boot/config-"+kexectest.Old, "# CONFIG_KEXEC_FILE is not set\n")
		}, maint.CodeKexec},
		"lockdown":                       {func(b *bed) { b.m.Write("/sys/kernel/security/lockdown", "none [integrity] confidentiality\n") }, maint.CodeKexec},
		"the old kernel's image is gone": {func(b *bed) { b.m.Remove("/boot/vmlinuz-" + kexectest.Old) }, maint.CodeNoWayBack},
		"the boot loader does not know":  {func(b *bed) { b.m.Write("/boot/grub/grub.cfg", "linux /boot/vmlinuz root=/dev/vda1\n") }, maint.CodeNoWayBack},
		"the image is none":              {func(b *bed) { b.m.Write("/boot/vmlinuz-"+kexectest.Next, "ELF") }, maint.CodeImage},
		"the initrd is none":             {func(b *bed) { b.m.Write("/boot/initrd.img-"+kexectest.Next, "text") }, maint.CodeImage},
		"the kernel has no modules":      {func(b *bed) { b.m.Remove("/lib/modules/" + kexectest.Next) }, maint.CodeImage},
		"the kernel knows no such memory": {func(b *bed) {
			b.m.Write("/lib/modules/"+kexectest.Next+"/modules.dep", "kernel/drivers/nvdimm/nd_pmem.ko:\nkernel/fs/ext4/ext4.ko:\n")
		}, maint.CodeImage},
		"another memmap": {func(b *bed) { b.Request.Append = "root=/dev/vda1 memmap=256M!4G" }, maint.CodeCmdline},
		"another root":   {func(b *bed) { b.Request.Append = "root=/dev/vdb1 memmap=512M!4G" }, maint.CodeCmdline},
		"libvirt-guests is enabled": {func(b *bed) {
			b.m.Write("/etc/systemd/system/multi-user.target.wants/libvirt-guests.service", "")
		}, maint.CodeGuestsUnit},
		"libvirt-guests is active": {func(b *bed) { b.m.Write("/run/systemd/units/invocation:libvirt-guests.service", "") }, maint.CodeGuestsUnit},
		"a guest is left out":      {func(b *bed) { b.Request.All, b.Request.Guests = false, []string{} }, maint.CodeUncovered},
		"a device of the host": {func(b *bed) {
			b.h.PutGuest("gpu-1", func(g *maint.Guest) { g.Devices = []maint.Device{{Kind: "hostdev", Source: "0000:01:00.0"}} })
		}, maint.CodeDevice},
		"an interface of the host's": {func(b *bed) {
			b.h.PutGuest("net-1", func(g *maint.Guest) { g.Devices = []maint.Device{{Kind: "interface", Type: "vdpa"}} })
		}, maint.CodeDevice},
		"a file system of the host's": {func(b *bed) {
			b.h.PutGuest("fs-1", func(g *maint.Guest) { g.Devices = []maint.Device{{Kind: "filesystem", Type: "mount"}} })
		}, maint.CodeDevice},
		"shared memory": {func(b *bed) {
			b.h.PutGuest("shm-1", func(g *maint.Guest) { g.Devices = []maint.Device{{Kind: "shmem"}} })
		}, maint.CodeDevice},
		"the host's TPM": {func(b *bed) {
			b.h.PutGuest("tpm-1", func(g *maint.Guest) { g.Devices = []maint.Device{{Kind: "tpm", Type: "passthrough"}} })
		}, maint.CodeDevice},
		"a disk in memory": {func(b *bed) {
			b.h.PutGuest("tmp-1", func(g *maint.Guest) {
				g.Disks = []maint.Disk{{Target: "vda", Type: "file", Source: "/dev/shm/a.qcow2"}}
			})
		}, maint.CodeVolatile},
		"an unknown machine type": {func(b *bed) {
			b.h.PutGuest("old-1", func(g *maint.Guest) { g.MachineType = "pc-q35-2.4" })
		}, maint.CodeMachineType},
		"another CPU":              {func(b *bed) { b.h.PutGuest("amd-1", func(g *maint.Guest) { g.CPUModel = "EPYC" }) }, maint.CodeCPU},
		"no room":                  {func(b *bed) { b.h.PutGuest("big-1", func(g *maint.Guest) { g.MemoryBytes = 1 << 60 }) }, maint.CodeNoRoom},
		"guests of an earlier one": {func(b *bed) { b.save(); b.m.Boots(kexectest.Old); b.Op = "kexec-2" }, maint.CodeKeptGuest},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			b.h.PutGuest("plain-1", func(g *maint.Guest) { // with what every guest has
				g.MemoryBytes = 1 << 20
				g.Devices = []maint.Device{{Kind: "interface", Type: "bridge"}, {Kind: "tpm", Type: "emulator"}, {Kind: "channel", Type: "unix"}}
			})
			if v, err := b.Plan(t.Context()); err != nil || len(v.Problems) > 0 {
				t.Fatalf("nothing is missing: %+v, %v", v.Problems, err)
			}
			c.spoil(b)
			v, err := b.Plan(t.Context())
			if err != nil || !slices.ContainsFunc(v.Problems, func(p maint.Problem) bool { return p.Code == c.want && p.Remedy != "" }) {
				t.Errorf("%+v, %v; want %s", v.Problems, err, c.want)
			}
		})
	}
}
