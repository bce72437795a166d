package observer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"belay/vmtests/probe"
)

// Options are the sizes of an observer. Zero values are replaced.
type Options struct {
	// Capacity is how many heartbeats are kept of each guest; 48 bytes each,
	// used as they arrive. Default 1<<18: over four minutes at 1 kHz.
	Capacity int
	// ReceiveBuffer is the size of the socket's queue in bytes. Default
	// 8 MiB; beyond net.core.rmem_max it needs CAP_NET_ADMIN.
	ReceiveBuffer int
}

// maxGuests bounds what strangers on the LAN can make an observer allocate.
const maxGuests = 64

// Observer receives heartbeats. Make one with Listen, end it with Close.
type Observer struct {
	conn *net.UDPConn
	raw  syscall.RawConn
	opt  Options
	done chan struct{} // closed when the receiver has ended

	mu     sync.Mutex
	rx     receiver
	trains map[uint64]*train
	alien  uint64 // datagrams that were no heartbeats
	err    error  // why the receiver ended
}

// Mark is a moment from which a report can be asked for.
type Mark struct{ at int64 }

// train is what is known of one guest.
type train struct {
	ring     []sample
	total    uint64 // ever received
	epochs   map[uint64]uint32
	current  uint64 // incarnation
	epoch    uint32
	interval time.Duration
	waiters  []waiter
}

type waiter struct {
	total uint64
	ready chan struct{}
}

// Listen starts to observe on conn, which must be an IPv4 UDP socket in the
// guests' LAN, and takes it over. The error is of the socket's options.
func Listen(conn *net.UDPConn, opt Options) (*Observer, error) {
	if opt.Capacity <= 0 {
		opt.Capacity = 1 << 18
	}
	if opt.ReceiveBuffer <= 0 {
		opt.ReceiveBuffer = 8 << 20
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("observe heartbeats: %w", err)
	}
	o := &Observer{
		conn:   conn,
		raw:    raw,
		opt:    opt,
		done:   make(chan struct{}),
		trains: map[uint64]*train{},
	}
	var optErr error
	if err := raw.Control(func(fd uintptr) { optErr = prepare(int(fd), opt.ReceiveBuffer) }); err != nil {
		return nil, fmt.Errorf("observe heartbeats: %w", err)
	}
	if optErr != nil {
		return nil, fmt.Errorf("observe heartbeats: %w", optErr)
	}
	go o.receive()
	return o, nil
}

