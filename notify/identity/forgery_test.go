package identity

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/notify"
)

// onBridge is a host with a guest, a neighbour, and a stranger that was not set.
func onBridge(t *testing.T) (h *host, g *Gate, victim, forger, stranger *guest) {
	h = newHost(t)
	h.bridge("br0")
	victim = h.guest("br0", "vnet0", 1, "10.0.0.1/24")
	forger = h.guest("br0", "vnet1", 2, "10.0.0.2/24")
	stranger = h.guest("br0", "vnet2", 3, "10.0.0.3/24")
	g = h.open(Config{})
	h.serve(g)
	h.set(g, victim, forger)
	victim.isKnown() // and now the host knows its MAC address
	forger.isKnown()
	return h, g, victim, forger, stranger
}

// honest is what a guest may send.
func (g *guest) honest(h *host, port uint16) segment {
	return segment{dst: h.device("br0").Attrs().HardwareAddr, src: g.port.MAC, from: g.port.Addrs[0], port: port}
}

func TestForgedFramesGetNoAnswer(t *testing.T) {
	t.Parallel()
	h, g, victim, forger, stranger := onBridge(t)
	const fromLoopback = "the host's address" // the host itself takes it for forged
	hostMAC := h.device("br0").Attrs().HardwareAddr
	for name, f := range map[string]struct {
		loose bool // the forger's addresses are not known
		from  *guest
		bad   func(*segment)
	}{
		"MAC address":                     {false, forger, func(s *segment) { s.src = victim.port.MAC }},
		"MAC address, addresses unknown":  {true, forger, func(s *segment) { s.src = victim.port.MAC }},
		"nobody's MAC address":            {false, forger, func(s *segment) { s.src = mac(9) }},
		"IP address":                      {false, forger, func(s *segment) { s.from = victim.port.Addrs[0] }},
		"both":                            {false, forger, func(s *segment) { s.src, s.from = victim.port.MAC, victim.port.Addrs[0] }},
		"the service's address":           {true, forger, func(s *segment) { s.from = serviceAddr }},
		fromLoopback:                      {true, forger, func(s *segment) { s.from = netip.MustParseAddr("127.0.0.1") }},
		"VLAN tag":                        {false, forger, func(s *segment) { s.tags = []byte{0x81, 0, 0, 7} }},
		"service tag":                     {false, forger, func(s *segment) { s.tags = []byte{0x88, 0xa8, 0, 7} }},
		"two tags":                        {false, forger, func(s *segment) { s.tags = []byte{0x81, 0, 0, 0, 0x81, 0, 0, 7} }},
		"first fragment":                  {false, forger, func(s *segment) { s.frag = 0x2000 }},
		"another port":                    {false, forger, func(s *segment) { s.to = 8080 }},
		"a tap that is not known":         {false, stranger, func(*segment) {}},
		"an unknown tap, victim's":        {false, stranger, func(s *segment) { s.src, s.from = victim.port.MAC, victim.port.Addrs[0] }},
		"an unknown tap, the host's MAC":  {false, stranger, func(s *segment) { s.src = hostMAC }},
		"an unknown tap, everybody's MAC": {false, stranger, func(s *segment) { s.dst = broadcast }},
	} {
		t.Run(name, func(t *testing.T) {
			h.t = t
			known := forger.port
			if f.loose {
				known.Addrs = nil
			}
			h.must(g.Set(t.Context(), []Port{victim.port, known}))
			bad := f.from.honest(h, 1000)
			f.bad(&bad)
			w := h.listen("br0")
			f.from.send(bad.frame())
			forger.send(forger.honest(h, 2000).frame()) // after it, and answered
			for _, frame := range w.until(func(f []byte) bool { return synAck(f) == 2000 }) {
				if synAck(frame) == 1000 {
					t.Error("is answered")
				}
				if isFromPort(frame, 1000) && f.from == forger && name != fromLoopback {
					t.Error("comes to the host")
				}
			}
		})
	}
	t.Run("priority tag is none", func(t *testing.T) {
		h.t = t
		h.set(g, forger)
		s := forger.honest(h, 3000)
		s.tags = []byte{0x81, 0, 0xe0, 0}
		w := h.listen()
		forger.send(s.frame())
		w.until(func(f []byte) bool { return synAck(f) == 3000 })
	})
}

