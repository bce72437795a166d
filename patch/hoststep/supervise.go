package hoststep

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"belay/agent/boottime"
	"belay/agent/maint"
)

// SuperviseArg is the first argument of a program that is to call Supervise
// with the rest of its arguments, and exit with what it returns, before it
// does anything else.
const SuperviseArg = "run-step"

const (
	// searchPath is where programs are looked for, and the step's PATH.
	searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	tokenVar   = "BELAY_STEP_TOKEN"
	// supervisorName is not belayd's: who kills belayd by name means belayd.
	supervisorName = "belay-step"
)

// errGivenUp: somebody has seen to it that the step never begins.
var errGivenUp = errors.New("it was given up before it began")

// Supervise is the supervisor of one step: when it is told to, it runs a
// command as its folder's specification says. args are the folder, and the
// number of a file to tell on that it can be told. It heeds no signal but
// SIGUSR1, which ends the step.
func Supervise(args []string) int {
	if err := supervise(args); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", supervisorName, err)
		return 1
	}
	return 0
}

func supervise(args []string) error {
	if len(args) == 0 {
		return errors.New("no folder given")
	}
	// Caught, not ignored: what is ignored stays so in the command.
	caught := make(chan os.Signal, 16)
	signal.Notify(caught, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGALRM, unix.SIGUSR1, unix.SIGUSR2)
	if err := settleIn(); err != nil {
		return err
	}
	s := &supervisor{at: place(args[0]), begin: make(chan request, 1), begun: make(chan struct{}), end: make(chan request, 1), done: make(chan struct{})}
	var err error
	if s.spec, err = s.at.spec(); err != nil {
		return err
	}
	if len(s.spec.Step.Command) == 0 {
		return errors.New("the step's specification has no command")
	}
	l, drop, err := s.at.listen()
	if err != nil {
		return err
	}
	defer l.Close()
	defer drop() // or nobody else can listen where it gives up
	// Who gives it up from now on finds somebody to tell. Nobody does where the
	// place is another one by now.
	if _, claimed, err := s.at.claimed(); err != nil || claimed {
		return errors.Join(err, errGivenUp)
	}
	if now, err := s.at.spec(); err != nil || now.Token != s.spec.Token {
		return errors.Join(err, errGivenUp)
	}
	go s.heed(caught)
	s.answering.Go(func() { s.serve(l) })
	if err := sayReady(args[1:]); err != nil {
		return err
	}

	begun, failed := s.decide()
	if begun {
		s.run()
		failed = s.at.writeResult(s.state)
	}
	close(s.done)
	drop() // before nobody listens on it: see deserted
	l.Close()
	s.answering.Wait()
	if s.pipe != nil { // a daemon that writes must neither block nor get SIGPIPE
		_, _ = io.Copy(io.Discard, s.pipe)
	}
	return failed
}

// settleIn makes this process one that a step can be started from.
func settleIn() error {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range fds {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	unix.Umask(0o022)
	_ = os.WriteFile("/proc/self/comm", []byte(supervisorName), 0)
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("0"), 0) // may be refused where it is higher
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot become a subreaper: %w", err)
	}
	return nil
}

// sayReady tells who started this process: systemd, or belayd on a pipe.
func sayReady(args []string) error {
	if _, err := daemon.SdNotify(true, daemon.SdNotifyReady); err != nil {
		return err
	}
	if len(args) == 0 {
		return nil
	}
	fd, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	ready := os.NewFile(uintptr(fd), "ready")
	_, _ = ready.Write([]byte{1}) // belayd may be dead by now
	return ready.Close()
}

type supervisor struct {
	at      place
	spec    spec
	begin   chan request  // the first one to begin the step
	begun   chan struct{} // closed when it has begun
	with    request       // what it has begun with, after begun
	started time.Time     // after begun
	out     output
	pipe    *os.File     // the read end of the command's output; nil before it is started
	end     chan request // the first one to end the step
	done    chan struct{}
	state   outcome // how it went, after done

	answering sync.WaitGroup
}

func (s *supervisor) heed(caught <-chan os.Signal) {
	for sig := range caught {
		if sig == unix.SIGUSR1 {
			first(s.end, request{Why: "its supervisor was sent SIGUSR1"})
		}
	}
}

// first passes on a request unless somebody else has asked.
func first(to chan<- request, q request) {
	select {
	case to <- q:
	default:
	}
}

func (s *supervisor) serve(l *net.UnixListener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		s.answering.Go(func() { s.answer(c) })
	}
}

func (s *supervisor) answer(c net.Conn) {
	defer c.Close()
	var q request
	_ = c.SetReadDeadline(time.Now().Add(time.Second))
	if err := json.NewDecoder(c).Decode(&q); err != nil {
		return
	}
	now := outcome{StepRun: maint.StepRun{ExitCode: -1}}
	switch q.Ask {
	case askLook:
		select {
		case <-s.begun:
			now.Started = s.started
			now.Output, now.OutputDropped = s.out.text()
		default:
		}
	case askBegin:
		first(s.begin, q)
		<-s.done
		now = s.state
	case askEnd:
		first(s.end, q)
		<-s.done
		now = s.state
	default: // whatever was meant, a look is not its answer
		return
	}
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	_ = json.NewEncoder(c).Encode(now) // who has gone can read the result's file
}

