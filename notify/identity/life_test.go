package identity

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// asHost in the environment has this test binary be a host's agent, which can be
// killed: its value is the port of a guest.
const asHost = "BELAY_TEST_IDENTITY_HOST"

func TestMain(m *testing.M) {
	if v := os.Getenv(asHost); v != "" {
		if err := agent(v); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		select {} // until it is killed
	}
	os.Exit(m.Run())
}

func agent(v string) error {
	var p Port
	var hw string
	if _, err := fmt.Sscan(v, &p.Guest, &p.Ifindex, &p.Tap, &p.Bridge, &hw); err != nil {
		return err
	}
	var err error
	if p.MAC, err = net.ParseMAC(hw); err != nil {
		return err
	}
	g, err := Open(Config{})
	if err != nil {
		return err
	}
	if _, err := serve(g); err != nil {
		return err
	}
	if err := g.Set(context.Background(), []Port{p}); err != nil {
		return err
	}
	fmt.Println("ready")
	return nil
}

func TestTakeover(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.bridge("br0")
	a := h.guest("br0", "vnet0", 1, "10.0.0.1/24")
	b := h.guest("br0", "vnet1", 2, "10.0.0.2/24")
	for range 3 {
		c := exec.Command("/proc/self/exe")
		c.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %s %s %s", asHost, a.port.Guest, a.port.Ifindex, a.port.Tap, a.port.Bridge, a.port.MAC))
		out, err := c.StdoutPipe()
		h.must(err)
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		h.must(c.Start()) // in the namespace of this thread
		line, _ := bufio.NewReader(out).ReadString('\n')
		if line != "ready\n" {
			t.Errorf("the agent says %q", line)
		} else {
			a.isKnown()
		}
		h.must(c.Process.Kill())
		_ = c.Wait()
	}
	before := chainsNow(t, h)
	if len(before) != 1 {
		t.Fatalf("marks %v are left instead of one", before)
	}

	g := h.open(Config{})
	h.serve(g)
	// The kernel marks a as before, and who asks waits until the new gate knows ports.
	asks := h.listen()
	known := make(chan error, 1)
	go func() {
		who, err := a.ask()
		if err == nil && who != a.port.Guest {
			err = fmt.Errorf("it is taken for %q", who)
		}
		known <- err
	}()
	asks.until(func(f []byte) bool { return isFrom(f, a.port.Addrs[0]) && isSYN(f) })
	h.set(g, a, b)
	if err := <-known; err != nil {
		t.Errorf("%s asked while the gate was new: %v", a.port.Guest, err)
	}
	h.set(g, b)
	b.isKnown()
	bad := a.honest(h, 1000)
	w := h.listen()
	a.send(bad.frame())
	b.send(b.honest(h, 2000).frame())
	for _, f := range w.until(func(f []byte) bool { return synAck(f) == 2000 }) {
		if synAck(f) == 1000 {
			t.Error("a guest of the killed gate is still answered")
		}
	}
	if after := chainsNow(t, h); len(after) != 1 || after[0] == before[0] {
		t.Errorf("marks were %v and are %v", before, after)
	}
}

func TestUnplugged(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.bridge("br0")
	a := h.guest("br0", "vnet0", 1, "10.0.0.1/24")
	b := h.guest("br0", "vnet1", 2, "10.0.0.2/24")
	g := h.open(Config{})
	h.serve(g)
	h.set(g, a, b)
	old := a.port
	c, err := a.dial(t.Context())
	h.must(err)
	defer c.Close()
	kept, err := b.dial(t.Context())
	h.must(err)
	defer kept.Close()
	a.isKnown()

	// Another guest gets a tap with the same name, index, MAC and IP address.
	w := h.listen()
	h.must(h.link.LinkDel(h.device("vnet0")))
	await(t, func() bool {
		g.change.Lock() // with which the kernel is told too
		defer g.change.Unlock()
		return len(g.taps) == 1
	})
	a.plug(h, old.Ifindex)
	if a.port.Ifindex != old.Ifindex {
		t.Fatalf("the new tap has index %d", a.port.Ifindex)
	}
	a.send(a.honest(h, 1000).frame())
	b.isKnown()
	b.send(b.honest(h, 2000).frame())
	for _, f := range w.until(func(f []byte) bool { return synAck(f) == 2000 }) {
		if synAck(f) == 1000 {
			t.Error("a new tap has the identity of the one before it")
		}
	}
	if marks := chainsNow(t, h); len(marks) != 1 {
		t.Errorf("the kernel has marks %v instead of one", marks)
	}
	// The neighbour has felt nothing.
	fmt.Fprint(kept, "GET / HTTP/1.0\r\n\r\n")
	if all, err := io.ReadAll(kept); err != nil || !strings.HasSuffix(string(all), b.port.Guest) {
		t.Errorf("the neighbour is answered %q (%v)", all, err)
	}

	a.port.Guest = "uuid-next"
	h.must(a.link.RouteReplace(&netlink.Route{LinkIndex: a.device("eth0").Attrs().Index, Dst: serviceNet, Scope: netlink.SCOPE_LINK}))
	a.address("eth0", "10.0.0.1/24")
	h.set(g, a, b)
	a.isKnown()
	if err := g.Set(t.Context(), []Port{b.port, {Guest: "x", Ifindex: 9999, Tap: "vnet9", Bridge: "br0", MAC: mac(9)}}); err == nil || !strings.Contains(err.Error(), "vnet9") {
		t.Errorf("a tap that is not there: %v", err)
	}
	b.isKnown()
}

