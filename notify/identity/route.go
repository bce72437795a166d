package identity

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

var serviceNet = &net.IPNet{IP: service, Mask: net.CIDRMask(32, 32)}

// dump repeats a question that the kernel's changes have cut into.
func dump[T any](ask func() (T, error)) (answer T, err error) {
	for range 10 {
		if answer, err = ask(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return answer, err
		}
	}
	return answer, err
}

// links are the devices there are, by index.
func (g *Gate) links() (map[int]netlink.Link, error) {
	all, err := dump(g.link.LinkList)
	if err != nil {
		return nil, fmt.Errorf("cannot list network devices: %w", err)
	}
	by := make(map[int]netlink.Link, len(all))
	for _, l := range all {
		by[l.Attrs().Index] = l
	}
	return by, nil
}

// OnBridge reports whether a device is a port of a Linux bridge: only of such the
// gate sees the frames.
func OnBridge(ifindex int) bool {
	port, err := netlink.LinkByIndex(ifindex)
	if err != nil || port.Attrs().MasterIndex == 0 {
		return false
	}
	master, err := netlink.LinkByIndex(port.Attrs().MasterIndex)
	return err == nil && master.Type() == "bridge"
}

// addresses are the host's own.
func (g *Gate) addresses() ([]netlink.Addr, error) {
	all, err := dump(func() ([]netlink.Addr, error) { return g.link.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("cannot list addresses: %w", err)
	}
	return all, nil
}

// routes are those of one of our tables.
func (g *Gate) routes(table int) ([]netlink.Route, error) {
	all, err := dump(func() ([]netlink.Route, error) {
		return g.link.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list the routes of table %d: %w", table, err)
	}
	return all, nil
}

// find looks for the ports' devices. Those of which one is missing are left out.
func (g *Gate) find(ports []Port) (bridges map[int]bridge, taps []tap, missing, err error) {
	links, err := g.links()
	if err != nil {
		return nil, nil, nil, err
	}
	addrs, err := g.addresses()
	if err != nil {
		return nil, nil, nil, err
	}
	byName := make(map[string]*netlink.LinkAttrs, len(links))
	for _, l := range links {
		byName[l.Attrs().Name] = l.Attrs()
	}
	bridges = make(map[int]bridge)
	taken := make(map[uint32]bool) // slots
	for _, b := range g.bridges {
		taken[b.slot] = true
	}
	var errs []error
	for _, p := range ports {
		leave := func(reason string, args ...any) {
			errs = append(errs, fmt.Errorf("tap %s of guest %s is left out: %w", p.Tap, p.Guest, fmt.Errorf(reason, args...)))
		}
		if l := links[p.Ifindex]; l == nil || l.Attrs().Name != p.Tap {
			leave("there is no such device with index %d (any more)", p.Ifindex)
			continue
		}
		br := byName[p.Bridge]
		if br == nil || len(br.HardwareAddr) != 6 {
			leave("there is no bridge %s", p.Bridge)
			continue
		}
		if _, done := bridges[br.Index]; !done {
			b := bridge{name: br.Name, mac: br.HardwareAddr, up: br.Flags&net.FlagUp != 0, slot: g.slot(br.Index, taken)}
			if b.slot == 0 {
				leave("there are more than %d bridges with guests", maxSlots)
				continue
			}
			b.bare = !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.LinkIndex == br.Index })
			bridges[br.Index] = b
		}
		taps = append(taps, tap{Port: p, bridge: br.Index})
	}
	return bridges, taps, errors.Join(errs...), nil
}

// slot is that which a bridge has, or a free one, 0 if there is none.
func (g *Gate) slot(index int, taken map[uint32]bool) uint32 {
	if b, known := g.bridges[index]; known {
		return b.slot
	}
	for slot := uint32(1); slot <= maxSlots; slot++ {
		if !taken[slot] {
			taken[slot] = true
			return slot
		}
	}
	return 0
}

// rulesOf are the two routing rules of a bridge: for what its guests send, and
// for what they are sent. The first also lets the kernel's check of the source
// (rp_filter) find that a guest of any address is where it came from.
func (g *Gate) rulesOf(slot uint32) [2]*netlink.Rule {
	var both [2]*netlink.Rule
	for i := range both {
		r, mask := netlink.NewRule(), g.marks.slotMask()
		r.Family, r.Priority, r.Table = unix.AF_INET, g.cfg.RulePriority, g.cfg.Tables+int(slot)
		r.Mark, r.Mask = g.marks.mark(slot, 0), &mask
		both[i] = r
	}
	both[0].Dst, both[1].Src = serviceNet, serviceNet
	return both
}

