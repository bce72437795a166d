package local

import (
	"net"
	"net/netip"
	"slices"
	"testing"
)

// What the kernel tells of listening sockets is what its files do, and a connection is none.
func TestListeners(t *testing.T) {
	t.Parallel()
	var at []netip.AddrPort
	connected := make(map[netip.AddrPort]bool)
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Log(err) // there may be no IPv6
			continue
		}
		defer l.Close()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		connected[netip.MustParseAddrPort(c.LocalAddr().String())] = true
		at = append(at, netip.MustParseAddrPort(l.Addr().String()))
	}
	asked, err := listeners()
	if err != nil {
		t.Skipf("this kernel cannot be asked: %v", err)
	}
	if slices.ContainsFunc(asked, func(a netip.AddrPort) bool { return a.Port() == 0 || connected[a] }) {
		t.Errorf("not all listen: %v", asked)
	}
	for name, all := range map[string][]netip.AddrPort{"netlink": asked, "files": New("", t.TempDir()).listeningByFile()} {
		for _, a := range at {
			if !slices.Contains(all, a) {
				t.Errorf("%s: nobody listens on %s, of %v", name, a, all)
			}
		}
	}
}
