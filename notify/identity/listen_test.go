package identity

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"belay/notify"
)

// dialFrom opens a connection from a port of the guest's choice.
func (g *guest) dialFrom(port uint16) (c net.Conn, err error) {
	from := net.TCPAddrFromAddrPort(netip.AddrPortFrom(g.port.Addrs[0], port))
	inErr := g.in(func() (err error) {
		c, err = (&net.Dialer{LocalAddr: from}).DialContext(g.t.Context(), "tcp4", net.JoinHostPort(notify.Address, "80"))
		return err
	})
	return c, inErr
}

// answer is whom the host takes a connection for, which it closes.
func answer(c net.Conn) (string, error) {
	fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
	all, err := io.ReadAll(c)
	_, who, _ := strings.Cut(string(all), "\r\n\r\n")
	return who, err
}

// Networks of several tenants have the same addresses, and their guests cannot
// know which ports the others ask from.
func TestSameAddressAndPortOnTwoBridges(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	a, b := h.tenants()
	g := h.open(Config{})
	h.serve(g)
	h.set(g, a, b)

	open := func(from *guest, port uint16) net.Conn {
		c, err := from.dialFrom(port)
		if err != nil {
			t.Fatalf("%s cannot ask from port %d: %v", from.port.Guest, port, err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	is := func(c net.Conn, of *guest) {
		if who, err := answer(c); err != nil || who != of.port.Guest {
			t.Errorf("%s is taken for %q (%v)", of.port.Guest, who, err)
		}
	}
	// Both at the same time, and each is told what is its own.
	first, second := open(a, 40000), open(b, 40000)
	is(second, b)
	is(first, a)
	// One after the other: the host remembers what it has closed (TIME_WAIT).
	is(open(b, 40001), b)
	is(open(a, 40001), a)
}

// A bridge that is there no more has no socket, and one that comes back has.
func TestSocketsFollowBridges(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	a, b := h.tenants()
	g := h.open(Config{})
	h.serve(g)
	sockets := func() (n int) {
		all, err := g.listeners()
		h.must(err)
		return len(all)
	}
	for _, step := range [][]*guest{{a, b}, {b}, {}, {a}, {a, b}} {
		h.set(g, step...)
		bridges := make(map[string]bool)
		for _, known := range step {
			known.isKnown()
			bridges[known.port.Bridge] = true
		}
		if n, want := sockets(), 1+len(bridges); n != want { // and the claim
			t.Errorf("%d guests are served by %d sockets, want %d", len(step), n, want)
		}
	}
	h.must(h.link.LinkDel(h.device("br1")))
	await(t, func() bool { return sockets() == 2 })
	a.isKnown()
	// Without any guest the port stays claimed.
	h.set(g)
	if ln, err := net.Listen("tcp", ":80"); err == nil {
		ln.Close()
		t.Error("somebody else could have the port")
	}
}