// route has marked packets be the host's own, and replies go out to the bridge
// that the question came from. A bridge that is down has no routes: the watch adds
// them when it comes up.
func (g *Gate) route(bridges map[int]bridge) error {
	there, err := g.ourRules()
	if err != nil {
		return err
	}
	for index, b := range bridges {
		if err := g.sysctl("net/ipv4/conf/"+b.name+"/src_valid_mark", "1"); err != nil {
			return err
		}
		for _, r := range g.rulesOf(b.slot) {
			if slices.ContainsFunc(there, func(o netlink.Rule) bool { return sameRule(o, *r) }) {
				continue
			}
			if err := g.link.RuleAdd(r); err != nil {
				return fmt.Errorf("cannot add a routing rule for bridge %s: %w", b.name, err)
			}
		}
		if !b.up {
			continue
		}
		for _, r := range g.routesOf(index, b.slot) {
			if err := g.link.RouteReplace(r); err != nil && !errors.Is(err, unix.ENETDOWN) {
				return fmt.Errorf("cannot add a route for bridge %s: %w", b.name, err)
			}
		}
	}
	return nil
}

func (g *Gate) routesOf(index int, slot uint32) [2]*netlink.Route {
	table := g.cfg.Tables + int(slot)
	return [2]*netlink.Route{
		{Table: table, LinkIndex: index, Dst: serviceNet, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST},
		{Table: table, LinkIndex: index, Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, Scope: unix.RT_SCOPE_LINK},
	}
}

// unroute takes away our routing rules and routes but those of the bridges.
func (g *Gate) unroute(but map[int]bridge) error {
	var keep []*netlink.Rule
	tables := make(map[int]bool)
	for _, b := range but {
		both := g.rulesOf(b.slot)
		keep = append(keep, both[:]...)
		tables[g.cfg.Tables+int(b.slot)] = true
	}
	there, err := g.ourRules()
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range there {
		if !slices.ContainsFunc(keep, func(k *netlink.Rule) bool { return sameRule(*k, r) }) {
			errs = append(errs, g.link.RuleDel(&r))
		}
		if tables[r.Table] {
			continue
		}
		tables[r.Table] = true
		routes, err := g.routes(r.Table)
		errs = append(errs, err)
		for _, route := range routes {
			errs = append(errs, gone(g.link.RouteDel(&route)))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cannot delete routes of guests: %w", err)
	}
	return nil
}

// gone takes it for done if what is to be deleted is not there.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// ourRules are the routing rules to our tables.
func (g *Gate) ourRules() ([]netlink.Rule, error) {
	all, err := dump(func() ([]netlink.Rule, error) { return g.link.RuleList(netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("cannot list routing rules: %w", err)
	}
	return slices.DeleteFunc(all, func(r netlink.Rule) bool {
		return r.Table <= g.cfg.Tables || r.Table > g.cfg.Tables+maxSlots
	}), nil
}

func sameRule(a, b netlink.Rule) bool {
	mask := func(m *uint32) uint32 {
		if m == nil {
			return 0
		}
		return *m
	}
	text := func(n *net.IPNet) string {
		if n == nil {
			return ""
		}
		return n.String()
	}
	return a.Priority == b.Priority && a.Table == b.Table && a.Mark == b.Mark && mask(a.Mask) == mask(b.Mask) &&
		text(a.Src) == text(b.Src) && text(a.Dst) == text(b.Dst)
}

// sysctl writes a value (Documentation/networking/ip-sysctl.rst), unless it is
// that already.
func (g *Gate) sysctl(name, value string) error {
	return g.inside(func() error {
		file := filepath.Join("/proc/sys", name)
		if now, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(now)) == value {
			return nil
		}
		if err := os.WriteFile(file, []byte(value), 0o644); err != nil {
			return fmt.Errorf("cannot set sysctl %s to %s: %w", name, value, err)
		}
		return nil
	})
}

// away is the gate's network namespace where the calling thread is in another one, else
// none: to enter even its own takes CAP_SYS_ADMIN, which belayd's unit does not have.
func (g *Gate) away() netns.NsHandle {
	here, err := netns.Get()
	if err != nil {
		return g.ns
	}
	defer here.Close()
	if here.Equal(g.ns) {
		return netns.None()
	}
	return g.ns
}

// inside runs f on a thread in the gate's network namespace, which nearly always
// is that of all threads.
func (g *Gate) inside(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if ns := g.away(); !ns.IsOpen() {
			defer runtime.UnlockOSThread()
		} else if err := netns.Set(ns); err != nil { // for good: the thread ends here
			result <- fmt.Errorf("cannot enter the network namespace: %w", err)
			return
		}
		result <- f()
	}()
	return <-result
}
