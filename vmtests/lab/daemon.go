package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Daemon is one of libvirt's daemons on a host.
type Daemon string

const (
	// Libvirtd manages the host's guests, which go on without it.
	Libvirtd Daemon = "libvirtd"
	// Virtlogd holds the other end of the guests' output.
	Virtlogd Daemon = "virtlogd"
	// Virtlockd holds the leases of the guests' disks.
	Virtlockd Daemon = "virtlockd"
)

// Daemons are all of them, in the order in which they start.
func Daemons() []Daemon { return []Daemon{Virtlogd, Virtlockd, Libvirtd} }

// answerTimeout is how long a daemon may take until it answers. It is generous:
// a machine with two cores may be running guests on both.
const answerTimeout = 60 * time.Second

// socket is the daemon's socket, inside the host.
func (d Daemon) socket() string {
	switch d {
	case Libvirtd:
		return "/run/libvirt/libvirt-sock"
	default:
		return "/run/libvirt/" + string(d) + "-sock"
	}
}

func (d Daemon) pidFile() string { return "/run/" + string(d) + ".pid" }

// DaemonPID is the daemon's process ID, or 0 if it does not run.
func (h *Host) DaemonPID(d Daemon) (int, error) {
	b, err := os.ReadFile(h.Path(d.pidFile()))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, nil // created, and not yet written
	}
	// A killed daemon leaves its file behind, and the number may by now be
	// another process's, even in this lab.
	if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err != nil || strings.TrimSpace(string(comm)) != string(d) {
		return 0, nil
	}
	ns, err := netnsIDs(h.netns)
	if err != nil {
		return 0, err
	}
	if _, dead, err := procStat(pid); err != nil || dead || !inside(pid, ns) {
		return 0, nil
	}
	return pid, nil
}

// reaperScript runs a program, its arguments after the numbers of prctl and of
// PR_SET_CHILD_SUBREAPER, and reaps what is orphaned below it, until nothing is
// left; it ends with the program's exit code.
//
// libvirtd's guests are orphans from the start. When it stops one it waits until
// the process is gone from the process table, and whether that takes no time, two
// seconds, or for ever, is up to the machine's process 1, which in a container
// may be anything. With a reaper above libvirtd it takes no time.
const reaperScript = `
syscall(0 + shift, 0 + shift, 1, 0, 0, 0) == 0 or die "prctl: $!\n";
defined(my $pid = fork) or die "fork: $!\n";
if (!$pid) {
	exec { $ARGV[0] } @ARGV;
	die "$ARGV[0]: $!\n";
}
my $status = 0;
while ((my $ended = wait) != -1) {
	$status = $? if $ended == $pid;
}
exit($status & 127 ? 128 + ($status & 127) : $status >> 8);
`

// awaitUnlocked waits until nobody holds the lock of the daemon's pid file. A
// program that a daemon had just forked when it was killed shares its open files
// until it is executed, and so its locks: no successor can start before that.
func (h *Host) awaitUnlocked(ctx context.Context, d Daemon) error {
	file, err := os.OpenFile(h.Path(d.pidFile()), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close() // gives the lock up
	for {
		// What virPidFileAcquirePath locks. This kind conflicts with every other.
		lock := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
		err := unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &lock)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("its pid file stays locked: %w", context.Cause(ctx))
		case <-time.After(pollEvery):
		}
	}
}

// StartDaemon starts one of the host's daemons and returns once it answers. It
// is an error if the daemon already runs. If the daemon dies before it answers,
// the error says what it printed.
func (h *Host) StartDaemon(ctx context.Context, d Daemon) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot start %s on %s: %w", d, h.Name, err)
		}
	}()
	pid, err := h.DaemonPID(d)
	if err != nil {
		return err
	}
	if pid != 0 {
		return fmt.Errorf("it already runs as process %d", pid)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, answerTimeout, fmt.Errorf("it has not answered for %v", answerTimeout))
	defer cancel()
	if err := h.awaitUnlocked(ctx, d); err != nil {
		return err
	}
	out, err := os.OpenFile(h.Path("/var/log/libvirt/"+string(d)+".out"), os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	args := []string{"--target", strconv.Itoa(h.holder), "--mount", "--uts", "--"}
	if d == Libvirtd {
		args = append(args, "perl", "-e", reaperScript,
			strconv.Itoa(unix.SYS_PRCTL), strconv.Itoa(unix.PR_SET_CHILD_SUBREAPER),
			string(d), "--pid-file", d.pidFile(), "--listen")
	} else {
		args = append(args, string(d), "--pid-file", d.pidFile())
	}
	cmd := tool(context.WithoutCancel(ctx), "nsenter", args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // see startHolder
	// Born in the network namespace, as the holder is.
	if err := inNetns(h.netns, cmd.Start); err != nil {
		return err
	}
	exited := make(chan struct{})
	go func() {
		cmd.Wait()
		close(exited)
	}()

	for {
		answer := h.answers(ctx, d)
		if answer == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), answer)
		case <-exited:
			return withText(fmt.Errorf("it ended (%s)", cmd.ProcessState), h.lastWords(d))
		case <-time.After(pollEvery):
		}
	}
}

// answers returns nil if the daemon takes connections and, if it is libvirtd,
// answers calls: it accepts long before its drivers are ready, and answers after.
func (h *Host) answers(ctx context.Context, d Daemon) error {
	conn, err := net.Dial("unix", h.Path(d.socket()))
	if err != nil {
		return err
	}
	conn.Close()
	if d == Libvirtd {
		_, err = h.Virsh(ctx, "list")
	}
	return err
}

// lastWords is the end of what a daemon has printed and logged.
func (h *Host) lastWords(d Daemon) []byte {
	var text []byte
	for _, ext := range []string{".out", ".log"} {
		b, err := os.ReadFile(h.Path("/var/log/libvirt/" + string(d) + ext))
		if err != nil {
			continue
		}
		text = append(text, b[max(0, len(b)-2048):]...)
	}
	return text
}

// Kill sends one of the host's daemons a signal. If it is SIGKILL or SIGTERM,
// Kill returns when the process has ended. A daemon that does not run is an
// error wrapping os.ErrProcessDone.
func (h *Host) Kill(ctx context.Context, d Daemon, sig os.Signal) error {
	fail := func(err error) error { return fmt.Errorf("cannot signal %s on %s: %w", d, h.Name, err) }
	pid, err := h.DaemonPID(d)
	if err != nil {
		return fail(err)
	}
	if pid == 0 {
		return fail(os.ErrProcessDone)
	}
	start, _, err := procStat(pid)
	if err != nil {
		return fail(os.ErrProcessDone)
	}
	s, ok := sig.(syscall.Signal)
	if !ok {
		return fail(fmt.Errorf("unknown signal %v", sig))
	}
	if err := syscall.Kill(pid, s); err != nil {
		return fail(err)
	}
	if s != syscall.SIGKILL && s != syscall.SIGTERM {
		return nil
	}
	for p := (process{pid, start}); p.alive(); {
		select {
		case <-ctx.Done():
			return fail(fmt.Errorf("it has not ended after %v: %w", sig, context.Cause(ctx)))
		case <-time.After(pollEvery):
		}
	}
	return nil
}
