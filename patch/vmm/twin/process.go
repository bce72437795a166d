package twin

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// holder is the process that holds the lock on a pid file, 0 when none does.
// libvirt's daemons, its QEMUs and the supervisor lock theirs (fcntl(2),
// F_SETLK) for as long as they live, so that neither a stale file nor a number
// that has come round again is taken for a process.
func holder(path string) (pid int, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &l); err != nil {
		return 0, fmt.Errorf("cannot ask who holds %s: %w", path, err)
	}
	if l.Type == unix.F_UNLCK {
		return 0, nil
	}
	return int(l.Pid), nil
}

// living are the pid files among those given whose processes live.
func living(paths []string) (alive []string, err error) {
	for _, path := range paths {
		pid, err := holder(path)
		if err != nil {
			return nil, err
		}
		if pid != 0 {
			alive = append(alive, path)
		}
	}
	return alive, nil
}

// process is one that need not be our child.
type process struct {
	pid int
	fd  int // pidfd_open(2)
}

func openProcess(pid int) (process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return process{}, fmt.Errorf("cannot watch process %d: %w", pid, err)
	}
	return process{pid, fd}, nil
}

func (p process) close() { _ = unix.Close(p.fd) }

func (p process) signal(s unix.Signal) error {
	err := unix.PidfdSendSignal(p.fd, s, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// ended waits for the process's end, for at most d, and reports whether it has
// come.
func (p process) ended(d time.Duration) bool {
	deadline := time.Now().Add(d)
	for {
		left := max(time.Until(deadline), 0)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		switch {
		case n > 0:
			return true
		case err != nil && !errors.Is(err, unix.EINTR), left == 0:
			return false
		}
	}
}
