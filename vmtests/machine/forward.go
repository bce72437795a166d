package machine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"belay/agent/api"
	"belay/vmtests/program"
)

// The sockets in a host that programs of this machine speak to.
const libvirtSocket, belaydSocket = "/run/libvirt/libvirt-sock", "/run/belay/belayd.sock"

// DialUnix connects to a unix socket in the host, as root.
func (h *Host) DialUnix(ctx context.Context, inside string) (net.Conn, error) {
	there, err := h.channel(ctx, inside)
	if err != nil {
		return nil, err
	}
	// A channel of ssh knows no deadlines: what it is for speaks to a socket of this machine.
	here, end, err := socketpair()
	if err != nil {
		return nil, errors.Join(err, there.Close())
	}
	go relay(end, there)
	return here, nil
}

func (h *Host) channel(ctx context.Context, inside string) (net.Conn, error) {
	c, err := h.connect(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := c.DialContext(ctx, "unix", inside)
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", h.Name, inside, err)
	}
	return conn, nil
}

func socketpair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	first, second := os.NewFile(uintptr(fds[0]), ""), os.NewFile(uintptr(fds[1]), "")
	defer first.Close() // net has copies of its own
	defer second.Close()
	if a, err = net.FileConn(first); err != nil {
		return nil, nil, err
	}
	if b, err = net.FileConn(second); err != nil {
		return nil, nil, errors.Join(err, a.Close())
	}
	return a, b, nil
}

// relay carries what comes on either connection to the other, until one ends.
func relay(a, b net.Conn) {
	defer a.Close()
	defer b.Close()
	go func() {
		defer a.Close()
		defer b.Close()
		io.Copy(b, a)
	}()
	io.Copy(a, b)
}

// forward makes a socket on this machine that leads to one in the host, through resets and
// other kernels: each connection is made anew.
func (h *Host) forward(inside, here string) error {
	listener, err := net.Listen("unix", here)
	if err != nil {
		return err
	}
	h.forwards = append(h.forwards, listener)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // the lab is taken down
			}
			go func() {
				there, err := h.channel(context.Background(), inside)
				if err != nil {
					conn.Close() // who called sees that
					return
				}
				relay(conn, there)
			}()
		}
	}()
	return nil
}

// Client speaks to the host's belayd as root.
func (h *Host) Client() *api.Client { return api.NewUnix(h.file("belayd")) }

// Virsh runs virsh on this machine, connected to the host's libvirt: paths among the
// arguments are this machine's. It returns what virsh prints on standard output.
func (h *Host) Virsh(ctx context.Context, args ...string) (string, error) {
	uri := "qemu+unix:///system?socket=" + h.file("libvirt")
	out, err := program.Output(ctx, "", "env", append([]string{"LC_ALL=C", "virsh", "-q", "-c", uri}, args...)...)
	if err != nil {
		return "", fmt.Errorf("%s: %w", h.Name, err)
	}
	return out, nil
}
