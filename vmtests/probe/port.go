package probe

import (
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

// Port is a virtio-serial port that outlives its peers: a Read waits through
// the time in which no one is connected, a Write in that time is dropped.
//
// While the host side is closed the kernel reports POLLIN and POLLHUP and
// read(2) returns 0, all at once, so an ordinary reader would stop or spin. The host side
// closes with each client that leaves, and once more after a migration, where
// the destination's QEMU opens a fresh socket.
type Port struct{ fd int }

const (
	// hungUp is how soon a port that lost its peer is looked at again. No
	// poll waits for a peer to come. The time is doubled while none does, up
	// to hungUpLong: waking up is dear under emulation, and twenty guests
	// that look fifty times a second leave a small host no time.
	hungUp     = 20 * time.Millisecond
	hungUpLong = 250 * time.Millisecond
	// writeTimeout is how long a connected peer may leave a reply unread.
	writeTimeout = 10 * time.Second
	// hangUpGrace is how long a Write waits on a port that has hung up: a
	// client that has just connected can be heard before the guest's kernel
	// is told that it is there.
	hangUpGrace = time.Second
)

// errPeer is returned by Write when there was no one to take the bytes.
var errPeer = errors.New("peer is gone or does not read")

// OpenPort opens the port's device.
func OpenPort(path string) (*Port, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open port %s: %w", path, err)
	}
	return &Port{fd: fd}, nil
}

// poll waits for an event and reports which came, if any.
func (p *Port) poll(events int16, d time.Duration) (int16, error) {
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: events}}
	_, err := unix.Poll(fds, int(d.Milliseconds()))
	if err == unix.EINTR {
		return 0, nil
	}
	return fds[0].Revents, err
}

// Read blocks until there are bytes. It returns io.EOF never, and an error
// only when the device itself fails.
func (p *Port) Read(b []byte) (int, error) {
	wait := hungUp
	for {
		n, err := unix.Read(p.fd, b)
		switch {
		case n > 0:
			return n, nil
		case err == unix.EINTR:
			continue
		case err == nil: // no peer
			time.Sleep(wait)
			wait = min(2*wait, hungUpLong)
			continue
		case err != unix.EAGAIN:
			return 0, fmt.Errorf("read port: %w", err)
		}
		if _, err := p.poll(unix.POLLIN, time.Minute); err != nil {
			return 0, fmt.Errorf("poll port: %w", err)
		}
	}
}

// Write sends all of b or gives up on this peer.
func (p *Port) Write(b []byte) (int, error) {
	done := 0
	begun := monotonic()
	for done < len(b) {
		n, err := unix.Write(p.fd, b[done:])
		switch {
		case n > 0:
			done += n
			continue
		case err == unix.EINTR:
			continue
		case err != nil && err != unix.EAGAIN:
			return done, fmt.Errorf("write port: %w", err)
		}
		ev, err := p.poll(unix.POLLOUT, 100*time.Millisecond)
		if err != nil {
			return done, fmt.Errorf("poll port: %w", err)
		}
		waited := monotonic() - begun
		if waited > writeTimeout || ev&unix.POLLHUP != 0 && waited > hangUpGrace {
			return done, errPeer
		}
		if ev&unix.POLLHUP != 0 {
			time.Sleep(hungUp)
		}
	}
	return done, nil
}

// Close closes the device.
func (p *Port) Close() error { return unix.Close(p.fd) }

var _ io.ReadWriteCloser = (*Port)(nil)
