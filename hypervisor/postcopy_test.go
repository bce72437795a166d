package hypervisor

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// pair connects two sockets over an address and returns the accepting end first.
func pair(t *testing.T, network, address string) (server, client net.Conn) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Skip(err)
	}
	defer l.Close()
	c, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = s.Close(), c.Close() })
	return s, c
}

// TestConnections: of a process's connections those that are meant are held, or ended, and
// no others.
func TestConnections(t *testing.T) {
	t.Parallel()
	for network, address := range map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0", "tcp": "[::ffff:127.0.0.1]:0"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			in, out := pair(t, network, address)
			other, _ := pair(t, network, address)
			port := in.LocalAddr().(*net.TCPAddr).AddrPort().Port()
			var found []maint.Connection
			n, err := connectionsOf(os.Getpid(), func(local, remote netip.AddrPort) bool {
				meant := remote.Port() == port
				if meant {
					found = append(found, maint.Connection{From: local, To: remote})
				}
				return meant
			}, hold)
			if errors.Is(err, unix.EPERM) {
				t.Skip(err)
			}
			if from := out.LocalAddr().(*net.TCPAddr).AddrPort().Port(); n != 1 || err != nil || len(found) != 1 || found[0].From.Port() != from {
				t.Fatalf("%d, %+v, %v", n, found, err)
			}
			for c, want := range map[net.Conn]int{out: int(held.Milliseconds()), in: 0, other: 0} {
				raw, err := c.(*net.TCPConn).SyscallConn()
				if err != nil {
					t.Fatal(err)
				}
				_ = raw.Control(func(fd uintptr) {
					if ms, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT); ms != want || err != nil {
						t.Errorf("it is held for %d ms, %v; want %d", ms, err, want)
					}
				})
			}
			shut := func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) }
			if n, err := connectionsOf(os.Getpid(), among(found), shut); n != 1 || err != nil {
				t.Fatalf("%d, %v", n, err)
			}
			if _, err := in.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("it was not ended: %v", err)
			}
			_ = other.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if _, err := other.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the other one: %v", err)
			}
		})
	}
}
