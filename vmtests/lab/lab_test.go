package lab_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"belay/vmtests/lab"
)

// wantHosts checks that every host answers and is a host of its own.
func wantHosts(t *testing.T, l *lab.Lab) {
	t.Helper()
	seen := map[string]bool{}
	for _, h := range l.Hosts {
		caps := virsh(t, h, "capabilities")
		if !strings.Contains(caps, "<uuid>"+h.UUID+"</uuid>") {
			t.Errorf("%s does not report the host UUID %s", h.Name, h.UUID)
		}
		if got := virsh(t, h, "hostname"); got != h.Name {
			t.Errorf("%s calls itself %q", h.Name, got)
		}
		for _, id := range []string{h.Name, h.UUID, h.Addr.String(), h.Dir} {
			if seen[id] {
				t.Errorf("%s is that of two hosts", id)
			}
			seen[id] = true
		}
	}
}

func TestTwoHosts(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{})
	if len(l.Hosts) != 2 || l.Hosts[0].Name != "host-a" || l.Host("host-b") != l.Hosts[1] || l.Host("host-c") != nil {
		t.Fatalf("hosts: %v", l.Hosts)
	}
	wantHosts(t, l)

	// What is the host's own, and what it shares.
	a, b := l.Hosts[0], l.Hosts[1]
	if got := inside(t, a, "cat", "/etc/hostname"); got != "host-a" {
		t.Errorf("hostname file: %q", got)
	}
	for _, path := range []string{"/etc/belay.conf", "/run/x", "/var/run/y", "/var/lib/libvirt/z", lab.MemoryDir + "/m"} {
		inside(t, a, "sh", "-c", "echo mine >"+path)
		if text, err := os.ReadFile(a.Path(path)); err != nil || string(text) != "mine\n" {
			t.Errorf("%s outside: %q, %v", path, text, err)
		}
		for _, other := range []string{path, b.Path(path)} {
			if _, err := os.Stat(other); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s of host-a is visible as %s", path, other)
			}
		}
	}
	shared := filepath.Join(l.Shared, "x")
	inside(t, a, "sh", "-c", "echo ours >"+shared)
	if got := inside(t, b, "cat", shared); got != "ours" {
		t.Errorf("shared folder: %q", got)
	}
	if got := inside(t, a, "sh", "-c", "ls /sys/class/net; grep -c nsfs /proc/mounts || true"); got != "br0\nlo\nuplink\n0" {
		t.Errorf("links and namespaces seen inside: %q", got)
	}

	// The command is the process, and its exit code is the program's.
	cmd := a.Command(t.Context(), "sh", "-c", "echo $$; exit 7")
	out, err := cmd.Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("exit code passed on: %v", err)
	}
	if got, want := strings.TrimSpace(string(out)), cmd.Process.Pid; got != itoa(want) {
		t.Errorf("process ID inside %s, outside %d", got, want)
	}

	logs := t.TempDir()
	if err := l.CollectLogs(logs); err != nil {
		t.Error(err)
	}
	for _, h := range l.Hosts {
		if text, err := os.ReadFile(filepath.Join(logs, h.Name, "libvirtd.log")); err != nil || len(text) == 0 {
			t.Errorf("log of %s: %d bytes, %v", h.Name, len(text), err)
		}
	}

	if _, err := lab.Up(t.Context(), lab.Config{Name: l.Name}); err == nil || !strings.Contains(err.Error(), "already up") {
		t.Errorf("second lab of the same name: %v", err)
	}
	wantHosts(t, l)
}

// Guests' memory is on a tmpfs of the host's own, which is never on disk.
func TestMemoryDir(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{Hosts: 1})
	var fs unix.Statfs_t
	if err := unix.Statfs(l.Hosts[0].Path(lab.MemoryDir), &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		t.Errorf("%s is a file system of type %x, %v; want a tmpfs", lab.MemoryDir, fs.Type, err)
	}
}

