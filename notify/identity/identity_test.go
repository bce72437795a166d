package identity

import (
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
)

var serviceAddr = netip.AddrFrom4([4]byte(service))

func TestGuestsAreToldApart(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.must(os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("1"), 0o644))
	h.bridge("br0")
	h.bridge("br1")
	h.bridge("br2")
	h.address("br2", "10.2.0.1/24")
	a := h.guest("br0", "vnet0", 1, "10.0.0.1/24")
	b := h.guest("br0", "vnet1", 2, "10.0.0.2/24")
	same := h.guest("br1", "vnet2", 3, "10.0.0.1/24") // as a
	far := h.guest("br1", "vnet3", 4, "198.51.100.7/32")
	far.port.Addrs = nil
	near := h.guest("br2", "vnet4", 5, "10.2.0.2/24") // where the host is too
	astray := h.guest("br2", "vnet5", 6, "192.0.2.9/24")

	// It has no route to the service but its gateway, which is not the host.
	gw := h.guest("br0", "vnet6", 7, "10.0.0.7/24")
	eth0 := gw.device("eth0").Attrs().Index
	gw.must(gw.link.RouteDel(&netlink.Route{LinkIndex: eth0, Dst: serviceNet, Scope: netlink.SCOPE_LINK}))
	gw.must(gw.link.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, Gw: net.ParseIP("10.0.0.2")}))

	g := h.open(Config{})
	h.serve(g)
	all := []*guest{a, b, same, far, near, astray, gw}
	h.set(g, all...)
	for _, filter := range []string{"1", "0"} { // whether bridged packets go through the IP hooks too
		for _, f := range []string{"iptables", "arptables"} {
			if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+f, []byte(filter), 0o644); err != nil {
				t.Log(err) // there is no br_netfilter
			}
		}
		for _, guest := range all {
			guest.isKnown()
		}
	}
	for _, c := range g.Check(t.Context()) {
		if c.Result != "ok" {
			t.Errorf("%s: %s %s", c.Name, c.Result, c.Text)
		}
	}
}