// An earlier rule, or whoever can have one, marks packets as the victim's.
func TestForgedMark(t *testing.T) {
	t.Parallel()
	h, _, victim, forger, stranger := onBridge(t)
	c := chainsNow(t, h)
	for _, mark := range c {
		h.nft(`table bridge other { chain c { type filter hook prerouting priority -250
			meta mark set ` + mark + `
		}
		}`)
		victim.isKnown()
		forger.isKnown()
		bad := stranger.honest(h, 1000)
		w := h.listen()
		stranger.send(bad.frame())
		forger.send(forger.honest(h, 2000).frame())
		for _, frame := range w.until(func(f []byte) bool { return synAck(f) == 2000 }) {
			if synAck(frame) == 1000 {
				t.Errorf("an unknown tap is let in with mark %s", mark)
			}
		}
		h.nft(`delete table bridge other`)
	}
	if len(c) != 2 {
		t.Errorf("there are marks %v instead of two", c)
	}
}

// chainsNow are the marks that the kernel has rules for.
func chainsNow(t *testing.T, h *host) (marks []string) {
	t.Helper()
	g := &Gate{ns: h.ns}
	c, err := g.nft()
	h.must(err)
	all, err := guestChains(c)
	h.must(err)
	for _, ch := range all {
		mark, err := markOf(ch.Name)
		h.must(err)
		marks = append(marks, fmt.Sprintf("%#x", mark))
	}
	return marks
}

// A program on the host that may set marks is no guest.
func TestForgedMarkOnTheHost(t *testing.T) {
	t.Parallel()
	h, _, _, _, _ := onBridge(t)
	h.address("lo", "203.0.113.5/32")
	for _, mark := range chainsNow(t, h) {
		var v int
		if _, err := fmt.Sscan(mark, &v); err != nil {
			t.Fatal(err)
		}
		d := net.Dialer{Timeout: 200 * time.Millisecond, LocalAddr: &net.TCPAddr{IP: net.ParseIP("203.0.113.5")}, Control: func(_, _ string, raw syscall.RawConn) (err error) {
			return errors.Join(raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, v) }), err)
		}}
		h.must(h.in(func() error {
			c, err := d.Dial("tcp4", net.JoinHostPort(notify.Address, "80"))
			if err == nil {
				c.Close()
				return fmt.Errorf("the host is let in with mark %s", mark)
			}
			var timeout net.Error
			if !errors.As(err, &timeout) || !timeout.Timeout() {
				return err
			}
			return nil
		}))
	}
}

// Bits outside of the mask stay as others want them.
func TestOtherBitsOfMarks(t *testing.T) {
	t.Parallel()
	h, _, _, forger, _ := onBridge(t)
	h.nft(`table bridge other { chain c { type filter hook prerouting priority -250
		meta mark set 0x10004000
	}
	}
	table ip other {
		counter seen {
		}
		chain c { type filter hook input priority 0
			ip daddr 169.254.169.254 meta mark & 0xf000f000 == 0x10004000 counter name seen
		}
	}`)
	forger.isKnown()
	if out := h.nft("list counters"); !strings.Contains(out, "packets ") || strings.Contains(out, "packets 0 ") {
		t.Errorf("bits of others are lost: %s", out)
	}
}

