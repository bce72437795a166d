package live_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/live"
	"belay/patch/live/livetest"
)

// programBed has real QEMUs, and a livepatch of a library that one of them has preloaded.
type programBed struct {
	t      *testing.T
	l      live.Libpulp
	vendor *livetest.Vendor
	dir    string
	target livetest.Target
	fits   live.Artifact
}

func newProgramBed(t *testing.T) *programBed {
	t.Helper()
	root, err := os.MkdirTemp("", "qemus") // QEMU, another user, can look into it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	b := &programBed{t: t, vendor: livetest.NewVendor(t), dir: filepath.Join(root, "lib"), target: livetest.BuildTarget(t, filepath.Join(root, "lib"))}
	b.l = live.Libpulp{Tree: live.Tree{Root: filepath.Join(root, "host")}, Keys: filepath.Join(root, "keys"), Dir: filepath.Join(root, "containers")}
	b.vendor.Trust(b.l.Keys)
	b.must(os.MkdirAll(filepath.Join(b.l.Tree.Root, "run/libvirt/qemu"), 0o755))
	b.must(os.Symlink("/proc", filepath.Join(b.l.Tree.Root, "proc")))
	b.fits = b.vendor.VouchContainer(b.target.Container, b.target.Manifest)
	return b
}

func (b *programBed) path(name string) string { return filepath.Join(b.dir, name) }

func (b *programBed) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// start starts a guest's QEMU. A stock one has no libpulp.
func (b *programBed) start(guest string, stock bool) live.QEMU {
	b.t.Helper()
	pid := livetest.StartQEMU(b.t, b.target, b.path(guest), stock)
	b.must(os.WriteFile(filepath.Join(b.l.Tree.Root, "run/libvirt/qemu", guest+".pid"), []byte(strconv.Itoa(pid)), 0o644))
	q, err := b.l.Tree.Process(guest)
	b.must(err)
	return q
}

func (b *programBed) asked(guest string) uint32 { return livetest.Asked(b.t, b.path(guest)) }

// TestUserContract: the fake, and libpulp in a real QEMU where there is one.
func TestUserContract(t *testing.T) {
	t.Parallel()
	t.Run("fake", func(t *testing.T) {
		t.Parallel()
		v, p := livetest.NewVendor(t), livetest.NewPrograms(filepath.Join(t.TempDir(), "keys"))
		v.Trust(p.Keys)
		livetest.UserContract(t, livetest.UserSubject{UserSpace: background{p}, QEMU: p.Run("web-1", targetBuild), Stock: p.Run("web-2"),
			Fits: v.Container("fix", targetBuild), Other: v.Container("other", otherBuild), Foreign: livetest.NewVendor(t).Container("fix", targetBuild),
			End: func() { p.End("web-1") }})
	})
	t.Run("libpulp", func(t *testing.T) {
		t.Parallel()
		b := newProgramBed(t)
		q, other := b.start("web-1", false), b.target.Manifest
		other.BuildID = otherBuild
		livetest.UserContract(t, livetest.UserSubject{UserSpace: b.l, QEMU: q, Stock: b.start("web-2", true),
			Fits: b.fits, Other: b.vendor.VouchContainer(b.target.Container, other), Foreign: livetest.NewVendor(t).VouchContainer(b.target.Container, b.target.Manifest),
			Effect: func() bool { return b.asked("web-1") == 2 },
			End:    func() { b.must(os.Remove(filepath.Join(b.l.Tree.Root, "run/libvirt/qemu/web-1.pid"))) }})
		if answer := b.asked("web-1"); answer != 1 {
			t.Errorf("it goes on with %d", answer)
		}
	})
}

const (
	targetBuild = "0123456789abcdef0123456789abcdef01234567"
	otherBuild  = "fedcba9876543210fedcba9876543210fedcba98"
)

// background is Programs, which does not look at contexts, with those that do.
type background struct{ *livetest.Programs }

func (b background) Patchable(ctx context.Context, q live.QEMU, a live.Artifact) error {
	return errors.Join(b.Programs.Patchable(ctx, q, a), ctx.Err())
}

// TestKilledWhileUlpWorks: whoever has started ulp is killed at any moment. The QEMU lives, and
// who comes next is told the truth.
func TestKilledWhileUlpWorks(t *testing.T) {
	if guest := os.Getenv("BELAY_TEST_ULP"); guest != "" {
		setOver(t, guest)
		return
	}
	t.Parallel()
	b := newProgramBed(t)
	q := b.start("web-1", false)
	file := livetest.WriteContainer(t, b.dir, "signed", b.fits)
	on := false
	for range 25 {
		c := exec.Command(os.Args[0], "-test.run", "^TestKilledWhileUlpWorks$")
		c.Env = append(os.Environ(), "BELAY_TEST_ULP=web-1", "BELAY_TEST_FILE="+file, "BELAY_TEST_ROOT="+filepath.Dir(b.dir))
		out, err := c.StdoutPipe()
		b.must(err)
		b.must(c.Start())
		_, err = out.Read(make([]byte, 1)) // it begins
		b.must(err)
		time.Sleep(time.Duration(rand.IntN(60_000)) * time.Microsecond)
		_ = c.Process.Kill()
		_ = c.Wait()
		on, err = b.l.Applied(t.Context(), q, b.fits)
		b.must(err)
		if answer := b.asked("web-1"); (answer == 2) != on {
			t.Fatalf("it is applied: %t, and it answers %d", on, answer)
		}
	}
	if on {
		_, err := b.l.Set(t.Context(), q, b.fits, false)
		b.must(err)
	}
	if answer := b.asked("web-1"); answer != 1 {
		t.Errorf("it answers %d", answer)
	}
}

