package machine

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// lan is a network of this process's own: a namespace that has no name, held by a thread,
// with a bridge of one tap for each host. It ends with the process.
type lan struct {
	jobs chan func()
	addr netip.Prefix // of this process, on the bridge
}

func newLAN(addr netip.Prefix) (*lan, error) {
	l := &lan{jobs: make(chan func()), addr: addr}
	ready := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and with it the namespace.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ready <- fmt.Errorf("make a network namespace: %w", err)
			return
		}
		ready <- nil
		for job := range l.jobs {
			job()
		}
	}()
	if err := <-ready; err != nil {
		return nil, err
	}
	err := l.within(l.addBridge)
	if err != nil {
		l.close()
	}
	return l, err
}

func (l *lan) close() { close(l.jobs) }

// within calls f in the network's namespace.
func (l *lan) within(f func() error) error {
	done := make(chan error)
	l.jobs <- func() { done <- f() }
	return <-done
}

func (l *lan) addBridge() error {
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	err := netlink.LinkAdd(bridge)
	if err == nil {
		err = netlink.AddrAdd(bridge, &netlink.Addr{IPNet: &net.IPNet{
			IP: l.addr.Addr().AsSlice(), Mask: net.CIDRMask(l.addr.Bits(), 32)}})
	}
	if err == nil {
		err = netlink.LinkSetUp(bridge)
	}
	if err != nil {
		return fmt.Errorf("make the LAN's bridge: %w", err)
	}
	return nil
}

// addTap adds a port to the LAN; the file is for QEMU, and keeps it there.
func (l *lan) addTap(name string) (*os.File, error) {
	var tap *os.File
	err := l.within(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		tap = os.NewFile(uintptr(fd), name)
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			return err
		}
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		bridge, err := netlink.LinkByName("br0")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetMaster(link, bridge), netlink.LinkSetUp(link))
	})
	if err != nil {
		tap.Close()
		return nil, fmt.Errorf("add %s to the LAN: %w", name, err)
	}
	return tap, nil
}

// setLink plugs a host's cable in or pulls it.
func (l *lan) setLink(name string, up bool) error {
	return l.within(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if up {
			return netlink.LinkSetUp(link)
		}
		return netlink.LinkSetDown(link)
	})
}

// listenUDP listens on this process's address on the LAN.
func (l *lan) listenUDP() (conn *net.UDPConn, err error) {
	err = l.within(func() error {
		conn, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(l.addr.Addr(), 0)))
		return err
	})
	return conn, err
}
