package hoststep_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/hoststep"
)

// fakeSystemd starts units as its own children, with sd_notify(3), and does
// to its other units what a test says.
type fakeSystemd struct {
	t         *testing.T
	job       func(ctx context.Context, unit, job string) (string, error)
	lookError error

	mu      sync.Mutex
	units   map[string]hoststep.UnitState
	asked   []string
	started []hoststep.Transient
	killed  []string
}

func (f *fakeSystemd) set(unit string, s hoststep.UnitState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.units[unit] = s
}

// jobs gives how many jobs were asked for.
func (f *fakeSystemd) jobs() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.asked)
}

func (f *fakeSystemd) Unit(_ context.Context, unit string) (hoststep.UnitState, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.units[unit], f.lookError
}

func (f *fakeSystemd) Job(ctx context.Context, unit, job string) (string, error) {
	f.mu.Lock()
	f.asked = append(f.asked, job+" "+unit)
	f.mu.Unlock()
	return f.job(ctx, unit, job)
}

func (f *fakeSystemd) Kill(ctx context.Context, unit string) error {
	if _, bounded := ctx.Deadline(); !bounded {
		f.t.Errorf("a systemd that hangs would be waited for to kill %s", unit)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.killed = append(f.killed, unit)
	return nil
}

func (f *fakeSystemd) Start(ctx context.Context, u hoststep.Transient) error {
	f.mu.Lock()
	f.started = append(f.started, u)
	f.mu.Unlock()
	at := filepath.Join(f.t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer l.Close()
	c := &exec.Cmd{Path: u.Program, Args: u.Args, Env: []string{"NOTIFY_SOCKET=" + at}, SysProcAttr: &unix.SysProcAttr{Setsid: true}}
	if err := c.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	ready := make(chan string, 1)
	go func() {
		b := make([]byte, 100)
		n, _ := l.Read(b)
		ready <- string(b[:n])
	}()
	select {
	case said := <-ready:
		if said != "READY=1" {
			return errors.New("it said " + said)
		}
		return nil
	case err := <-ended:
		return errors.Join(errors.New("failed"), err)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TestInATransientUnit runs the same supervisor as the tests without systemd
// do, started by another.
func TestInATransientUnit(t *testing.T) {
	t.Parallel()
	f := &fakeSystemd{t: t}
	h := newHost(t, f)
	run := h.sh(t.Context(), "mig-1-step", `echo "[$NOTIFY_SOCKET]"; exit 3`)
	h.wantEnded(run, 3)
	if run.Output != "[]\n" {
		t.Errorf("output %q", run.Output)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	run = h.sh(ctx, "mig-2-step", wild, filepath.Join(t.TempDir(), "pid"))
	if !run.TimedOut || run.Error != "" || run.ExitCode != 137 {
		t.Errorf("got %+v", run)
	}
	if left := h.ofSteps(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if len(f.killed) > 0 {
		t.Errorf("systemd was asked to kill %v", f.killed)
	}
	// systemctl stop
	run = h.sh(t.Context(), "mig-3-step", `kill -USR1 $PPID; exec sleep 100`)
	h.wantError(run, "SIGUSR1")
	// Its supervisor is killed: systemd knows what is left.
	run = h.sh(t.Context(), "mig-4-step", `kill -9 $PPID; exec sleep 100`)
	h.wantError(run, "not known")
	if !slices.Equal(f.killed, []string{"belay-step-mig-4-step.service"}) {
		t.Errorf("systemd was asked to kill %v", f.killed)
	}
	if u := f.started[0]; u.Unit != "belay-step-mig-1-step.service" || u.Args[0] != "belay-step" || u.StopTimeout < 2*time.Second {
		t.Errorf("started %+v", u)
	}
}

func TestATransientUnitDoesNotStart(t *testing.T) {
	t.Parallel()
	f := &fakeSystemd{t: t}
	h := &host{t: t, dir: filepath.Join(t.TempDir(), "steps"), mark: "BELAY_TEST=x"}
	h.Runner = hoststep.New(hoststep.Config{Dir: h.dir, Systemd: f, Program: "/bin/false"})
	run := h.sh(t.Context(), "mig-1-step", "exit 0")
	h.wantError(run, "cannot start the step", "failed")
	if again, err := h.Look(t.Context(), "mig-1-step"); err != nil || again.Error != run.Error {
		t.Errorf("Look: %+v, %v", again, err)
	}
	if left, err := h.Leftover(t.Context(), "mig-1-step"); left || err != nil {
		t.Errorf("Leftover: %v, %v", left, err)
	}
}

var (
	runs     = hoststep.UnitState{Load: "loaded", Active: "active", Sub: "running", Type: "notify", Result: "success", Invocation: "a"}
	again    = hoststep.UnitState{Load: "loaded", Active: "active", Sub: "running", Type: "notify", Result: "success", Invocation: "b"}
	failing  = hoststep.UnitState{Load: "loaded", Active: "failed", Sub: "failed", Type: "notify", Result: "exit-code", Invocation: "b"}
	crashing = hoststep.UnitState{Load: "loaded", Active: "activating", Sub: "auto-restart", Type: "simple", Result: "signal", Invocation: "b"}
	stopped  = hoststep.UnitState{Load: "loaded", Active: "inactive", Sub: "dead", Type: "notify", Result: "success"}
	onceDone = hoststep.UnitState{Load: "loaded", Active: "inactive", Sub: "dead", Type: "oneshot", Result: "success", Invocation: "b"}
	stopping = hoststep.UnitState{Load: "loaded", Active: "deactivating", Sub: "stop-sigterm", Type: "notify", Result: "success", Invocation: "a", Job: 7}
)

func TestAUnitsJob(t *testing.T) {
	t.Parallel()
	for i, c := range []struct {
		job, result   string
		err           error
		after         hoststep.UnitState
		ok            bool
		output, fails string
	}{
		{"restart", "done", nil, again, true, "restart of x.service: done; it is active (running)", ""},
		{"", "done", nil, again, true, "restart of x.service: done", ""},
		{"restart", "failed", nil, failing, false, "failed; it is failed (failed), result exit-code", ""},
		{"restart", "done", nil, failing, false, "done; it is failed", ""},
		{"restart", "done", nil, crashing, false, "auto-restart", ""},
		{"restart", "done", nil, onceDone, true, "done", ""},
		{"restart", "done", nil, stopped, false, "inactive", ""},
		{"restart", "canceled", nil, again, false, "canceled", ""},
		{"restart", "dependency", nil, stopped, false, "dependency", ""},
		{"start", "done", nil, runs, true, "done", ""},
		{"reload", "done", nil, runs, true, "done", ""},
		{"reload", "failed", nil, runs, false, "failed", ""},
		{"stop", "done", nil, stopped, true, "done", ""},
		{"stop", "done", nil, failing, true, "done", ""},
		{"stop", "timeout", nil, stopping, false, "timeout; it is deactivating (stop-sigterm), job 7", ""},
		{"restart", "", errors.New("Unit x.service is masked."), runs, false, "", "cannot restart x.service: Unit x.service is masked."},
		{"restart", "", hoststep.ErrJobLost, again, true, "its result was lost; it is active", ""},
		{"restart", "", hoststep.ErrJobLost, runs, false, "lost", "not known"},
		{"restart", "", hoststep.ErrJobLost, failing, false, "failed", ""},
		{"reload", "", hoststep.ErrJobLost, runs, false, "lost", "not known"},
		{"start", "", hoststep.ErrJobLost, runs, true, "lost", ""},
		{"stop", "", hoststep.ErrJobLost, stopped, true, "lost", ""},
		{"stop", "", hoststep.ErrJobLost, runs, false, "lost", ""},
	} {
		f := &fakeSystemd{t: t, units: map[string]hoststep.UnitState{"x.service": runs}}
		f.job = func(context.Context, string, string) (string, error) {
			f.set("x.service", c.after)
			return c.result, c.err
		}
		h := newHost(t, f)
		run := h.Run(t.Context(), "mig-1-step", maint.HostStep{Unit: "x.service", Job: c.job}, nil)
		if run.OK() != c.ok || run.TimedOut || run.ExitCode > 0 || run.Ended.IsZero() || !strings.Contains(run.Output, c.output) ||
			(run.Error == "") != (c.fails == "") || !strings.Contains(run.Error, c.fails) {
			t.Errorf("%d: %+v: got %+v", i, c, run)
		}
		seen, err := h.Look(t.Context(), "mig-1-step")
		if err != nil || seen.OK() != run.OK() || seen.Output != run.Output || seen.Error != run.Error {
			t.Errorf("%d: Look gives %+v, %v", i, seen, err)
		}
		h.Run(t.Context(), "mig-1-step", maint.HostStep{Unit: "x.service", Job: c.job}, nil)
		if f.jobs() != 1 {
			t.Errorf("%d: asked for %d jobs", i, f.jobs())
		}
		if err := h.Forget("mig-1-step"); err != nil {
			t.Error(err)
		}
	}
}

// TestAUnitsJobTakesTooLong: it is left to systemd, and that is said.
func TestAUnitsJobTakesTooLong(t *testing.T) {
	t.Parallel()
	f := &fakeSystemd{t: t, units: map[string]hoststep.UnitState{"x.service": runs}}
	f.job = func(ctx context.Context, _, _ string) (string, error) {
		f.set("x.service", stopping)
		<-ctx.Done()
		return "", ctx.Err()
	}
	h := newHost(t, f)
	run := h.Run(t.Context(), "mig-1-step", maint.HostStep{Unit: "x.service", Timeout: 50 * time.Millisecond}, nil)
	if !run.TimedOut || run.OK() || run.Error != "" || !strings.Contains(run.Output, "left to systemd; it is deactivating") {
		t.Errorf("got %+v", run)
	}
	if left, err := h.Leftover(t.Context(), "mig-1-step"); !left || err != nil {
		t.Errorf("Leftover: %v, %v", left, err)
	}
	if err := h.Forget("mig-1-step"); err == nil {
		t.Error("it was forgotten")
	}
	now, err := h.Look(t.Context(), "mig-1-step")
	if err != nil || !now.Ended.IsZero() || !strings.Contains(now.Output, "deactivating") {
		t.Errorf("Look: %+v, %v", now, err)
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := h.End(short, "mig-1-step"); err == nil || !strings.Contains(err.Error(), "goes on") {
		t.Errorf("End: %v", err)
	}
	ended := make(chan error)
	go func() { ended <- h.End(t.Context(), "mig-1-step") }()
	f.set("x.service", again)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if run, err := h.Look(t.Context(), "mig-1-step"); err != nil || !run.OK() {
		t.Errorf("Look in the end: %+v, %v", run, err)
	}

	ctx, stop := context.WithCancelCause(t.Context())
	f.job = func(ctx context.Context, _, _ string) (string, error) {
		stop(errors.New("the operator aborted it"))
		<-ctx.Done()
		return "", ctx.Err()
	}
	h.wantError(h.Run(ctx, "mig-2-step", maint.HostStep{Unit: "x.service"}, nil), "the operator aborted it")
}

// TestBelaydDiesDuringAUnitsJob, which the next one sees through.
func TestBelaydDiesDuringAUnitsJob(t *testing.T) {
	t.Parallel()
	f := &fakeSystemd{t: t, units: map[string]hoststep.UnitState{"x.service": runs}}
	asked := make(chan bool)
	f.job = func(context.Context, string, string) (string, error) {
		f.set("x.service", stopping)
		asked <- true
		select {} // it died here
	}
	h := newHost(t, f)
	go h.Run(context.Background(), "mig-1-step", maint.HostStep{Unit: "x.service"}, nil)
	<-asked
	next := hoststep.New(hoststep.Config{Dir: h.dir, Systemd: f})
	if left, err := next.Leftover(t.Context(), "mig-1-step"); !left || err != nil {
		t.Errorf("Leftover: %v, %v", left, err)
	}
	done := make(chan maint.StepRun)
	go func() { done <- next.Run(t.Context(), "mig-1-step", maint.HostStep{Unit: "x.service"}, nil) }()
	f.set("x.service", again)
	if run := <-done; !run.OK() || !strings.Contains(run.Output, "its result was lost") {
		t.Errorf("got %+v", run)
	}
	if f.jobs() != 1 {
		t.Errorf("asked for %d jobs", f.jobs())
	}

	// And before it had asked: nothing is asked for any more.
	dir := filepath.Join(h.dir, "mig-2-step")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "spec.json"), []byte(`{"step":{"unit":"x.service"},"token":"T"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := next.End(t.Context(), "mig-2-step"); err != nil {
		t.Error(err)
	}
	run, err := next.Look(t.Context(), "mig-2-step")
	if err != nil || !strings.Contains(run.Error, "not begun") || f.jobs() != 1 {
		t.Errorf("Look: %+v, %v; asked for %d jobs", run, err, f.jobs())
	}
}