// Addr is the address to which guests have to send.
func (o *Observer) Addr() netip.AddrPort {
	return o.conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

// Close ends the observer and closes its socket.
func (o *Observer) Close() error {
	err := o.conn.Close()
	<-o.done
	return err
}

// receive empties the socket whenever there is something in it.
func (o *Observer) receive() {
	defer close(o.done)
	var err error
	rerr := o.raw.Read(func(fd uintptr) bool {
		err = o.drain(int(fd))
		return err != nil // false: wait until there is more
	})
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err = errors.Join(err, rerr); o.err == nil {
		o.err = net.ErrClosed
	}
	for _, t := range o.trains {
		for _, w := range t.waiters {
			close(w.ready)
		}
		t.waiters = nil
	}
}

// drain books all datagrams that have arrived.
func (o *Observer) drain(fd int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	var beat probe.Heartbeat
	for {
		d, err := o.rx.next(fd)
		if err != nil {
			return fmt.Errorf("receive heartbeats: %w", err)
		}
		if d == nil {
			return nil
		}
		if beat.Parse(d.body) != nil {
			o.alien++
			continue
		}
		o.book(&beat, d)
	}
}

// book files one heartbeat; it allocates only for a guest or an incarnation
// that was not seen before.
func (o *Observer) book(h *probe.Heartbeat, d *datagram) {
	t := o.train(h.Guest)
	if t == nil {
		o.alien++
		return
	}
	epoch := t.epoch
	if h.Incarnation != t.current {
		var known bool
		if epoch, known = t.epochs[h.Incarnation]; !known {
			epoch = uint32(len(t.epochs))
			t.epochs[h.Incarnation] = epoch
			t.current, t.epoch = h.Incarnation, epoch
		}
	}
	t.interval = h.Interval
	t.ring[t.total%uint64(len(t.ring))] = sample{
		at:      d.mono,
		offset:  h.Wall - d.wall,
		mono:    int64(h.Monotonic),
		seq:     h.Sequence,
		epoch:   epoch,
		skipped: h.Skipped,
		drops:   d.drops,
	}
	t.total++
	if len(t.waiters) > 0 {
		t.waiters = slices.DeleteFunc(t.waiters, func(w waiter) bool {
			if t.total < w.total {
				return false
			}
			close(w.ready)
			return true
		})
	}
}

// train finds or starts the record of a guest; nil when there are too many.
func (o *Observer) train(guest uint64) *train {
	t := o.trains[guest]
	if t == nil && len(o.trains) < maxGuests {
		t = &train{ring: make([]sample, o.opt.Capacity), epochs: map[uint64]uint32{}}
		o.trains[guest] = t
	}
	return t
}

// Mark is now.
func (o *Observer) Mark() Mark {
	mono, _ := now()
	return Mark{at: mono}
}

// Since reports on a guest, by name, from a mark to now. A guest that never
// sent gives a report of one open gap.
func (o *Observer) Since(m Mark, guest string) Report {
	present, _ := now()
	// What has arrived must not look like a gap because the receiver was not
	// scheduled yet. An error ends the receiver too, and shows in Err.
	_ = o.raw.Control(func(fd uintptr) { _ = o.drain(int(fd)) })

	o.mu.Lock()
	var r Report
	t := o.trains[probe.GuestID(guest)]
	if t == nil {
		o.mu.Unlock()
		r = analyse(nil, nil, m.at, present)
	} else {
		before, in, truncated := t.window(m.at, present)
		interval := t.interval
		o.mu.Unlock()
		if truncated && len(in) > 0 {
			m.at = in[0].at
		}
		r = analyse(before, in, m.at, present)
		r.Interval, r.Truncated = interval, truncated
	}
	r.Guest = guest
	return r
}

// window copies the samples that arrived from mark to end, and some before.
func (t *train) window(mark, end int64) (before, in []sample, truncated bool) {
	size := uint64(len(t.ring))
	oldest := t.total - min(t.total, size)
	from := t.total
	for from > oldest && t.ring[(from-1)%size].at >= mark {
		from--
	}
	for i := from - min(from-oldest, lookBack); i < t.total; i++ {
		switch s := t.ring[i%size]; {
		case i < from:
			before = append(before, s)
		case s.at <= end:
			in = append(in, s)
		}
	}
	return before, in, from == oldest && oldest > 0
}

// Await returns when n more heartbeats of a guest have arrived than at the
// time of the call, or with ctx's error, or when the observer has ended.
func (o *Observer) Await(ctx context.Context, guest string, n int) error {
	if n <= 0 {
		return nil
	}
	o.mu.Lock()
	if o.err != nil {
		defer o.mu.Unlock()
		return fmt.Errorf("await heartbeats of %s: %w", guest, o.err)
	}
	t := o.train(probe.GuestID(guest))
	if t == nil {
		o.mu.Unlock()
		return fmt.Errorf("await heartbeats of %s: already %d guests", guest, maxGuests)
	}
	start := t.total
	w := waiter{total: start + uint64(n), ready: make(chan struct{})}
	t.waiters = append(t.waiters, w)
	o.mu.Unlock()

	var err error
	select {
	case <-w.ready:
	case <-ctx.Done():
		err = ctx.Err()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if t.total >= w.total {
		return nil
	}
	t.waiters = slices.DeleteFunc(t.waiters, func(x waiter) bool { return x.ready == w.ready })
	return fmt.Errorf("await heartbeats of %s: %d of %d came: %w", guest, t.total-start, n, errors.Join(err, o.err))
}

// Err is why the observer no longer receives, or nil while it does.
func (o *Observer) Err() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// Aliens counts datagrams that were no heartbeats, or of one guest too many.
func (o *Observer) Aliens() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.alien
}
