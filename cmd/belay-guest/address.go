package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// errServed: something else serves the address in this guest.
var errServed = errors.New("the address is served already")

// label marks the address as belay-guest's: one that was killed leaves it, and the
// next takes it over.
const label = "lo:belay"

// addAddress adds the address to lo, which it brings up, and gives what takes it
// away again. An address that lo has from somebody else stays.
func addAddress(a netip.Addr, force bool) (remove func() error, err error) {
	nothing := func() error { return nil }
	if a.IsLoopback() {
		return nothing, nil
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("cannot find lo: %w", err)
	}
	there, err := netlink.AddrList(nil, unix.AF_INET)
	if err != nil {
		return nil, fmt.Errorf("cannot list the guest's addresses: %w", err)
	}
	for _, t := range there {
		switch {
		case !t.IP.Equal(a.AsSlice()) || t.Label == label:
		case t.LinkIndex == lo.Attrs().Index:
			return nothing, nil
		case !force:
			return nil, fmt.Errorf("%w: %s is an address of interface %s (take it away there, or use -force)", errServed, a, t.Label)
		}
	}
	host := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}
	if !force {
		routes, err := netlink.RouteListFiltered(unix.AF_INET, &netlink.Route{Dst: host}, netlink.RT_FILTER_DST)
		if err != nil {
			return nil, fmt.Errorf("cannot list the guest's routes: %w", err)
		}
		if len(routes) > 0 {
			return nil, fmt.Errorf("%w: the guest's network routes %s to where metadata is served (do without belay-guest, or use -force)", errServed, a)
		}
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return nil, fmt.Errorf("cannot bring lo up: %w", privileges(err))
	}
	ours := &netlink.Addr{IPNet: host, Label: label, Scope: unix.RT_SCOPE_HOST}
	if err := netlink.AddrReplace(lo, ours); err != nil {
		return nil, fmt.Errorf("cannot add %s to lo: %w", a, privileges(err))
	}
	return func() error {
		if err := netlink.AddrDel(lo, ours); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("cannot take %s off lo: %w", a, err)
		}
		return nil
	}, nil
}

// privileges adds what would help.
func privileges(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w (run belay-guest as root, or with CAP_NET_ADMIN)", err)
	}
	return err
}
