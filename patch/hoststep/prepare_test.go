package hoststep_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/hoststep"
)

// asPreparing is a belayd that prepares a step and lives until its input ends:
// DIR NAME WAIT COMMAND…
func asPreparing(args []string) int {
	wait, err := time.ParseDuration(args[2])
	if err != nil {
		return 1
	}
	r := hoststep.New(hoststep.Config{Dir: args[0], Wait: wait})
	if err := r.Prepare(context.Background(), args[1], maint.HostStep{Command: args[3:]}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("prepared")
	_, _ = os.Stdin.Read(make([]byte, 1))
	return 0
}

// preparing starts a belayd of its own that has prepared a script.
func (h *host) preparing(name string, wait time.Duration, script string, args ...string) *exec.Cmd {
	h.t.Helper()
	self, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	c := exec.Command(self, append([]string{"prepare-as-belayd", h.dir, name, wait.String(), "sh", "-c", script, "step"}, args...)...)
	c.Stderr = os.Stderr
	if _, err := c.StdinPipe(); err != nil {
		h.t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	if said, err := bufio.NewReader(out).ReadString('\n'); err != nil || said != "prepared\n" {
		h.t.Fatalf("it said %q, %v", said, err)
	}
	return c
}

func (h *host) prepare(name, script string, args ...string) {
	h.t.Helper()
	if err := h.Prepare(h.t.Context(), name, shell(script, args...)); err != nil {
		h.t.Fatal(err)
	}
}

// supervisor is the one process that waits in a step's folder.
func (h *host) supervisor(name string) int {
	h.t.Helper()
	all := scan(func(_, line []byte) bool {
		return bytes.HasPrefix(line, []byte("belay-step\x00")) && bytes.Contains(line, []byte(filepath.Join(h.dir, name)))
	})
	if len(all) != 1 {
		h.t.Fatalf("the supervisors of %s are %v", name, all)
	}
	return all[0].pid
}

func (h *host) gone(pid int) {
	h.t.Helper()
	eventually(h.t, "the supervisor is gone", func() bool { return !alive(pid) })
}

// wantNever says that a step has not begun, and cannot any more.
func (h *host) wantNever(name, file string, parts ...string) {
	h.t.Helper()
	run, err := h.Look(h.t.Context(), name)
	if err != nil {
		h.t.Error(err)
	}
	h.wantError(run, append(parts, "not begun")...)
	h.wantError(h.sh(h.t.Context(), name, "exit 0"), "not begun")
	if begun, err := h.Begun(name); begun || err != nil {
		h.t.Errorf("Begun: %v, %v", begun, err)
	}
	if left, err := h.Leftover(h.t.Context(), name); left || err != nil {
		h.t.Errorf("Leftover: %v, %v", left, err)
	}
	if _, err := os.Stat(file); err == nil {
		h.t.Error("the step was run")
	}
	if err := h.Forget(name); err != nil {
		h.t.Error(err)
	}
}

// TestPrepared begins when it is told to, in the process that waited for it.
func TestPrepared(t *testing.T) {
	t.Parallel()
	for name, systemd := range map[string]hoststep.Systemd{"child": nil, "unit": &fakeSystemd{t: t}} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, systemd)
			file := filepath.Join(t.TempDir(), "ran")
			h.prepare("mig-1-step", `touch $1; echo $PPID $BELAY_GUESTS; exit 3`, file)
			supervisor := h.supervisor("mig-1-step")
			if now, err := h.Look(t.Context(), "mig-1-step"); err != nil || !now.Started.IsZero() || !now.Ended.IsZero() || now.OK() {
				t.Errorf("Look: %+v, %v", now, err)
			}
			if begun, err := h.Begun("mig-1-step"); begun || err != nil {
				t.Errorf("Begun: %v, %v", begun, err)
			}
			if left, err := h.Leftover(t.Context(), "mig-1-step"); !left || err != nil { // it may begin
				t.Errorf("Leftover: %v, %v", left, err)
			}
			if err := h.Prepare(t.Context(), "mig-1-step", shell("exit 0")); err == nil {
				t.Error("it was prepared twice")
			}
			if _, err := os.Stat(file); err == nil {
				t.Error("it has begun already")
			}
			told := time.Now()
			run := h.Run(t.Context(), "mig-1-step", shell("exit 4"), []string{h.mark, "BELAY_GUESTS=a b"})
			h.wantEnded(run, 3)
			if want := fmt.Sprintf("%d a b\n", supervisor); run.Output != want {
				t.Errorf("output %q, want %q", run.Output, want)
			}
			if run.Started.Before(told.Round(0)) {
				t.Errorf("started at %v, it was told to at %v", run.Started, told)
			}
			if begun, err := h.Begun("mig-1-step"); !begun || err != nil {
				t.Errorf("Begun in the end: %v, %v", begun, err)
			}
			h.gone(supervisor)
		})
	}
}

