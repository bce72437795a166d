package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// ErrTaken: another metadata service is on this host's 169.254.169.254.
var ErrTaken = errors.New("another metadata service is on this host")

// Config is how a gate fits in with what else is on the host. Zero values give
// the defaults. A gate that takes over from another must have the same Tables.
type Config struct {
	// Mask are the bits of packet marks (SO_MARK(7)) that are the gate's, 16 at
	// least. No other packets than to and from 169.254.169.254 get them, and
	// other bits are left alone. Default 0x0fff0fff, which has none of
	// Kubernetes' bits.
	Mask uint32
	// RulePriority is that of the routing rules, lower than those of others that
	// match marks. Default 100.
	RulePriority int
	// Tables is the number before 255 routing tables that nobody else uses.
	// Default 169254000.
	Tables int
	// MaxConns is how many connections a guest may have. Default 32.
	MaxConns int
	Log      *slog.Logger // default slog.Default
}

// Port is a guest's network interface on the host's side.
type Port struct {
	Guest   string // its UUID
	Ifindex int    // of the tap
	Tap     string // its name, "vnet3"
	// Bridge is the device by which the host is on the guest's network: the
	// bridge, or with VLAN filtering a VLAN device upon it, "br0.20".
	Bridge string
	MAC    net.HardwareAddr // the guest's own, not the tap's
	// Addrs are all addresses that it may ask from. Without an IPv4 address
	// among them it may ask from any.
	Addrs []netip.Addr
}

// ipv4 are the IPv4 addresses among Addrs, each once.
func (p Port) ipv4() (of []netip.Addr) {
	for _, a := range p.Addrs {
		if a = a.Unmap(); a.Is4() {
			of = append(of, a)
		}
	}
	slices.SortFunc(of, netip.Addr.Compare)
	return slices.Compact(of)
}

// tap is a port that the kernel knows.
type tap struct {
	Port
	mark   uint32
	bridge int // ifindex
}

// bridge is a device that guests are on.
type bridge struct {
	name string
	mac  net.HardwareAddr
	slot uint32
	up   bool
	bare bool // it has no IPv4 address
}

// Gate tells guests apart. It belongs to the network namespace in which it was
// opened.
type Gate struct {
	cfg  Config
	log  *slog.Logger
	ns   netns.NsHandle
	link *netlink.Handle

	change  sync.Mutex // held while the kernel's rules are changed
	stop    func()     // ends the watch
	done    <-chan struct{}
	marks   *marks
	taps    []tap
	bridges map[int]bridge // by ifindex

	who door // who is behind which mark
}

// Open takes over what an earlier gate left in the kernel, which goes on until
// the first Set: nobody it let in is served, because this gate does not know its
// marks. It is an error that wraps ErrTaken if 169.254.169.254 is an address of
// this host.
func Open(cfg Config) (*Gate, error) {
	if cfg.Mask == 0 {
		cfg.Mask = 0x0fff0fff
	}
	if cfg.RulePriority == 0 {
		cfg.RulePriority = 100
	}
	if cfg.Tables == 0 {
		cfg.Tables = 169254000
	}
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 32
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	m, err := newMarks(cfg.Mask)
	switch {
	case err != nil:
	case cfg.RulePriority < 1 || cfg.RulePriority > 32765:
		err = fmt.Errorf("routing rules of priority %d would not come before those of the main table (give one from 1 to 32765)", cfg.RulePriority)
	case cfg.Tables < 255 || cfg.Tables > math.MaxInt32-maxSlots:
		err = fmt.Errorf("routing tables from %d on are others' (give a number from 255 to %d)", cfg.Tables, math.MaxInt32-maxSlots)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot tell guests apart: %w", err)
	}
	g := &Gate{cfg: cfg, log: cfg.Log, marks: m, bridges: make(map[int]bridge), who: newDoor(cfg)}
	if err := g.open(); err != nil {
		if g.link != nil {
			g.link.Close()
		}
		if g.ns.IsOpen() {
			g.ns.Close()
		}
		return nil, fmt.Errorf("cannot tell guests apart: %w", err)
	}
	return g, nil
}

func (g *Gate) open() (err error) {
	g.ns = netns.None()
	if g.ns, err = netns.Get(); err != nil {
		return fmt.Errorf("cannot open the network namespace: %w", err)
	}
	if g.link, err = netlink.NewHandleAt(g.away(), unix.NETLINK_ROUTE, unix.NETLINK_INET_DIAG); err != nil {
		return fmt.Errorf("cannot open netlink: %w", err)
	}
	if err := g.taken(); err != nil {
		return err
	}
	c, err := g.nft()
	if err != nil {
		return fmt.Errorf("cannot talk to nftables: %w", err)
	}
	old, err := guestChains(c)
	if err != nil {
		return err
	}
	for _, ch := range old {
		if mark, err := markOf(ch.Name); err == nil {
			g.marks.seen(g.marks.number(mark), time.Now())
		}
	}
	if err := g.sysctl("net/ipv4/tcp_fwmark_accept", "1"); err != nil {
		return err
	}
	return g.watch()
}

