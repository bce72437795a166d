package hoststep_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/hoststep"
)

func TestItEndsByItself(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	for i, c := range []struct {
		script string
		code   int
		output string
	}{
		{"exit 0", 0, ""},
		{"exit 3", 3, ""},
		{"exit 255", 255, ""},
		{"kill -9 $$", 137, ""},
		{"kill -SEGV $$", 139, ""},
		{"echo a; echo b >&2; echo c; echo d >&2", 0, "a\nb\nc\nd\n"},
		{"printf 'a\\377\\376b'; exit 1", 1, "a\uFFFDb"},
		{"exec >&- 2>&-; sleep 0.1; exit 4", 4, ""},
		{"exec >&-; echo still heard >&2; exit 5", 5, "still heard\n"},
		{"cat; read x || exit 6", 6, ""},                                                                 // stdin is at its end
		{"for s in TERM INT HUP QUIT ALRM USR2 PIPE; do kill -$s $PPID; done; sleep 0.1; exit 7", 7, ""}, // as pkill would
		{"cat /proc/$PPID/comm", 0, "belay-step\n"},
	} {
		name := fmt.Sprintf("mig-%d-step", i)
		run := h.sh(t.Context(), name, c.script)
		h.wantEnded(run, c.code)
		if run.Output != c.output || run.OutputDropped != 0 {
			t.Errorf("%s: output %q, %d dropped; want %q", c.script, run.Output, run.OutputDropped, c.output)
		}
		again, err := h.Look(t.Context(), name)
		if err != nil || again.ExitCode != c.code || again.Output != c.output || !again.Ended.Equal(run.Ended) {
			t.Errorf("%s: Look gives %+v, %v; Run gave %+v", c.script, again, err, run)
		}
		if left, err := h.Leftover(t.Context(), name); left || err != nil {
			t.Errorf("%s: Leftover says %v, %v", c.script, left, err)
		}
	}
}

