package hoststep_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/hoststep"
)

// TestItKillsBelayd: the next belayd learns how it went.
func TestItKillsBelayd(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		end  string
		code int
	}{
		"and succeeds":         {"exit 0", 0},
		"and fails":            {"exit 5", 5},
		"and dies":             {"kill -9 $$", 137},
		"and closes all":       {"exec <&- >&- 2>&-; sleep 0.1; exit 6", 6},
		"and writes much more": {"seq 100000; exit 7", 7},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, nil)
			pid, on := filepath.Join(t.TempDir(), "pid"), filepath.Join(t.TempDir(), "go")
			b := h.belayd("mig-1-step", 0, `echo before; while ! test -e $1; do sleep 0.01; done; kill -9 $(cat $1); while ! test -e $2; do sleep 0.01; done; echo after; `+c.end, pid, on)
			if err := os.WriteFile(pid+".new", []byte(fmt.Sprintln(b.Process.Pid)), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(pid+".new", pid); err != nil {
				t.Fatal(err)
			}
			if err := b.Wait(); err == nil {
				t.Fatal("belayd has not been killed")
			}
			if left, err := h.Leftover(t.Context(), "mig-1-step"); !left || err != nil {
				t.Errorf("Leftover: %v, %v", left, err)
			}
			// What it wrote may still be on its way to its supervisor.
			now, err := h.Look(t.Context(), "mig-1-step")
			for end := time.Now().Add(10 * time.Second); err == nil && now.Output == "" && time.Now().Before(end); time.Sleep(time.Millisecond) {
				now, err = h.Look(t.Context(), "mig-1-step")
			}
			if err != nil || now.Output != "before\n" {
				t.Errorf("Look: %+v, %v", now, err)
			}
			if err := os.WriteFile(on, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			run := h.sh(t.Context(), "mig-1-step", "echo never run twice")
			h.wantEnded(run, c.code)
			if !strings.HasPrefix(run.Output, "before\n") || c.code < 6 && run.Output != "before\nafter\n" {
				t.Errorf("output %.100q", run.Output)
			}
			if left, err := h.Leftover(t.Context(), "mig-1-step"); left || err != nil {
				t.Errorf("Leftover in the end: %v, %v", left, err)
			}
		})
	}
}

// TestBelaydIsKilledAndTheStepEnded by the next one.
func TestBelaydIsKilledAndTheStepEnded(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	file := filepath.Join(t.TempDir(), "pid")
	b := h.belayd("mig-1-step", 0, wild, file)
	readPID(t, file)
	kill(t, b)
	if err := h.End(t.Context(), "mig-1-step"); err != nil {
		t.Error(err)
	}
	if left := h.ofSteps(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	run, err := h.Look(t.Context(), "mig-1-step")
	if err != nil || run.ExitCode != 137 || run.TimedOut || !strings.Contains(run.Error, "restart") {
		t.Errorf("Look: %+v, %v", run, err)
	}
	if left, err := h.Leftover(t.Context(), "mig-1-step"); left || err != nil {
		t.Errorf("Leftover: %v, %v", left, err)
	}
}

// TestItsTimeIsUpWithoutBelayd: the supervisor keeps the time.
func TestItsTimeIsUpWithoutBelayd(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	file := filepath.Join(t.TempDir(), "pid")
	b := h.belayd("mig-1-step", 1500*time.Millisecond, `echo $PPID >$1; trap "" TERM; setsid sleep 100 & while :; do sleep 0.1; done`, file)
	supervisor := readPID(t, file)
	kill(t, b)
	eventually(t, "the supervisor has ended the step", func() bool {
		run, err := h.Look(t.Context(), "mig-1-step")
		return err == nil && !run.Ended.IsZero() && run.TimedOut
	})
	eventually(t, "the supervisor has ended", func() bool { return !alive(supervisor) })
}

// TestItKillsItsSupervisor, in every way it can; what it leaves is ended and
// nobody claims to know how it went.
func TestItKillsItsSupervisor(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{
		"kills":           `kill -9 $PPID; exec sleep 100`,
		"kills and forks": `setsid sh -c 'trap "" TERM; while :; do sleep 0.1; done' & sleep 0.1; kill -9 $PPID; trap "" TERM; while :; do sleep 0.1; done`,
		"stops":           `kill -STOP $PPID; setsid sleep 100 & exec sleep 100`,
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, nil)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			begun := time.Now()
			run := h.sh(ctx, "mig-1-step", script)
			h.wantError(run, "not known")
			if run.ExitCode != -1 {
				t.Errorf("got %+v", run)
			}
			if took := time.Since(begun); took > 12*time.Second {
				t.Errorf("it took %v", took)
			}
			eventually(t, "nothing is left", func() bool { return len(h.processes()) == 0 })
			again, err := h.Look(t.Context(), "mig-1-step")
			if err != nil || again.Error != run.Error {
				t.Errorf("Look: %+v, %v", again, err)
			}
		})
	}
}

