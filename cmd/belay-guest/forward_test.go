package main

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"testing"

	"github.com/mdlayher/vsock"
)

// vsockStandIn is a way with a connection of its own for each, as vsock is, which
// tests cannot dial: whoever is at CID 2 of the machine they run on is not theirs.
type vsockStandIn string

func (w vsockStandIn) dial(ctx context.Context) (conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", string(w))
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

func (vsockStandIn) run(ctx context.Context, _ *slog.Logger) { <-ctx.Done() }

func (w vsockStandIn) String() string { return string(w) }

// fromCID is a host's listener for a guest's stand-in.
type fromCID struct {
	net.Listener
	cid uint32
}

func (l fromCID) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return connFromCID{c, l.cid}, err
}

type connFromCID struct {
	net.Conn
	cid uint32
}

func (c connFromCID) RemoteAddr() net.Addr { return &vsock.Addr{ContextID: c.cid} }

func TestThreeGuestsByCID(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	cids := map[uint32]string{3: "guest-3", 4: "guest-4", 5: "guest-5"}
	if err := h.SetCIDs(cids); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var asked, forwarded sync.WaitGroup
	var tr *http.Transport
	for cid, guest := range cids {
		socket := filepath.Join(t.TempDir(), "vsock")
		in, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		go h.ServeVsock(fromCID{in, cid})
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		forwarded.Go(func() {
			if err := forward(ctx, l, vsockStandIn(socket), slog.New(slog.DiscardHandler)); err != nil {
				t.Error(err)
			}
		})
		tr = &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
			return net.Dial("tcp4", l.Addr().String())
		}}
		c := &http.Client{Transport: tr}
		defer c.CloseIdleConnections()
		for range 4 {
			asked.Go(func() {
				for range 10 {
					is(t, c, guest)
				}
			})
		}
	}
	asked.Wait()

	// The end of belay-guest ends what it carries.
	failed := make(chan error)
	go func() {
		_, err := get(&http.Client{Transport: tr}, "/wait")
		failed <- err
	}()
	<-h.parked
	cancel()
	if err := <-failed; err == nil {
		t.Error("a connection outlived belay-guest")
	}
	if got := <-h.parked; got != "gone" {
		t.Errorf("the request is %s", got)
	}
	forwarded.Wait()
}
