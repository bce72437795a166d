package observer

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"testing"
	"time"

	"belay/vmtests/probe"
)

// listen starts an observer on the loopback and a sender to it.
func listen(t *testing.T, opt Options) (*Observer, func(guest string, incarnation, seq uint64)) {
	t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	o, err := Listen(conn, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	out, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(o.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	buf := make([]byte, probe.HeartbeatSize)
	return o, func(guest string, incarnation, seq uint64) {
		mono, wall := now()
		h := probe.Heartbeat{
			Guest: probe.GuestID(guest), Incarnation: incarnation, Sequence: seq,
			Monotonic: time.Duration(mono), Wall: wall, Interval: time.Millisecond,
		}
		if _, err := out.Write(h.Put(buf)); err != nil {
			t.Error(err)
		}
	}
}

// arrived waits until n heartbeats of the guest have arrived since m: the
// loopback delivers at once, but for a machine that is busy.
func arrived(t *testing.T, o *Observer, m Mark, guest string, n int) Report {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; {
		r := o.Since(m, guest)
		if r.Received >= n || time.Now().After(end) {
			return r
		}
	}
}

func TestObserve(t *testing.T) {
	o, send := listen(t, Options{})
	before := o.Mark()
	for seq := range uint64(10) {
		send("a", 7, seq+1)
		send("b", 8, 100+seq)
	}
	arrived(t, o, before, "a", 10)
	arrived(t, o, before, "b", 10)
	m := o.Mark()
	for seq := range uint64(100) {
		if seq != 50 {
			send("a", 7, seq+11)
		}
	}
	r := arrived(t, o, m, "a", 99)
	if r.Received != 99 || r.Lost != 1 || r.Interval != time.Millisecond || r.Guest != "a" || r.Truncated {
		t.Errorf("a: %+v", r)
	}
	if b := o.Since(m, "b"); b.Received != 0 || !b.LargestGap.Open || b.LargestGap.After != 109 {
		t.Errorf("b: %+v", b)
	}
	if c := o.Since(m, "never seen"); !c.LargestGap.Open || c.LargestGap.Length != c.Span {
		t.Errorf("unknown guest: %+v", c)
	}
	if _, err := json.Marshal(r); err != nil {
		t.Error(err)
	}
}

// The time of arrival is the kernel's: a receiver that was kept from reading
// does not stretch a gap.
func TestArrivalIsKernelTime(t *testing.T) {
	o, send := listen(t, Options{})
	send("a", 1, 1)
	o.Since(o.Mark(), "a") // drained
	o.mu.Lock()            // the receiver waits for this
	m, _ := now()
	send("a", 1, 2)
	held := time.NewTimer(100 * time.Millisecond)
	<-held.C
	o.mu.Unlock()
	r := o.Since(Mark{at: m}, "a")
	if r.Received != 1 || r.LargestGap.Length < 100*time.Millisecond || !r.LargestGap.Open {
		t.Errorf("heartbeat of 100 ms ago was booked as one of now: %+v", r)
	}
}

func TestAwait(t *testing.T) {
	o, send := listen(t, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := o.Await(ctx, "a", 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("await nothing: %v", err)
	}
	if err := o.Await(t.Context(), "a", 0); err != nil {
		t.Errorf("await no heartbeats: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- o.Await(t.Context(), "a", 5) }()
	// Sends more than enough until Await, which starts when it likes, is
	// content.
	for seq := uint64(1); ; seq++ {
		send("a", 1, seq)
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Millisecond):
			continue
		}
		break
	}
	go func() { done <- o.Await(t.Context(), "a", 1000) }()
	o.Close()
	// Whether it was waiting yet or not.
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("await on a closed observer: %v", err)
	}
	if o.Err() == nil {
		t.Error("no error after Close")
	}
}

func TestRingForgets(t *testing.T) {
	o, send := listen(t, Options{Capacity: 32})
	m := o.Mark()
	for seq := range uint64(100) {
		send("a", 1, seq+1)
	}
	r := o.Since(m, "a")
	if !r.Truncated || r.Received != 32 || r.Lost != 0 || r.LargestGap.Length > time.Second {
		t.Errorf("report over more than is kept: %+v", r)
	}
}

func TestStrangersAreCounted(t *testing.T) {
	o, send := listen(t, Options{Capacity: 4})
	for i := range maxGuests + 3 {
		send(string(rune('A'+i)), 1, 1)
	}
	o.Since(o.Mark(), "A")
	if o.Aliens() != 3 {
		t.Errorf("aliens = %d, want 3", o.Aliens())
	}
}

func TestOwnDropsAreTold(t *testing.T) {
	o, send := listen(t, Options{ReceiveBuffer: 4096})
	send("a", 1, 1)
	o.Since(o.Mark(), "a")
	m := o.Mark()
	o.mu.Lock()
	for seq := uint64(2); seq < 200; seq++ {
		send("a", 1, seq)
	}
	o.mu.Unlock()
	o.Since(m, "a")
	send("a", 1, 200) // carries the count
	r := o.Since(m, "a")
	if r.Lost == 0 || uint64(r.ReceiverDrops) != r.Lost {
		t.Errorf("lost %d, of which the receiver dropped %d", r.Lost, r.ReceiverDrops)
	}
}

func TestNoAllocationPerHeartbeat(t *testing.T) {
	o, _ := listen(t, Options{})
	h := probe.Heartbeat{Guest: 1, Incarnation: 2, Interval: time.Millisecond}
	body := h.Put(make([]byte, probe.HeartbeatSize))
	d := &datagram{body: body}
	n := testing.AllocsPerRun(1000, func() {
		var beat probe.Heartbeat
		if err := beat.Parse(d.body); err != nil {
			t.Fatal(err)
		}
		o.mu.Lock()
		o.book(&beat, d)
		o.mu.Unlock()
	})
	if n != 0 {
		t.Errorf("%v allocations per heartbeat", n)
	}
}
