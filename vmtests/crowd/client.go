package crowd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"belay/notify"
)

// client is a guest's program with a connection that stays.
type client struct {
	guest int
	conn  net.Conn
	in    *bufio.Reader
}

func (s *Server) clients(ctx context.Context, guests []int) ([]*client, error) {
	conns, err := s.crowd.dial(ctx, s.address, guests)
	if err != nil {
		return nil, err
	}
	all := make([]*client, len(conns))
	for i, c := range conns {
		all[i] = &client{guest: guests[i], conn: c, in: bufio.NewReader(c)}
	}
	return all, nil
}

func hangUp(all []*client) {
	for _, c := range all {
		c.conn.Close()
	}
}

// request asks for the guest's document, in Azure's form.
func request(more string) []byte {
	return fmt.Appendf(nil, "GET /metadata/scheduledevents?api-version=2020-07-01%s HTTP/1.1\r\nHost: %s\r\nMetadata: true\r\n\r\n", more, notify.Address)
}

// ask gives the body of the answer, and when it had been read.
func (c *client) ask(request []byte) (body []byte, read time.Duration, err error) {
	if _, err := c.conn.Write(request); err != nil {
		return nil, 0, err
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return nil, 0, fmt.Errorf("guest %d gets no answer: %w", c.guest, err)
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	read = monotonic()
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("guest %d is answered %s: %s", c.guest, resp.Status, body)
	}
	return body, read, err
}

// Length is how many bytes the document of a guest has.
func (s *Server) Length(ctx context.Context, guest int) (int, error) {
	all, err := s.clients(ctx, []int{guest})
	if err != nil {
		return 0, err
	}
	defer hangUp(all)
	body, _, err := all[0].ask(request(""))
	return len(body), err
}

// Waiting are guests that each wait for a change with a long poll.
type Waiting struct {
	server  *Server
	clients []*client
	seen    chan seen
	stop    context.CancelFunc
	ended   sync.WaitGroup
	polls   int64 // how many the server has had before all wait
}

// seen is a change that a guest has read.
type seen struct {
	guest, events int
	at            time.Duration
	err           error
}

// Visible is when a guest was told of something, and when it had read it.
type Visible struct {
	Told
	Seen time.Duration
}

// Wait has the first n guests wait.
func (s *Server) Wait(ctx context.Context, n int) (*Waiting, error) {
	guests := make([]int, n)
	for i := range guests {
		guests[i] = i
	}
	all, err := s.clients(ctx, guests)
	if err != nil {
		return nil, err
	}
	w := &Waiting{server: s, clients: all, seen: make(chan seen, n), polls: int64(n)}
	ctx, w.stop = context.WithCancel(ctx)
	context.AfterFunc(ctx, func() { hangUp(all) })
	for _, c := range all {
		w.ended.Go(func() { w.follow(ctx, c) })
	}
	return w, nil
}

// follow waits with one guest until it fails, or ctx ends.
func (w *Waiting) follow(ctx context.Context, c *client) {
	next := request("&wait=5m")
	for {
		body, at, err := c.ask(next)
		var doc struct {
			DocumentIncarnation uint64
			Events              []json.RawMessage
		}
		if err == nil {
			err = json.Unmarshal(body, &doc)
		}
		select {
		case w.seen <- seen{guest: c.guest, events: len(doc.Events), at: at, err: err}:
		case <-ctx.Done():
			return
		}
		if err != nil {
			return
		}
		next = request(fmt.Sprintf("&wait=5m&incarnation=%d", doc.DocumentIncarnation))
	}
}

// Announce tells guests of an event each, one after the other, when all wait.
func (w *Waiting) Announce(ctx context.Context, guests ...int) ([]Visible, error) {
	told, err := w.server.tell(order{Polls: w.polls, Announce: guests})
	if err != nil {
		return nil, err
	}
	all := make(map[int]Told, len(guests))
	for i, g := range guests {
		all[g] = told[i]
	}
	return w.collect(ctx, all, 1)
}

// Cancel cancels at once what these guests were told of, when all wait.
func (w *Waiting) Cancel(ctx context.Context, guests ...int) ([]Visible, error) {
	told, err := w.server.tell(order{Polls: w.polls, Cancel: true})
	if err != nil {
		return nil, err
	}
	all := make(map[int]Told, len(guests))
	for _, g := range guests {
		all[g] = told[0]
	}
	return w.collect(ctx, all, 0)
}

