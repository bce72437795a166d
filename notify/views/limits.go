package views

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

// Limits are what one guest may take up. What is zero has its default.
type Limits struct {
	Get  Rate // requests that read and, apart from these, for what is not here; 5 a second, 20 at once
	Post Rate // requests to approve, that a program is ready, and for tokens; 5 a second, 20 at once
	Poll Rate // long polls; 5 a second, 20 at once
	// Keep is requests that the host keeps on disk for long, however often they are
	// made: to register and unregister programs, and about moments; 1 a minute, 40 at
	// once.
	Keep Rate
	// Parked is how many long polls may wait at a time; 10.
	Parked int
	// Wait is how long a long poll waits at most, whatever it asks for; 5 min.
	Wait time.Duration
}

// Rate is a token bucket: as many requests a second for long, and as many at
// once.
type Rate struct {
	PerSecond float64
	Burst     int
}

func (l Limits) orDefault() Limits {
	for _, r := range []*Rate{&l.Get, &l.Post, &l.Poll} {
		if *r == (Rate{}) {
			*r = Rate{PerSecond: 5, Burst: 20} // a crawl of one view's leaves comes at once
		}
	}
	if l.Keep == (Rate{}) {
		l.Keep = Rate{PerSecond: 1. / 60, Burst: 40} // twice the programs that a guest may have, and some
	}
	if l.Parked == 0 {
		l.Parked = 10
	}
	if l.Wait == 0 {
		l.Wait = 5 * time.Minute
	}
	return l
}

// kind is which bucket a request is taken from.
type kind int

const (
	kindGet kind = iota
	kindPost
	kindPoll
	kindKeep
	kindNone // for what is not here: as many as those that read, and not at their cost
	kinds
)

func kindOf(r *http.Request, q *query) kind {
	if r.Method != http.MethodGet {
		switch strings.TrimPrefix(r.URL.Path, ownPath) {
		case "listeners/register", "listeners/unregister", "maintenance/book", "maintenance/start", "maintenance/defer":
			return kindKeep
		}
		return kindPost
	}
	if _, waits := q.get("wait"); waits || q.is("wait_for_change") {
		return kindPoll
	}
	return kindGet
}

// client is what a guest takes up. Handler.mu guards it.
type client struct {
	buckets [kinds]*rate.Limiter
	active  int           // requests that are being answered
	parked  int           // of these, long polls that wait
	gone    chan struct{} // closed when none is parked any more
	drained chan struct{} // closed for those parked to end
	until   time.Time     // none parks before
	heard   time.Time     // its latest request
}

// Heard is when a guest has last asked for anything, the zero time for one that was silent for
// a minute at least.
func (h *Handler) Heard(guest string) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	if cl := h.clients[guest]; cl != nil {
		return cl.heard
	}
	return time.Time{}
}

func (h *Handler) clientOf(guest string) *client {
	cl := h.clients[guest]
	if cl == nil {
		cl = &client{drained: make(chan struct{})}
		for k, r := range [kinds]Rate{kindGet: h.limits.Get, kindPost: h.limits.Post, kindPoll: h.limits.Poll, kindKeep: h.limits.Keep, kindNone: h.limits.Get} {
			cl.buckets[k] = rate.NewLimiter(rate.Limit(r.PerSecond), r.Burst)
		}
		h.clients[guest] = cl
	}
	return cl
}

// admit lets a request in, or not; leave follows in both cases.
func (h *Handler) admit(guest string, k kind) (cl *client, draining, admitted bool) {
	now := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sweep(now)
	cl = h.clientOf(guest)
	cl.active++
	cl.heard = now
	return cl, now.Before(cl.until), cl.buckets[k].AllowN(now, 1)
}

// heldUp is how long a request waits before it is refused as one too many. A guest
// that asks on regardless gets no further by it than its connections, of which it
// has few, and leaves the processor to others.
const heldUp = 100 * time.Millisecond

func (h *Handler) holdUp(ctx context.Context) {
	timer := time.NewTimer(heldUp)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	case <-h.stopped:
	}
}

func (h *Handler) leave(cl *client) {
	h.mu.Lock()
	defer h.mu.Unlock()
	cl.active--
}

// sweep forgets, once a minute, the clients of which nothing need be known: their
// buckets are full again, and they were not heard of for a minute. So those of guests that have gone do not stay.
func (h *Handler) sweep(now time.Time) {
	if now.Sub(h.swept) < time.Minute {
		return
	}
	h.swept = now
	for guest, cl := range h.clients {
		if cl.active == 0 && !now.Before(cl.until) && now.Sub(cl.heard) >= time.Minute && cl.full(now) {
			delete(h.clients, guest)
		}
	}
}

func (cl *client) full(now time.Time) bool {
	for _, b := range cl.buckets {
		if b.TokensAt(now) < float64(b.Burst()) {
			return false
		}
	}
	return true
}

// enter parks a long poll until drained is closed; unpark is called once when it
// has been answered, and is nil when too many are parked.
func (h *Handler) enter(cl *client) (drained <-chan struct{}, unpark func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.now().Before(cl.until):
		none := make(chan struct{})
		close(none)
		return none, func() {}
	case cl.parked >= h.limits.Parked:
		return nil, nil
	case cl.parked == 0:
		cl.gone = make(chan struct{})
	}
	cl.parked++
	return cl.drained, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if cl.parked--; cl.parked == 0 {
			close(cl.gone)
		}
	}
}

// Drain answers the long polls of a guest that wait, with "Connection: close",
// and returns when their answers have been sent. For as long as is given, none
// waits again and every answer closes its connection: connections do not follow a
// guest to another host. Its error is that of ctx.
func (h *Handler) Drain(ctx context.Context, guest string, d time.Duration) error {
	h.mu.Lock()
	cl := h.clientOf(guest)
	cl.until = h.now().Add(d)
	close(cl.drained)
	cl.drained = make(chan struct{})
	gone, parked := cl.gone, cl.parked
	h.mu.Unlock()
	if parked == 0 {
		return nil
	}
	select {
	case <-gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("cannot finish the long polls of guest %s: %w", guest, ctx.Err())
	}
}

// Stop answers all long polls, and has none wait from then on.
func (h *Handler) Stop() { h.stop.Do(func() { close(h.stopped) }) }
