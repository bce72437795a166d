package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"belay/notify/channel/wire"
)

func is(t *testing.T, c *http.Client, guest string) {
	t.Helper()
	if got, err := get(c, "/who"); err != nil || got != guest {
		t.Errorf("%s is taken for %q, %v", guest, got, err)
	}
}

// addresses are those of lo.
func (v *vm) addresses() (all []string) {
	v.t.Helper()
	err := v.ns.do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		there, err := netlink.AddrList(lo, unix.AF_INET)
		for _, a := range there {
			all = append(all, a.IPNet.String())
		}
		return err
	})
	if err != nil {
		v.t.Fatal(err)
	}
	return all
}

func TestThreeGuests(t *testing.T) {
	needsRoot(t)
	h := newHost(t)
	var all sync.WaitGroup
	for i := range 3 {
		v := newVM(t, fmt.Sprintf("guest-%d", i))
		v.start()
		h.connect(v)
		shared := v.ns.client(t)
		for range 8 {
			all.Go(func() {
				each := v.ns.client(t)
				for range 20 {
					is(t, shared, v.uuid)
					is(t, each, v.uuid)
					each.CloseIdleConnections()
				}
			})
		}
	}
	all.Wait()
}

// TestConnections: long polls, pipelined requests, one that reads nothing, one that
// leaves, and a program that closes its sending side first.
func TestConnections(t *testing.T) {
	needsRoot(t)
	h := newHost(t)
	v := newVM(t, "guest-1")
	v.start()
	h.connect(v)

	slow, err := v.ns.dial(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	io.WriteString(slow, "GET /much HTTP/1.0\r\n\r\n")
	<-h.parked

	leaver, err := v.ns.dial(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(leaver, "GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
	<-h.parked
	leaver.Close()
	if got := <-h.parked; got != "gone" {
		t.Errorf("a request whose program left is %s", got)
	}

	polled := make(chan string)
	go func() {
		got, err := get(v.ns.client(t), "/wait")
		polled <- fmt.Sprint(got, err)
	}()
	<-h.parked

	c, err := v.ns.dial(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, strings.Repeat("GET /who HTTP/1.1\r\nHost: x\r\n\r\n", 20)+"GET /who HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	c.(*net.TCPConn).CloseWrite()
	r := bufio.NewReader(c)
	for range 21 {
		a, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(a.Body); string(got) != v.uuid || err != nil {
			t.Errorf("a pipelined answer is %q, %v", got, err)
		}
	}
	if _, err := r.ReadByte(); err != io.EOF {
		t.Errorf("after the last answer: %v", err)
	}

	close(h.release)
	if got := <-polled; got != v.uuid+"<nil>" {
		t.Errorf("the long poll was answered %q", got)
	}
	if got, err := io.ReadAll(slow); err != nil || len(got) < much {
		t.Errorf("the slow reader got %d bytes, %v", len(got), err)
	}
}

func TestManyConnections(t *testing.T) {
	needsRoot(t)
	h := newHost(t)
	v := newVM(t, "guest-1")
	v.start()
	h.connect(v)
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			c := v.ns.client(t)
			for range 20 {
				is(t, c, v.uuid)
				c.CloseIdleConnections()
			}
		})
	}
	all.Wait()
}

// TestRestarts of belay-guest, killed in the middle of an answer, and of the host.
func TestRestarts(t *testing.T) {
	needsRoot(t)
	h := newHost(t)
	v := newVM(t, "guest-1")
	g := v.start()
	stop := h.connect(v)
	c := v.ns.client(t)
	is(t, c, v.uuid)

	half, err := v.ns.dial(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer half.Close()
	io.WriteString(half, "GET /much HTTP/1.0\r\n\r\n")
	<-h.parked
	g.Process.Kill()
	g.Wait()
	if got := v.addresses(); !strings.Contains(fmt.Sprint(got), "169.254.169.254/32") {
		t.Fatalf("lo has %v after a kill: the rest of this test proves nothing", got)
	}
	g = v.start()
	is(t, v.ns.client(t), v.uuid)

	old := make(chan error)
	go func() {
		_, err := get(v.ns.client(t), "/wait")
		old <- err
	}()
	<-h.parked
	stop()
	h.connect(v)
	if err := <-old; err == nil { // which the new host has caused
		t.Error("a request outlived the host")
	}
	is(t, v.ns.client(t), v.uuid)

	g.Process.Signal(unix.SIGTERM)
	if err := g.Wait(); err != nil {
		t.Errorf("on SIGTERM: %v", err)
	}
	if got := v.addresses(); strings.Contains(fmt.Sprint(got), "169.254.169.254") {
		t.Errorf("lo has kept %v", got)
	}
}

// TestHostComesLater: programs that ask before it is there are answered.
func TestHostComesLater(t *testing.T) {
	needsRoot(t)
	v := newVM(t, "guest-1")
	v.start()
	c, err := v.ns.dial(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET /who HTTP/1.0\r\n\r\n")
	newHost(t).connect(v)
	if got, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(got), "\r\n\r\nguest-1") {
		t.Errorf("answered %q, %v", got, err)
	}
}

func TestPrint(t *testing.T) {
	needsRoot(t)
	h := newHost(t)
	v := newVM(t, "guest-1")
	show := func() (code int, out, stderr string) {
		var o, e bytes.Buffer
		v.ns.do(func() error {
			code = run(t.Context(), []string{"-print"}, &o, &e)
			return nil
		})
		return code, o.String(), e.String()
	}
	if code, _, stderr := show(); code != exitFailed || !strings.Contains(stderr, "start belay-guest") {
		t.Errorf("with nobody to ask: exit code %d, %q", code, stderr)
	}
	v.start()
	h.connect(v)
	want := "{\n  \"DocumentIncarnation\": 7,\n  \"Events\": [\n    {\n      \"Resources\": [\n        \"guest-1\"\n      ]\n    }\n  ]\n}\n"
	if code, out, stderr := show(); code != exitOK || out != want {
		t.Errorf("exit code %d, %q, %q", code, out, stderr)
	}
}

func TestAddressServedElsewhere(t *testing.T) {
	needsRoot(t)
	for name, arrange := range map[string]func(other netlink.Link) error{
		"an address": func(other netlink.Link) error {
			return netlink.AddrAdd(other, &netlink.Addr{IPNet: hostNet("169.254.169.254")})
		},
		"a route": func(other netlink.Link) error {
			return netlink.RouteAdd(&netlink.Route{LinkIndex: other.Attrs().Index, Dst: hostNet("169.254.169.254")})
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVM(t, "guest-1")
			err := v.ns.do(func() error {
				other := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "other"}}
				if err := netlink.LinkAdd(other); err != nil {
					return err
				}
				if err := netlink.LinkSetUp(other); err != nil {
					return err
				}
				return arrange(other)
			})
			if err != nil {
				t.Fatal(err)
			}
			var code int
			var stderr bytes.Buffer
			v.ns.do(func() error {
				code = run(t.Context(), []string{"-device", v.device}, io.Discard, &stderr)
				return nil
			})
			if code != exitServed || !strings.Contains(stderr.String(), "-force") {
				t.Errorf("exit code %d, %q", code, &stderr)
			}
			if got := v.addresses(); len(got) > 0 {
				t.Errorf("lo has %v", got)
			}
			v.start("-force")
			if got := v.addresses(); !strings.Contains(fmt.Sprint(got), "169.254.169.254/32") {
				t.Errorf("with -force lo has %v", got)
			}
		})
	}
}