// setOver applies and takes back without end.
func setOver(t *testing.T, guest string) {
	root := os.Getenv("BELAY_TEST_ROOT")
	l := live.Libpulp{Tree: live.Tree{Root: filepath.Join(root, "host")}, Keys: filepath.Join(root, "keys"), Dir: filepath.Join(root, "containers")}
	a, err := live.ReadContainer(os.Getenv("BELAY_TEST_FILE"))
	if err != nil {
		t.Fatal(err)
	}
	q, err := l.Tree.Process(guest)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("begun")
	for {
		on, err := l.Applied(t.Context(), q, a)
		if err == nil {
			_, err = l.Set(t.Context(), q, a, !on)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestWhatUlpSays: what is made of ulp's words and exit codes, with an ulp that says them.
func TestWhatUlpSays(t *testing.T) {
	t.Parallel()
	const enabled = "  Livepatching status: enabled"
	for _, c := range []struct {
		name, trigger, check, patches string
		set, applied                  maint.Code // "": no error
		on, sticks                    bool
	}{
		{name: "patched", trigger: "echo 'ulp: Processes patched: 1, Skipped: 0, Failed: 0.'", check: "echo 'ulp: patch already applied' >&2; exit 1", patches: enabled, on: true},
		{name: "skipped, with exit code 0", trigger: "echo 'ulp: Processes patched: 0, Skipped: 1, Failed: 0.'", check: "echo 'ulp: patch not yet applied' >&2", patches: enabled, set: maint.CodeQEMURefused},
		{name: "unknown error, which is 256, as exit code 0", trigger: "echo 'ulp: Processes patched: 0, Skipped: 0, Failed: 1.'", check: "echo 'ulp: patch not yet applied' >&2", patches: enabled, set: maint.CodeQEMURefused},
		{name: "busy", trigger: "exit 11", check: "echo 'error extracting .ulp section' >&2; exit 1", patches: enabled, set: maint.CodeQEMURefused, applied: maint.CodeQEMURefused},
		{name: "a check that fails", trigger: "exit 1", check: "exit 255", patches: enabled, set: maint.CodeQEMURefused, applied: maint.CodeQEMURefused},
		{name: "libpulp out of order", trigger: "exit 1", check: "echo 'ulp: patch not yet applied' >&2", patches: "  Livepatching status: disabled (internal error)", set: maint.CodeQEMURefused, applied: maint.CodeQEMURefused},
		{name: "fatal by code", trigger: "exit 255", set: maint.CodeQEMUUnsure, sticks: true},
		{name: "fatal by word", trigger: "printf 'ulp: fatal error (restoring).\\nPROGRAM POTENTIALLY LEFT IN INCONSISTENT STATE.' >&2; exit 62", set: maint.CodeQEMUUnsure, sticks: true},
		{name: "killed", trigger: "kill -9 $$", set: maint.CodeQEMUUnsure, sticks: true},
		{name: "a check that is fatal", trigger: "exit 1", check: "printf 'PROGRAM POTENTIALLY LEFT IN INCONSISTENT STATE.' >&2; exit 255", patches: enabled, set: maint.CodeQEMURefused, applied: maint.CodeQEMUUnsure, sticks: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l, q, a := fixture(t, fmt.Sprintf("case $1 in trigger) %s;; check) %s;; patches) echo '%s';; esac", c.trigger, "true; "+c.check, c.patches))
			code := func(err error) maint.Code {
				if p := new(maint.Problem); errors.As(err, &p) {
					return p.Code
				}
				if err != nil {
					return maint.Code(err.Error())
				}
				return ""
			}
			_, err := l.Set(t.Context(), q, a, true)
			if code(err) != c.set {
				t.Errorf("to apply it: %v", err)
			}
			if !live.Unsure(err) {
				on, err := l.Applied(t.Context(), q, a)
				if code(err) != c.applied || on != c.on {
					t.Errorf("it is applied: %t, %v", on, err)
				}
			}
			if err := l.Patchable(t.Context(), q, a); live.Unsure(err) != c.sticks || err != nil && !c.sticks {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// TestUnmappable: a QEMU that may not map the container is as it was, and who may keep it from
// that is told.
func TestUnmappable(t *testing.T) {
	t.Parallel()
	l, q, a := fixture(t, "echo 'qemu (pid: 1): FAILED x.so: Failure in dlopen'; exit 31")
	p := new(maint.Problem)
	if _, err := l.Set(t.Context(), q, a, true); !errors.As(err, &p) || p.Code != maint.CodeQEMURefused || !strings.Contains(p.Remedy, "AppArmor") || !strings.Contains(p.Remedy, l.Dir) {
		t.Errorf("%v", err)
	}
}

// fixture is a process that looks like a guest's QEMU with libpulp, and an ulp that is a script.
func fixture(t *testing.T, script string) (live.Libpulp, live.QEMU, live.Artifact) {
	t.Helper()
	root := t.TempDir()
	v := livetest.NewVendor(t)
	l := live.Libpulp{Tree: live.Tree{Root: filepath.Join(root, "host")}, Keys: filepath.Join(root, "keys"), Dir: filepath.Join(root, "containers"), Program: filepath.Join(root, "ulp")}
	v.Trust(l.Keys)
	pid := strconv.Itoa(os.Getpid())
	proc := filepath.Join(l.Tree.Root, "proc", pid)
	files := map[string]string{
		filepath.Join(l.Tree.Root, "run/libvirt/qemu/web-1.pid"): pid + "\n",
		filepath.Join(proc, "stat"):                              pid + " (qemu) system (x) S" + strings.Repeat(" 1", 18) + " 4711 0 0",
		filepath.Join(proc, "status"):                            "Name:\tqemu\nState:\tS (sleeping)\nPid:\t" + pid + "\nTracerPid:\t0\n",
		filepath.Join(proc, "maps"): "1000-2000 r--p 00000000 fe:01 7 /lib/libtarget.so (deleted)\n2000-3000 r-xp 00001000 fe:01 7 /lib/libtarget.so (deleted)\n" +
			"4000-5000 rw-p 00000000 00:00 0\n5000-6000 r--p 00000000 fe:01 8 /lib/libpulp.so.0\n",
		filepath.Join(proc, "task", pid, "status"): "State:\tS (sleeping)\n",
		l.Program: "#!/bin/sh\n" + script + "\n",
	}
	for name, text := range files {
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("/usr/bin/qemu-system-x86_64 (deleted)", filepath.Join(proc, "exe")), os.Symlink("/", filepath.Join(proc, "root")),
		os.MkdirAll(filepath.Join(proc, "map_files"), 0o755), os.WriteFile(filepath.Join(proc, "map_files/1000-2000"), livetest.Library(targetBuild), 0o644)); err != nil {
		t.Fatal(err)
	}
	q, err := l.Tree.Process("web-1")
	if err != nil || q.Start != 4711 {
		t.Fatalf("%+v, %v", q, err)
	}
	return l, q, v.Container("fix", targetBuild)
}

// TestUnfitProcesses: what is no guest's QEMU, or cannot be stopped, is not touched.
func TestUnfitProcesses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		spoil func(proc string) error
		want  string
	}{
		{"another program", func(proc string) error {
			return errors.Join(os.Remove(filepath.Join(proc, "exe")), os.Symlink("/usr/bin/sleep", filepath.Join(proc, "exe")))
		}, "is no QEMU"},
		{"traced", func(proc string) error {
			return os.WriteFile(filepath.Join(proc, "status"), []byte("TracerPid:\t77\n"), 0o644)
		}, "traced by process 77"},
		{"a thread that hangs", func(proc string) error {
			return os.WriteFile(filepath.Join(proc, "task", filepath.Base(proc), "status"), []byte("Name:\tworker\nState:\tD (disk sleep)\nPid:\t9\nvoluntary_ctxt_switches:\t3\n"), 0o644)
		}, "worker (task 9"},
		{"another root folder", func(proc string) error {
			return errors.Join(os.Remove(filepath.Join(proc, "root")), os.Symlink(proc, filepath.Join(proc, "root")))
		}, "does not see"},
		{"no libpulp", func(proc string) error {
			return os.WriteFile(filepath.Join(proc, "maps"), nil, 0o644)
		}, "libpulp.so preloaded"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l, q, a := fixture(t, "echo touched >&2; exit 255")
			if err := c.spoil(filepath.Join(l.Tree.Root, "proc", strconv.Itoa(q.PID))); err != nil {
				t.Fatal(err)
			}
			p := new(maint.Problem)
			if _, err := l.Set(t.Context(), q, a, true); !errors.As(err, &p) || !strings.Contains(p.Reason, c.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestUlpAtWork: who comes while ulp is at work waits, and no longer than there is time.
func TestUlpAtWork(t *testing.T) {
	t.Parallel()
	l, q, a := fixture(t, "true")
	if err := l.Patchable(t.Context(), q, a); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(l.Dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	p := new(maint.Problem)
	if err := l.Patchable(ctx, q, a); !errors.As(err, &p) || p.Code != maint.CodeBusy {
		t.Errorf("%v", err)
	}
	f.Close()
	if err := l.Patchable(t.Context(), q, a); err != nil {
		t.Errorf("when the lock is free: %v", err)
	}
}
