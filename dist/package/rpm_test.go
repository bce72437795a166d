package package_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// newChroot is a root folder that rpm installs into, scripts and all: it has this machine's
// /usr, over which what is installed is laid, and no systemd runs in it.
func newChroot(t *testing.T) system {
	t.Helper()
	needs(t, "rpm", "unshare", "systemd-sysusers", "systemd-tmpfiles")
	if os.Geteuid() != 0 {
		t.Skip("rpm installs as root only")
	}
	s := system{t, t.TempDir()}
	for _, dir := range []string{"usr", "run", "proc", "dev", "tmp", "var/lib", "etc/systemd/system", ".layer/usr", ".layer/work"} {
		if err := os.MkdirAll(filepath.Join(s.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+name, filepath.Join(s.root, name)); err != nil {
			t.Fatal(err)
		}
	}
	s.write("/etc/group", "root:x:0:\n")
	s.write("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
	if out, err := s.rpm("-q", "--all"); err != nil {
		t.Skipf("nothing can be laid over /usr here: %v\n%s", err, out)
	}
	return s
}

// rpm runs it in a mount namespace of its own, of which nothing is left. Dependencies do not
// count: the machine that tests is another distribution's.
func (s system) rpm(args ...string) (string, error) {
	s.t.Helper()
	const script = `cd "$1" && shift
mount -t overlay belay -o lowerdir=/usr,upperdir=.layer/usr,workdir=.layer/work usr && mount --rbind /proc proc && mount --bind /dev dev
exec rpm --root "$PWD" "$@"`
	return output(s.t, nil, "unshare", append([]string{"--mount", "--propagation", "private", "sh", "-ec", script, "sh", s.root}, args...)...)
}

func (s system) mustRPM(args ...string) {
	s.t.Helper()
	out, err := s.rpm(args...)
	if err != nil || strings.Contains(out, "scriptlet failed") || strings.Contains(out, "error:") {
		s.t.Fatalf("rpm %v: %v\n%s", args, err, out)
	}
}

// TestRPMLifecycle: its scripts do what those of the Debian package do.
func TestRPMLifecycle(t *testing.T) {
	t.Parallel()
	s := newChroot(t)
	const belayd = ".layer/usr/sbin/belayd"
	s.mustRPM("-i", "--nodeps", one(t, older, "belay-1*.rpm"))
	if !strings.Contains(s.read("/etc/group"), "belay:x:") {
		t.Error("there is no group belay")
	}
	if !s.has("/run/belay") || !s.has(belayd) {
		t.Error("there is no folder /run/belay, or no belayd")
	}

	s.write(journal, "journal")
	s.write("/etc/belay/belayd.toml", "host = 'host-a'\n")
	s.mustRPM("-U", "--nodeps", one(t, newer, "belay-1*.rpm"))
	if got := s.read("/etc/belay/belayd.toml"); got != "host = 'host-a'\n" {
		t.Errorf("the upgrade changes the configuration: %s", got)
	}

	for _, held := range []string{notes, "/run/belay/vmm/6e8f3f6a-0000-4000-8000-000000000001/order", "/var/lib/belay/memory/6e8f3f6a-0000-4000-8000-000000000001.save"} {
		s.write(held, "{}")
		out, err := s.rpm("-e", "belay")
		if err == nil || !strings.Contains(out, filepath.Dir(held)) || !strings.Contains(out, "belay ops abort") {
			t.Errorf("with %s it is removed: %v\n%s", held, err, out)
		}
		if out, err := s.rpm("-q", "belay"); err != nil || !s.has(belayd) {
			t.Fatalf("with %s half of it is removed: %v %s", held, err, out)
		}
		if err := os.Remove(filepath.Join(s.root, held)); err != nil {
			t.Fatal(err)
		}
	}

	s.mustRPM("-e", "belay")
	if s.has(belayd) || s.has("/etc/libvirt/hooks/qemu.d/belay") {
		t.Error("it is removed, and is there")
	}
	if s.read(journal) != "journal" || s.read("/etc/belay/belayd.toml.rpmsave") != "host = 'host-a'\n" {
		t.Error("its removal takes the journal or the configuration away")
	}
}

func TestGuestRPMLifecycle(t *testing.T) {
	t.Parallel()
	s := newChroot(t)
	const program = ".layer/usr/sbin/belay-guest"
	s.mustRPM("-i", "--nodeps", one(t, newer, "belay-guest-*.rpm"))
	if !s.has(program) {
		t.Error("there is no belay-guest")
	}
	s.mustRPM("-e", "belay-guest")
	if s.has(program) {
		t.Error("it is removed, and is there")
	}
}
