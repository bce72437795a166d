package twin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

const (
	// startTimeout is how long the twin may take until it answers. A libvirtd
	// that has to learn what QEMU can do takes seconds, several on a busy host.
	startTimeout = 90 * time.Second
	// stopTimeout is enough for three daemons that have to be killed.
	stopTimeout = 2 * time.Minute
	pollEvery   = 20 * time.Millisecond
	// launchEvery is the time that a supervisor has until it holds the lock.
	launchEvery = 5 * time.Second
)

// Launcher starts a program that outlives its caller: outside belayd's cgroup and
// sandbox. Under systemd that is a transient unit (KillMode=process, so that
// guests outlive the supervisor); elsewhere see [Detached].
type Launcher interface {
	Launch(ctx context.Context, unit, description string, argv []string) error
}

// Detached starts programs in sessions of their own, as children of belayd. It is
// for hosts without systemd.
type Detached struct {
	Output string // a file for what they say; "" discards it
}

// Launch implements Launcher.
func (d Detached) Launch(_ context.Context, _, _ string, argv []string) error {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if d.Output != "" {
		out, err := os.OpenFile(d.Output, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		defer out.Close()
		cmd.Stdout, cmd.Stderr = out, out
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	go cmd.Wait() // reaped whenever it ends
	return nil
}

// Pinger is the twin's libvirt; see hypervisor.Host.Ping.
type Pinger interface {
	Ping(ctx context.Context) error
}

// Twin starts and stops the second libvirt daemon.
type Twin struct {
	Root     string   // DefaultRoot when empty
	Program  []string // runs [Serve] with Root: belayd, "twin"
	Launcher Launcher
	// Libvirt speaks to Socket.
	Libvirt Pinger
}

func (t *Twin) place() place { return place(cmp.Or(t.Root, DefaultRoot)) }

// Socket is the libvirt socket of the twin.
func (t *Twin) Socket() string { return t.place().socket() }

// uri is what home's libvirtd calls the twin.
func (t *Twin) uri() string { return "qemu+unix:///system?socket=" + t.Socket() }

// homeURI is what the twin's libvirtd calls home: by way of /run, in which home's
// sockets come and go.
func (t *Twin) homeURI() string {
	socket := "libvirt-sock"
	if _, err := os.Stat(runDir + "/virtqemud-sock"); err == nil {
		socket = "virtqemud-sock"
	}
	return "qemu+unix:///system?socket=" + t.place().at("home/libvirt", socket)
}

// Start has the twin run and answer. It may be called again and again, and by
// another process than before. The twin outlives the caller.
func (t *Twin) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("it does not answer within %s", startTimeout))
	defer cancel()
	err := t.start(ctx)
	if err == nil {
		return nil
	}
	return fmt.Errorf("cannot start the twin: %w%s", err, t.lastWords())
}

func (t *Twin) start(ctx context.Context) error {
	var launched time.Time
	for {
		// Again and again: one that is seen may be about to die.
		if time.Since(launched) > launchEvery {
			did, err := t.launch(ctx)
			if err != nil {
				return err
			}
			if did {
				launched = time.Now()
			}
		}
		err := t.Libvirt.Ping(ctx)
		if err == nil {
			t.place().awaitOthers(ctx, slices.DeleteFunc(daemons(), func(d string) bool { return d == "libvirtd" || findDaemon(d) == "" }))
			return nil
		}
		if why, readErr := os.ReadFile(t.place().failed()); readErr == nil {
			return errors.New(string(why))
		}
		if !wait(ctx, pollEvery) {
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// othersWithin is how long the daemons beside libvirtd are waited for. Without them no QEMU starts in the
// twin; a guest that is in it comes home also without.
const othersWithin = 5 * time.Second

// awaitOthers waits until these daemons answer.
func (p place) awaitOthers(ctx context.Context, names []string) {
	ctx, cancel := context.WithTimeout(ctx, othersWithin)
	defer cancel()
	for _, d := range names {
		for !p.answers(ctx, d) {
			if !wait(ctx, pollEvery) {
				return
			}
		}
	}
}

// answers reports whether a daemon takes connections.
func (p place) answers(ctx context.Context, daemon string) bool {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", p.at("run", daemon+"-sock"))
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// launch starts the supervisor unless there is one.
func (t *Twin) launch(ctx context.Context) (did bool, err error) {
	pid, err := holder(t.place().lock())
	if err != nil || pid != 0 {
		return false, err
	}
	if err := os.Remove(t.place().failed()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return true, t.Launcher.Launch(ctx, "belay-twin.service", "Belay's second libvirt daemon", t.Program)
}

// lastWords is the end of what the twin's libvirtd has said.
func (t *Twin) lastWords() string {
	text, err := os.ReadFile(t.place().at("log/libvirtd.log"))
	if err != nil || len(text) == 0 {
		return ""
	}
	return "; its libvirtd says:\n" + strings.TrimSpace(string(text[max(0, len(text)-1000):]))
}

// Guests are the names of the guests that are in the twin, whether or not its
// libvirtd answers.
func (t *Twin) Guests() ([]string, error) { return t.place().guests() }

// Stop ends the twin and removes what there is of it. It refuses, with a
// *maint.Problem, while a guest is in it. That it does not run is no error.
func (t *Twin) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, stopTimeout, fmt.Errorf("it has not ended within %s", stopTimeout))
	defer cancel()
	fail := func(err error) error { return fmt.Errorf("cannot stop the twin: %w", err) }
	p := t.place()
	if _, err := os.Stat(string(p)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	guests, err := p.guests()
	if err != nil {
		return fail(err)
	}
	if len(guests) > 0 {
		return fail(maint.Problemf(maint.CodeBusy, "host", "bring them home first (belay replace-vmm GUEST)", "guests are in the twin: %s", strings.Join(guests, ", ")))
	}
	// A supervisor that has died is started again: it takes the daemons over,
	// and ends them.
	if _, err := t.launch(ctx); err != nil {
		return fail(err)
	}
	var super process
	for {
		pid, err := holder(p.lock())
		if err != nil {
			return fail(err)
		}
		if pid != 0 {
			if super, err = openProcess(pid); err == nil {
				break
			}
		}
		if why, err := os.ReadFile(p.failed()); err == nil {
			if left, err := p.daemonsLeft(); err != nil || len(left) > 0 {
				return fail(errors.Join(err, fmt.Errorf("its supervisor does not start (%s), and there are daemons left: %s", why, strings.Join(left, ", "))))
			}
			break
		}
		if !wait(ctx, pollEvery) {
			return fail(context.Cause(ctx))
		}
	}
	if super.pid == 0 {
		if err := p.remove(); err != nil {
			return fail(err)
		}
		return nil
	}
	defer super.close()
	if err := super.signal(unix.SIGTERM); err != nil {
		return fail(err)
	}
	for !super.ended(pollEvery) {
		if ctx.Err() != nil {
			return fail(context.Cause(ctx))
		}
	}
	if _, err := os.Stat(string(p)); !errors.Is(err, fs.ErrNotExist) {
		return fail(fmt.Errorf("%s is still there%s", p, t.lastWords()))
	}
	return nil
}

// daemonsLeft are the pid files of daemons that live.
func (p place) daemonsLeft() ([]string, error) {
	var files []string
	for _, d := range daemons() {
		files = append(files, p.at("run", d+".pid"))
	}
	return living(files)
}

// wait waits for d and reports whether ctx is still alive.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