// decide waits to be told to begin, and claims the step. If it is not to begin
// it sets state to why, and sees to it that nobody begins it any more.
func (s *supervisor) decide() (begun bool, err error) {
	self, _ := look(os.Getpid())
	c, why := claim{PID: self.pid, Start: self.start}, ""
	late := false
	select {
	case s.with = <-s.begin:
		if late = s.with.Until > 0 && boottime.Now() >= s.with.Until; late {
			c, why = claim{}, "its time was over when its supervisor was told to"
		}
	case q := <-s.end:
		c, why = claim{}, q.Why
	case <-time.After(s.spec.Wait):
		c, why = claim{}, fmt.Sprintf("its supervisor waited %v to be told to", s.spec.Wait)
	}
	c.Time = time.Now()
	mine, err := s.at.claim(c)
	switch {
	case err != nil:
		s.state = never(notBegun + err.Error())
		return false, err
	case !mine:
		s.state = never(notBegun + errGivenUp.Error())
		return false, nil
	case c.PID == 0:
		s.state = never(notBegun + why)
		s.state.TimedOut = late
		return false, s.at.writeResult(s.state)
	}
	s.started = c.Time
	close(s.begun)
	return true, nil
}

// run runs the command and sets state to how it went.
func (s *supervisor) run() {
	r := &s.state
	r.Started, r.ExitCode = s.started, -1
	pid, err := s.start()
	if err != nil {
		r.Ended, r.Error = time.Now(), err.Error()
		return
	}
	read := make(chan struct{})
	go func() { defer close(read); _, _ = io.Copy(&s.out, s.pipe) }()
	exited, gone := make(chan unix.WaitStatus, 1), make(chan struct{})
	go reap(pid, exited, gone)

	var timeUp <-chan time.Time
	if s.with.Until > 0 {
		timeUp = time.After(s.with.Until - boottime.Now())
	}
	q, status, ended := s.await(exited, timeUp)
	if ended {
		r.ExitCode = exitCode(status)
		s.finish(read)
		return
	}
	left := endAll(func() []process { return descendants(os.Getpid()) }, gone, s.spec.Grace)
	var errs []string
	if r.TimedOut = q.TimedOut; !q.TimedOut {
		errs = append(errs, "ended before it was done: "+q.Why)
	}
	if r.Stuck = len(left) > 0; r.Stuck {
		errs = append(errs, stuck(left))
	}
	select {
	case status := <-exited:
		r.ExitCode = exitCode(status)
	case <-time.After(100 * time.Millisecond): // it is among those that are left
	}
	r.Error = strings.Join(errs, "; ")
	s.finish(read)
}

// await waits for the command's end, or for why it has to be ended.
func (s *supervisor) await(exited <-chan unix.WaitStatus, timeUp <-chan time.Time) (q request, status unix.WaitStatus, ended bool) {
	select {
	case status = <-exited:
		return q, status, true
	case <-timeUp:
		q.TimedOut = true
	case q = <-s.end:
	}
	select { // both at once: it has ended by itself
	case status = <-exited:
		return q, status, true
	default:
		return q, 0, false
	}
}

// finish takes over what was written before the end, without waiting for
// who may go on writing. read is closed when nobody reads the pipe any more.
func (s *supervisor) finish(read <-chan struct{}) {
	s.state.Ended = time.Now()
	_ = s.pipe.SetReadDeadline(time.Now())
	<-read
	_ = s.pipe.SetReadDeadline(time.Time{})
	var waiting int
	if c, err := s.pipe.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { waiting, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	}
	_, _ = io.CopyN(&s.out, s.pipe, int64(waiting))
	s.state.Output, s.state.OutputDropped = s.out.text()
}

// start starts the command in a session of its own.
func (s *supervisor) start() (pid int, err error) {
	step := s.spec.Step
	program, err := find(step.Command[0])
	if err != nil {
		return 0, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	var ends [2]int // not os.Pipe, whose write end would not block
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	defer unix.Close(ends[1])
	if err := unix.SetNonblock(ends[0], true); err != nil {
		return 0, err
	}
	s.pipe = os.NewFile(uintptr(ends[0]), "output")
	env := append([]string{"PATH=" + searchPath, "LANG=C.UTF-8", "HOME=/root"}, s.with.Env...)
	dir := step.Dir
	if dir == "" {
		dir = "/"
	}
	pid, err = syscall.ForkExec(program, step.Command, &syscall.ProcAttr{
		Dir:   dir,
		Env:   append(env, tokenVar+"="+s.spec.Token),
		Files: []uintptr{null.Fd(), uintptr(ends[1]), uintptr(ends[1])},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("cannot start %s in %s: %w", program, dir, err)
	}
	return pid, nil
}

// find looks a program up in searchPath.
func find(program string) (string, error) {
	if strings.Contains(program, "/") {
		return program, nil
	}
	for _, dir := range filepath.SplitList(searchPath) {
		file := filepath.Join(dir, program)
		if st, err := os.Stat(file); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", &exec.Error{Name: program, Err: exec.ErrNotFound}
}

// reap waits for every child, its own and those that it inherits as
// subreaper. gone: there is no descendant left, and there never will be.
func reap(command int, exited chan<- unix.WaitStatus, gone chan<- struct{}) {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			close(gone)
			return
		case pid == command:
			exited <- status
		}
	}
}

func exitCode(s unix.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}