// TestItKillsSupervisorAndBelayd and goes on.
func TestItKillsSupervisorAndBelayd(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	file := filepath.Join(t.TempDir(), "pid")
	b := h.belayd("mig-1-step", 0, `setsid sh -c 'trap "" TERM; while :; do sleep 0.1; done' & echo $PPID >$1; exec sleep 100`, file)
	supervisor := readPID(t, file)
	stop(t, supervisor) // so that belayd cannot see it die
	kill(t, b)
	if err := unix.Kill(supervisor, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the supervisor is gone", func() bool { return !alive(supervisor) })
	if left, err := h.Leftover(t.Context(), "mig-1-step"); !left || err != nil {
		t.Errorf("Leftover: %v, %v", left, err)
	}
	if _, err := h.Look(t.Context(), "mig-1-step"); err == nil {
		t.Error("Look knows how it goes")
	}
	if err := h.End(t.Context(), "mig-1-step"); err != nil {
		t.Error(err)
	}
	if left, err := h.Leftover(t.Context(), "mig-1-step"); left || err != nil {
		t.Errorf("Leftover in the end: %v, %v", left, err)
	}
	run, err := h.Look(t.Context(), "mig-1-step")
	if err != nil {
		t.Error(err)
	}
	h.wantError(run, "not known")
}

// TestBelaydIsKilledWhileItStarts one: what had not begun never begins.
func TestBelaydIsKilledWhileItStarts(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	file := filepath.Join(t.TempDir(), "ran")
	dir := filepath.Join(h.dir, "mig-1-step")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if left, err := h.Leftover(t.Context(), "mig-1-step"); !left || err != nil { // it may begin
		t.Errorf("Leftover: %v, %v", left, err)
	}
	spec := fmt.Sprintf(`{"step":{"command":["touch",%q]},"token":"T","grace_ns":1000000}`, file)
	if err := os.WriteFile(filepath.Join(dir, "spec.json"), []byte(spec), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.End(t.Context(), "mig-1-step"); err != nil {
		t.Error(err)
	}
	run, err := h.Look(t.Context(), "mig-1-step")
	if err != nil {
		t.Error(err)
	}
	h.wantError(run, "not begun")

	self, err := os.Executable() // the supervisor comes late
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(self, hoststep.SuperviseArg, dir).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "given up") {
		t.Errorf("the late supervisor: %v, %s", err, out)
	}
	if _, err := os.Lstat(filepath.Join(dir, "sock")); !os.IsNotExist(err) { // the next one could not listen
		t.Errorf("its socket: %v", err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("the step was run")
	}
}

// TestBelaydIsKilledAtAnyTime in the first moments of a step: afterwards it
// has either never begun, or it is known how it went.
func TestBelaydIsKilledAtAnyTime(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	for i := range 25 {
		name := fmt.Sprintf("mig-%d-step", i)
		file := filepath.Join(t.TempDir(), "ran")
		b := h.belayd(name, 0, `echo x >>$1; exit 3`, file)
		time.Sleep(time.Duration(i*4) * time.Millisecond)
		_ = b.Process.Kill() // it may have ended
		_ = b.Wait()
		run := maint.StepRun{Error: "not begun"}
		if _, err := h.Look(t.Context(), name); err == nil || !strings.Contains(err.Error(), hoststep.ErrUnknown.Error()) {
			run = h.sh(t.Context(), name, `echo x >>$1; exit 4`, file)
		}
		ran, _ := os.ReadFile(file)
		switch {
		case run.Error == "" && run.ExitCode == 3 && string(ran) == "x\n":
		case strings.Contains(run.Error, "not begun") && len(ran) == 0:
		default:
			t.Errorf("killed after %d ms: %+v, and it ran %q", i*4, run, ran)
		}
		if err := h.End(t.Context(), name); err != nil {
			t.Error(err)
		}
		if err := h.Forget(name); err != nil {
			t.Error(err)
		}
	}
}

// TestItRemovesTheFolder of all steps under its own supervisor.
func TestItRemovesTheFolder(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	run := h.sh(t.Context(), "mig-1-step", `rm -r $1; exit 3`, h.dir)
	if run.ExitCode != 3 { // it was faster than who was to wait for it
		h.wantError(run, "not known")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	run = h.sh(ctx, "mig-2-step", `rm -r $1; exec sleep 100`, h.dir)
	if !run.TimedOut {
		h.wantError(run, "not known")
	}
	if left := h.ofSteps(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestItSleepsUninterruptibly: a frozen process (cgroup v1) does not end when
// it is killed, like one that waits for a dead disk.
func TestItSleepsUninterruptibly(t *testing.T) {
	t.Parallel()
	freezer := filepath.Join("/sys/fs/cgroup/freezer", "belay-test-"+strings.ToLower(filepath.Base(t.TempDir())+fmt.Sprint(os.Getpid())))
	if err := os.Mkdir(freezer, 0o755); err != nil {
		t.Skipf("no cgroup v1 freezer here: %v", err)
	}
	h := newHost(t, nil)
	t.Cleanup(func() {
		set(t, freezer, "freezer.state", "THAWED")
		eventually(t, "the cgroup is empty", func() bool { return os.Remove(freezer) == nil })
	})
	file := filepath.Join(t.TempDir(), "pid")
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		set(t, freezer, "cgroup.procs", fmt.Sprint(readPID(t, file)))
		set(t, freezer, "freezer.state", "FROZEN")
		eventually(t, "it is frozen", func() bool {
			b, _ := os.ReadFile(filepath.Join(freezer, "freezer.state"))
			return string(b) == "FROZEN\n"
		})
		cancel()
	}()
	run := h.sh(ctx, "mig-1-step", `setsid sh -c 'echo $$ >$1; exec sleep 100' sh $1 & exec sleep 100`, file)
	h.wantError(run, "context canceled", "(sleep, state D)")
	if took := run.Ended.Sub(run.Started); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	if left, err := h.Leftover(t.Context(), "mig-1-step"); !left || err != nil {
		t.Errorf("Leftover: %v, %v", left, err)
	}
	if err := h.End(t.Context(), "mig-1-step"); err == nil {
		t.Error("End says that it is ended")
	}
	set(t, freezer, "freezer.state", "THAWED")
	eventually(t, "it is gone", func() bool {
		left, err := h.Leftover(t.Context(), "mig-1-step")
		return !left && err == nil
	})
}

func set(t *testing.T, dir, file, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0); err != nil {
		t.Error(err)
	}
}

func kill(t *testing.T, c *exec.Cmd) {
	t.Helper()
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err == nil {
		t.Fatal("it ended by itself")
	}
}