func TestARP(t *testing.T) {
	t.Parallel()
	h, g, victim, forger, stranger := onBridge(t)
	who := func(g *guest) arp {
		return arp{dst: broadcast, src: g.port.MAC, op: 1, mac: g.port.MAC, from: g.port.Addrs[0], to: serviceAddr}
	}
	control := func(f []byte) bool {
		op, from, to, ok := arpOf(f)
		return ok && op == 2 && from == serviceAddr && to == forger.port.Addrs[0] && bytes.Equal(f[:6], forger.port.MAC)
	}

	t.Run("is answered to guests only, and seen by nobody else", func(t *testing.T) {
		h.t = t
		w, seen := h.listen(), victim.listen()
		forged := who(forger)
		forged.from = victim.port.Addrs[0]
		other := who(forger)
		other.mac = victim.port.MAC
		stranger.send(who(stranger).frame())
		forger.send(forged.frame(), other.frame(), who(forger).frame())
		frames := w.until(control)
		for _, f := range frames {
			if op, from, to, ok := arpOf(f); ok && op == 2 && from == serviceAddr && !control(f) {
				t.Errorf("%v (%v) is answered", to, net.HardwareAddr(f[:6]))
			}
		}
		// What reaches the victim after it shows what has not.
		forger.send(arp{dst: broadcast, src: forger.port.MAC, op: 1, mac: forger.port.MAC, from: forger.port.Addrs[0], to: victim.port.Addrs[0]}.frame())
		for _, f := range seen.until(func(f []byte) bool {
			_, from, to, ok := arpOf(f)
			return ok && from == forger.port.Addrs[0] && to == victim.port.Addrs[0]
		}) {
			if _, from, to, ok := arpOf(f); ok && from == forger.port.Addrs[0] && to == serviceAddr {
				t.Error("a guest's ARP for the service is sent to others")
			}
		}
	})
	t.Run("nobody is the service to guests", func(t *testing.T) {
		h.t = t
		seen := victim.listen()
		for _, rogue := range []*guest{forger, stranger} {
			rogue.send(arp{dst: victim.port.MAC, src: rogue.port.MAC, op: 2, mac: rogue.port.MAC, from: serviceAddr, to: victim.port.Addrs[0]}.frame(),
				segment{dst: victim.port.MAC, src: rogue.port.MAC, from: serviceAddr, dest: victim.port.Addrs[0], port: 80, flags: flagSYN | flagACK}.frame())
			rogue.send(arp{dst: victim.port.MAC, src: rogue.port.MAC, op: 2, mac: rogue.port.MAC, from: rogue.port.Addrs[0], to: victim.port.Addrs[0]}.frame())
			for _, f := range seen.until(func(f []byte) bool {
				_, from, _, ok := arpOf(f)
				return ok && from == rogue.port.Addrs[0]
			}) {
				if _, from, _, ok := arpOf(f); ok && from == serviceAddr || isFrom(f, serviceAddr) {
					t.Errorf("%s makes itself the service", rogue.port.Tap)
				}
			}
		}
		victim.isKnown()
	})
	t.Run("a guest is the service to nobody", func(t *testing.T) {
		h.t = t
		seen := stranger.listen()
		s := segment{dst: stranger.port.MAC, src: forger.port.MAC, from: serviceAddr, dest: stranger.port.Addrs[0], port: 80, flags: flagSYN | flagACK}
		forger.send(s.frame(),
			arp{dst: stranger.port.MAC, src: forger.port.MAC, op: 2, mac: forger.port.MAC, from: serviceAddr, to: stranger.port.Addrs[0]}.frame(),
			arp{dst: stranger.port.MAC, src: forger.port.MAC, op: 2, mac: forger.port.MAC, from: forger.port.Addrs[0], to: stranger.port.Addrs[0]}.frame())
		for _, f := range seen.until(func(f []byte) bool {
			_, from, _, ok := arpOf(f)
			return ok && from == forger.port.Addrs[0]
		}) {
			_, from, _, ok := arpOf(f)
			if ok && from == serviceAddr || isFrom(f, serviceAddr) {
				t.Errorf("frame %x is sent on", f)
			}
		}
	})
	t.Run("the host does not tell its address", func(t *testing.T) {
		h.t = t
		h.must(h.link.LinkSetUp(h.device("lo")))
		h.address("lo", "203.0.113.5/32")
		h.must(h.link.NeighDel(neighbour(h, forger)))
		w := h.listen()
		forger.send(forger.honest(h, 4000).frame())
		for _, f := range w.until(func(f []byte) bool { return synAck(f) == 4000 }) {
			if op, from, _, ok := arpOf(f); ok && op == 1 && from != serviceAddr {
				t.Errorf("it asks by %v", from)
			}
		}
	})
	t.Run("who takes a neighbour's address gets nothing of its replies", func(t *testing.T) {
		h.t = t
		loose := forger.port
		loose.Addrs = nil
		h.must(g.Set(t.Context(), []Port{victim.port, loose}))
		// The host has the forger's MAC address for the victim's address.
		n := neighbour(h, victim)
		n.HardwareAddr, n.State = forger.port.MAC, 0x80 // NUD_PERMANENT
		h.must(h.link.NeighSet(n))
		w := h.listen()
		victim.send(victim.honest(h, 5000).frame())
		w.until(func(f []byte) bool { return synAck(f) == 5000 }) // it is sent by br0
		seen := forger.listen()
		victim.send(victim.honest(h, 5001).frame())
		w.until(func(f []byte) bool { return synAck(f) == 5001 })
		forger.send(forger.honest(h, 5002).frame())
		for _, f := range seen.until(func(f []byte) bool { return synAck(f) == 5002 }) {
			if synAck(f) == 5001 {
				t.Error("the forger sees it")
			}
		}
	})
}

