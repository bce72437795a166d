package identity

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"belay/notify"
)

// host is a network namespace, in which the test's goroutine is. It ends with
// what is open in it.
type host struct {
	t    *testing.T
	ns   netns.NsHandle
	link *netlink.Handle
}

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Getenv("BELAY_LAB") == "skip" {
		t.Skip("BELAY_LAB=skip: tests that need network namespaces are left out")
	}
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	h := &host{t: t}
	h.ns, h.link = unshare(t)
	h.up("lo")
	return h
}

// unshare puts the thread into a new network namespace.
func unshare(t *testing.T) (netns.NsHandle, *netlink.Handle) {
	t.Helper()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("cannot make a network namespace: %v (BELAY_LAB=skip leaves out the tests that need one)", err)
	}
	ns, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	link, err := netlink.NewHandleAt(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(link.Close)
	return ns, link
}

// in runs f on a thread in the namespace.
func (h *host) in(f func() error) error {
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(h.ns); err != nil {
			failed <- err
			return
		}
		failed <- f()
	}()
	return <-failed
}

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) device(name string) netlink.Link {
	h.t.Helper()
	l, err := h.link.LinkByName(name)
	h.must(err)
	return l
}

func (h *host) up(name string) { h.t.Helper(); h.must(h.link.LinkSetUp(h.device(name))) }

// bridge makes one, and has the host check sources strictly on it.
func (h *host) bridge(name string) {
	h.t.Helper()
	h.must(h.link.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: mac(0xb0 + byte(len(name)) + name[len(name)-1])}}))
	h.up(name)
	h.must(os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/rp_filter", []byte("1"), 0o644))
}

func mac(last byte) net.HardwareAddr { return net.HardwareAddr{0x52, 0x54, 0, 0, 0, last} }

func (h *host) address(dev, cidr string) {
	h.t.Helper()
	a, err := netlink.ParseAddr(cidr)
	h.must(err)
	h.must(h.link.AddrAdd(h.device(dev), a))
}

// guest is a namespace with a tap on a bridge.
type guest struct {
	*host
	port Port
}

// guest starts one. Its UUID is its tap's name with something before it.
func (h *host) guest(bridge, tap string, m byte, cidr string) *guest {
	h.t.Helper()
	p := netip.MustParsePrefix(cidr)
	g := &guest{host: &host{t: h.t}, port: Port{Guest: "uuid-" + tap, Tap: tap, Bridge: bridge, MAC: mac(m), Addrs: []netip.Addr{p.Addr()}}}
	made := make(chan struct{})
	go func() {
		defer close(made)
		runtime.LockOSThread()
		g.ns, g.link = unshare(h.t)
	}()
	<-made
	g.up("lo")
	g.plug(h, 0)
	g.address("eth0", cidr)
	dev := g.device("eth0").Attrs().Index
	g.must(g.link.RouteAdd(&netlink.Route{LinkIndex: dev, Dst: serviceNet, Scope: netlink.SCOPE_LINK}))
	return g
}

// tenants are two guests with the same address, each on a bridge of its own.
func (h *host) tenants() (a, b *guest) {
	h.t.Helper()
	h.bridge("br0")
	h.bridge("br1")
	return h.guest("br0", "vnet0", 1, "10.0.0.1/24"), h.guest("br1", "vnet1", 2, "10.0.0.1/24")
}

// plug gives the guest its interface, with an index of the host's choice if 0, and
// waits until it carries frames.
func (g *guest) plug(h *host, index int) {
	h.t.Helper()
	br := h.device(g.port.Bridge).Attrs().Index
	h.must(h.link.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: g.port.Tap, Index: index, MasterIndex: br}, PeerName: "eth0",
		PeerHardwareAddr: g.port.MAC, PeerNamespace: netlink.NsFd(g.ns),
	}))
	h.up(g.port.Tap)
	g.up("eth0")
	// Only when the kernel has seen the carrier does the bridge forward its frames.
	await(h.t, func() bool { return h.device(g.port.Tap).Attrs().OperState == netlink.OperUp })
	g.port.Ifindex = h.device(g.port.Tap).Attrs().Index
}

func (g *guest) dial(ctx context.Context) (c net.Conn, err error) {
	inErr := g.in(func() (err error) {
		c, err = new(net.Dialer).DialContext(ctx, "tcp4", net.JoinHostPort(notify.Address, "80"))
		return err
	})
	return c, inErr
}