// TestItsTimeCountsFromTheBeginning, not from when it was prepared.
func TestItsTimeCountsFromTheBeginning(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	quick, slow := shell("exit 3"), shell("exec sleep 100")
	quick.Timeout, slow.Timeout = time.Second, 100*time.Millisecond
	for name, step := range map[string]maint.HostStep{"mig-1-step": quick, "mig-2-step": slow} {
		if err := h.Prepare(t.Context(), name, step); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(quick.Timeout)
	h.wantEnded(h.Run(t.Context(), "mig-1-step", quick, []string{h.mark}), 3)
	run := h.Run(t.Context(), "mig-2-step", slow, []string{h.mark})
	if took := run.Ended.Sub(run.Started); !run.TimedOut || run.ExitCode != 143 || took < 90*time.Millisecond {
		t.Errorf("got %+v after %v", run, took)
	}
}

// TestItCannotBePrepared: nothing is left of it, and the name is free.
func TestItCannotBePrepared(t *testing.T) {
	t.Parallel()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	ends := &fakeSystemd{t: t}
	for name, c := range map[string]struct {
		ctx  context.Context
		cfg  hoststep.Config
		step maint.HostStep
		want string
	}{
		"no step":              {t.Context(), hoststep.Config{}, maint.HostStep{}, "nothing to do"},
		"too late":             {gone, hoststep.Config{}, shell("exit 0"), "not begun"},
		"a unit, no systemd":   {t.Context(), hoststep.Config{}, maint.HostStep{Unit: "x.service"}, "systemd does not run"},
		"its supervisor ends":  {t.Context(), hoststep.Config{Systemd: ends, Program: "/bin/false"}, shell("exit 0"), "failed"},
		"there is no such one": {t.Context(), hoststep.Config{Systemd: ends, Program: "/no/such/program"}, shell("exit 0"), "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, nil)
			c.cfg.Dir = h.dir
			if err := hoststep.New(c.cfg).Prepare(c.ctx, "mig-1-step", c.step); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if _, err := os.Stat(filepath.Join(h.dir, "mig-1-step")); !os.IsNotExist(err) {
				t.Errorf("its folder: %v", err)
			}
			out, err := exec.Command("/proc/self/exe", hoststep.SuperviseArg, filepath.Join(h.dir, "mig-1-step")).CombinedOutput()
			if err == nil || !strings.Contains(string(out), "not there") { // a supervisor that comes late
				t.Errorf("the late supervisor: %v, %s", err, out)
			}
			h.wantEnded(h.sh(t.Context(), "mig-1-step", "exit 3"), 3)
		})
	}
	f := &fakeSystemd{t: t}
	h := newHost(t, f)
	if err := h.Prepare(t.Context(), "mig-1-step", maint.HostStep{Unit: "x.service"}); err != nil || f.jobs() > 0 {
		t.Errorf("a unit's job: %v; asked for %d", err, f.jobs())
	}
}