// Another service on the bridge has the address, for those that are not set.
func TestOthersAreLeftAlone(t *testing.T) {
	t.Parallel()
	h, _, _, _, stranger := onBridge(t)
	other := h.guest("br0", "vnet3", 4, "10.0.0.4/24")
	seen := other.listen()
	s := stranger.honest(h, 1000)
	s.dst = other.port.MAC
	stranger.send(s.frame())
	seen.until(func(f []byte) bool { return isFromPort(f, 1000) })
	seen = stranger.listen()
	other.send(arp{dst: stranger.port.MAC, src: other.port.MAC, op: 2, mac: other.port.MAC, from: serviceAddr, to: stranger.port.Addrs[0]}.frame(),
		segment{dst: stranger.port.MAC, src: other.port.MAC, from: serviceAddr, dest: stranger.port.Addrs[0], port: 80, flags: flagSYN | flagACK}.frame())
	seen.until(func(f []byte) bool { _, from, _, ok := arpOf(f); return ok && from == serviceAddr })
	seen.until(func(f []byte) bool { return isFrom(f, serviceAddr) })
}

// A neighbour that knows everything of a connection, the numbers too, adds to it.
func TestNobodyAddsToAnothersConnection(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.bridge("br0")
	victim := h.guest("br0", "vnet0", 1, "10.0.0.1/24")
	forger := h.guest("br0", "vnet1", 2, "10.0.0.2/24")
	forger.port.Addrs = nil
	g := h.open(Config{})
	h.set(g, victim, forger)
	ln, err := g.Listen(t.Context())
	h.must(err)
	w := h.listen()
	theirs, err := victim.dial(t.Context())
	h.must(err)
	defer theirs.Close()
	ours, err := ln.Accept()
	h.must(err)
	defer ours.Close()
	frames := w.until(func(f []byte) bool { return synAck(f) != 0 })
	last := frames[len(frames)-1]
	s := segment{dst: h.device("br0").Attrs().HardwareAddr, src: forger.port.MAC, from: victim.port.Addrs[0], port: synAck(last),
		seq: binary.BigEndian.Uint32(last[42:]), ack: binary.BigEndian.Uint32(last[38:]) + 1, flags: flagACK | flagPSH, data: "forged"}
	forger.send(s.frame())
	if _, err := theirs.Write([]byte("honest")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 6)
	if _, err := ours.Read(got); err != nil || string(got) != "honest" {
		t.Errorf("the connection has %q (%v)", got, err)
	}
}
