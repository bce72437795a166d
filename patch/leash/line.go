package leash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"belay/agent/boottime"
	"belay/agent/maint"
)

// ErrFired: the leash has begun to release guests. The pause is over.
var ErrFired = errors.New("the leash has fired")

// maxReplaced bounds how often a leash that dies is replaced within one line:
// what kills it again and again would kill it when it is needed.
const maxReplaced = 5

// Line is an armed leash as its holder has it. It renews itself until it is
// closed, disarmed or lost. What it is told of guests is sent in order, and
// waited for by nobody.
type Line struct {
	c       *Client
	op      maint.OpID
	silence time.Duration
	pause   time.Duration // for which it is armed

	mu       sync.Mutex
	s        *Status // the order, and what the holder knows
	launch   []string
	calls    map[uint64]*call // not answered
	unsent   []*call          // in order
	ids      uint64
	answered time.Duration // when the leash has last answered; CLOCK_BOOTTIME
	err      error         // why it is lost
	closed   bool

	wake chan struct{} // there is something to send; room for one
	lost chan struct{}
	end  context.CancelFunc
	life context.Context
	done sync.WaitGroup
}

// call is a request on its way.
type call struct {
	req   request
	reply chan reply // nil: nobody waits
}

func newLine(c *Client, s *Status) *Line {
	l := &Line{c: c, op: s.Op, silence: s.Silence, s: s, calls: make(map[uint64]*call),
		wake: make(chan struct{}, 1), lost: make(chan struct{})}
	l.life, l.end = context.WithCancel(context.Background())
	return l
}

// begin connects to a leash, and then keeps the line.
func (l *Line) begin(ctx context.Context, do string) (*Line, error) {
	conn, in, err := l.connect(ctx, do)
	if err != nil {
		l.end()
		return nil, err
	}
	l.done.Go(func() { l.keep(conn, in) })
	return l, nil
}

// connect reaches a leash, starting one if need be, and introduces the holder to
// it. One that dies in the middle of that, as one does that was just killed, is
// one that was not there.
func (l *Line) connect(ctx context.Context, do string) (net.Conn, *lines, error) {
	for {
		conn, err := l.reach(ctx)
		if err != nil {
			return nil, nil, err
		}
		in, err := l.introduce(ctx, conn, do)
		if err == nil {
			return conn, in, nil
		}
		conn.Close()
		if lost := new(lostError); !errors.As(err, &lost) || !sleep(ctx, redial) {
			return nil, nil, err
		}
	}
}