// Set has exactly these ports be known, and closes the connections of those that
// no longer are. Connections of the others stay. It is one transaction of
// nftables: a frame is judged by the old rules or by the new ones.
//
// Bad input is refused and changes nothing. Ports whose devices have gone are
// left out and named in the error, with the others set. After any other error no
// port is known that was not both before and among these.
func (g *Gate) Set(ctx context.Context, ports []Port) error {
	if err := check(ports); err != nil {
		return err
	}
	g.change.Lock()
	defer g.change.Unlock()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("cannot set the ports of guests: %w", context.Cause(ctx))
	}
	select {
	case <-g.done: // the watch has failed
		if err := g.watch(); err != nil {
			return fmt.Errorf("cannot set the ports of guests: %w", err)
		}
	default:
	}
	return g.apply(ports)
}

// check refuses ports that would not tell guests apart.
func check(ports []Port) error {
	var problems []maint.Problem
	refuse := func(p Port, remedy, reason string, args ...any) {
		problems = append(problems, *maint.Problemf(maint.CodeBadRequest, fmt.Sprintf("tap %s of guest %s", p.Tap, p.Guest), remedy, reason, args...))
	}
	seen := make(map[int]Port)
	for _, p := range ports {
		switch other, twice := seen[p.Ifindex]; {
		case p.Guest == "":
			refuse(p, "give the domain's UUID", "it belongs to no guest")
		case p.Ifindex <= 0 || p.Tap == "" || p.Bridge == "":
			refuse(p, "take all three from the running domain", "interface index %d, tap %q or bridge %q is missing", p.Ifindex, p.Tap, p.Bridge)
		case len(p.MAC) != 6 || p.MAC[0]&1 != 0:
			refuse(p, "take it from the domain's <mac address>", "%q is not the MAC address of an interface", p.MAC)
		case twice:
			refuse(p, "name each tap once", "it is the same device as tap %s of guest %s", other.Tap, other.Guest)
		}
		seen[p.Ifindex] = p
	}
	return maint.Refuse("cannot set the ports of guests", problems)
}

// apply does what Set says. What is no longer wanted is forgotten before the
// kernel is told, and what is new is known only while the kernel has it.
func (g *Gate) apply(ports []Port) error {
	g.retain(func(t tap) bool {
		return slices.ContainsFunc(ports, func(p Port) bool { return p.Guest == t.Guest && p.Ifindex == t.Ifindex })
	})
	bridges, there, missing, err := g.find(ports)
	var taps []tap
	if err == nil {
		taps, err = g.assign(there, bridges)
	}
	if err == nil {
		g.retain(func(t tap) bool { return hasMark(taps, t.mark) })
		err = g.route(bridges)
	}
	ln := g.who.listener()
	if err == nil && ln != nil {
		err = ln.open(bridges)
	}
	if err == nil {
		g.who.admit(taps)
		err = g.program(taps, bridges)
	}
	if err != nil {
		g.drop(taps)
		return errors.Join(fmt.Errorf("cannot set the ports of guests: %w", err), missing)
	}
	g.taps, g.bridges = taps, bridges
	if ln != nil {
		ln.leave(bridges)
	}
	return errors.Join(missing, g.unroute(bridges))
}

// assign gives each port a mark: that which it has, or a new one.
func (g *Gate) assign(ports []tap, bridges map[int]bridge) (taps []tap, err error) {
	for _, p := range ports {
		i := slices.IndexFunc(g.taps, func(t tap) bool {
			return t.Guest == p.Guest && t.Ifindex == p.Ifindex && t.bridge == p.bridge
		})
		if i >= 0 {
			p.mark = g.taps[i].mark
		} else {
			number, err := g.marks.take(time.Now())
			if err != nil {
				return taps, err
			}
			p.mark = g.marks.mark(bridges[p.bridge].slot, number)
		}
		taps = append(taps, p)
	}
	return taps, nil
}

// retain forgets the ports that are not to be kept.
func (g *Gate) retain(keep func(tap) bool) {
	g.taps = slices.DeleteFunc(slices.Clone(g.taps), func(t tap) bool {
		if keep(t) {
			return false
		}
		g.forget(t)
		return true
	})
}

// drop forgets those in taps that are new.
func (g *Gate) drop(taps []tap) {
	for _, t := range taps {
		if !hasMark(g.taps, t.mark) {
			g.forget(t)
		}
	}
}

func (g *Gate) forget(t tap) {
	g.who.expel(t.mark)
	g.marks.release(g.marks.number(t.mark), time.Now())
}

func hasMark(taps []tap, mark uint32) bool {
	return slices.ContainsFunc(taps, func(t tap) bool { return t.mark == mark })
}

// Close takes away what the gate has made, closes all connections and stops
// listening. The sysctls stay: others may rely on them by now, and without marks
// they do nothing.
func (g *Gate) Close() error {
	g.change.Lock()
	stop, done := g.stop, g.done
	g.change.Unlock()
	stop()
	<-done
	g.change.Lock()
	defer g.change.Unlock()
	g.retain(func(tap) bool { return false })
	var err error
	if ln := g.who.listener(); ln != nil {
		err = ln.Close()
	}
	err = errors.Join(err, g.unprogram(), g.unroute(nil))
	g.link.Close()
	if nsErr := g.ns.Close(); err == nil && nsErr != nil {
		err = nsErr
	}
	if err != nil {
		return fmt.Errorf("cannot take the rules of guests away: %w", err)
	}
	return nil
}