func hostNet(ip string) *net.IPNet {
	return &net.IPNet{IP: net.ParseIP(ip).To4(), Mask: net.CIDRMask(32, 32)}
}

func TestFindPort(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if _, err := findPort(root, ""); err == nil || !strings.Contains(err.Error(), "<channel") {
		t.Errorf("no port: %v", err)
	}
	for port, name := range map[string]string{"vport1p1": "org.qemu.guest_agent.0", "vport1p2": wire.Name} {
		dir := filepath.Join(root, "sys/class/virtio-ports", port)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "name"), []byte(name+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if w, err := findPort(root, ""); err != nil || w.device != filepath.Join(root, "dev/vport1p2") {
		t.Errorf("without udev: %v, %v", w, err)
	}
	named := filepath.Join(root, "dev/virtio-ports", wire.Name)
	if err := os.MkdirAll(filepath.Dir(named), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(named, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if w, err := findPort(root, ""); err != nil || w.device != named {
		t.Errorf("with udev: %v, %v", w, err)
	}
}

func TestFlags(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"-help", exitOK, "Exit codes"},
		{"-version", exitOK, ""},
		{"-via pigeon", exitUsage, "auto, vsock or serial"},
		{"-port 0", exitUsage, "1 to 4294967294"},
		{"-listen [::1]:80", exitUsage, "IPv4"},
		{"-listen x", exitUsage, "-listen"},
		{"more", exitUsage, "unexpected"},
		{"-via serial -device /nonexistent/port", exitNoWay, "<channel"},
	} {
		var stderr bytes.Buffer
		if code := run(context.Background(), strings.Fields(c.args), io.Discard, &stderr); code != c.code || !strings.Contains(stderr.String(), c.says) {
			t.Errorf("%s: exit code %d, %q", c.args, code, &stderr)
		}
	}
}