// collect waits until all who were told have seen so many events.
func (w *Waiting) collect(ctx context.Context, told map[int]Told, events int) (all []Visible, err error) {
	late := time.After(30 * time.Second)
	for range len(told) {
		select {
		case s := <-w.seen:
			t, expected := told[s.guest]
			switch {
			case s.err != nil:
				return nil, s.err
			case !expected || s.events != events:
				return nil, fmt.Errorf("guest %d sees %d events, which it was not told of", s.guest, s.events)
			}
			delete(told, s.guest)
			all = append(all, Visible{Told: t, Seen: s.at})
			w.polls++
		case <-late:
			return nil, fmt.Errorf("%d guests have not seen what they were told", len(told))
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return all, nil
}

// Close ends the guests' polls.
func (w *Waiting) Close() {
	w.stop()
	w.ended.Wait()
}

// Polling are guests that ask once a second.
type Polling struct{ clients []*client }

// Poll connects guests.
func (s *Server) Poll(ctx context.Context, guests []int) (*Polling, error) {
	all, err := s.clients(ctx, guests)
	return &Polling{all}, err
}

// Run has each ask that often, spread evenly over each second, and gives how long
// it waited for its answers.
func (p *Polling) Run(ctx context.Context, times int) ([]time.Duration, error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	n := len(p.clients)
	took := make([]time.Duration, n*times)
	begun := time.Now()
	var all sync.WaitGroup
	for i, c := range p.clients {
		all.Go(func() {
			ask := request("")
			for k := range times {
				select {
				case <-time.After(time.Until(begun.Add(time.Second*time.Duration(k) + time.Second*time.Duration(i)/time.Duration(n)))):
				case <-ctx.Done():
					return
				}
				asked := monotonic()
				_, read, err := c.ask(ask)
				if err != nil {
					stop(err)
					return
				}
				took[i*times+k] = read - asked
			}
		})
	}
	all.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	// The last second, too, is a whole one.
	select {
	case <-time.After(time.Until(begun.Add(time.Second * time.Duration(times)))):
	case <-ctx.Done():
	}
	return took, ctx.Err()
}

// Close hangs up.
func (p *Polling) Close() { hangUp(p.clients) }

const (
	// floodConns is how many connections a guest floods by, and floodEvery how
	// often it sends by each.
	floodConns = 10
	floodEvery = 50 * time.Millisecond
)

// Flood has a guest ask perSecond times a second, whether it is answered or not,
// until ctx ends. It gives how many requests it could send, and how many answers
// it got.
func (s *Server) Flood(ctx context.Context, guest, perSecond int) (sent, answered int, err error) {
	guests := make([]int, floodConns)
	for i := range guests {
		guests[i] = guest
	}
	all, err := s.clients(ctx, guests)
	if err != nil {
		return 0, 0, err
	}
	defer context.AfterFunc(ctx, func() { hangUp(all) })()
	defer hangUp(all)
	ask := request("")
	var mu sync.Mutex
	var errs []error
	count := func(f func(total *int) error, total *int) func() {
		return func() {
			n := 0
			err := f(&n)
			mu.Lock()
			defer mu.Unlock()
			*total += n
			if ctx.Err() == nil {
				errs = append(errs, err)
			}
		}
	}
	var ended sync.WaitGroup
	for i, c := range all {
		ended.Go(count(c.answers, &answered))
		ended.Go(count(func(n *int) error {
			select { // they take turns: 10,000 a second are no ten bursts of a thousand
			case <-time.After(time.Duration(i) * floodEvery / floodConns):
			case <-ctx.Done():
			}
			return c.flood(ctx, ask, perSecond/floodConns, n)
		}, &sent))
	}
	ended.Wait()
	return sent, answered, errors.Join(errs...)
}

func (c *client) flood(ctx context.Context, ask []byte, perSecond int, sent *int) error {
	most := bytes.Repeat(ask, perSecond/10) // made once: its garbage would slow the others' clients down
	begun := time.Now()
	tick := time.NewTicker(floodEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		due := int(time.Since(begun).Seconds()*float64(perSecond)) - *sent
		n, err := c.conn.Write(most[:min(due*len(ask), len(most))])
		*sent += n / len(ask)
		if err != nil {
			return err
		}
	}
}

// answers counts them.
func (c *client) answers(n *int) error {
	for {
		resp, err := http.ReadResponse(c.in, nil)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			return err
		}
		*n++
	}
}