// TestItIsNeverBegun by a belayd that thought better of it.
func TestItIsNeverBegun(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		give func(h *host, name string)
		want string
	}{
		"ended": {func(h *host, name string) {
			if err := h.End(h.t.Context(), name); err != nil {
				h.t.Error(err)
			}
		}, "given up"},
		"stopped": {func(h *host, name string) { // systemctl stop
			if err := unix.Kill(h.supervisor(name), unix.SIGUSR1); err != nil {
				h.t.Error(err)
			}
			eventually(h.t, "it has ended", func() bool {
				run, err := h.Look(h.t.Context(), name)
				return err == nil && !run.Ended.IsZero()
			})
		}, "SIGUSR1"},
		"cancelled": {func(h *host, name string) {
			ctx, cancel := context.WithCancelCause(h.t.Context())
			cancel(errors.New("the operator aborted it"))
			h.wantError(h.sh(ctx, name, "exit 0"), "not begun", "the operator aborted it")
		}, "the operator aborted it"},
		"too late": {func(h *host, name string) {
			ctx, cancel := context.WithTimeout(h.t.Context(), 0)
			defer cancel()
			if run := h.sh(ctx, name, "exit 0"); !run.TimedOut {
				h.t.Errorf("got %+v", run)
			}
		}, "deadline"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, nil)
			file := filepath.Join(t.TempDir(), "ran")
			h.prepare("mig-1-step", `touch $1`, file)
			supervisor := h.supervisor("mig-1-step")
			c.give(h, "mig-1-step")
			h.gone(supervisor)
			h.wantNever("mig-1-step", file, c.want)
		})
	}
}

// TestBelaydIsKilledBeforeItBegins: the supervisor goes by itself, or when the
// next belayd says so.
func TestBelaydIsKilledBeforeItBegins(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	file := filepath.Join(t.TempDir(), "ran")
	kill(t, h.preparing("mig-1-step", time.Hour, `touch $1`, file))
	supervisor := h.supervisor("mig-1-step")
	if err := h.End(t.Context(), "mig-1-step"); err != nil {
		t.Error(err)
	}
	h.gone(supervisor)
	h.wantNever("mig-1-step", file, "given up")

	kill(t, h.preparing("mig-2-step", 500*time.Millisecond, `touch $1`, file))
	eventually(t, "nothing waits", func() bool { return len(h.processes()) == 0 })
	h.wantNever("mig-2-step", file, "waited 500ms")
}

