package channel

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// fakeVsock is vsock in memory: guests dial it with any CID.
type fakeVsock struct {
	queue  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newFakeVsock() *fakeVsock {
	return &fakeVsock{queue: make(chan net.Conn), closed: make(chan struct{})}
}

func (f *fakeVsock) Accept() (net.Conn, error) {
	select {
	case c := <-f.queue:
		return c, nil
	case <-f.closed:
		return nil, net.ErrClosed
	}
}

func (f *fakeVsock) Close() error {
	f.once.Do(func() { close(f.closed) })
	return nil
}

func (f *fakeVsock) Addr() net.Addr { return &vsock.Addr{ContextID: vsock.Host, Port: 1} }

func (f *fakeVsock) dial(cid uint32) net.Conn {
	host, guest := net.Pipe()
	f.queue <- fromCID{host, cid}
	return guest
}

// client asks from a CID.
func (f *fakeVsock) client(t *testing.T, cid uint32) *http.Client {
	tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return f.dial(cid), nil }}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

type fromCID struct {
	net.Conn
	cid uint32
}

func (c fromCID) RemoteAddr() net.Addr { return &vsock.Addr{ContextID: c.cid, Port: 1024} }

func serveVsock(t *testing.T) (*served, *fakeVsock) {
	t.Helper()
	s, f := serve(t), newFakeVsock()
	go s.ServeVsock(f)
	return s, f
}

func (s *served) cids(t *testing.T, cids map[uint32]string) {
	t.Helper()
	if err := s.SetCIDs(cids); err != nil {
		t.Fatal(err)
	}
}

func TestGuestsByCID(t *testing.T) {
	t.Parallel()
	s, f := serveVsock(t)
	if got, err := get(f.client(t, 5), "/who"); err == nil {
		t.Errorf("a CID that is nobody's is taken for %q", got)
	}
	s.cids(t, map[uint32]string{5: "guest-5", 6: "guest-6", 7: "guest-7"})
	for cid, guest := range map[uint32]string{5: "guest-5", 6: "guest-6", 7: "guest-7"} {
		is(t, f.client(t, cid), guest)
	}
	for _, cid := range []uint32{vsock.Hypervisor, vsock.Local, vsock.Host, unix.VMADDR_CID_ANY, 8} {
		if got, err := get(f.client(t, cid), "/who"); err == nil {
			t.Errorf("CID %d is taken for %q", cid, got)
		}
	}
}

// TestCIDTakenAway: connections end when their CID is another's, or nobody's.
func TestCIDTakenAway(t *testing.T) {
	t.Parallel()
	s, f := serveVsock(t)
	s.cids(t, map[uint32]string{5: "a", 6: "b", 7: "c"})
	failed := make(chan error, 3)
	for _, cid := range []uint32{5, 6, 7} {
		go func() {
			_, err := get(f.client(t, cid), "/wait")
			failed <- err
		}()
		<-s.parked
	}
	s.cids(t, map[uint32]string{6: "another", 7: "c"})
	for range 2 {
		if err := <-failed; err == nil {
			t.Error("a request outlived its guest's CID")
		}
	}
	close(s.release)
	if err := <-failed; err != nil {
		t.Errorf("a guest that kept its CID: %v", err)
	}
	is(t, f.client(t, 6), "another")
}

func TestTooManyConnections(t *testing.T) {
	t.Parallel()
	s, f := serveVsock(t)
	s.cids(t, map[uint32]string{5: "a", 6: "b"})
	for range MaxConns {
		go get(f.client(t, 5), "/wait")
	}
	for range MaxConns {
		<-s.parked
	}
	if _, err := f.dial(5).Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("one connection too many: %v", err)
	}
	is(t, f.client(t, 6), "b") // another guest's are its own
	close(s.release)
}

func TestBadCIDs(t *testing.T) {
	t.Parallel()
	l := NewListener(slog.New(slog.DiscardHandler))
	for _, bad := range []map[uint32]string{{0: "a"}, {1: "a"}, {2: "a"}, {unix.VMADDR_CID_ANY: "a"}, {5: ""}} {
		if err := l.SetCIDs(bad); err == nil {
			t.Errorf("%v is accepted", bad)
		}
	}
}

// TestVsockSupported: a host has it, or is told what is missing.
func TestVsockSupported(t *testing.T) {
	t.Parallel()
	_, missing := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	switch err := VsockSupported(); {
	case err == nil && missing != nil:
		t.Error("there are no vsock sockets, and nothing is missing")
	case err != nil && !strings.Contains(err.Error(), "modprobe"):
		t.Errorf("no remedy in %q", err)
	}
}

// TestVsockLoopback is identity by a real socket, where the kernel has a loopback.
func TestVsockLoopback(t *testing.T) {
	t.Parallel()
	in, err := vsock.ListenContextID(vsock.Local, 0, nil)
	if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) {
		t.Skipf("the kernel has no vsock loopback (modprobe vsock_loopback): %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	s := serve(t)
	go s.ServeVsock(in)
	s.setCIDs(map[uint32]string{vsock.Local: "loopback"}) // as SetCIDs would not
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return vsock.DialContext(ctx, vsock.Local, in.Addr().(*vsock.Addr).Port, nil)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	is(t, &http.Client{Transport: tr}, "loopback")
	s.cids(t, nil)
	if got, err := get(&http.Client{Transport: tr}, "/who"); err == nil {
		t.Errorf("a CID that was taken away is taken for %q", got)
	}
}
