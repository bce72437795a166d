package leash

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
)

// site is a host whose guests are files, with leashes that are processes.
type site struct {
	t   *testing.T
	dir string
	*Client
	host filed
	exec *execs
}

// late is far more than anything here takes; what has to be quick is measured.
const late = 20 * time.Second

func newSite(t *testing.T) *site {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "leash") // short, and in RAM
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, dir: dir, host: filed(dir), exec: &execs{dir: dir}}
	s.Client = &Client{Dir: filepath.Join(dir, "leash"), Launcher: s.exec, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	t.Cleanup(func() {
		s.exec.endAll()
		if pid := s.pid(); pid != 0 { // started by another process of the test
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if log, err := os.ReadFile(filepath.Join(dir, "log")); err == nil && t.Failed() {
			t.Logf("the leashes' log:\n%s", log)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	for _, u := range []string{a, b, c} {
		s.set(u, "running")
	}
	return s
}

// execs is a Launcher: this test binary is the leash.
type execs struct {
	dir string

	mu      sync.Mutex
	refuse  error
	started []*exec.Cmd
	reaped  sync.WaitGroup
}

func (e *execs) Launch(_ context.Context, op maint.OpID) ([]string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.refuse != nil {
		return nil, e.refuse
	}
	cmd := exec.Command(os.Args[0], string(op))
	cmd.Env = append(os.Environ(), asLeash+"="+e.dir, asHolder+"=")
	cmd.Stderr = os.Stderr
	extra, err := os.Open(e.inherited())
	if err != nil {
		return nil, err
	}
	defer extra.Close()
	cmd.ExtraFiles = []*os.File{extra}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	e.started = append(e.started, cmd)
	e.reaped.Go(func() { _ = cmd.Wait() })
	return []string{"a test has started it"}, nil
}

// inherited is a file that every leash is born with.
func (e *execs) inherited() string { return filepath.Join(e.dir, "guest-"+a) }

func itoa(n int) string { return strconv.Itoa(n) }

func (e *execs) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.started)
}

func (e *execs) fail(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.refuse = err
}

func (e *execs) endAll() {
	e.mu.Lock()
	e.refuse = errors.New("the test is over")
	for _, cmd := range e.started {
		_ = cmd.Process.Kill()
	}
	e.mu.Unlock()
	e.reaped.Wait()
}

// pid is that of the leash that was started last, 0 for none.
func (s *site) pid() int {
	b, err := os.ReadFile(filepath.Join(s.dir, "pid"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil {
		s.t.Fatal(err)
	}
	return pid
}

// signal sends the leash one, and waits for its end or stop if it is SIGKILL or
// SIGSTOP.
func (s *site) signal(sig syscall.Signal) {
	s.t.Helper()
	pid := s.pid()
	if err := syscall.Kill(pid, sig); err != nil {
		s.t.Fatal(err)
	}
	switch sig {
	case syscall.SIGKILL:
		// Its first thread may be gone before the last.
		s.await("the leash's end", func() bool {
			threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
			return !lives(pid) && (err != nil || len(threads) == 1)
		})
	case syscall.SIGSTOP:
		s.await("the leash's stop", func() bool { return stopped(pid) })
	}
}

// lives reports whether a process is there and no zombie.
func lives(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// stopped reports whether all threads of a process stand still.
func stopped(pid int) bool {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, t := range threads {
		stat, err := os.ReadFile(t)
		if err != nil || !strings.Contains(string(stat), ") T ") {
			return false
		}
	}
	return err == nil && len(threads) > 0
}

// await waits until something is so, and gives how long that took.
func (s *site) await(what string, is func() bool) time.Duration {
	s.t.Helper()
	begun := time.Now()
	for !is() {
		if time.Since(begun) > late {
			s.t.Fatalf("%s has not come in %s", what, late)
		}
		time.Sleep(2 * time.Millisecond)
	}
	return time.Since(begun)
}

func (s *site) set(uuid, state string) {
	s.t.Helper()
	if err := s.host.set(uuid, state); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) runs(uuid string) bool {
	s.t.Helper()
	state, _, err := s.host.State(s.t.Context(), uuid)
	if err != nil {
		s.t.Fatal(err)
	}
	return state == maint.GuestRunning
}

// released waits until guests run.
func (s *site) released(uuids ...string) time.Duration {
	s.t.Helper()
	begun := time.Now()
	for _, u := range uuids {
		s.await("the release of guest "+u[:1], func() bool { return s.runs(u) })
	}
	return time.Since(begun)
}

func order(maxPause, silence time.Duration) Order {
	return Order{Op: testOp, MaxPause: maxPause, Silence: silence, Guests: []Guest{{UUID: a, Name: "guest-a"}, {UUID: b, Name: "guest-b"}, {UUID: c, Name: "guest-c"}}}
}

// hold arms a leash and pauses a and b.
func (s *site) hold(maxPause, silence time.Duration) *Line {
	s.t.Helper()
	l, err := s.Arm(s.t.Context(), order(maxPause, silence))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(l.Close)
	s.pause(l)
	return l
}

func (s *site) pause(l *Line) {
	s.t.Helper()
	for _, u := range []string{a, b} {
		s.set(u, "paused")
		l.Paused(u)
	}
	l.Left(c)
}

// resume is how a hold ends.
func (s *site) resume(l *Line) {
	s.t.Helper()
	for _, u := range []string{a, b} {
		s.set(u, "running")
		l.Released(u)
	}
}

// lost waits until the line is.
func (s *site) lost(l *Line) time.Duration {
	s.t.Helper()
	begun := time.Now()
	select {
	case <-l.Lost():
	case <-time.After(late):
		s.t.Fatal("the line is not lost")
	}
	return time.Since(begun)
}

// holder is a belayd that can be killed: it holds a and b, and renews.
func (s *site) holder(silence time.Duration) *exec.Cmd {
	s.t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), asHolder+"="+s.dir+":"+silence.String())
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	said, err := bufio.NewReader(out).ReadString('\n')
	if said != "held\n" {
		s.t.Fatalf("the holder says %q, %v", said, err)
	}
	return cmd
}

// holderProcess is that belayd.
func holderProcess(arg string) error {
	dir, silenceText, _ := strings.Cut(arg, ":")
	silence, err := time.ParseDuration(silenceText)
	if err != nil {
		return err
	}
	client := &Client{Dir: filepath.Join(dir, "leash"), Launcher: &execs{dir: dir}, Log: slog.New(slog.DiscardHandler)}
	l, err := client.Arm(context.Background(), order(time.Minute, silence))
	if err != nil {
		return err
	}
	for _, u := range []string{a, b} {
		if err := filed(dir).set(u, "paused"); err != nil {
			return err
		}
		l.Paused(u)
	}
	l.Left(c)
	// Heard by the leash: its answer to this comes after those.
	if _, err := l.Events(context.Background()); err != nil {
		return err
	}
	fmt.Println("held")
	return nil
}