// client makes a connection for each request.
func (g *guest) client() *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return g.dial(ctx) },
	}}
}

// ask is whom the host takes the guest for.
func (g *guest) ask() (string, error) {
	resp, err := g.client().Get("http://" + notify.Address + "/")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	who, err := io.ReadAll(resp.Body)
	return string(who), err
}

func (g *guest) isKnown() {
	g.t.Helper()
	if who, err := g.ask(); err != nil || who != g.port.Guest {
		g.t.Errorf("%s is taken for %q (%v)", g.port.Guest, who, err)
	}
}

// open opens a gate in the host, which is closed with the test.
func (h *host) open(cfg Config) *Gate {
	h.t.Helper()
	g, err := Open(cfg)
	h.must(err)
	h.t.Cleanup(func() {
		if err := g.Close(); err != nil {
			h.t.Error(err)
		}
	})
	return g
}

func ports(guests ...*guest) (all []Port) {
	for _, g := range guests {
		all = append(all, g.port)
	}
	return all
}

func (h *host) set(g *Gate, guests ...*guest) {
	h.t.Helper()
	h.must(g.Set(h.t.Context(), ports(guests...)))
}

// serve answers guests with who they are.
func serve(g *Gate) (*http.Server, error) {
	ln, err := g.Listen(context.Background())
	if err != nil {
		return nil, err
	}
	s := &http.Server{ConnContext: g.ConnContext, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if who, known := notify.GuestOf(r.Context()); known {
			fmt.Fprint(w, who)
		} else {
			fmt.Fprint(w, "nobody")
		}
	})}
	go s.Serve(ln)
	return s, nil
}

func (h *host) serve(g *Gate) {
	h.t.Helper()
	s, err := serve(g)
	h.must(err)
	h.t.Cleanup(func() { s.Close() })
}

var allFrames = binary.NativeEndian.Uint16(be16(unix.ETH_P_ALL))

// wire is a packet socket.
type wire struct {
	t  *testing.T
	fd int
}

// listen sees all frames of a namespace, or of a device.
func (h *host) listen(device ...string) (w *wire) {
	h.t.Helper()
	h.must(h.in(func() error { w = newWire(h.t); return nil }))
	for _, name := range device {
		h.must(unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: allFrames, Ifindex: h.device(name).Attrs().Index}))
	}
	return w
}

func newWire(t *testing.T) *wire {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(allFrames))
	if err != nil {
		t.Error(err)
		return &wire{t, -1}
	}
	t.Cleanup(func() { unix.Close(fd) })
	tv := unix.NsecToTimeval(int64(3 * time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Error(err)
	}
	return &wire{t, fd}
}

// send puts frames onto eth0.
func (g *guest) send(frames ...[]byte) {
	g.t.Helper()
	to := &unix.SockaddrLinklayer{Ifindex: g.device("eth0").Attrs().Index}
	w := g.listen()
	for _, f := range frames {
		g.must(unix.Sendto(w.fd, f, 0, to))
	}
}

// until gives the frames up to the one that last wants, that one included.
func (w *wire) until(last func(frame []byte) bool) (frames [][]byte) {
	w.t.Helper()
	for {
		buf := make([]byte, 2048)
		n, _, err := unix.Recvfrom(w.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			w.t.Fatalf("the frame that was waited for has not come: %v", err)
		}
		frames = append(frames, buf[:n])
		if last(buf[:n]) {
			return frames
		}
	}
}

// nft runs a script of nft(8), and gives what it prints.
func (h *host) nft(script string) (out string) {
	h.t.Helper()
	h.must(h.in(func() error {
		c := exec.Command("nft", "-f", "-") // it inherits the thread's namespace
		c.Stdin = strings.NewReader(script)
		all, err := c.CombinedOutput()
		if out = string(all); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	}))
	return out
}

// neighbour is what the host's ARP cache has of a guest.
func neighbour(h *host, g *guest) *netlink.Neigh {
	h.t.Helper()
	return &netlink.Neigh{LinkIndex: h.device(g.port.Bridge).Attrs().Index, Family: unix.AF_INET, IP: g.port.Addrs[0].AsSlice(), HardwareAddr: g.port.MAC}
}
