package identity

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestCheck(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.bridge("br0")
	a := h.guest("br0", "vnet0", 1, "10.0.0.1/24")
	g := h.open(Config{})
	sysctl := func(name, value string) func() {
		return func() {
			h.must(h.in(func() error { return os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0o644) }))
		}
	}
	for _, c := range []struct {
		name, says string
		harm, heal func()
	}{
		{"accept", "tcp_fwmark_accept is 0", sysctl("tcp_fwmark_accept", "0"), sysctl("tcp_fwmark_accept", "1")},
		{"arp", "arp_ignore is 1", sysctl("conf/all/arp_ignore", "1"), sysctl("conf/all/arp_ignore", "0")},
		{"flushed", "chain bridge belay_identity", func() { h.nft("flush table bridge belay_identity") }, func() {}},
		{"deleted", "chain bridge belay_identity", func() { h.nft("delete table bridge belay_identity") }, func() {}},
		{"emptied", "set ip belay_identity marks", func() { h.nft("flush set ip belay_identity marks") }, func() {}},
		{"rule", "routing rules", func() { h.must(h.link.RuleDel(g.rulesOf(1)[0])) }, func() {}},
		{"routes", "lost its routes", func() { h.must(h.link.RouteDel(g.routesOf(h.device("br0").Attrs().Index, 1)[1])) }, func() {}},
		{"no bridge", "is not on bridge", func() { h.must(h.link.LinkSetNoMaster(h.device("vnet0"))) }, func() { h.must(h.link.LinkSetMaster(h.device("vnet0"), h.device("br0"))) }},
		{"address", "br0 has the address", func() { h.address("br0", "169.254.169.254/32") }, func() {
			addr, _ := netlink.ParseAddr("169.254.169.254/32")
			h.must(h.link.AddrDel(h.device("br0"), addr))
		}},
		{"stranger", "ip other c", func() {
			h.nft("table ip other {\nset s {\ntype ipv4_addr\nelements = { 1.2.3.4, 169.254.169.254 }\n}\nchain c {\nip daddr @s drop\n}\n}")
		}, func() { h.nft("delete table ip other") }},
	} {
		h.set(g, a)
		if bad := failed(g.Check(t.Context())); bad != "" {
			t.Errorf("%s: before any harm: %s", c.name, bad)
		}
		c.harm()
		if bad := failed(g.Check(t.Context())); !strings.Contains(bad, c.says) {
			t.Errorf("%s: Check says %q", c.name, bad)
		}
		c.heal()
	}
	ln, err := net.Listen("tcp", ":80")
	h.must(err)
	defer ln.Close()
	if bad := failed(g.Check(t.Context())); !strings.Contains(bad, fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("Check says %q", bad)
	}
}

func TestTaken(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	g := h.open(Config{})
	for _, addr := range []string{":80", "0.0.0.0:80"} {
		ln, err := net.Listen("tcp", addr)
		h.must(err)
		_, err = g.Listen(t.Context())
		if !errors.Is(err, ErrTaken) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
			t.Errorf("%s: %v", addr, err)
		}
		ln.Close()
	}
	other, err := net.Listen("tcp", "127.0.0.1:80")
	h.must(err)
	defer other.Close()
	ln, err := g.Listen(t.Context())
	if err != nil {
		t.Fatalf("a listener on another address is in the way: %v", err)
	}
	ln.Close()
	h.address("lo", "169.254.169.254/32")
	if _, err := Open(Config{}); !errors.Is(err, ErrTaken) || !strings.Contains(err.Error(), "lo has the address") {
		t.Errorf("the address is the host's: %v", err)
	}
}
