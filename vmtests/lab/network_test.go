package lab_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"belay/vmtests/lab"
)

// dial connects from one host to the other's libvirtd.
func dial(from, to *lab.Host) error {
	return from.InNet(func() error {
		conn, err := net.DialTimeout("tcp", to.Addr.String()+":16509", time.Second)
		if err != nil {
			return fmt.Errorf("from %s: %w", from.Name, err)
		}
		return conn.Close()
	})
}

// send sends a datagram from a host to a socket in the switch.
func send(h *lab.Host, to net.Addr, text string) error {
	return h.InNet(func() error {
		conn, err := net.Dial("udp", to.String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write([]byte(text))
		return err
	})
}

func TestLinkCutAndShaped(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{Hosts: 3})
	a, b, c := l.Hosts[0], l.Hosts[1], l.Hosts[2]

	var observer net.PacketConn
	var observed net.Listener
	err := l.InSwitch(func() (err error) {
		if observer, err = net.ListenPacket("udp", lab.SwitchAddr().String()+":0"); err != nil {
			return err
		}
		observed, err = net.Listen("tcp", lab.SwitchAddr().String()+":0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer observer.Close()
	defer observed.Close()
	// The socket stays in the switch, whichever thread reads it.
	receive := func(wait time.Duration) (string, error) {
		observer.SetReadDeadline(time.Now().Add(wait))
		buf := make([]byte, 64)
		n, from, err := observer.ReadFrom(buf)
		return fmt.Sprintf("%s from %v", buf[:n], from), err
	}
	// A link that has just come up, as here, forwards within a second.
	within(t, time.Minute, func() error {
		if err := send(a, observer.LocalAddr(), "hello"); err != nil {
			return err
		}
		got, err := receive(100 * time.Millisecond)
		if err == nil && !strings.HasPrefix(got, "hello from 10.77.0.1:") {
			err = fmt.Errorf("observer got %q", got)
		}
		return err
	})
	for { // those that were kept back
		if _, err := receive(100 * time.Millisecond); err != nil {
			break
		}
	}

	if err := a.SetLink(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if err := dial(a, b); err == nil {
		t.Error("host-a reaches host-b with its link cut")
	}
	if err := dial(b, a); err == nil {
		t.Error("host-b reaches host-a with its link cut")
	}
	send(a, observer.LocalAddr(), "cut") // whatever it returns
	if got, err := receive(200 * time.Millisecond); err == nil {
		t.Errorf("observer got %q over a cut link", got)
	}
	if err := errors.Join(dial(a, a), dial(b, c)); err != nil {
		t.Errorf("what is not cut: %v", err)
	}
	if _, err := a.Virsh(t.Context(), "list"); err != nil {
		t.Errorf("the socket is not the LAN: %v", err)
	}
	if err := a.SetLink(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	within(t, time.Minute, func() error { return errors.Join(dial(a, b), dial(b, a)) })
	t.Logf("reachable %v after the link came back", time.Since(start))

	const size = 512 << 10
	if err := a.Netem(t.Context(), "tbf", "rate", "8mbit", "burst", "32kb", "latency", "200ms"); err != nil {
		t.Fatal(err)
	}
	// 512 KiB at 1 MB/s.
	if took := transfer(t, a, observed, size); took < 300*time.Millisecond {
		t.Errorf("%d bytes took %v over a slow link", size, took)
	}
	for range 2 {
		if err := a.Netem(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if took := transfer(t, a, observed, size); took > 200*time.Millisecond {
		t.Errorf("%d bytes took %v over a link that is not shaped", size, took)
	}
	if err := a.Netem(t.Context(), "nonsense"); err == nil {
		t.Error("accepted nonsense")
	}
}

// transfer sends bytes from a host to a listener in the switch and returns how
// long it took until the last had arrived.
func transfer(t *testing.T, h *lab.Host, to net.Listener, size int) time.Duration {
	t.Helper()
	start := time.Now()
	sent := make(chan error, 1)
	go func() {
		sent <- h.InNet(func() error {
			conn, err := net.DialTimeout("tcp", to.Addr().String(), time.Second)
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = conn.Write(make([]byte, size))
			return err
		})
	}()
	conn, err := to.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if n, err := io.Copy(io.Discard, conn); err != nil || n != int64(size) {
		t.Fatalf("received %d bytes, %v", n, err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	return time.Since(start)
}

// TestInNetReturns: a function that ends its goroutine does not hang the
// caller, and no thread stays behind in the host's network.
func TestInNetReturns(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{Hosts: 1})
	links := machineLinks(t)
	h := l.Hosts[0]
	want := errors.New("mine")
	if err := h.InNet(func() error { return want }); err != want {
		t.Errorf("error passed on: %v", err)
	}
	if err := h.InNet(func() error { goexit(); return nil }); err == nil {
		t.Error("no error from a function that never returned")
	}
	for range 50 {
		if got := machineLinks(t); len(got) != len(links) {
			t.Fatalf("a thread sees %v", got)
		}
	}
}
