package livetest

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"belay/patch/live"
)

// targetSource is a library that a QEMU has preloaded: a thread of its own writes into a file, over
// and over, what answer() is, and how often it has asked.
const targetSource = `
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
__attribute__((noinline)) int answer(void) { asm volatile(""); return 1; }
static volatile int *page;
static void *ask(void *unused) {
	for (;;) { page[0] = answer(); page[1]++; usleep(1000); }
}
__attribute__((constructor)) static void begin(void) {
	int fd = open(getenv("ANSWER"), O_RDWR);
	pthread_t t;
	page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	pthread_create(&t, 0, ask, 0);
}
`

const targetFix = "int new_answer(void) { return 2; }\n"

// Target is a library for real QEMUs to have preloaded, and a livepatch of it.
type Target struct {
	Library string
	// Preload is LD_PRELOAD of a QEMU that takes livepatches. ANSWER names the file that it
	// writes to, of 4096 bytes.
	Preload   string
	Container []byte // with it, answer() is 2
	Manifest  live.UserManifest
}

// BuildTarget builds it in a folder. Where a tool for that is missing the test is skipped.
func BuildTarget(t testing.TB, dir string) Target {
	t.Helper()
	for _, tool := range []string{"ulp", "gcc", "readelf", "qemu-system-x86_64"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not in PATH (of libpulp, Debian has no package)", tool)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("root alone may look into other users' processes")
	}
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v: %s", name, args, err, out)
		}
		return string(out)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	library, fix := path("libtarget.so"), path("answer_fix.so")
	check(t, os.MkdirAll(dir, 0o755))
	check(t, os.WriteFile(path("target.c"), []byte(targetSource), 0o644))
	check(t, os.WriteFile(path("fix.c"), []byte(targetFix), 0o644))
	check(t, os.WriteFile(path("fix.dsc"), []byte(fix+"\n@"+library+"\nanswer:new_answer\n"), 0o644))
	build := []string{"-O2", "-shared", "-fPIC", "-Wl,--build-id", "-Wl,--hash-style=sysv"}
	run("gcc", append(build, "-fpatchable-function-entry=16,14", "-o", library, path("target.c"), "-pthread")...)
	run("ulp", "post", library)
	run("gcc", append(build, "-o", fix, path("fix.c"))...)
	run("ulp", "packer", path("fix.dsc"))
	_, id, found := strings.Cut(run("readelf", "-n", library), "Build ID: ")
	if !found {
		t.Fatal("the library has no build ID")
	}
	container, err := os.ReadFile(fix)
	check(t, err)
	return Target{Library: library, Preload: libpulp() + ":" + library, Container: container,
		Manifest: live.UserManifest{Name: "answer_fix", Library: "libtarget.so", BuildID: strings.Fields(id)[0]}}
}

// libpulp is the library beside ulp, or where the linker looks.
func libpulp() string {
	ulp, _ := exec.LookPath("ulp")
	if files, _ := filepath.Glob(filepath.Join(filepath.Dir(ulp), "../lib*/libpulp.so.0")); len(files) > 0 {
		return files[0]
	}
	return "libpulp.so.0"
}

// StartQEMU starts a QEMU as libvirt would, as a user of its own and in QEMU's sandbox, and gives
// its process when it runs. Its library writes to the file. A stock one has no libpulp.
func StartQEMU(t testing.TB, target Target, file string, stock bool) (pid int) {
	t.Helper()
	check(t, os.WriteFile(file, make([]byte, 4096), 0o666))
	check(t, os.Chmod(file, 0o666))
	c := exec.Command("qemu-system-x86_64", "-M", "none", "-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-monitor", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	c.Dir, c.Stderr = "/", os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	preload := target.Library
	if !stock {
		preload = target.Preload
	}
	c.Env = append(os.Environ(), "LD_PRELOAD="+preload, "ANSWER="+file)
	check(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	Asked(t, file)
	return c.Process.Pid
}

// Asked waits until the library has asked twice more, and gives what it was answered last: the
// QEMU runs.
func Asked(t testing.TB, file string) (answer uint32) {
	t.Helper()
	look := func() (answer, count uint32) {
		page, err := os.ReadFile(file)
		check(t, err)
		return binary.NativeEndian.Uint32(page), binary.NativeEndian.Uint32(page[4:])
	}
	_, begun := look()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for limit := time.After(time.Minute); ; {
		if answer, count := look(); count >= begun+2 {
			return answer
		}
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("the QEMU that writes to %s does not run any more", file)
		}
	}
}