// TestBelaydIsKilledAsItTellsItToBegin: the word is on its way, and the
// supervisor hears it only when belayd is dead.
func TestBelaydIsKilledAsItTellsItToBegin(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	begin := func(name, file string, until time.Duration) (supervisor int) {
		h.prepare(name, `echo x >>$1; exit 3`, file)
		supervisor = h.supervisor(name)
		stop(t, supervisor)
		c, err := net.Dial("unix", h.sock(name))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintf(c, `{"ask":"begin","env":[%q],"until_boottime_ns":%d}`, h.mark, until); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		return supervisor
	}
	wake := func(supervisor int) {
		if err := unix.Kill(supervisor, unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(t.TempDir(), "ran")
	wake(begin("mig-1-step", file, 0))
	h.wantEnded(h.sh(t.Context(), "mig-1-step", "exit 4"), 3)
	if ran, err := os.ReadFile(file); err != nil || string(ran) != "x\n" {
		t.Errorf("it ran %q, %v", ran, err)
	}

	file = filepath.Join(t.TempDir(), "ran")
	supervisor := begin("mig-2-step", file, 0)
	if err := h.End(t.Context(), "mig-2-step"); err != nil { // the claim is ours
		t.Error(err)
	}
	wake(supervisor)
	h.gone(supervisor)
	h.wantNever("mig-2-step", file, "given up")

	// When the time is over the guests run again.
	supervisor = begin("mig-3-step", file, time.Nanosecond)
	wake(supervisor)
	h.gone(supervisor)
	if run, err := h.Look(t.Context(), "mig-3-step"); err != nil || !run.TimedOut {
		t.Errorf("Look: %+v, %v", run, err)
	}
	h.wantNever("mig-3-step", file, "its time was over")
}

// TestWhatIsHalfRemoved by a belayd that died is removed by the next one.
func TestWhatIsHalfRemoved(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	gone := filepath.Join(h.dir, ".gone-X")
	if err := os.MkdirAll(filepath.Join(gone, "below"), 0o700); err != nil {
		t.Fatal(err)
	}
	h.wantEnded(h.sh(t.Context(), "mig-1-step", "exit 3"), 3)
	if _, err := os.Stat(gone); !os.IsNotExist(err) {
		t.Errorf("it is there: %v", err)
	}
}

// sock is a path of the step's socket that is short enough.
func (h *host) sock(name string) string {
	h.t.Helper()
	d, err := os.Open(filepath.Join(h.dir, name))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { d.Close() })
	return fmt.Sprintf("/proc/self/fd/%d/sock", d.Fd())
}

// TestItsSupervisorIsKilledWhileItWaits: another one begins the step.
func TestItsSupervisorIsKilledWhileItWaits(t *testing.T) {
	t.Parallel()
	f := &fakeSystemd{t: t}
	for name, systemd := range map[string]hoststep.Systemd{"child": nil, "unit": f} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, systemd)
			file := filepath.Join(t.TempDir(), "ran")
			const script = `echo x >>$1; echo $PPID; exit 3`
			want := func(run maint.StepRun, dead int) {
				t.Helper()
				h.wantEnded(run, 3)
				if ran, err := os.ReadFile(file); err != nil || string(ran) != "x\n" || run.Output == fmt.Sprintln(dead) {
					t.Errorf("it ran %q, %v, and said %q", ran, err, run.Output)
				}
				if err := os.Remove(file); err != nil {
					t.Error(err)
				}
			}
			h.prepare("mig-1-step", script, file)
			supervisor := h.supervisor("mig-1-step")
			kill9(t, supervisor)
			h.gone(supervisor)
			want(h.sh(t.Context(), "mig-1-step", "exit 4"), supervisor)

			// And while it is told to begin.
			h.prepare("mig-2-step", script, file)
			supervisor = h.supervisor("mig-2-step")
			stop(t, supervisor)
			done := make(chan maint.StepRun)
			go func() { done <- h.sh(t.Context(), "mig-2-step", "exit 4") }()
			eventually(t, "it is being told", func() bool {
				all, err := os.ReadFile("/proc/net/unix") // its listener, and each connection
				return err == nil && strings.Count(string(all), fmt.Sprintf("/sock-%d\n", supervisor)) == 2
			})
			kill9(t, supervisor)
			want(<-done, supervisor)
		})
	}
	if len(f.started) != 4 {
		t.Errorf("started %+v", f.started)
	}

	// Nothing is begun when no other can be had.
	h := newHost(t, f)
	file := filepath.Join(t.TempDir(), "ran")
	h.prepare("mig-3-step", `touch $1`, file)
	kill9(t, h.supervisor("mig-3-step"))
	next := hoststep.New(hoststep.Config{Dir: h.dir, Systemd: f, Program: "/bin/false"})
	h.wantError(next.Run(t.Context(), "mig-3-step", shell("exit 4"), []string{h.mark}), "cannot start the step", "failed")
	if begun, err := h.Begun("mig-3-step"); begun || err != nil {
		t.Errorf("Begun: %v, %v", begun, err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("the step was run")
	}
}

func kill9(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// stop stops a process, and returns when each of its threads stands still.
func stop(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it stands still", func() bool {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		return err == nil && len(threads) > 0 && !slices.ContainsFunc(threads, func(stat string) bool {
			b, err := os.ReadFile(stat)
			_, state, _ := strings.Cut(string(b), ") ")
			return err == nil && !strings.HasPrefix(state, "T")
		})
	})
}

// TestItsFolderIsFull before it is prepared, or before it begins.
func TestItsFolderIsFull(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	if err := os.MkdirAll(h.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("belay-test", h.dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(h.dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	file := filepath.Join(t.TempDir(), "ran")
	h.prepare("mig-1-step", `touch $1`, file)
	supervisor := h.supervisor("mig-1-step")
	full := filepath.Join(h.dir, "full")
	if err := os.WriteFile(full, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("it is not full: %v", err)
	}
	h.wantError(h.sh(t.Context(), "mig-1-step", "exit 0"), "not begun", "no space")
	h.gone(supervisor)
	if err := h.Prepare(t.Context(), "mig-2-step", shell("exit 0")); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("prepared on a full disk: %v", err)
	}
	if _, err := os.Stat(filepath.Join(h.dir, "mig-2-step")); !os.IsNotExist(err) {
		t.Errorf("its folder: %v", err)
	}
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	if err := h.End(t.Context(), "mig-1-step"); err != nil {
		t.Error(err)
	}
	h.wantNever("mig-1-step", file)
}
