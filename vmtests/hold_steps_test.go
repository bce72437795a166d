package vmtests

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"belay/agent/maint"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
)

// nasty is a step that does not do what it should, and what comes of it.
type nasty struct {
	name   string
	step   string // of a shell; $0 is the trail
	verify string
	undo   string // "": one that says so
	// during is done by the harness when the step has said its first word.
	during   func(context.Context, *trial) error
	maxPause time.Duration // default 3 s
	outcome  maint.Outcome
	code     int  // belay's
	fired    bool // the leash had to release the guests
	slack    time.Duration
	short    bool // of the short form: package hoststep's own tests have the others, but for guests
	check    func(*testing.T, *trial)
}

// TestHoldNastySteps runs what nobody should run while guests are held.
func TestHoldNastySteps(t *testing.T) {
	t.Parallel()
	w := newWard(t, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	before := w.look(ctx)
	const maxPause = 3 * time.Second

	restartLibvirtd := func(after time.Duration) func(context.Context, *trial) error {
		return func(ctx context.Context, e *trial) error {
			// The step has killed it, which StartDaemon has to have seen.
			for pid := 1; pid != 0; sleep(ctx, 5*time.Millisecond) {
				var err error
				if pid, err = e.DaemonPID(lab.Libvirtd); err != nil || ctx.Err() != nil {
					return fmt.Errorf("libvirtd is not killed: %w, %w", err, ctx.Err())
				}
			}
			sleep(ctx, after)
			return e.StartDaemon(ctx, lab.Libvirtd)
		}
	}
	restartBelayd := func(ctx context.Context, e *trial) error {
		sleep(ctx, restartAfter)
		if err := e.Kill(); err != nil { // which it is; now the harness knows
			return err
		}
		return e.Start(ctx)
	}
	// shutDown is what systemd does at a shutdown that goes no further. A leash
	// that is told to end releases at once.
	shutDown := func(ctx context.Context, e *trial) error {
		for _, pid := range e.processes(leashComm) {
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
				return err
			}
		}
		if err := e.Stop(); err != nil {
			return err
		}
		return e.Start(ctx)
	}
	reboot := filepath.Join(w.Dir, "reboot") // does as systemctl reboot does: it returns at once
	if err := os.WriteFile(reboot, []byte("#!/bin/sh\nexit 0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	stepped := func(f func(t *testing.T, run maint.StepRun)) func(*testing.T, *trial) {
		return func(t *testing.T, e *trial) {
			if e.op.Held == nil || e.op.Held.Step == nil {
				t.Fatalf("nothing is told of the step: %s", indent(e.op))
			}
			f(t, *e.op.Held.Step)
		}
	}
	gone := func(t *testing.T, e *trial) {
		if pids := w.processes("nasty-daemon"); len(pids) > 0 {
			t.Errorf("what the step has started is still there: %v", pids)
			endAll(pids)
		}
	}
	daemon := filepath.Join(w.Dir, "nasty-daemon")
	const forks = `#!/usr/bin/perl
use POSIX;
$SIG{$_} = "IGNORE" for qw(TERM INT HUP QUIT USR1 USR2 PIPE CHLD);
%ENV = ();
exit 0 if fork;
setsid();
exit 0 if fork;
sleep 1000 while 1;
`
	if err := os.WriteFile(daemon, []byte(forks), 0o755); err != nil {
		t.Fatal(err)
	}

	for _, n := range []nasty{
		{name: "exits with 3", short: true, step: `echo begin >>$0; exit 3`, outcome: maint.OutcomeFailed, code: 3},
		{name: "hangs and heeds no signal", short: true, step: `trap "" TERM INT HUP; echo begin >>$0; while :; do sleep 0.05; done`,
			outcome: maint.OutcomeFailed, code: 137, check: stepped(func(t *testing.T, r maint.StepRun) {
				if !r.TimedOut {
					t.Errorf("%+v", r)
				}
			})},
		{name: "leaves a daemon behind", short: true, step: `echo begin >>$0; ` + daemon + `; echo end >>$0`, outcome: maint.OutcomeDone},
		{name: "hides a daemon and hangs", step: `echo begin >>$0; ` + daemon + `; sleep 1000`,
			outcome: maint.OutcomeFailed, code: 143, check: gone},
		{name: "floods", step: `echo begin >>$0; head -c 104857600 /dev/zero; echo end >>$0`, maxPause: 20 * time.Second,
			outcome: maint.OutcomeDone, check: stepped(func(t *testing.T, r maint.StepRun) {
				if all := uint64(len(r.Output)) + r.OutputDropped; all < 100<<20 || len(r.Output) > 1<<20 {
					t.Errorf("%d bytes kept, %d left out", len(r.Output), r.OutputDropped)
				}
			})},
		{name: "floods without an end", step: `echo begin >>$0; trap "" TERM; cat /dev/zero`, outcome: maint.OutcomeFailed, code: 137},
		{name: "writes garbage", step: `echo begin >>$0; head -c 3000 /dev/urandom; printf '\377\376\000\033[2J\n'; echo end >>$0`,
			outcome: maint.OutcomeDone, check: stepped(func(t *testing.T, r maint.StepRun) {
				if !utf8.ValidString(r.Output) || len(r.Output) < 1000 {
					t.Errorf("output of %d bytes, valid: %t", len(r.Output), utf8.ValidString(r.Output))
				}
			})},
		{name: "does not verify", short: true, step: `echo begin >>$0; echo end >>$0`, verify: "exit 7", outcome: maint.OutcomeFailed, code: 1,
			check: func(t *testing.T, e *trial) {
				if e.op.Held.Verify == nil || e.op.Held.Verify.ExitCode != 7 {
					t.Errorf("verify: %+v", e.op.Held.Verify)
				}
			}},
		{name: "verifies for ever", step: `echo begin >>$0; echo end >>$0`, verify: "sleep 1000", outcome: maint.OutcomeFailed, code: 1},
		{name: "takes long to undo", step: `echo begin >>$0; exit 5`, undo: "sleep 6; echo undo >>TRAIL", outcome: maint.OutcomeFailed, code: 5,
			check: func(t *testing.T, e *trial) {
				if took := e.op.Held.Undo.Ended.Sub(e.op.Held.Undo.Started); took < 6*time.Second {
					t.Errorf("the undo was ended after %s", took)
				}
			}},
		{name: "kills libvirtd", step: fmt.Sprintf(`echo begin >>$0; kill -9 %s; echo end >>$0`, pidOf(w, lab.Libvirtd)),
			during: restartLibvirtd(500 * time.Millisecond), outcome: maint.OutcomeDone, slack: tolerance},
		{name: "kills libvirtd for good", short: true, step: fmt.Sprintf(`echo begin >>$0; kill -9 %s; echo end >>$0`, pidOf(w, lab.Libvirtd)),
			during: restartLibvirtd(maxPause + tolerance), outcome: maint.OutcomePartly, code: 4, fired: true, slack: tolerance},
		{name: "kills belayd", short: true, step: `echo begin >>$0; kill -9 $(cat $0.belayd); sleep 1; echo end >>$0`,
			during: restartBelayd, outcome: maint.OutcomeFailed, code: 1, slack: tolerance},
		{name: "reboots", step: reboot + `; echo begin >>$0; sleep 1; echo end >>$0`,
			during: shutDown, outcome: maint.OutcomeFailed, code: 143, fired: true},
	} {
		if !n.short && !long() {
			continue
		}
		t.Run(n.name, func(t *testing.T) {
			w.t = t
			e := w.try(ctx, strings.ReplaceAll(n.name, " ", "-"))
			if err := os.WriteFile(string(e.trail)+".belayd", []byte(fmt.Sprint(w.PID())), 0o600); err != nil {
				t.Fatal(err)
			}
			pause := cmp.Or(n.maxPause, maxPause)
			undo := n.undo
			if undo == "" {
				undo = "echo undo >>TRAIL"
			}
			args := []string{"--all", "--max-pause", pause.String(), "--undo", strings.ReplaceAll(undo, "TRAIL", string(e.trail))}
			if n.verify != "" {
				args = append(args, "--verify", n.verify)
			}
			done := make(chan error, 1)
			go func() {
				if n.during == nil {
					done <- nil
					return
				}
				for len(e.trail.words()) == 0 && ctx.Err() == nil {
					sleep(ctx, 2*time.Millisecond)
				}
				done <- n.during(ctx, e)
			}()
			e.hold(ctx, append(args, "--", "sh", "-c", n.step, string(e.trail))...)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			e.end(ctx)
			if n.name == "leaves a daemon behind" { // as a restarted service does
				pids := w.processes("nasty-daemon")
				if len(pids) != 1 {
					t.Errorf("the daemon: %v", pids)
				}
				endAll(pids)
			}
			wrong := e.wrong(ctx, func(observer.Gap) time.Duration { return pause + n.slack })
			if e.op.Outcome != n.outcome || e.result.Code != n.code || e.fired() != n.fired {
				wrong = append(wrong, fmt.Sprintf("outcome %q, exit code %d, the leash fired: %t; want %q, %d, %t", e.op.Outcome, e.result.Code, e.fired(), n.outcome, n.code, n.fired))
			}
			if n.outcome == maint.OutcomeFailed && !slices.Contains(e.trail.words(), "undo") {
				wrong = append(wrong, "it was not undone")
			}
			t.Logf("%q, exit code %d, stood still for %s (noise %s), %s in all: %v; %s", e.op.Outcome, e.result.Code, e.gap.Round(time.Millisecond),
				e.noise.Round(time.Millisecond), time.Since(e.begun).Round(time.Millisecond), e.op.Problems, e.clocks())
			if len(wrong) > 0 {
				t.Fatal(e.everything(wrong))
			}
			if n.check != nil {
				n.check(t, e)
			}
		})
		w.t = t
		if t.Failed() {
			return
		}
	}
	w.same(before, w.look(ctx))
}

// pidOf is a shell's word for a daemon's process, when it comes to it.
func pidOf(w *ward, d lab.Daemon) string {
	return "$(cat " + w.Path("/run/"+string(d)+".pid") + ")"
}

func endAll(pids []int) {
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}
