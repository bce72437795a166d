package twin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// daemonPath is where libvirt's daemons are looked for.
	daemonPath = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"

	// A daemon that dies is started again after respawnMin, doubled each time
	// up to respawnMax.
	respawnMin, respawnMax = 100 * time.Millisecond, 10 * time.Second
	// A daemon that is told to end has endGrace before it is killed.
	endGrace = 10 * time.Second
)

// daemons are the twin's, in the order in which they start. It has a virtlogd and
// a virtlockd of its own: virtlogd refuses a file that it has open already, which
// home's has while a guest crosses, and what virtlockd holds are locks of the
// kernel, which are between any two of them.
func daemons() []string { return []string{"virtlogd", "virtlockd", "libvirtd"} }

// Serve is the twin: it makes the namespaces and runs libvirt's daemons in them,
// starting again those that die, until ctx ends. Then it ends the daemons and
// removes the twin's folder, unless there are guests in it: then all but the
// supervisor itself is left as it is, for the next one to take over.
//
// It is a process's only business: children of any kind are reaped, and
// the process becomes the parent of the twin's orphaned QEMUs. It needs root with
// all capabilities. That it runs already is an error.
func Serve(ctx context.Context, root string, log *slog.Logger) error {
	s := &server{place: place(root), log: log}
	if err := os.MkdirAll(root, 0o711); err != nil {
		return err
	}
	lock, err := s.take()
	if err != nil {
		return fmt.Errorf("cannot serve the twin: %w", err)
	}
	defer lock.Close()
	if err := s.serve(ctx); err != nil {
		err = fmt.Errorf("cannot serve the twin: %w", err)
		return errors.Join(err, os.WriteFile(s.failed(), []byte(err.Error()), 0o600))
	}
	return nil
}

type server struct {
	place
	log *slog.Logger
	// start starts a program in the twin's namespaces.
	start func(argv []string, out *os.File) (pid int, err error)
}

// take locks the twin for this process. The lock is fcntl's, gone with the
// process, and with any descriptor of the file that this process closes.
func (s *server) take() (*os.File, error) {
	f, err := os.OpenFile(s.lock(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &l); err != nil {
		f.Close()
		return nil, fmt.Errorf("another supervisor holds %s: %w", s.lock(), err)
	}
	return f, nil
}

func (s *server) serve(ctx context.Context) error {
	if err := os.Remove(s.failed()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, d := range daemons() {
		if findDaemon(d) == "" {
			return fmt.Errorf("%s is not installed", d)
		}
	}
	set, err := readSettings("")
	if err != nil {
		return err
	}
	if err := s.makeFiles("", set); err != nil {
		return fmt.Errorf("cannot make its files: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	if s.start, err = s.enter(set); err != nil {
		return err
	}
	go reap()

	ended := make(chan struct{})
	for _, d := range daemons() {
		go func() {
			s.keep(ctx, d)
			ended <- struct{}{}
		}()
	}
	for range daemons() {
		<-ended
	}
	return s.end()
}

// reap takes the exit status of every child, ours or an orphan's, for as long as
// the process lives.
func reap() {
	for {
		var status unix.WaitStatus
		if _, err := unix.Wait4(-1, &status, 0, nil); errors.Is(err, unix.ECHILD) {
			time.Sleep(100 * time.Millisecond) // wait4(2) does not wait for a first child
		}
	}
}

// enter makes the twin's namespaces on a thread of its own, and gives a function
// that starts programs from there. The namespaces live on with the programs.
func (s *server) enter(set settings) (func([]string, *os.File) (int, error), error) {
	type order struct {
		argv []string
		out  *os.File
		done chan<- result
	}
	orders, made := make(chan order), make(chan error)
	go func() {
		// Never unlocked: the thread must serve nobody else.
		runtime.LockOSThread()
		err := s.mounts(set)
		made <- err
		if err != nil {
			return
		}
		for o := range orders {
			pid, err := spawn(o.argv, o.out)
			o.done <- result{pid, err}
		}
	}()
	if err := <-made; err != nil {
		return nil, fmt.Errorf("cannot make its namespaces: %w", err)
	}
	return func(argv []string, out *os.File) (int, error) {
		done := make(chan result)
		orders <- order{argv, out, done}
		r := <-done
		return r.pid, r.err
	}, nil
}

type result struct {
	pid int
	err error
}

// mounts gives the calling thread a mount and a UTS namespace that are the
// twin's. What the host mounts later is seen in it, not the other way round.
func (s *server) mounts(set settings) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWUTS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(twinName(set.hostname))); err != nil {
		return err
	}
	bind := func(from, to string) error {
		if _, err := os.Stat(from); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err := os.MkdirAll(to, 0o711); err != nil {
			return err
		}
		if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("cannot bind %s to %s: %w", from, to, err)
		}
		return nil
	}
	// Not recursively: it holds the twin itself.
	if err := unix.Mount("/run", s.at("home"), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("cannot bind /run to %s: %w", s.at("home"), err)
	}
	// What guests use by path stays the same although it is below libvirt's
	// own folders.
	shared := []string{nvramDir}
	if m := set.memory(); strings.HasPrefix(m, qemuDir+"/") {
		shared = append(shared, m)
	}
	for _, dir := range shared {
		if err := bind(dir, s.at("lib", strings.TrimPrefix(dir, qemuDir))); err != nil {
			return err
		}
	}
	for from, to := range map[string]string{"lib": qemuDir, "etc": etcDir, "cache": cacheDir, "dnsmasq": dnsmasqDir, "run": runDir} {
		if err := bind(s.at(from), to); err != nil {
			return err
		}
	}
	// libvirt runs the hook that is there, and Debian mounts /run noexec.
	if err := unix.Mount("", etcDir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("cannot have programs run from %s: %w", etcDir, err)
	}
	return hideCgroups()
}