func TestHooks(t *testing.T) {
	t.Parallel()
	hooks := filepath.Join(t.TempDir(), "hooks")
	if err := os.MkdirAll(filepath.Join(hooks, "qemu.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\necho $1 $2 >>/run/hooked\n"
	if err := os.WriteFile(filepath.Join(hooks, "qemu.d", "note"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	l := up(t, lab.Config{Hosts: 1, Hooks: hooks})
	h := l.Hosts[0]
	mustStart(t, h, "g1", "")
	if text, err := os.ReadFile(h.Path("/run/hooked")); err != nil || !strings.HasPrefix(string(text), "g1 prepare\ng1 start\n") {
		t.Errorf("the hook wrote %q, %v", text, err)
	}
}

func TestThreeHosts(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{Hosts: 3})
	if len(l.Hosts) != 3 {
		t.Fatalf("%d hosts", len(l.Hosts))
	}
	wantHosts(t, l)
	for _, from := range l.Hosts {
		for _, to := range l.Hosts {
			if err := dial(from, to); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestTwoLabsAtOnce(t *testing.T) {
	t.Parallel()
	x, y := up(t, lab.Config{}), up(t, lab.Config{})
	mustStart(t, x.Hosts[0], "only-in-x", "")
	for i := range x.Hosts {
		if x.Hosts[i].Addr != y.Hosts[i].Addr {
			t.Errorf("addresses %s and %s", x.Hosts[i].Addr, y.Hosts[i].Addr)
		}
		if x.Hosts[i].UUID == y.Hosts[i].UUID {
			t.Error("hosts of two labs have the same UUID")
		}
	}
	wantGuests(t, y.Hosts[0], "")
	if err := x.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantNothingLeft(t, x)
	wantHosts(t, y)
	if err := dial(y.Hosts[0], y.Hosts[1]); err != nil {
		t.Error(err)
	}
}

func TestOpen(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{})
	o, err := lab.Open(l.Name)
	if err != nil {
		t.Fatal(err)
	}
	wantHosts(t, o)
	if got := inside(t, o.Hosts[1], "hostname"); got != "host-b" {
		t.Errorf("hostname %q", got)
	}
	if err := l.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := lab.Open(l.Name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opened a lab that is down: %v", err)
	}
}

func TestDownLeavesNothing(t *testing.T) {
	t.Parallel()
	links := machineLinks(t)
	l := up(t, lab.Config{})
	a := l.Hosts[0]
	mustStart(t, a, "g1", "")
	// One that does not end when asked to, one that cannot even be asked.
	if err := a.Command(t.Context(), "sh", "-c", "trap '' TERM; while :; do sleep 1; done").Start(); err != nil {
		t.Fatal(err)
	}
	if err := a.Kill(t.Context(), lab.Virtlogd, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if got := machineLinks(t); !slices.Equal(got, links) {
		t.Errorf("the machine's links with a lab: %v, before: %v", got, links)
	}
	for range 2 { // again: nothing to do
		if err := l.Down(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantNothingLeft(t, l)
	}
	if got := machineLinks(t); !slices.Equal(got, links) {
		t.Errorf("the machine's links after a lab: %v, before: %v", got, links)
	}
}

func TestUpCancelled(t *testing.T) {
	needLab(t)
	t.Parallel()
	name := randomName()
	for _, after := range []int{0, 20, 60, 120, 250} {
		ctx, cancel := context.WithTimeout(t.Context(), ms(after))
		l, err := lab.Up(ctx, lab.Config{Name: name})
		cancel()
		if err == nil {
			t.Logf("up within %d ms", after)
			err = l.Down(t.Context())
			if err != nil {
				t.Error(err)
			}
		} else if !errors.Is(err, context.DeadlineExceeded) && !strings.Contains(err.Error(), "killed") {
			t.Errorf("after %d ms: %v", after, err)
		}
		wantNamedNothing(t, name)
	}
}

func TestConfigCheck(t *testing.T) {
	for _, c := range []lab.Config{
		{Name: "Upper"}, {Name: "1st"}, {Name: "a-b"}, {Name: "elevenchars"}, {Name: "../x"},
		{Hosts: -1}, {Hosts: 27},
	} {
		if err := c.Check(); err == nil {
			t.Errorf("accepted %+v", c)
		}
		if _, err := lab.Up(t.Context(), c); err == nil {
			t.Errorf("made %+v", c)
		}
	}
	if err := (lab.Config{}).Check(); err != nil {
		t.Error(err)
	}
}