// introduce makes the first exchange on a connection: all that the holder knows
// for all that the leash knows.
func (l *Line) introduce(ctx context.Context, conn net.Conn, do string) (*lines, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	l.mu.Lock()
	if do == doArm { // the launch is no part of the pause
		l.s.Deadline = boottime.Now() + l.pause
	}
	l.ids++
	req := request{ID: l.ids, Do: do, Order: l.s.clone()}
	// What an earlier leash was told of guests is in the order now; what
	// somebody waits for is asked again.
	l.unsent = nil
	for _, id := range slices.Sorted(maps.Keys(l.calls)) {
		if c := l.calls[id]; c.reply != nil {
			l.unsent = append(l.unsent, c)
		} else {
			delete(l.calls, id)
		}
	}
	l.mu.Unlock()
	req.Order.Events, req.Order.Warnings = nil, nil
	in := newLines(conn, maxReply)
	var r reply
	_, err := conn.Write(encode(req))
	if err != nil {
		err = &lostError{err}
	} else {
		err = in.next(&r)
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("the leash does not answer: %w", err)
	}
	if r.Problem != nil {
		return nil, r.Problem
	}
	if r.Status == nil || r.Status.Op != l.op {
		return nil, errors.New("the leash answers something else")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.learn(r)
	return in, nil
}

// learn takes over what an answer tells. l.mu is held.
func (l *Line) learn(r reply) {
	l.answered = boottime.Now()
	if r.Status != nil {
		s := r.Status.clone()
		for i := range s.Guests { // the holder may know what the leash has not read yet
			old, now := l.s.guest(s.Guests[i].UUID), &s.Guests[i]
			if old != nil && (!old.Fate.Held() || now.Fate == Armed) {
				now.Fate = old.Fate
			}
		}
		l.s = s
	}
	if r.Fired != "" {
		l.s.Fired = r.Fired
		l.lose(fmt.Errorf("%w: %s", ErrFired, r.Fired))
	}
}

// lose tells the holder to end the pause. l.mu is held.
func (l *Line) lose(err error) {
	if l.err == nil && !l.closed {
		l.err = err
		close(l.lost)
	}
}

// keep sees to the line until it is closed or no leash can be had.
func (l *Line) keep(conn net.Conn, in *lines) {
	defer l.end()
	for replaced := 0; ; replaced++ {
		err := l.session(conn, in)
		if l.life.Err() != nil {
			return
		}
		if l.collected() {
			l.c.Log.Warn("the leash was disarmed by somebody else", "op", l.op)
			return
		}
		l.c.Log.Error("the leash has died", "op", l.op, "err", err)
		if replaced >= maxReplaced {
			err = fmt.Errorf("it was replaced %d times, and died again: %w", replaced, err)
		} else if !errors.Is(err, errDumb) {
			conn, in, err = l.replace()
		}
		if err != nil {
			l.mu.Lock()
			l.lose(fmt.Errorf("the leash of %s is lost: %w", l.op, err))
			l.mu.Unlock()
			return
		}
		l.c.Log.Warn("the leash was replaced", "op", l.op)
	}
}

// collected reports whether a leash that had fired was disarmed by another
// holder: then there is nothing to go on with.
func (l *Line) collected() bool {
	l.mu.Lock()
	fired := l.s.Fired != ""
	l.mu.Unlock()
	_, err := readNotes(l.c.Dir, l.op)
	return fired && errors.Is(err, fs.ErrNotExist)
}

// replace has another leash go on in the place of one that died, with the time
// that remains.
func (l *Line) replace() (net.Conn, *lines, error) {
	ctx, cancel := context.WithTimeout(l.life, l.silence)
	defer cancel()
	return l.connect(ctx, doTake)
}

// errDumb: the leash is there and does not answer. It cannot be replaced.
var errDumb = errors.New("the leash does not answer any more")

// session speaks to one leash until it goes, or the line is closed.
func (l *Line) session(conn net.Conn, in *lines) error {
	ended := make(chan error, 2)
	quit := make(chan struct{})
	var parts sync.WaitGroup
	parts.Go(func() { ended <- l.read(in) })
	parts.Go(func() { ended <- l.write(conn, quit) })
	l.poke()
	err := l.watch(ended)
	close(quit)
	conn.Close()
	parts.Wait()
	return err
}

// watch renews until the session ends, or the leash falls silent.
func (l *Line) watch(ended <-chan error) error {
	every := time.NewTicker(l.silence / 3)
	defer every.Stop()
	for {
		select {
		case err := <-ended:
			return err
		case <-l.life.Done():
			return l.life.Err()
		case <-every.C:
		}
		l.mu.Lock()
		quiet := boottime.Now() - l.answered
		l.mu.Unlock()
		if quiet > l.silence {
			return errDumb
		}
		l.send(request{Do: doRenew}, nil) // one that has fired is asked too: does it live?
	}
}

// read takes answers.
func (l *Line) read(in *lines) error {
	for {
		var r reply
		if err := in.next(&r); err != nil {
			return err
		}
		l.mu.Lock()
		c := l.calls[r.ID]
		delete(l.calls, r.ID)
		l.learn(r)
		if r.Problem != nil && (c == nil || c.reply == nil) {
			// The two do not agree on what is held.
			l.lose(fmt.Errorf("the leash of %s refuses what it is told: %w", l.op, r.Problem))
		}
		if c != nil && c.reply != nil {
			c.reply <- r // has room
		}
		over := c != nil && c.req.Do == doDisarm && r.Problem == nil
		l.closed = l.closed || over
		l.mu.Unlock()
		if over { // it ends now, and is not to be replaced
			l.end()
			return nil
		}
	}
}

// write sends requests.
func (l *Line) write(conn net.Conn, quit <-chan struct{}) error {
	for {
		l.mu.Lock()
		var b []byte
		for _, c := range l.unsent {
			b = append(b, encode(c.req)...)
		}
		l.unsent = l.unsent[:0]
		l.mu.Unlock()
		if len(b) > 0 {
			if _, err := conn.Write(b); err != nil {
				return err
			}
		}
		select {
		case <-l.wake:
		case <-quit:
			return nil
		}
	}
}

// send has a request sent, and gives its ID.
func (l *Line) send(r request, to chan reply) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ids++
	r.ID = l.ids
	c := &call{r, to}
	l.calls[r.ID] = c
	l.unsent = append(l.unsent, c)
	l.poke()
	return r.ID
}

