package launch

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// bootScript makes a host of namespaces over the machine's files, whose process
// 1 is systemd. Its arguments are a cgroup to be in and a folder that both see.
const bootScript = `
set -e
echo $$ >"$1/cgroup.procs"
exec unshare --pid --mount --uts --ipc --net --cgroup --fork sh -ec '
	shared=$1
	mount --make-rprivate /
	mount -t tmpfs tmpfs /mnt
	mkdir /mnt/up /mnt/work /mnt/root
	mount -t overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work overlay /mnt/root
	cd /mnt/root
	mount -t proc proc proc
	mount -t tmpfs tmpfs run
	mount -t sysfs -o ro sysfs sys
	mount -t cgroup2 cgroup2 sys/fs/cgroup
	mount --rbind /dev dev
	mkdir -p "./$shared"
	mount --bind "$shared" "./$shared"
	rm -rf etc/systemd/system usr/lib/systemd/system-generators etc/fstab
	mkdir etc/systemd/system
	printf "[Unit]\nDescription=Nothing\nDefaultDependencies=no\n" >etc/systemd/system/default.target
	pivot_root . mnt
	umount -l /mnt
	exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin /usr/lib/systemd/systemd --log-target=console --show-status=no
' sh "$2"
`

// booted is a host with a real systemd.
type booted struct {
	t      *testing.T
	pid    int // of its process 1
	shared string
}

// boot starts one, and ends it with the test. It is left out where tests that
// need a lab are.
func boot(t *testing.T) *booted {
	t.Helper()
	if testing.Short() || os.Getenv("BELAY_LAB") == "skip" {
		t.Skip("needs namespaces and systemd")
	}
	root, err := unified()
	if err != nil {
		t.Skip(err)
	}
	shared, err := os.MkdirTemp("", "leash-systemd-")
	if err != nil {
		t.Fatal(err)
	}
	group := filepath.Join(root, filepath.Base(shared))
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Skip(err)
	}
	cmd := exec.Command("sh", "-c", bootScript, "sh", group, shared)
	log, err := os.Create(filepath.Join(shared, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	b := &booted{t: t, shared: shared}
	t.Cleanup(func() {
		if b.pid != 0 {
			_ = syscall.Kill(b.pid, syscall.SIGKILL) // and with it all of the host
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if said, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("systemd says:\n%s", said)
		}
		removeCgroup(t, group)
		if err := os.RemoveAll(shared); err != nil {
			t.Error(err)
		}
	})
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if children, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/task/" + strconv.Itoa(cmd.Process.Pid) + "/children"); err == nil {
			b.pid, _ = strconv.Atoi(strings.TrimSpace(string(children)))
		}
		if b.pid != 0 {
			if out, _ := b.run("systemctl", "is-system-running"); out == "running" || out == "degraded" {
				return b
			}
		}
		if time.Now().After(end) {
			t.Fatal("systemd does not come up")
		}
	}
}

// removeCgroup removes a cgroup when the last process in it is gone.
func removeCgroup(t *testing.T, dir string) {
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		var dirs []string
		_ = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append([]string{path}, dirs...)
			}
			return nil
		})
		err = nil
		for _, d := range dirs {
			err = errors.Join(err, os.Remove(d))
		}
		if err == nil {
			return
		}
	}
	t.Error(err)
}

// command prepares a program to run in the host.
func (b *booted) command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--target", strconv.Itoa(b.pid), "--pid", "--mount", "--cgroup", "--net", "--"}, args...)...)
}

func (b *booted) run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := b.command(ctx, args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (b *booted) must(args ...string) string {
	b.t.Helper()
	out, err := b.run(args...)
	if err != nil {
		b.t.Fatalf("%q: %v: %s", args, err, out)
	}
	return out
}

// TestRealSystemd has a real systemd start the unit, as belayd.service does,
// and does to both what a host step may do.
func TestRealSystemd(t *testing.T) {
	b := boot(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(b.shared, "said")
	program := filepath.Join(b.shared, "program") // the machine's /tmp is not to be relied on
	text, err := os.ReadFile(self)
	if err == nil {
		err = os.WriteFile(program, text, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	const unit = "belay-leash-hold-1.service"
	show := func(property string) string { return b.must("systemctl", "show", "--value", "-p", property, unit) }

	b.must("systemd-run", "--unit=belayd", "-p", "StandardOutput=file:"+b.shared+"/belayd", program, "belayd", file)
	if line := said(t, filepath.Join(b.shared, "belayd"), 1)[0]; line != "launched [] <nil>" {
		t.Fatal(line)
	}
	first := pidIn(t, said(t, file, 1)[0])
	for property, want := range map[string]string{
		"ActiveState": "active", "Slice": "belay.slice", "ControlGroup": "/belay.slice/" + unit, "Restart": "on-failure", "RestartUSec": "100ms",
		"StartLimitIntervalUSec": "0", "TimeoutStopUSec": "1min 30s", "OOMScoreAdjust": "-1000", "Nice": "-20", "CollectMode": "inactive-or-failed",
		"DefaultDependencies": "yes", "Type": "exec", "LimitMEMLOCK": "infinity", "WorkingDirectory": "/", "UMask": "0077", "MainPID": strconv.Itoa(first),
	} {
		if got := show(property); got != want {
			t.Errorf("%s=%s, want %s", property, got, want)
		}
	}

	// belayd is stopped: the leash stays.
	b.must("systemctl", "stop", "belayd.service")
	if got := show("MainPID"); got != strconv.Itoa(first) {
		t.Errorf("with belayd's end its process is %s, was %d", got, first)
	}

	// It is killed: systemd starts it again, however often.
	for n := 2; n < 12; n++ {
		begun := time.Now()
		b.must("systemctl", "kill", "--signal=KILL", unit)
		said(t, file, n)
		if took := time.Since(begun); took > 30*time.Second {
			t.Errorf("it was back after %s", took)
		}
	}

	// A belayd that comes back finds it there.
	b.must("systemd-run", "--unit=belayd2", "-p", "StandardOutput=file:"+b.shared+"/belayd2", program, "belayd", file)
	if line := said(t, filepath.Join(b.shared, "belayd2"), 1)[0]; line != "launched [] <nil>" {
		t.Fatal(line)
	}
	if n := len(said(t, file, 1)); n != 11 {
		t.Errorf("started %d times, want 11", n)
	}

	// The host shuts down: it is told, and may take its time.
	b.must("systemctl", "stop", unit)
	if lines := said(t, file, 12); lines[11] != "told" {
		t.Errorf("it is not told: %q", lines)
	}
	if got := show("LoadState"); got != "not-found" {
		t.Errorf("when it has ended the unit is %s", got)
	}
}
