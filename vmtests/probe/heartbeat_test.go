package probe

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestHeartbeatCodec(t *testing.T) {
	want := Heartbeat{
		Guest: GuestID("web-1"), Incarnation: 1 << 63, Sequence: 42,
		Monotonic: 5 * time.Second, Wall: -1, Interval: 1500 * time.Microsecond, Skipped: 7,
	}
	b := want.Put(make([]byte, 100))
	if len(b) != HeartbeatSize {
		t.Fatalf("%d bytes", len(b))
	}
	var got Heartbeat
	if err := got.Parse(b); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	before := got
	for i := range b {
		b[i] ^= 0x10
		if err := got.Parse(b); !errors.Is(err, ErrNotHeartbeat) {
			t.Errorf("flipped bit in byte %d: %v", i, err)
		}
		b[i] ^= 0x10
	}
	for _, short := range [][]byte{nil, b[:HeartbeatSize-1], append(b, 0)} {
		if err := got.Parse(short); !errors.Is(err, ErrNotHeartbeat) {
			t.Errorf("%d bytes: %v", len(short), err)
		}
	}
	if got != before {
		t.Error("a datagram that was refused changed the heartbeat")
	}
}

func FuzzHeartbeat(f *testing.F) {
	f.Add((&Heartbeat{Sequence: 1}).Put(make([]byte, HeartbeatSize)))
	f.Fuzz(func(t *testing.T, b []byte) {
		var h Heartbeat
		if h.Parse(b) != nil {
			return
		}
		if d := cmp.Diff(b, h.Put(make([]byte, HeartbeatSize))); d != "" {
			t.Error(d)
		}
	})
}

// The train keeps its schedule: what was not sent in time is skipped and
// counted, so that sent and skipped together follow the clock.
func TestSenderKeepsSchedule(t *testing.T) {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	to := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	s, err := NewSender(slog.New(slog.DiscardHandler), "g", 9, to)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); s.Run(ctx) }()
	defer func() { cancel(); <-ended }()

	var first, last Heartbeat
	buf := make([]byte, 2*HeartbeatSize)
	for n := range 200 {
		size, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if err := last.Parse(buf[:size]); err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			first = last
		}
		if last.Sequence != uint64(n+1) || last.Guest != GuestID("g") || last.Incarnation != 9 {
			t.Fatalf("heartbeat %d: %v", n, &last)
		}
	}
	ticks := last.Sequence - first.Sequence + uint64(last.Skipped-first.Skipped)
	took := last.Monotonic - first.Monotonic
	if drift := took - time.Duration(ticks)*DefaultInterval; drift.Abs() > 20*time.Millisecond {
		t.Errorf("%d ticks took %v: drift %v", ticks, took, drift)
	}
}

func TestSenderSettings(t *testing.T) {
	s := &Sender{every: DefaultInterval}
	for _, bad := range []HeartbeatSettings{{To: "x"}, {To: "[::1]:9"}, {To: "1.2.3.4:0"}, {IntervalUs: 1}, {IntervalUs: -5}, {IntervalUs: 1 << 40}} {
		if s.Set(bad) == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
	if err := s.Set(HeartbeatSettings{To: "10.0.0.1:9"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Set(HeartbeatSettings{IntervalUs: 2000}); err != nil {
		t.Fatal(err)
	}
	if st := s.Status(); st.To != "10.0.0.1:9" || st.IntervalUs != 2000 {
		t.Errorf("%+v", st)
	}
}
