package lab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
)

const (
	// lanBits is the LAN's prefix length: 10.77.0.0/16.
	lanBits = 16
	// Bridge is the bridge in each host that guests attach to. The host's
	// own address is on it.
	Bridge = "br0"
	// Uplink is the host's link into the LAN, a port of Bridge.
	Uplink = "uplink"

	// MigrationLink is the host's link into a migration network.
	MigrationLink = "mig"

	// lan is the bridge in the switch's namespace. Its ports have the names
	// of the hosts behind them.
	lan = "lan"
)

// hostAddr is the LAN address of the host with index i, from 0.
func hostAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 77, 0, byte(i + 1)}) }

// SwitchAddr is the address of the switch's namespace on the LAN.
func SwitchAddr() netip.Addr { return netip.AddrFrom4([4]byte{10, 77, 255, 254}) }

// addNetns makes a network namespace whose links have no IPv6: what is not there cannot answer on an
// address that no test gave it. No connection begins at a port that libvirt has for guests that
// come, by chance: tests take those.
func (l *Lab) addNetns(ctx context.Context, name string) error {
	if err := l.ip(ctx, "", "netns add "+name); err != nil {
		return err
	}
	return inNetns(name, func() error {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_reserved_ports", []byte("49152-49215"), 0); err != nil {
			return err
		}
		for _, which := range []string{"all", "default"} {
			err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0)
			if err != nil && !os.IsNotExist(err) { // a kernel without IPv6
				return err
			}
		}
		return nil
	})
}

// addBridge gives the commands for a bridge that forwards from the moment a
// port comes up: a guest that has just moved must be reachable at once, so there
// is no spanning tree, no forward delay and no multicast snooping.
func addBridge(name string, addr netip.Addr) []string {
	return []string{
		"link set lo up",
		"link add " + name + " type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
		fmt.Sprintf("addr add %s/%d dev %s", addr, lanBits, name),
		"link set " + name + " up",
	}
}

func (l *Lab) addSwitch(ctx context.Context) error {
	ns := l.netns("switch")
	if err := l.addNetns(ctx, ns); err != nil {
		return err
	}
	// Else it has the address of one of its ports, and not always of the same.
	return l.ip(ctx, ns, append(addBridge(lan, SwitchAddr()), "link set "+lan+" address 52:54:00:77:ff:fe")...)
}

// addNetwork makes the host's network namespace and connects it to the switch.
// Both ends of the veth pair are born where they belong, so nothing appears in
// the machine's network, not even for a moment.
func (h *Host) addNetwork(ctx context.Context) error {
	if err := h.lab.addNetns(ctx, h.netns); err != nil {
		return err
	}
	sw := h.lab.netns("switch")
	a := h.Addr.As4()
	cmds := append(addBridge(Bridge, h.Addr),
		// Else the bridge takes the lowest address among its ports, and
		// changes it as guests come and go.
		fmt.Sprintf("link set %s address 52:54:00:77:%02x:%02x", Bridge, a[2], a[3]),
		fmt.Sprintf("link add %s type veth peer name %s netns %s", Uplink, h.Name, sw),
		"link set "+Uplink+" master "+Bridge,
		"link set "+Uplink+" up")
	if err := h.lab.ip(ctx, h.netns, cmds...); err != nil {
		return err
	}
	return h.lab.ip(ctx, sw,
		"link set "+h.Name+" master "+lan,
		"link set "+h.Name+" up")
}

// AddMigrationNetwork gives all hosts a second network, of nothing but them: a link
// MigrationLink each, with the host's MigrationAddr, to a bridge of its own.
func (l *Lab) AddMigrationNetwork(ctx context.Context) error {
	sw := l.netns("switch")
	if err := l.ip(ctx, sw, "link add "+MigrationLink+" type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set "+MigrationLink+" up"); err != nil {
		return fmt.Errorf("migration network: %w", err)
	}
	for _, h := range l.Hosts {
		port := h.Name + "-m"
		err := l.ip(ctx, h.netns, fmt.Sprintf("link add %s type veth peer name %s netns %s", MigrationLink, port, sw),
			fmt.Sprintf("addr add %s/%d dev %s", h.MigrationAddr(), lanBits, MigrationLink), "link set "+MigrationLink+" up")
		if err == nil {
			err = l.ip(ctx, sw, "link set "+port+" master "+MigrationLink, "link set "+port+" up")
		}
		if err != nil {
			return fmt.Errorf("migration network of %s: %w", h.Name, err)
		}
	}
	return nil
}

// MigrationAddr is the host's address in the network that AddMigrationNetwork makes.
func (h *Host) MigrationAddr() netip.Addr {
	a := h.Addr.As4()
	return netip.AddrFrom4([4]byte{a[0], a[1] + 1, a[2], a[3]})
}

// SetLink cuts the host from the LAN (false) or connects it again (true), as
// pulling the cable would: the switch's port goes down, so the host's uplink
// loses its carrier and nothing passes in either direction. Guests on the host
// still reach it and each other.
func (h *Host) SetLink(ctx context.Context, up bool) error {
	to := "down"
	if up {
		to = "up"
	}
	if err := h.lab.ip(ctx, h.lab.netns("switch"), "link set "+h.Name+" "+to); err != nil {
		return fmt.Errorf("cannot set link of %s %s: %w", h.Name, to, err)
	}
	return nil
}

// Netem shapes what the host sends into the LAN. The arguments are a queueing
// discipline of tc(8) and its options, and replace those before them:
//
//	h.Netem(ctx, "netem", "delay", "20ms", "loss", "1%")
//	h.Netem(ctx, "tbf", "rate", "100mbit", "burst", "64kb", "latency", "50ms")
//
// Without any the uplink is as fast as it can be. What comes in is shaped at
// the hosts that send it. The kernel must have the discipline (sch_netem,
// sch_tbf); a kernel made for small virtual machines may have one and not the
// other.
func (h *Host) Netem(ctx context.Context, args ...string) error {
	tc := []string{"-n", h.netns, "qdisc", "replace", "dev", Uplink, "root"}
	if len(args) == 0 {
		// noqueue is what a veth has from the start; deleting a root
		// that is not there would be an error.
		args = []string{"noqueue"}
	}
	if err := h.lab.run(tool(ctx, "tc", append(tc, args...)...)); err != nil {
		return fmt.Errorf("cannot shape uplink of %s with %s: %w", h.Name, args[0], err)
	}
	return nil
}