// hideCgroups detaches all cgroups, as libvirt takes what is mounted for what
// there is.
func hideCgroups() error {
	text, err := os.ReadFile("/proc/thread-self/mounts")
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	slices.Reverse(lines) // what was mounted last lies on top
	for _, line := range lines {
		f := strings.Fields(line)
		if len(f) < 3 || f[2] != "cgroup" && f[2] != "cgroup2" {
			continue
		}
		if err := unix.Unmount(f[1], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("cannot detach %s: %w", f[1], err)
		}
	}
	return nil
}

// spawn starts a program in the calling thread's namespaces. It has a session of
// its own and outlives its parent.
func spawn(argv []string, out *os.File) (int, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	return syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
		Dir: "/",
		// No bus: systemd-machined and firewalld are home's. Nothing of
		// systemd's, LISTEN_FDS above all.
		Env:   []string{"PATH=" + daemonPath, "LC_ALL=C", "HOME=/", "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent"},
		Files: []uintptr{null.Fd(), out.Fd(), out.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
}

// findDaemon gives a daemon's path, "" when it is not installed.
func findDaemon(name string) string {
	for _, dir := range filepath.SplitList(daemonPath) {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path
		}
	}
	return ""
}

func (s *server) pidFile(daemon string) string { return s.at("run", daemon+".pid") }

// keep has one daemon run until ctx ends. One that an earlier supervisor has left
// is taken over.
func (s *server) keep(ctx context.Context, daemon string) {
	pause := respawnMin
	for ctx.Err() == nil {
		begun := time.Now()
		p, err := s.have(daemon)
		if err != nil {
			s.log.Error("cannot start a daemon of the twin", "daemon", daemon, "err", err)
		} else {
			for ctx.Err() == nil && !p.ended(200*time.Millisecond) {
			}
			p.close()
		}
		if ctx.Err() != nil {
			return
		}
		s.log.Warn("a daemon of the twin has ended and is started again", "daemon", daemon)
		if time.Since(begun) > respawnMax {
			pause = respawnMin
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, respawnMax)
	}
}

// have gives the daemon that runs, or starts it.
func (s *server) have(daemon string) (process, error) {
	pid, err := holder(s.pidFile(daemon))
	if err != nil {
		return process{}, err
	}
	if pid == 0 {
		out, err := os.OpenFile(s.at("log", daemon+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return process{}, err
		}
		defer out.Close()
		// The path is the twin's.
		if pid, err = s.start([]string{findDaemon(daemon), "--pid-file", runDir + "/" + daemon + ".pid"}, out); err != nil {
			return process{}, err
		}
	}
	return openProcess(pid)
}

// end ends the daemons and removes the twin, if no guest is in it.
func (s *server) end() error {
	for _, d := range []string{"libvirtd", "virtlockd", "virtlogd"} {
		guests, err := s.guests()
		if err != nil {
			return err
		}
		if len(guests) > 0 {
			s.log.Warn("guests are in the twin: it is left as it is", "guests", guests, "not ended", d)
			return nil
		}
		if err := s.endDaemon(d); err != nil {
			return err
		}
	}
	return s.remove()
}

// guests are the names of the guests whose QEMUs live in the twin.
func (p place) guests() ([]string, error) {
	files, err := p.qemuPIDs()
	if err != nil {
		return nil, err
	}
	alive, err := living(files)
	for i, f := range alive {
		alive[i] = strings.TrimSuffix(filepath.Base(f), ".pid")
	}
	return alive, err
}

func (s *server) endDaemon(daemon string) error {
	pid, err := holder(s.pidFile(daemon))
	if err != nil || pid == 0 {
		return err
	}
	p, err := openProcess(pid)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.close()
	if err := p.signal(unix.SIGTERM); err != nil {
		return err
	}
	if p.ended(endGrace) {
		return nil
	}
	if err := p.signal(unix.SIGKILL); err != nil {
		return err
	}
	if !p.ended(endGrace) {
		return fmt.Errorf("%s (process %s) does not end", daemon, strconv.Itoa(pid))
	}
	return nil
}

// remove removes the twin's files. It is not to be run in the twin's namespaces,
// where the host's files are mounted below them, and refuses to.
func (p place) remove() error {
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 4 && (f[4] == string(p) || strings.HasPrefix(f[4], string(p)+"/")) {
			return fmt.Errorf("cannot remove %s: %s is mounted", p, f[4])
		}
	}
	set, err := readSettings("")
	if err != nil {
		return err
	}
	if err := removeEmpty(set.twinMemory()); err != nil {
		return err
	}
	return os.RemoveAll(string(p))
}

// removeEmpty removes folders in which there is nothing else.
func removeEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeEmpty(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}