func (l *Line) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// tell notes what the holder knows of guests, and has the leash told.
func (l *Line) tell(do string, f Fate, uuids []string) {
	if len(uuids) == 0 {
		return
	}
	l.mu.Lock()
	for _, u := range uuids {
		if g := l.s.guest(u); g != nil {
			g.Fate = f
		}
	}
	l.mu.Unlock()
	l.send(request{Do: do, Guests: uuids}, nil)
}

// Paused says that Belay has paused guests. It returns at once.
func (l *Line) Paused(uuids ...string) { l.tell(doPaused, Paused, uuids) }

// Left says that guests are not Belay's to release: they were found paused, or
// have ended. It returns at once.
func (l *Line) Left(uuids ...string) { l.tell(doLeft, Left, uuids) }

// Released says that guests are known to run again. It returns at once.
func (l *Line) Released(uuids ...string) { l.tell(doReleased, Released, uuids) }

// Ours are the guests that may be paused, by Belay: neither Left nor Released.
func (l *Line) Ours() (uuids []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, g := range l.s.Guests {
		if g.Fate.Held() {
			uuids = append(uuids, g.UUID)
		}
	}
	return uuids
}

// Status is what holder and leash know; of the leash, what it has last said.
func (l *Line) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.s.clone()
	s.Warnings = append(slices.Clip(s.Warnings), l.launch...)
	return *s
}

// Deadline is when the leash fires. It holds for as long as the host is not
// suspended.
func (l *Line) Deadline() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Now().Add(l.s.Deadline - boottime.Now())
}

// Lost is closed when the pause is to end now: the leash has fired, or it died
// and no other could be had. Err says which.
func (l *Line) Lost() <-chan struct{} { return l.lost }

// Err is nil until Lost is closed. It wraps ErrFired if that is why.
func (l *Line) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Check is to be asked right before vCPUs are stopped. It is nil if the leash
// has answered within two thirds of Silence: a holder that was itself held up
// for longer may have a leash that has fired for nothing, and does not know yet.
func (l *Line) Check() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	if quiet := boottime.Now() - l.answered; quiet > l.silence*2/3 {
		return fmt.Errorf("the leash of %s has not answered for %s", l.op, quiet.Round(time.Millisecond))
	}
	return nil
}

// ask sends a request and waits for the answer.
func (l *Line) ask(ctx context.Context, do string) (reply, error) {
	answer := make(chan reply, 1)
	id := l.send(request{Do: do}, answer)
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.calls, id)
	}()
	select {
	case r := <-answer:
		if r.Problem != nil {
			return r, r.Problem
		}
		return r, nil
	case <-l.life.Done():
		select {
		case r := <-answer:
			return r, nil // to a request to disarm
		default:
		}
		if err := l.Err(); err != nil {
			return reply{}, err
		}
		return reply{}, net.ErrClosed
	case <-ctx.Done():
		return reply{}, fmt.Errorf("no answer in time: %w", context.Cause(ctx))
	}
}

// Events are what the leash has done so far.
func (l *Line) Events(ctx context.Context) ([]maint.LeashEvent, error) {
	r, err := l.ask(ctx, doStatus)
	if err != nil || r.Status == nil {
		return nil, fmt.Errorf("cannot ask the leash of %s: %w", l.op, err)
	}
	return r.Status.Events, nil
}

// retryDisarm is between two tries to disarm a leash that is busy.
const retryDisarm = 100 * time.Millisecond

// Disarm ends the leash, which removes its notes, and closes the line. It gives
// all that the leash has done. It is an error that a guest is still paused; a
// leash that is just releasing one is waited for.
func (l *Line) Disarm(ctx context.Context) ([]maint.LeashEvent, error) {
	for {
		r, err := l.ask(ctx, doDisarm)
		if err == nil {
			l.Close()
			if r.Status == nil {
				return nil, nil
			}
			return r.Status.Events, nil
		}
		if r.Problem == nil || r.Problem.Code != maint.CodeBusy || !sleep(ctx, retryDisarm) {
			return nil, fmt.Errorf("cannot disarm the leash of %s: %w", l.op, err)
		}
	}
}

// Close lets go of the leash without disarming it: it fires when Silence has
// passed, and releases what is paused.
func (l *Line) Close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.end()
	l.done.Wait()
}
