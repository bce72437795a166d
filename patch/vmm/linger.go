package vmm

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// libvirt takes a QEMU for ended when its monitor's connection closes, which is
// a few milliseconds before the process is gone. It then sends a signal, sees
// that there still is a process, and looks again after 200 ms (libvirt,
// virProcessKillPainfullyDelay): that is a third of the whole pause.
//
// So QEMU's end of the connection is kept open here until the process is gone.
// It is an optimisation: whatever does not work is left.

const (
	// reapGrace is how long an ended process may wait to be reaped before the
	// connection is closed nevertheless.
	reapGrace = 150 * time.Millisecond
	// lingerLimit is how long a connection is held at all.
	lingerLimit = 30 * time.Second
)

// linger holds the monitor connections of a QEMU until the process is gone, or
// until it is told to let go; if belayd dies the kernel does.
func (p Places) linger(proc process) (letGo func()) {
	pidfd, err := unix.PidfdOpen(proc.PID, 0)
	if err != nil {
		return func() {}
	}
	held := p.monitors(proc.PID, pidfd)
	if len(held) == 0 || !p.alive(proc) { // or the number is another's by now
		closeAll(append(held, pidfd))
		return func() {}
	}
	ctx, cancel := context.WithTimeout(context.Background(), lingerLimit)
	go func() {
		defer cancel()
		defer closeAll(append(held, pidfd))
		ended := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		for ctx.Err() == nil {
			if n, err := unix.Poll(ended, 10); n > 0 || err != nil && err != unix.EINTR {
				break
			}
		}
		for deadline := time.Now().Add(reapGrace); ctx.Err() == nil && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if unix.Kill(proc.PID, 0) == unix.ESRCH {
				return
			}
		}
	}()
	return cancel
}

// monitors duplicates the descriptors of a process that are connections to its
// monitor's socket (pidfd_getfd, Linux 5.6).
func (p Places) monitors(pid, pidfd int) (held []int) {
	dir := p.at("/proc", strconv.Itoa(pid), "fd")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || !strings.HasPrefix(to, "socket:") {
			continue
		}
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			continue
		}
		name, err := unix.Getsockname(fd)
		addr, ok := name.(*unix.SockaddrUnix)
		if err == nil && ok && filepath.Base(addr.Name) == "monitor.sock" && connected(fd) {
			held = append(held, fd)
			continue
		}
		closeAll([]int{fd})
	}
	return held
}

// connected tells a connection from the socket that it was accepted on.
func connected(fd int) bool {
	listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && listens == 0
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
