package package_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// system is a root folder that dpkg installs into, as when an image is put together:
// nothing runs in it, and no script enters it (DPKG_ROOT).
type system struct {
	t    *testing.T
	root string
}

func newSystem(t *testing.T) system {
	t.Helper()
	needs(t, "dpkg", "deb-systemd-helper", "systemd-sysusers", "systemd-tmpfiles")
	if os.Geteuid() != 0 {
		t.Skip("dpkg installs as root only")
	}
	s := system{t, t.TempDir()}
	for _, dir := range []string{"var/lib/dpkg/updates", "var/lib/dpkg/info", "etc/systemd/system", "run"} {
		if err := os.MkdirAll(filepath.Join(s.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.write("/var/lib/dpkg/status", "")
	s.write("/etc/group", "root:x:0:\n")
	s.write("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
	return s
}

func (s system) write(name, text string) {
	s.t.Helper()
	path := filepath.Join(s.root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

func (s system) read(name string) string {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.root, name))
	if err != nil {
		s.t.Error(err)
	}
	return string(b)
}

func (s system) has(name string) bool {
	_, err := os.Lstat(filepath.Join(s.root, name))
	return err == nil
}

// dpkg fails as it does where dependencies are not counted.
func (s system) dpkg(args ...string) (string, error) {
	s.t.Helper()
	return output(s.t, []string{"DEBIAN_FRONTEND=noninteractive"}, "dpkg", append([]string{"--root=" + s.root, "--force-depends", "--force-not-root",
		"--force-script-chrootless", "--force-confdef", "--force-confold", "--log=/dev/null"}, args...)...)
}

func (s system) mustDpkg(args ...string) string {
	s.t.Helper()
	out, err := s.dpkg(args...)
	if err != nil {
		s.t.Fatalf("dpkg %v: %v\n%s", args, err, out)
	}
	return out
}

const (
	wanted  = "/etc/systemd/system/multi-user.target.wants/belayd.service"
	journal = "/var/lib/belay/journal.db"
	notes   = "/run/belay/leash/hold-1.json"
)

// TestLifecycle: what the operator has changed is kept, what guests need is there as long
// as there is one to need it, and in the end nothing is left.
func TestLifecycle(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.mustDpkg("-i", one(t, older, "belay_*.deb"))
	if !s.has(wanted) {
		t.Error("belayd is not enabled")
	}
	if !s.has("/etc/systemd/system/sockets.target.wants/belay-kernel.socket") {
		t.Error("belay-kernel's socket is not enabled")
	}
	if !strings.Contains(s.read("/etc/group"), "belay:x:") {
		t.Error("there is no group belay")
	}
	if !s.has("/run/belay") {
		t.Error("there is no folder /run/belay")
	}

	s.write(journal, "journal")
	s.write("/etc/belay/belayd.toml", "host = 'host-a'\n")
	if err := os.Remove(filepath.Join(s.root, wanted)); err != nil { // systemctl disable
		t.Fatal(err)
	}
	s.mustDpkg("-i", one(t, newer, "belay_*.deb"))
	if s.has(wanted) {
		t.Error("the upgrade enables belayd again")
	}
	if got := s.read("/etc/belay/belayd.toml"); got != "host = 'host-a'\n" {
		t.Errorf("the upgrade changes the configuration: %s", got)
	}
	if got := s.read(journal); got != "journal" {
		t.Errorf("the upgrade changes the journal: %s", got)
	}

	for _, held := range []string{notes, "/run/belay/vmm/6e8f3f6a-0000-4000-8000-000000000001/order", "/run/belay-twin/run/qemu/web-1.pid", "/var/lib/belay/memory/6e8f3f6a-0000-4000-8000-000000000001.save"} {
		s.write(held, "{}")
		out, err := s.dpkg("-r", "belay")
		if err == nil || !strings.Contains(out, filepath.Dir(held)) || !strings.Contains(out, "belay ops abort") {
			t.Errorf("with %s it is removed: %v\n%s", held, err, out)
		}
		if !s.has("/usr/sbin/belayd") || !s.has("/usr/sbin/belay-leash") || !strings.Contains(s.read("/var/lib/dpkg/status"), "install ok installed") {
			t.Fatalf("with %s half of it is removed:\n%s", held, out)
		}
		if err := os.Remove(filepath.Join(s.root, held)); err != nil {
			t.Fatal(err)
		}
	}

	// What a change of kernel leaves that has come to its end is no reason to stay.
	s.write("/var/lib/belay/memory/manifest.json", "{}")
	s.write("/var/lib/belay/memory/6e8f3f6a-0000-4000-8000-000000000001.mark", "{}")
	s.mustDpkg("-r", "belay")
	if s.has("/usr/sbin/belayd") || s.has("/usr/lib/systemd/system/belayd.service") {
		t.Error("it is removed, and is there")
	}
	if !s.has(journal) || s.read("/etc/belay/belayd.toml") != "host = 'host-a'\n" {
		t.Error("its removal takes the journal or the configuration away")
	}

	s.mustDpkg("-i", one(t, newer, "belay_*.deb"))
	if s.has(wanted) {
		t.Error("installed again, belayd is enabled, which the operator had disabled")
	}
	s.mustDpkg("-r", "belay")
	s.mustDpkg("-P", "belay")
	for _, name := range []string{"/var/lib/belay", "/run/belay", "/etc/belay", "/etc/libvirt", "/etc/needrestart", "/etc/systemd/system/belayd.service", "/etc/systemd/system/belay-kernel.socket"} {
		if s.has(name) {
			t.Errorf("it is purged, and %s is there", name)
		}
	}
}

// A host on which guests are held, and whose package was taken away all the same, keeps
// what the next belayd needs.
func TestPurgeWhileHeld(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.mustDpkg("-i", one(t, newer, "belay_*.deb"))
	s.mustDpkg("-r", "belay")
	s.write(journal, "journal")
	s.write(notes, "{}")
	if out := s.mustDpkg("-P", "belay"); !strings.Contains(out, "hold-1") || !s.has(journal) || !s.has(notes) {
		t.Errorf("the journal is there: %v, the leash's notes: %v\n%s", s.has(journal), s.has(notes), out)
	}
}

// The reserved memory is a file system of its own, which a purge neither empties nor stumbles over.
func TestPurgeBesideReservedMemory(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.mustDpkg("-i", one(t, newer, "belay_*.deb"))
	const file = "/var/lib/belay/memory/manifest.json"
	s.write(file, "")
	memory := filepath.Join(s.root, filepath.Dir(file))
	if err := unix.Mount("tmpfs", memory, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("nothing can be mounted here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(memory, 0) })
	s.write(file, "{}")
	s.write(journal, "journal")
	s.mustDpkg("-P", "belay")
	if !s.has(file) || s.has(journal) {
		t.Errorf("the memory is there: %v, the journal: %v", s.has(file), s.has(journal))
	}
}

// What the operator has put into the folder of keys is the operator's.
func TestPurgeKeepsKeys(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.mustDpkg("-i", one(t, newer, "belay_*.deb"))
	const key = "/etc/belay/pki/host-key.pem"
	s.write(key, "key")
	s.mustDpkg("-P", "belay")
	if !s.has(key) {
		t.Error("the host's key is gone")
	}
}

func TestGuestLifecycle(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	const wanted = "/etc/systemd/system/multi-user.target.wants/belay-guest.service"
	s.mustDpkg("-i", one(t, newer, "belay-guest_*.deb"))
	if !s.has(wanted) {
		t.Error("belay-guest is not enabled")
	}
	if out, err := s.dpkg("-i", one(t, newer, "belay_*.deb")); err == nil || !strings.Contains(out, "conflict") {
		t.Errorf("a host's package can be installed beside it: %v\n%s", err, out)
	}
	s.mustDpkg("-P", "belay-guest")
	if s.has(wanted) || s.has("/usr/sbin/belay-guest") {
		t.Error("it is purged, and is there")
	}
}
