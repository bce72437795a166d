package hoststep_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/hoststep"
)

// TestMain makes the test's program a supervisor, and a belayd that can be
// killed while it runs a step.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == hoststep.SuperviseArg {
		os.Exit(hoststep.Supervise(os.Args[2:]))
	}
	if len(os.Args) > 2 && os.Args[1] == "run-as-belayd" {
		os.Exit(asBelayd(os.Args[2:]))
	}
	if len(os.Args) > 2 && os.Args[1] == "prepare-as-belayd" {
		os.Exit(asPreparing(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// asBelayd runs a step as a process of its own: DIR NAME TIMEOUT ENV COMMAND…
func asBelayd(args []string) int {
	r := hoststep.New(hoststep.Config{Dir: args[0]})
	timeout, err := time.ParseDuration(args[2])
	if err != nil {
		return 1
	}
	run := r.Run(context.Background(), args[1], maint.HostStep{Command: args[4:], Timeout: timeout}, []string{args[3]})
	if err := json.NewEncoder(os.Stdout).Encode(run); err != nil {
		return 1
	}
	return 0
}

// host is where a test's steps run. When the test ends nothing of them may be
// there any more.
type host struct {
	*hoststep.Runner
	t    *testing.T
	dir  string
	mark string // in every step's environment
}

func newHost(t *testing.T, systemd hoststep.Systemd) *host {
	t.Helper()
	h := &host{t: t, dir: filepath.Join(t.TempDir(), "steps"), mark: "BELAY_TEST=" + rand.Text()}
	h.Runner = hoststep.New(hoststep.Config{Dir: h.dir, Systemd: systemd, Grace: 200 * time.Millisecond})
	t.Cleanup(func() {
		eventually(t, "nothing is left", func() bool { return len(h.processes())+len(children(t, "Z")) == 0 })
		for _, p := range h.processes() {
			t.Errorf("left behind: %s", p)
			_ = unix.Kill(p.pid, unix.SIGKILL)
		}
	})
	return h
}

// sh runs a shell script as a step.
func (h *host) sh(ctx context.Context, name, script string, args ...string) maint.StepRun {
	return h.Run(ctx, name, shell(script, args...), []string{h.mark})
}

func shell(script string, args ...string) maint.HostStep {
	return maint.HostStep{Command: append([]string{"sh", "-c", script, "step"}, args...)}
}

type found struct {
	pid  int
	line string
}

func (f found) String() string { return fmt.Sprintf("%d %s", f.pid, f.line) }

// processes are the steps' processes and their supervisors, wherever they
// have gone.
func (h *host) processes() []found {
	return scan(func(env, line []byte) bool {
		return h.marks(env, line) || bytes.Contains(line, []byte(h.dir))
	})
}

// ofSteps are the steps' processes only.
func (h *host) ofSteps() []found { return scan(h.marks) }

func (h *host) marks(env, line []byte) bool {
	return bytes.Contains(env, []byte(h.mark)) || bytes.Contains(line, []byte(h.mark))
}

func scan(want func(env, line []byte) bool) (all []found) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		env, _ := os.ReadFile(d + "/environ")
		line, _ := os.ReadFile(d + "/cmdline")
		pid, _ := strconv.Atoi(filepath.Base(d))
		if len(line) > 0 && pid != os.Getpid() && want(env, line) {
			all = append(all, found{pid, string(bytes.ReplaceAll(line, []byte{0}, []byte{' '}))})
		}
	}
	return all
}

// children are this process's own in a state.
func children(t *testing.T, state string) (pids []int) {
	t.Helper()
	dirs, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, d := range dirs {
		b, _ := os.ReadFile(d)
		_, after, _ := strings.Cut(string(b), ") ")
		f := strings.Fields(after)
		if len(f) > 1 && f[0] == state && f[1] == strconv.Itoa(os.Getpid()) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(d)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// eventually waits for what no event tells of.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("in 20 seconds it did not come about that %s", what)
			return
		}
	}
}

// readPID waits until a step has written a number into a file.
func readPID(t *testing.T, file string) (pid int) {
	t.Helper()
	eventually(t, file+" has a number", func() bool {
		b, _ := os.ReadFile(file)
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		pid = n
		return err == nil && bytes.HasSuffix(b, []byte("\n"))
	})
	return pid
}

func alive(pid int) bool { return unix.Kill(pid, 0) == nil }

func (h *host) wantEnded(run maint.StepRun, code int) {
	h.t.Helper()
	if run.ExitCode != code || run.TimedOut || run.Error != "" || run.OK() != (code == 0) || run.Started.IsZero() || run.Ended.Before(run.Started) {
		h.t.Errorf("got %+v, want an end by itself with %d", run, code)
	}
}

func (h *host) wantError(run maint.StepRun, parts ...string) {
	h.t.Helper()
	for _, part := range parts {
		if run.OK() || !strings.Contains(run.Error, part) {
			h.t.Errorf("got %+v, want an error with %q", run, part)
		}
	}
}

// belayd starts a belayd of its own that runs a script as a step.
func (h *host) belayd(name string, timeout time.Duration, script string, args ...string) *exec.Cmd {
	h.t.Helper()
	self, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	c := exec.Command(self, append([]string{"run-as-belayd", h.dir, name, timeout.String(), h.mark, "sh", "-c", script, "step"}, args...)...)
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	return c
}