func TestConnectionsOfPortsTakenAway(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.bridge("br0")
	a := h.guest("br0", "vnet0", 1, "10.0.0.1/24")
	b := h.guest("br0", "vnet1", 2, "10.0.0.2/24")
	g := h.open(Config{MaxConns: 3})
	ln, err := g.Listen(t.Context())
	h.must(err)
	h.set(g, a, b)
	inside := func(from *guest) net.Conn {
		c, err := from.dial(t.Context())
		h.must(err)
		t.Cleanup(func() { c.Close() })
		s, err := ln.Accept()
		h.must(err)
		if who, known := g.Guest(s); !known || who != from.port.Guest {
			t.Fatalf("%s is taken for %q", from.port.Guest, who)
		}
		return s
	}
	a1, a2, a3, b1 := inside(a), inside(a), inside(a), inside(b)

	// One too many is reset; the next that is accepted is b's.
	extra, err := a.dial(t.Context())
	if err == nil {
		defer extra.Close()
		_, err = extra.Read(make([]byte, 1))
	}
	b2 := inside(b)
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a connection too many ends with %v", err)
	}
	h.must(a3.Close())
	_ = a3.Close() // closed once more it is not counted once more
	a3 = inside(a)

	h.set(g, b)
	for _, c := range []net.Conn{a1, a2, a3} {
		if who, known := g.Guest(c); known {
			t.Errorf("the connection is still %q's", who)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("the connection is still open: %v", err)
		}
	}
	for _, c := range []net.Conn{b1, b2} {
		if _, known := g.Guest(c); !known {
			t.Error("the neighbour's connection is gone")
		}
	}
	if _, known := g.Guest(extra); known {
		t.Error("a connection of somebody else is a guest's")
	}
}

// A guest cannot open connections as fast as it likes, and keeps no other from it.
func TestConnectionsAtOnce(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.bridge("br0")
	a := h.guest("br0", "vnet0", 1, "10.0.0.1/24")
	b := h.guest("br0", "vnet1", 2, "10.0.0.2/24")
	const tries = 3 * connectsAtOnce
	g := h.open(Config{MaxConns: tries})
	h.serve(g)
	h.set(g, a, b)
	begun := time.Now()
	var opened atomic.Int32
	var all sync.WaitGroup
	ctx, cancel := context.WithTimeout(t.Context(), 900*time.Millisecond) // TCP tries again after a second
	defer cancel()
	for range tries {
		all.Go(func() {
			if c, err := a.dial(ctx); err == nil {
				opened.Add(1)
				c.Close()
			}
		})
	}
	b.isKnown()
	all.Wait()
	most := connectsAtOnce + int32(connects*time.Since(begun).Seconds()) + 1
	if n := opened.Load(); n < connectsAtOnce/2 || n > most {
		t.Errorf("%d of %d connections were opened, want %d, and at most %d", n, tries, connectsAtOnce, most)
	}
	b.isKnown()
}

