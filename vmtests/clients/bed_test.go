package clients

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"belay/agent/journal"
	"belay/agent/maint"
	"belay/notify"
	"belay/notify/board"
	"belay/notify/views"
)

// host has guests and tells them of events.
type host struct {
	*board.Keeper
	t      *testing.T
	guests map[string]notify.Instance // by UUID
}

// newHost has one guest for each name.
func newHost(t *testing.T, names ...string) (*host, []*guest) {
	t.Helper()
	if os.Getenv("BELAY_LAB") == "skip" {
		t.Skip("BELAY_LAB=skip: tests that need network namespaces are left out")
	}
	j, err := journal.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	h := &host{Keeper: board.New(store{j}, j.Scheduled(), nil), t: t, guests: make(map[string]notify.Instance)}
	var guests []*guest
	for i, name := range names {
		g := &guest{t: t, EventGuest: maint.EventGuest{UUID: uuid.NewString(), Name: name}}
		h.guests[g.UUID] = notify.Instance{Name: name, UUID: g.UUID, Interfaces: []notify.Interface{{
			MAC: fmt.Sprintf("52:54:00:00:00:%02x", i+1), Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 78, 0, byte(i + 1)})},
		}}}
		guests = append(guests, g)
	}
	handler := views.New(views.Config{Source: h, EC2: views.EC2{ShowFreeze: true}, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	for _, g := range guests {
		g.boot(handler)
	}
	return h, guests
}

// need fails a test for which a program is missing.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Fatalf("%v: run scripts/deps lab", err)
		}
	}
}

// store keeps events as an agent does.
type store struct{ journal *journal.Journal }

func (s store) Append(c maint.EventChange) error {
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return s.journal.Append(maint.Record{Kind: maint.RecEvent, Data: data})
}

// Instance implements notify.Source.
func (h *host) Instance(guest string) (notify.Instance, bool) {
	i, known := h.guests[guest]
	return i, known
}

// The host has no campaigns.

func (h *host) Maintenance(string) []maint.Campaign { return nil }

func (h *host) Book(context.Context, string, maint.CampaignID, time.Time) error { return noCampaign() }

func (h *host) Defer(context.Context, string, maint.CampaignID) error { return noCampaign() }

func noCampaign() error {
	return maint.Problemf(maint.CodeNotFound, "campaign", "see those that are listed", "is not one of the guest's")
}

func (h *host) do(decide func(board.Board, time.Time) (maint.EventChange, error)) {
	h.t.Helper()
	if err := h.Do(decide); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) announce(impact maint.Impact, g *guest) maint.EventID {
	h.t.Helper()
	id := maint.EventID(uuid.NewString())
	h.do(func(b board.Board, now time.Time) (maint.EventChange, error) {
		return b.Announce(now, board.Announcement{ID: id, Impact: impact, Guests: []maint.EventGuest{g.EventGuest},
			Description: "Host server is undergoing maintenance.", Duration: 5 * time.Second})
	})
	return id
}

// awaitApproval waits until an event may start, which nobody lives to see unless
// it is approved, and checks by whom it is.
func (h *host) awaitApproval(id maint.EventID, g *guest) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), patience)
	defer cancel()
	if err := h.Wait(ctx, []maint.EventID{id}); err != nil {
		h.t.Fatalf("%s has not approved its event: %v", g.Name, err)
	}
	if a := h.event(id).Approval; a == nil || a.By != "guest "+g.Name {
		h.t.Fatalf("approved by %+v, want guest %s", a, g.Name)
	}
}

func (h *host) event(id maint.EventID) maint.ScheduledEvent {
	h.t.Helper()
	e, err := h.Event(id)
	if err != nil {
		h.t.Fatal(err)
	}
	return e
}

func (h *host) start(id maint.EventID) {
	h.t.Helper()
	impact := h.event(id).Impact
	h.do(func(b board.Board, now time.Time) (maint.EventChange, error) { return b.Start(now, id, impact, nil) })
}

func (h *host) end(id maint.EventID, g *guest) {
	h.t.Helper()
	h.do(func(b board.Board, now time.Time) (maint.EventChange, error) {
		return b.End(now, id, map[string]time.Duration{g.UUID: time.Second}, "")
	})
}

func (h *host) cancel(id maint.EventID) {
	h.t.Helper()
	h.do(func(b board.Board, now time.Time) (maint.EventChange, error) { return b.Cancel(now, id, "not needed") })
}

// guest is a network namespace with the host's metadata service. It ends with what
// is open in it.
type guest struct {
	maint.EventGuest
	t    *testing.T
	ns   netns.NsHandle
	link *netlink.Handle
}

// boot makes the namespace and serves it.
func (g *guest) boot(h *views.Handler) {
	g.t.Helper()
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			g.ns, err = netns.Get()
		}
		made <- err
	}()
	if err := <-made; err != nil {
		g.t.Fatalf("cannot make a network namespace: %v (BELAY_LAB=skip leaves out the tests that need one)", err)
	}
	g.t.Cleanup(func() { g.ns.Close() })
	var err error
	if g.link, err = netlink.NewHandleAt(g.ns); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(g.link.Close)
	g.address("lo", notify.Address+"/32")

	var ln net.Listener
	if err := g.in(func() (err error) { ln, err = net.Listen("tcp4", net.JoinHostPort(notify.Address, "80")); return err }); err != nil {
		g.t.Fatal(err)
	}
	s := views.NewServer(h)
	s.ConnContext = func(ctx context.Context, _ net.Conn) context.Context { return notify.WithGuest(ctx, g.UUID) }
	go s.Serve(ln)
	g.t.Cleanup(func() { s.Close() })
}

// address gives a device one, and sets it up.
func (g *guest) address(device, cidr string) {
	g.t.Helper()
	l, err := g.link.LinkByName(device)
	if err != nil {
		g.t.Fatal(err)
	}
	a, err := netlink.ParseAddr(cidr)
	if err == nil {
		err = errors.Join(g.link.AddrAdd(l, a), g.link.LinkSetUp(l))
	}
	if err != nil {
		g.t.Fatalf("%s %s: %v", device, cidr, err)
	}
}

// in runs f on a thread in the namespace.
func (g *guest) in(f func() error) error {
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(g.ns); err != nil {
			failed <- err
			return
		}
		failed <- f()
	}()
	return <-failed
}

// client is for programs of this process. It needs no names resolved.
func (g *guest) client() *http.Client {
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (c net.Conn, err error) {
		inErr := g.in(func() (err error) {
			c, err = new(net.Dialer).DialContext(ctx, "tcp4", net.JoinHostPort(notify.Address, "80"))
			return err
		})
		return c, inErr
	}}
	g.t.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}

// program has a program run in the guest, and gives what it prints.
func (g *guest) program(c *exec.Cmd) (out string, err error) {
	var b, stderr strings.Builder
	c.Stdout, c.Stderr = &b, &stderr
	if err = g.in(c.Start); err == nil { // it inherits the thread's namespace
		err = c.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, &stderr)
	}
	return strings.TrimSpace(b.String()), err
}

// patience is for how long anything is waited for, on a busy machine too.
const patience = time.Minute

// await waits until something is so. why is asked for when it does not become so.
func await(t *testing.T, what string, so func() bool, why func() string) {
	t.Helper()
	for until := time.Now().Add(patience); !so(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("waited for in vain: %s: %s", what, why())
		}
	}
}
