package crowd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"belay/agent/journal"
	"belay/agent/maint"
	"belay/notify"
	"belay/notify/board"
	"belay/notify/identity"
	"belay/notify/views"
)

const (
	serviceAddress = notify.Address
	// serverArg has a program be a server.
	serverArg = "crowd-server"
	// journalsIn is on a disk, which /tmp need not be.
	journalsIn = "/var/tmp"
)

// setup is the first thing that a server is told.
type setup struct {
	Ports []identity.Port
	// Plain is how long the answer of a plain server is that knows no guests; 0: it
	// is Belay's.
	Plain int
}

// order is what a server is to do, when it has had so many long polls.
type order struct {
	Polls    int64
	Announce []int // to these guests, in turn
	Cancel   bool  // all that was announced, in one change
}

// done is what it says of that.
type done struct {
	Told  []Told
	Error string
}

// Told is when the call that announces was made, and when what it said was durable,
// by CLOCK_MONOTONIC.
type Told struct{ Asked, Durable time.Duration }

func monotonic() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(err) // the clock is always there: clock_gettime(2)
	}
	return time.Duration(t.Nano())
}

// Main is a server, and does not return, in a process that was started to be one.
func Main() {
	if len(os.Args) != 2 || os.Args[1] != serverArg {
		return
	}
	signal.Ignore(unix.SIGINT, unix.SIGTERM) // whoever started it ends it
	if err := serve(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "server:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serve answers guests until in ends.
func serve(in io.Reader, out io.Writer) (err error) {
	orders, answers := json.NewDecoder(in), json.NewEncoder(out)
	var s setup
	if err := orders.Decode(&s); err != nil {
		return err
	}
	h := &host{ports: s.Ports, asked: make(chan struct{}, 1)}
	open := h.openBelay
	if s.Plain > 0 {
		open = func() error { return h.openPlain(s.Plain) }
	}
	defer func() { err = errors.Join(err, h.close()) }()
	if err := open(); err != nil {
		return err
	}
	var d done
	for {
		if err := answers.Encode(d); err != nil {
			return err
		}
		var o order
		switch err := orders.Decode(&o); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		told, err := h.do(o)
		d = done{Told: told}
		if err != nil {
			d.Error = err.Error()
		}
	}
}

// host is what guests ask.
type host struct {
	ports  []identity.Port
	closes []func() error // the last first
	keeper *board.Keeper
	events []maint.EventID // that are announced

	mu    sync.Mutex
	polls int64
	asked chan struct{} // has one when polls has grown
}

func (h *host) close() error {
	var errs []error
	for _, f := range slices.Backward(h.closes) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

func (h *host) openBelay() error {
	dir, err := os.MkdirTemp(journalsIn, "belay-bench-*")
	if err != nil {
		return err
	}
	h.closes = append(h.closes, func() error { return os.RemoveAll(dir) })
	j, err := journal.Open(dir)
	if err != nil {
		return err
	}
	h.closes = append(h.closes, j.Close)
	h.keeper = board.New(store{j}, j.Scheduled(), nil)
	gate, err := identity.Open(identity.Config{})
	if err != nil {
		return err
	}
	h.closes = append(h.closes, gate.Close)
	if err := gate.Set(context.Background(), h.ports); err != nil {
		return err
	}
	ln, err := gate.Listen(context.Background())
	if err != nil {
		return err
	}
	// Events are announced here much more often than guests may poll for long.
	often := views.Limits{Poll: views.Rate{PerSecond: 1000, Burst: 1000}}
	server := views.NewServer(views.New(views.Config{Source: source{Keeper: h.keeper}, Limits: often}))
	server.Handler, server.ConnContext = h.counted(server.Handler), gate.ConnContext
	h.serve(server, ln)
	return nil
}

// openPlain answers a constant of n bytes.
func (h *host) openPlain(n int) error {
	ln, err := net.Listen("tcp4", net.JoinHostPort(plainAddress, "80"))
	if err != nil {
		return err
	}
	body := []byte(strings.Repeat("x", n))
	h.serve(&http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Header().Set("Content-Length", strconv.Itoa(n))
		_, _ = w.Write(body) // who has gone away needs no answer
	})}, ln)
	return nil
}

// server is a views.Server or an http.Server.
type server interface {
	Serve(net.Listener) error
	Close() error
}

// counted counts long polls.
func (h *host) counted(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.RawQuery, "wait=") {
			h.mu.Lock()
			h.polls++
			h.mu.Unlock()
			select {
			case h.asked <- struct{}{}:
			default:
			}
		}
		handler.ServeHTTP(w, r)
	})
}

func (h *host) serve(s server, ln net.Listener) {
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	h.closes = append(h.closes, func() error {
		err := s.Close()
		if e := <-served; !errors.Is(e, http.ErrServerClosed) {
			err = errors.Join(err, e)
		}
		return err
	})
}

// await waits until there were so many long polls.
func (h *host) await(polls int64) error {
	late := time.After(30 * time.Second)
	for {
		h.mu.Lock()
		n := h.polls
		h.mu.Unlock()
		if n >= polls {
			return nil
		}
		select {
		case <-h.asked:
		case <-late:
			return fmt.Errorf("there were %d long polls instead of %d", n, polls)
		}
	}
}

func (h *host) do(o order) ([]Told, error) {
	if err := h.await(o.Polls); err != nil {
		return nil, err
	}
	if o.Cancel {
		t, err := h.cancel()
		return []Told{t}, err
	}
	var all []Told
	for _, i := range o.Announce {
		t, err := h.announce(h.ports[i].Guest, fmt.Sprintf("guest-%d", i))
		if err != nil {
			return all, err
		}
		all = append(all, t)
	}
	return all, nil
}

func (h *host) announce(guest, name string) (t Told, err error) {
	a := board.Announcement{ID: maint.EventID(uuid.NewString()), Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{{UUID: guest, Name: name}},
		Description: "Host server is undergoing maintenance. Virtual machine is paused meanwhile, with its memory preserved.",
		Duration:    2 * time.Second, Op: "hold-1"}
	h.events = append(h.events, a.ID)
	t.Asked = monotonic()
	err = h.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) { return b.Announce(now, a) })
	t.Durable = monotonic()
	return t, err
}

// cancel does it in one change, as operations start their events.
func (h *host) cancel() (t Told, err error) {
	t.Asked = monotonic()
	err = h.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) {
		all := maint.EventChange{Incarnations: make(map[string]uint64)}
		for _, id := range h.events {
			c, err := b.Cancel(now, id, "measured")
			if err != nil {
				return all, err
			}
			all.Events = append(all.Events, c.Events...)
			maps.Copy(all.Incarnations, c.Incarnations)
		}
		return all, nil
	})
	t.Durable = monotonic()
	h.events = nil
	return t, err
}

// store keeps events as an agent does.
type store struct{ *journal.Journal }

func (s store) Append(c maint.EventChange) error {
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return s.Journal.Append(maint.Record{Kind: maint.RecEvent, Data: data})
}

// source has what a board has not, of which no guest here asks.
type source struct{ *board.Keeper }

func (source) Instance(string) (i notify.Instance, known bool) { return i, false }
func (source) Maintenance(string) []maint.Campaign             { return nil }
func (source) Book(context.Context, string, maint.CampaignID, time.Time) error {
	return errors.ErrUnsupported
}
func (source) Defer(context.Context, string, maint.CampaignID) error { return errors.ErrUnsupported }