func TestNoRequestIsLostWhilePortsAreSet(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	a, b := h.tenants()
	others := []*guest{h.guest("br0", "vnet2", 3, "10.0.0.3/24"), h.guest("br1", "vnet3", 4, "10.0.0.4/24")}
	g := h.open(Config{})
	h.serve(g)
	h.set(g, a, b)

	var stop atomic.Bool
	var clients, setters sync.WaitGroup
	var asked atomic.Int64
	for _, guest := range []*guest{a, b} {
		for _, keep := range []bool{false, true} {
			clients.Go(func() {
				c := guest.client()
				c.Transport.(*http.Transport).DisableKeepAlives = !keep
				defer c.CloseIdleConnections()
				for !stop.Load() {
					resp, err := c.Get("http://169.254.169.254/")
					if err != nil {
						t.Errorf("%s: %v", guest.port.Guest, err)
						return
					}
					who, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					if err != nil || string(who) != guest.port.Guest {
						t.Errorf("%s is taken for %q (%v)", guest.port.Guest, who, err)
						return
					}
					asked.Add(1)
				}
			})
		}
	}
	for i := range 2 {
		setters.Go(func() {
			for n := range 25 {
				set := []*guest{a, b}
				if n%2 == i {
					set = append(set, others...)
				}
				if err := g.Set(t.Context(), ports(set...)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	setters.Wait()
	stop.Store(true)
	clients.Wait()
	if asked.Load() == 0 {
		t.Error("nobody has asked")
	}
}

func TestManyPorts(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.bridge("br0")
	a := h.guest("br0", "vnet0", 1, "10.0.0.1/24")
	all := []Port{a.port}
	for i := range 300 { // more than fit into a message
		one, two := fmt.Sprintf("tap%d", 2*i), fmt.Sprintf("tap%d", 2*i+1)
		h.must(h.link.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: one}, PeerName: two}))
		for _, name := range []string{one, two} {
			index := h.device(name).Attrs().Index
			all = append(all, Port{Guest: name, Ifindex: index, Tap: name, Bridge: "br0", MAC: net.HardwareAddr{2, 0, 0, 0, byte(index >> 8), byte(index)}})
		}
	}
	g := h.open(Config{})
	h.serve(g)
	for range 2 {
		h.must(g.Set(t.Context(), all))
	}
	if n := len(chainsNow(t, h)); n != len(all) {
		t.Errorf("the kernel has %d marks instead of %d", n, len(all))
	}
	a.isKnown()
}

func TestBridgeGoesDownAndUp(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.bridge("br0")
	a := h.guest("br0", "vnet0", 1, "10.0.0.1/24")
	g := h.open(Config{})
	h.serve(g)
	h.set(g, a)
	a.isKnown()
	br := h.device("br0")
	h.must(h.link.LinkSetDown(br)) // and its routes are gone
	await(t, func() bool { return failed(g.Check(t.Context())) != "" })
	h.set(g, a)
	h.must(h.link.LinkSetHardwareAddr(br, mac(0xee)))
	h.must(h.link.LinkSetUp(br))
	await(t, func() bool { return failed(g.Check(t.Context())) == "" })
	a.isKnown()
}

func await(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it has not come to be")
		}
	}
}

// failed are the names of checks that are not well.
func failed(all []maint.Check) string {
	var names []string
	for _, c := range all {
		if c.Result != maint.CheckOK {
			names = append(names, c.Name+": "+c.Text)
		}
	}
	return strings.Join(names, "; ")
}

func TestCloseLeavesNothing(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.bridge("br0")
	a := h.guest("br0", "vnet0", 1, "10.0.0.1/24")
	h.nft("table bridge belay_others {\nchain c {\n}\n}")
	all, err := h.link.RuleList(netlink.FAMILY_V4)
	h.must(err)
	rules := len(all)
	state := func() string {
		return h.nft("list ruleset")
	}
	before := state()
	g, err := Open(Config{})
	h.must(err)
	h.serve(g)
	h.set(g, a)
	a.isKnown()
	if state() == before {
		t.Fatal("a gate has no rules")
	}
	h.must(g.Close())
	if after := state(); after != before {
		t.Errorf("it leaves %s", after)
	}
	all, err = h.link.RuleList(netlink.FAMILY_V4)
	h.must(err)
	if len(all) != rules {
		t.Errorf("it leaves routing rules %v", all)
	}
	routes, err := h.link.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: 169254001}, netlink.RT_FILTER_TABLE)
	if err != nil || len(routes) != 0 {
		t.Errorf("it leaves routes %v (%v)", routes, err)
	}
	ln, err := net.Listen("tcp", ":80")
	if err != nil {
		t.Fatalf("it still listens: %v", err)
	}
	ln.Close()
}

func TestBadPortsAreRefused(t *testing.T) {
	t.Parallel()
	good := Port{Guest: "u", Ifindex: 3, Tap: "vnet0", Bridge: "br0", MAC: mac(1)}
	for says, spoil := range map[string]func(*Port){
		"belongs to no guest": func(p *Port) { p.Guest = "" },
		"interface index 0":   func(p *Port) { p.Ifindex = 0 },
		`tap ""`:              func(p *Port) { p.Tap = "" },
		`bridge ""`:           func(p *Port) { p.Bridge = "" },
		"not the MAC address": func(p *Port) { p.MAC = broadcast },
		"is the same device":  func(*Port) {},
	} {
		bad := good
		spoil(&bad)
		list := []Port{bad}
		if says == "is the same device" {
			list = append(list, good)
		}
		if err := check(list); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", says, err)
		}
	}
	if err := check([]Port{good}); err != nil {
		t.Error(err)
	}
}

func TestBadConfigIsRefused(t *testing.T) {
	t.Parallel()
	newHost(t)
	for says, cfg := range map[string]Config{
		"too few":     {Mask: 0xff},
		"priority":    {RulePriority: 32766},
		"are others'": {Tables: 254}, // the main table
	} {
		if g, err := Open(cfg); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v", cfg, err)
			if err == nil {
				g.Close()
			}
		}
	}
}
