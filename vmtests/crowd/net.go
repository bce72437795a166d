package crowd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"belay/notify/identity"
)

const (
	// perBridge is how many guests are on a bridge, of the 1,023 that it can have.
	perBridge = 200
	// plainAddress is where a host is asked that does not tell guests apart.
	plainAddress = "10.255.255.254"
)

// Crowd are guests on the bridges of a host.
type Crowd struct {
	Ports        []identity.Port // the guests', one each
	host, guests netns.NsHandle
}

// New makes n guests, 40,000 at most.
func New(ctx context.Context, n int) (c *Crowd, err error) {
	c = &Crowd{host: netns.None(), guests: netns.None()}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("cannot make a crowd of %d guests: %w", n, err), c.Close())
		}
	}()
	if c.host, err = newNetns(nil); err != nil {
		return c, err
	}
	// All guests are in one namespace: each device answers for its own address only.
	if c.guests, err = newNetns(map[string]string{"ipv4/conf/all/arp_ignore": "1", "ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0"}); err != nil {
		return c, err
	}
	host, err := netlink.NewHandleAt(c.host)
	if err != nil {
		return c, err
	}
	defer host.Close()
	guests, err := netlink.NewHandleAt(c.guests)
	if err != nil {
		return c, err
	}
	defer guests.Close()
	if err := up(host, "lo", plainAddress+"/32"); err != nil {
		return c, err
	}
	b := builder{host: host, guests: guests, inside: c.guests}
	for i := range n {
		if ctx.Err() != nil {
			return c, ctx.Err()
		}
		if i%perBridge == 0 {
			if err := b.bridge(i / perBridge); err != nil {
				return c, err
			}
		}
		p, err := b.guest(i)
		if err != nil {
			return c, err
		}
		c.Ports = append(c.Ports, p)
	}
	return c, carrying(host, n)
}

// newNetns makes a network namespace with these sysctls below net. Devices in it
// have no IPv6: they would tell each other that they have come.
func newNetns(sysctls map[string]string) (ns netns.NsHandle, err error) {
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("cannot make a network namespace: %w", err)
		}
		set := func(name, value string) error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o644) }
		if err := set("ipv6/conf/default/disable_ipv6", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for name, value := range sysctls {
			if err := set(name, value); err != nil {
				return err
			}
		}
		ns, err = netns.Get()
		return err
	})
	return ns, err
}

// onThread runs f on a thread of its own, which ends with it.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

func in(ns netns.NsHandle, f func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("cannot enter a network namespace: %w", err)
		}
		return f()
	})
}

func up(h *netlink.Handle, device, cidr string) error {
	l, err := h.LinkByName(device)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	return errors.Join(h.AddrAdd(l, a), h.LinkSetUp(l))
}

// builder makes the network.
type builder struct {
	host, guests *netlink.Handle
	inside       netns.NsHandle // the guests' namespace
	on           *netlink.Bridge
}

// bridge makes the i-th, which the next guests are put on.
func (b *builder) bridge(i int) error {
	b.on = &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("br%d", i), HardwareAddr: net.HardwareAddr{0x52, 0x54, 0, 1, 0, byte(i)}}}
	if err := b.host.LinkAdd(b.on); err != nil {
		return err
	}
	return up(b.host, b.on.Name, fmt.Sprintf("10.%d.0.1/24", i))
}

// guest makes the i-th. What it and the host ask each other by ARP is known
// beforehand: the kernel keeps only 1,024 such answers on the whole machine
// (gc_thresh3, arp(7)), those that are permanent not counted.
func (b *builder) guest(i int) (p identity.Port, err error) {
	p = identity.Port{Guest: uuid.NewString(), Tap: fmt.Sprintf("vnet%d", i), Bridge: b.on.Name,
		MAC:   net.HardwareAddr{0x52, 0x54, 0, 0, byte(i >> 8), byte(i)},
		Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i / perBridge), 0, byte(10 + i%perBridge)})}}
	eth := device(i)
	if err := b.host.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: p.Tap, MasterIndex: b.on.Index}, PeerName: eth,
		PeerHardwareAddr: p.MAC, PeerNamespace: netlink.NsFd(b.inside)}); err != nil {
		return p, err
	}
	tap, err := b.host.LinkByName(p.Tap)
	if err != nil {
		return p, err
	}
	p.Ifindex = tap.Attrs().Index
	if err := errors.Join(b.host.LinkSetUp(tap), up(b.guests, eth, p.Addrs[0].String()+"/32")); err != nil {
		return p, err
	}
	inside, err := b.guests.LinkByName(eth)
	if err != nil {
		return p, err
	}
	return p, errors.Join(
		know(b.host, b.on.Index, p.Addrs[0], p.MAC),
		know(b.guests, inside.Attrs().Index, netip.MustParseAddr(serviceAddress), b.on.HardwareAddr),
		know(b.guests, inside.Attrs().Index, netip.MustParseAddr(plainAddress), b.on.HardwareAddr))
}

func know(h *netlink.Handle, index int, ip netip.Addr, mac net.HardwareAddr) error {
	return h.NeighAdd(&netlink.Neigh{LinkIndex: index, Family: unix.AF_INET, State: unix.NUD_PERMANENT, IP: ip.AsSlice(), HardwareAddr: mac})
}

// device is a guest's end.
func device(guest int) string { return fmt.Sprintf("eth%d", guest) }

// carrying waits until n taps carry frames.
func carrying(host *netlink.Handle, n int) error {
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		links, err := host.LinkList()
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
		ready := 0
		for _, l := range links {
			if l.Type() == "veth" && l.Attrs().OperState == netlink.OperUp {
				ready++
			}
		}
		if ready == n {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("only %d of %d taps carry frames", ready, n)
		}
	}
}

// dial connects guests to a server.
func (c *Crowd) dial(ctx context.Context, address string, guests []int) (conns []net.Conn, err error) {
	err = in(c.guests, func() error {
		for _, i := range guests {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: c.Ports[i].Addrs[0].AsSlice()}, Control: func(_, _ string, raw syscall.RawConn) (err error) {
				if ctlErr := raw.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), device(i)) }); ctlErr != nil {
					return ctlErr
				}
				return err
			}}
			conn, err := d.DialContext(ctx, "tcp4", net.JoinHostPort(address, "80"))
			if err != nil {
				return fmt.Errorf("guest %d cannot connect: %w", i, err)
			}
			conns = append(conns, conn)
		}
		return nil
	})
	if err != nil {
		for _, conn := range conns {
			conn.Close()
		}
		return nil, err
	}
	return conns, nil
}

// Close lets go of the namespaces, which end with what is in them.
func (c *Crowd) Close() error {
	var errs []error
	for _, ns := range []*netns.NsHandle{&c.host, &c.guests} {
		if ns.IsOpen() {
			errs = append(errs, ns.Close())
		}
	}
	return errors.Join(errs...)
}