func TestItCannotBeStarted(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	folder := t.TempDir()
	script := filepath.Join(folder, "script")
	if err := os.WriteFile(script, []byte("#!/no/such/shell\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for i, c := range []struct {
		ctx  context.Context
		step maint.HostStep
		env  string
		want string
	}{
		{t.Context(), maint.HostStep{Command: []string{"/no/such/program"}}, "", "no such file"},
		{t.Context(), maint.HostStep{Command: []string{"no-such-program"}}, "", "not found"},
		{t.Context(), maint.HostStep{Command: []string{script}}, "", "no such file"},
		{t.Context(), maint.HostStep{Command: []string{folder}}, "", "permission denied"},
		{t.Context(), maint.HostStep{Command: []string{"true"}, Dir: "/no/such/folder"}, "", "/no/such/folder"},
		{t.Context(), maint.HostStep{Command: []string{"bin/true"}}, "", "relative"},
		{t.Context(), maint.HostStep{}, "", "nothing to do"},
		{t.Context(), maint.HostStep{Command: []string{"true"}, Unit: "x.service"}, "", "both"},
		{t.Context(), maint.HostStep{Unit: "x.service"}, "", "systemd does not run"},
		{t.Context(), shell("exit 0"), "LD_PRELOAD=/tmp/x", "LD_PRELOAD"},
		{t.Context(), shell("exit 0"), "BELAY_STEP_TOKEN=x", "BELAY_STEP_TOKEN"},
		{gone, shell("exit 0"), "", "not begun"},
	} {
		env := []string{h.mark}
		if c.env != "" {
			env = append(env, c.env)
		}
		run := h.Run(c.ctx, fmt.Sprintf("mig-%d", i), c.step, env)
		h.wantError(run, c.want)
		if run.ExitCode != -1 || run.TimedOut {
			t.Errorf("%+v: got %+v", c.step, run)
		}
	}
	for _, name := range []string{"", ".", "..", "../x", "a/b", "-x", "a b", strings.Repeat("x", 101), "a\x00"} {
		h.wantError(h.sh(t.Context(), name, "exit 0"), "cannot be a step's name")
	}
}

// TestWhatItIsGiven reads a step's surroundings from the inside.
func TestWhatItIsGiven(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	leak, err := os.Open("/dev/null") // one that is not closed on exec
	if err != nil {
		t.Fatal(err)
	}
	defer leak.Close()
	if _, err := unix.FcntlInt(leak.Fd(), unix.F_SETFD, 0); err != nil {
		t.Fatal(err)
	}
	run := h.sh(t.Context(), "mig-1-step", `
		tr '\0' '\n' </proc/$$/environ | grep -v -e TOKEN -e BELAY_TEST | sort
		umask; pwd -P
		grep -e SigIgn -e SigBlk /proc/self/status # the shell's own are blocked while it forks
		ls /proc/$$/fd | tr '\n' ' '; readlink /proc/$$/fd/0
		cut -d' ' -f 5-8 /proc/$$/stat | sed "s/^$$ $$/leader/"
		cat /proc/$$/oom_score_adj
		grep flags /proc/$$/fdinfo/1`)
	h.wantEnded(run, 0)
	want := []string{"HOME=/root", "LANG=C.UTF-8", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"0022", "/", "SigBlk:\t0000000000000000", "SigIgn:\t0000000000000000", "0 1 2 /dev/null", "leader 0 -1", "0", "flags:\t01"}
	got := strings.Split(strings.TrimSpace(run.Output), "\n")
	got = append(got[:0:0], got...)
	for i := 0; i < len(got); i++ {
		// What make starts ignores signal 32, the C library's own.
		got[i] = strings.Replace(got[i], "SigIgn:\t0000000080000000", "SigIgn:\t0000000000000000", 1)
		if strings.HasPrefix(got[i], "PWD=") || strings.HasPrefix(got[i], "OLDPWD=") { // the shell's own
			got = append(got[:i], got[i+1:]...)
		}
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	folder, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	step := shell(`pwd -P; echo $BELAY_OP`)
	step.Dir = folder
	run = h.Run(t.Context(), "mig-2-step", step, []string{h.mark, "BELAY_OP=mig-2"})
	if run.Output != folder+"\nmig-2\n" {
		t.Errorf("in its folder: %+v", run)
	}
}

// wild forks in every way there is, and nothing of it heeds SIGTERM.
const wild = `
	trap "" TERM HUP INT
	(setsid env -i sh -c 'trap "" TERM; exec <&- >&- 2>&-; while :; do sleep 0.2; done' "BELAY_TEST=$BELAY_TEST" &)
	setsid setsid sh -c 'trap "" TERM; (while :; do sleep 0.2; done) & while :; do sleep 0.2; done' &
	(kill -STOP $(sh -c 'echo $PPID'); exec sleep 100) &
	echo $$ >$1
	while :; do sleep 0.2; done`

func TestItsTimeIsUp(t *testing.T) {
	t.Parallel()
	for name, run := range map[string]func(h *host, file string) maint.StepRun{
		"the context's": func(h *host, file string) maint.StepRun {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			return h.sh(ctx, "mig-1-step", wild, file)
		},
		"the step's own": func(h *host, file string) maint.StepRun {
			step := shell(wild, file)
			step.Timeout = time.Second
			return h.Run(t.Context(), "mig-1-step", step, []string{h.mark})
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, nil)
			begun := time.Now()
			r := run(h, filepath.Join(t.TempDir(), "pid"))
			if !r.TimedOut || r.Error != "" || r.ExitCode != 137 || r.OK() {
				t.Errorf("got %+v, want it to be timed out and killed", r)
			}
			if took := time.Since(begun); took < time.Second || took > 3*time.Second {
				t.Errorf("it took %v", took)
			}
			if left := h.ofSteps(); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestItIsCancelled(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	for name, c := range map[string]struct {
		script string
		code   int
	}{
		"heeds":   {`echo $$ >$1; exec sleep 100`, 143},
		"lies":    {`trap 'exit 0' TERM; echo $$ >$1; while :; do sleep 0.1; done`, 0},
		"stopped": {`trap 'exit 9' TERM; echo $$ >$1; kill -STOP $$; exec sleep 100`, 9},
		"ignores": {wild, 137},
		"storm":   {`trap "" TERM; echo $$ >$1; while :; do setsid sleep 100 & sleep 0.01; done`, 137},
	} {
		file := filepath.Join(t.TempDir(), "pid")
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() {
			readPID(t, file)
			cancel(errors.New("the operator aborted it"))
		}()
		run := h.sh(ctx, "mig-"+name, c.script, file)
		h.wantError(run, "the operator aborted it")
		if run.TimedOut || run.ExitCode != c.code {
			t.Errorf("%s: %+v", name, run)
		}
		if left := h.ofSteps(); len(left) > 0 {
			t.Errorf("%s: left: %v", name, left)
		}
	}
}

// TestADaemonLivesOn: it holds the output, writes to it for ever, and is not
// waited for, blocked or killed.
func TestADaemonLivesOn(t *testing.T) {
	t.Parallel()
	for name, daemon := range map[string]string{
		"silent":  `exec sleep 100`,
		"writing": `while :; do echo I write; sleep 0.01; done`,
		"flood":   `exec yes`,
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, nil)
			file := filepath.Join(t.TempDir(), "pid")
			begun := time.Now()
			run := h.sh(t.Context(), "mig-1-step", `setsid sh -c 'echo $$ >$1.new; mv $1.new $1; '"$2" sh "$1" & while ! test -s $1; do sleep 0.01; done; echo done`, file, daemon)
			h.wantEnded(run, 0)
			if took := time.Since(begun); took > 5*time.Second {
				t.Errorf("it took %v", took)
			}
			if name == "silent" && run.Output != "done\n" {
				t.Errorf("output %q", run.Output)
			}
			pid := readPID(t, file)
			if left, err := h.Leftover(t.Context(), "mig-1-step"); left || err != nil {
				t.Errorf("Leftover: %v, %v", left, err)
			}
			if err := h.End(t.Context(), "mig-1-step"); err != nil { // it has ended: nothing to end
				t.Error(err)
			}
			if err := h.Forget("mig-1-step"); err != nil {
				t.Error(err)
			}
			switches := func() string {
				b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
				return string(b)
			}
			before := switches()
			if name != "silent" { // it is not blocked
				eventually(t, "the daemon has run again", func() bool { return switches() != before })
			}
			if !alive(pid) {
				t.Error("the daemon has been killed")
			}
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestItFloods(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	const lines = 2_000_000
	run := h.sh(t.Context(), "mig-1-step", fmt.Sprintf("echo the beginning; seq %d; echo the end >&2; exit 3", lines))
	h.wantEnded(run, 3)
	if !strings.HasPrefix(run.Output, "the beginning\n1\n2\n") || !strings.HasSuffix(run.Output, strconv.Itoa(lines)+"\nthe end\n") {
		t.Errorf("output begins %q, ends %q", run.Output[:30], run.Output[len(run.Output)-30:])
	}
	var total int
	for i, digits, next := 1, 1, 10; i <= lines; i++ {
		if i == next {
			digits, next = digits+1, next*10
		}
		total += digits + 1
	}
	total += len("the beginning\nthe end\n")
	notice := fmt.Sprintf("\n[%d bytes left out]\n", run.OutputDropped)
	if got := len(run.Output) - len(notice) + int(run.OutputDropped); got != total || !strings.Contains(run.Output, notice) {
		t.Errorf("kept and dropped make %d bytes, it wrote %d", got, total)
	}
	if len(run.Output) > 65<<10 || !utf8.ValidString(run.Output) {
		t.Errorf("%d bytes are kept", len(run.Output))
	}

	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	begun := time.Now()
	run = h.sh(ctx, "mig-2-step", `trap "" TERM; cat /dev/zero & cat /dev/urandom >&2 & yes`)
	if !run.TimedOut || run.Error != "" || run.OutputDropped == 0 || !utf8.ValidString(run.Output) {
		t.Errorf("an endless flood: timed out %v, %q, dropped %d", run.TimedOut, run.Error, run.OutputDropped)
	}
	if took := time.Since(begun); took > 4*time.Second {
		t.Errorf("it took %v to end it", took)
	}
}

func TestItIsSeenWhileItRuns(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	if _, err := h.Look(t.Context(), "mig-1-step"); !errors.Is(err, hoststep.ErrUnknown) {
		t.Errorf("before it was asked for: %v", err)
	}
	file := filepath.Join(t.TempDir(), "go")
	done := make(chan maint.StepRun)
	go func() {
		done <- h.sh(t.Context(), "mig-1-step", `echo one; while ! test -e $1; do sleep 0.02; done; echo two`, file)
	}()
	eventually(t, "its first line is seen", func() bool {
		run, err := h.Look(t.Context(), "mig-1-step")
		return err == nil && run.Output == "one\n" && run.Ended.IsZero() && !run.Started.IsZero() && !run.OK()
	})
	if left, err := h.Leftover(t.Context(), "mig-1-step"); !left || err != nil {
		t.Errorf("while it runs: %v, %v", left, err)
	}
	if err := h.Forget("mig-1-step"); err == nil {
		t.Error("it was forgotten while it ran")
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	run := <-done
	h.wantEnded(run, 0)
	if run.Output != "one\ntwo\n" {
		t.Errorf("output %q", run.Output)
	}
	if err := h.Forget("mig-1-step"); err != nil {
		t.Error(err)
	}
	if _, err := h.Look(t.Context(), "mig-1-step"); !errors.Is(err, hoststep.ErrUnknown) {
		t.Errorf("after it was forgotten: %v", err)
	}
}

// TestItRunsOnce, however often it is asked for under one name, also at once.
func TestItRunsOnce(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	file := filepath.Join(t.TempDir(), "log")
	first := h.sh(t.Context(), "mig-1-step", `echo x >>$1; exit 3`, file)
	again := h.sh(t.Context(), "mig-1-step", `echo x >>$1; exit 4`, file)
	h.wantEnded(first, 3)
	h.wantEnded(again, 3)
	if b, err := os.ReadFile(file); err != nil || string(b) != "x\n" {
		t.Errorf("it ran %q, %v", b, err)
	}

	file = filepath.Join(t.TempDir(), "log")
	runs := make(chan maint.StepRun)
	for range 5 {
		go func() { runs <- h.sh(t.Context(), "mig-2-step", `echo x >>$1; sleep 0.2`, file) }()
	}
	for range 5 { // one that comes too early makes all of them not begun
		if run := <-runs; !run.OK() && !strings.Contains(run.Error, "not begun") && !strings.Contains(run.Error, "cannot start") {
			t.Errorf("%+v", run)
		}
	}
	if b, _ := os.ReadFile(file); len(b) > len("x\n") {
		t.Errorf("it ran %q", b)
	}
}
