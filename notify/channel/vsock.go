package channel

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// firstCID is the first one that is a guest's: those below are the hypervisor's,
// the loopback's and the host's (vsock(7)).
const firstCID = 3

// VsockSupported says what the host lacks for guests to come by vsock, nil if
// nothing.
func VsockSupported() error {
	l, err := ListenVsock(unix.VMADDR_PORT_ANY)
	if err != nil {
		return err
	}
	return l.Close()
}

// ListenVsock listens for guests only, not for the vsock loopback nor for what
// the host itself is a guest of. wire.VsockPort is where belay-guest asks.
func ListenVsock(port uint32) (net.Listener, error) {
	l, err := vsock.ListenContextID(vsock.Host, port, nil)
	switch {
	case err == nil:
		return l, nil
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, errors.New("cannot listen for guests on vsock: the kernel's vhost driver for it is not there (modprobe vhost_vsock, and add it to /etc/modules-load.d; a kernel without CONFIG_VHOST_VSOCK cannot do it)")
	case errors.Is(err, unix.EAFNOSUPPORT):
		return nil, errors.New("cannot listen for guests on vsock: the kernel does not have AF_VSOCK (modprobe vsock), or belayd's unit forbids it (add AF_VSOCK to RestrictAddressFamilies=)")
	}
	return nil, fmt.Errorf("cannot listen for guests on vsock: %w", err)
}

// ServeVsock takes connections from in, whose addresses are vsock.Addr, until
// either is closed: net.ErrClosed. It closes in.
func (l *Listener) ServeVsock(in net.Listener) error {
	defer in.Close()
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return net.ErrClosed
	}
	l.vsocks = append(l.vsocks, in)
	l.mu.Unlock()
	for {
		c, err := in.Accept()
		if errors.Is(err, net.ErrClosed) || l.isClosed() {
			return net.ErrClosed
		} else if err != nil { // too many files are open, say: that passes
			l.log.Warn("cannot take a guest's connection from vsock", "err", err)
			time.Sleep(time.Second)
			continue
		}
		a, ok := c.RemoteAddr().(*vsock.Addr)
		if !ok {
			c.Close()
			return fmt.Errorf("cannot take connections from %s: it is not vsock", in.Addr())
		}
		l.offer(&conn{Conn: c, l: l, cid: a.ContextID})
	}
}

// SetCIDs says which guests, by UUID, have which CIDs, all of them: connections of
// a CID that is not its guest's any more are closed.
func (l *Listener) SetCIDs(cids map[uint32]string) error {
	for cid, guest := range cids {
		if cid < firstCID || cid == unix.VMADDR_CID_ANY {
			return fmt.Errorf("guest %s: cannot have the vsock CID %d, which is reserved (give it one from %d on)", guest, cid, firstCID)
		}
		if guest == "" {
			return fmt.Errorf("vsock CID %d: its guest has no UUID (leave out a CID that is nobody's)", cid)
		}
	}
	for _, c := range l.setCIDs(cids) {
		c.Close()
	}
	return nil
}

// setCIDs gives the connections that are nobody's any more.
func (l *Listener) setCIDs(cids map[uint32]string) (over []*conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cids = maps.Clone(cids)
	for guest, conns := range l.conns {
		for c := range conns {
			if c.cid != 0 && cids[c.cid] != guest {
				over = append(over, c)
			}
		}
	}
	return over
}
