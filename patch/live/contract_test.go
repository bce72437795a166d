package live_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/live"
	"belay/patch/live/livetest"
)

// kernels are those that the fixture trees are of.
var kernels = map[string]func() livetest.Options{"6.1": livetest.Debian12, "newer": livetest.Newer}

func TestContract(t *testing.T) {
	t.Parallel()
	for name, options := range kernels {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := livetest.New(t, t.TempDir(), options())
			v := livetest.NewVendor(t)
			livetest.Contract(t, livetest.Subject{Tree: m.Tree, Kernel: m, Wait: 10 * time.Second,
				A: v.Make("fix_a", m.Release, m.Version, nil), B: v.Make("fix_b", m.Release, m.Version, nil),
				Other: v.Make("fix_c", "5.10.0-30-amd64", m.Version, nil),
				Hold: func() (live.Artifact, func()) {
					m.Hold(120, "worker_thread")
					return v.Make("fix_d", m.Release, m.Version, nil), func() { m.LetGo(120) }
				}})
		})
	}
}

// A livepatch that goes while it is looked at has gone, whichever of its files was being read.
func TestGoesWhileLookedAt(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can make devices")
	}
	m := livetest.New(t, t.TempDir(), livetest.Newer())
	for _, name := range []string{"fix_a", "fix_b"} {
		dir := filepath.Join(m.Root(), "sys/kernel/livepatch", name)
		if err := os.MkdirAll(filepath.Join(dir, "vmlinux"), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, file := range []string{"enabled", "transition", "vmlinux/patched"} {
			if err := os.WriteFile(filepath.Join(dir, file), []byte("1\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, file := range []string{"transition", "enabled"} {
		file = filepath.Join(m.Root(), "sys/kernel/livepatch/fix_a", file)
		const noSuchMisc = 253 // a minor number of "misc" that no driver has: opened with ENODEV
		if err := errors.Join(os.Remove(file), unix.Mknod(file, unix.S_IFCHR|0o600, int(unix.Mkdev(10, noSuchMisc)))); err != nil {
			t.Fatal(err)
		}
		if _, err := os.ReadFile(file); !errors.Is(err, unix.ENODEV) {
			t.Skipf("such a device is read with %v", err)
		}
		if p, err := m.Tree.Patch("fix_a"); p != nil || err != nil {
			t.Errorf("%+v, %v", p, err)
		}
		if all, err := m.Tree.Patches(); err != nil || len(all) != 1 || all[0].Name != "fix_b" {
			t.Errorf("%+v, %v", all, err)
		}
	}
}

// thisKernel is the kernel that the test runs on, if it may be patched: the folder
// BELAY_LIVEPATCHES has a.ko and b.ko, cumulative, and held.ko, which changes a function in
// which a kernel thread sleeps for good. See docs/rung-a-hot-patch.md.
func thisKernel(t *testing.T) (host live.Host, a, b, held live.Artifact) {
	t.Helper()
	dir := os.Getenv("BELAY_LIVEPATCHES")
	if dir == "" {
		t.Skip("BELAY_LIVEPATCHES names no folder with livepatches for this kernel")
	}
	v, keys := livetest.NewVendor(t), filepath.Join(t.TempDir(), "keys")
	v.Trust(keys)
	d := live.Direct{Keys: keys}
	release, version, err := d.Tree.Kernel()
	if err != nil {
		t.Fatal(err)
	}
	vouch := func(name string) live.Artifact {
		module, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return v.Vouch(module, live.Manifest{Release: release, Version: version, Cumulative: true, Covers: []string{name}})
	}
	host = live.Host{Kernel: d, Witness: d, Keys: keys, Store: live.Store{Dir: filepath.Join(t.TempDir(), "live")},
		Timing: live.Timing{Poll: 100 * time.Millisecond, Name: 3 * time.Second, Limit: 10 * time.Second, Back: 2 * time.Minute, Soak: 2 * time.Second}}
	return host, vouch("a.ko"), vouch("b.ko"), vouch("held.ko")
}

// unchecked leaves to the kernel what Direct would refuse before.
type unchecked struct{ live.Direct }

func (unchecked) Load(_ context.Context, a live.Artifact) error {
	return os.NewSyscallError("init_module", unix.InitModule(a.Module, ""))
}

func TestContractOfThisKernel(t *testing.T) {
	host, a, b, held := thisKernel(t)
	info, err := live.ReadModInfo(a.Module)
	if err != nil {
		t.Fatal(err)
	}
	// A kernel with CONFIG_MODVERSIONS does not look at the release, the first word.
	release, flags, _ := strings.Cut(info.VerMagic, " ")
	other := live.Artifact{Module: bytes.ReplaceAll(a.Module, []byte("vermagic="+info.VerMagic), []byte("vermagic="+release+" "+strings.Repeat("9", len(flags))))}
	livetest.Contract(t, livetest.Subject{Tree: host.Tree, Kernel: unchecked{host.Kernel.(live.Direct)}, Wait: 2 * time.Minute, A: a, B: b, Other: other,
		Hold: func() (live.Artifact, func()) { return held, func() {} }})
}

// TestJobsOfThisKernel does all that Belay does.
func TestJobsOfThisKernel(t *testing.T) {
	host, a, b, held := thisKernel(t)
	bed := &bench{Host: host, t: t, notes: &notes{data: make(map[string][]byte)}, boot: "this"}
	show := func() string {
		patches, err := host.Tree.Patches()
		if err != nil {
			t.Fatal(err)
		}
		text := ""
		for _, p := range patches {
			text += fmt.Sprintf("%s whole=%t ", p.Name, p.Whole())
		}
		return text
	}
	for _, artifact := range []live.Artifact{a, b} {
		if err := bed.run(bed.begin(artifact)); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: transition %s, the kernel shows %s", bed.known.Active.Name, bed.result.Transition, show())
		v, err := bed.View(t.Context(), bed.known)
		if err != nil || len(v.Loaded) != 1 || v.Loaded[0].Kept == nil || !v.Loaded[0].Whole() {
			t.Fatalf("%+v, %v", v, err)
		}
	}
	if loaded, _, _ := host.Tree.Module(nameIn(t, a)); loaded {
		t.Error("what was replaced is loaded still")
	}
	err := bed.run(bed.begin(held))
	p := problem(t, err)
	if p.Code != maint.CodeStalled || !strings.Contains(p.Reason, "kernel thread") {
		t.Errorf("the problem is %v", p)
	}
	t.Logf("a transition that stalls: %v; notes: %s", p, bed.notes.text())
	if text := show(); text != nameIn(t, b)+" whole=true " {
		t.Errorf("after it was turned round the kernel shows %s", text)
	}
	j := bed.job(maint.PatchRequest{Action: maint.PatchRevert, Name: nameIn(t, b)})
	ctx := t.Context()
	if err := errors.Join(j.PreflightRevert(ctx, bed.notes.of(live.PhasePreflight)), j.Withdraw(ctx, bed.notes.of(live.PhaseWithdraw)), j.Finish(ctx, bed.notes.of(live.PhaseFinish))); err != nil {
		t.Fatal(err)
	}
	if text := show(); text != "" || bed.known.Active != nil {
		t.Errorf("after the revert the kernel shows %s", text)
	}
}

func nameIn(t *testing.T, a live.Artifact) string {
	t.Helper()
	info, err := live.ReadModInfo(a.Module)
	if err != nil {
		t.Fatal(err)
	}
	return info.Name
}
