package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DefaultInterval is the time between heartbeats until told otherwise.
const DefaultInterval = time.Millisecond

// minInterval keeps a mistyped interval from taking the guest's only CPU.
const minInterval = 50 * time.Microsecond

// calm is the interval from which on a sender sleeps as others do. It is some
// tenths of a millisecond less punctual then, but its guest is idle in between:
// see sleepUntil.
const calm = 10 * time.Millisecond

// idle is how often a sender without destination looks for one.
const idle = 250 * time.Millisecond

// Sender sends heartbeats. Make one with NewSender.
type Sender struct {
	log  *slog.Logger
	fd   int
	beat Heartbeat // owned by Run

	mu     sync.Mutex
	to     netip.AddrPort // invalid: do not send
	every  time.Duration
	status HeartbeatStatus
}

// NewSender makes a sender for a guest of that name; to may be invalid, then
// nothing is sent until Set. The error is of the socket.
func NewSender(log *slog.Logger, guest string, incarnation uint64, to netip.AddrPort) (*Sender, error) {
	// Not connected: a connected socket would report an absent receiver as
	// ECONNREFUSED on the next datagram, and so lose that one.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open heartbeat socket: %w", err)
	}
	return &Sender{
		log:   log,
		fd:    fd,
		beat:  Heartbeat{Guest: GuestID(guest), Incarnation: incarnation},
		to:    to,
		every: DefaultInterval,
	}, nil
}

// Set changes destination and interval; what is left zero stays.
func (s *Sender) Set(c HeartbeatSettings) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	to, every := s.to, s.every
	if c.To != "" {
		a, err := netip.ParseAddrPort(c.To)
		if err != nil {
			return fmt.Errorf("heartbeat destination: %w", err)
		}
		if !a.Addr().Is4() || a.Port() == 0 {
			return fmt.Errorf("heartbeat destination %s: need an IPv4 address and a port", c.To)
		}
		to = a
	}
	if c.IntervalUs != 0 {
		every = time.Duration(c.IntervalUs) * time.Microsecond
		if every < minInterval || every > time.Minute {
			return fmt.Errorf("heartbeat interval %v is outside %v to %v", every, minInterval, time.Minute)
		}
	}
	s.to, s.every = to, every
	return nil
}

// Status tells what is sent.
func (s *Sender) Status() HeartbeatStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.IntervalUs = int(s.every / time.Microsecond)
	if s.to.IsValid() {
		st.To = s.to.String()
	}
	return st
}

// Run sends until ctx ends, then closes the socket.
//
// The schedule is absolute: tick n is due at start + n × interval, so the
// train does not drift. A tick that was missed by a whole interval or more is
// skipped and counted, never sent late in a burst: a burst would fill the hole
// that the receiver is there to see.
func (s *Sender) Run(ctx context.Context) {
	defer unix.Close(s.fd)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := realtime(); err != nil {
		s.log.Warn("heartbeats run at normal priority", "err", err)
	}
	buf := make([]byte, HeartbeatSize)
	next := monotonic()
	for ctx.Err() == nil {
		s.mu.Lock()
		to, every := s.to, s.every
		s.mu.Unlock()
		if !to.IsValid() {
			time.Sleep(idle) // not as sleepUntil does, which keeps a CPU awake
			next = monotonic()
			continue
		}
		next += every
		var skipped int64
		if late := monotonic() - next; late >= every {
			skipped = int64(late / every)
			next += time.Duration(skipped) * every
		}
		if every < calm {
			sleepUntil(next)
		} else {
			time.Sleep(next - monotonic())
		}
		s.tick(buf, to, every, skipped)
	}
}

// tick sends one heartbeat and books it.
func (s *Sender) tick(buf []byte, to netip.AddrPort, every time.Duration, skipped int64) {
	b := &s.beat
	b.Sequence++
	b.Skipped += uint32(skipped)
	b.Interval = every
	b.Monotonic = monotonic()
	b.Wall = wall()
	err := sendTo(s.fd, b.Put(buf), to)
	if err != nil {
		b.Sequence-- // it counts what was sent
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.Sequence = b.Sequence
	s.status.Skipped += uint64(skipped)
	if err == nil {
		return
	}
	s.status.Failed++
	// One line for each kind of failure, not a thousand a second.
	if text := err.Error(); text != s.status.LastError {
		s.status.LastError = text
		s.log.Error("cannot send heartbeat", "to", to, "err", err)
	}
}

// sendTo is sendto(2), raw for the reason of sleepUntil.
func sendTo(fd int, b []byte, to netip.AddrPort) error {
	sa := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.Addr().As4()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:], to.Port())
	_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
		0, uintptr(unsafe.Pointer(&sa)), unix.SizeofSockaddrInet4)
	if errno != 0 {
		return errno
	}
	return nil
}

// realtime gives the calling thread a fixed priority over the guest's other
// work, which would otherwise show up as jitter in the train.
func realtime() error {
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 50}
	err := unix.SchedSetAttr(0, &attr, 0)
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("SCHED_FIFO needs CAP_SYS_NICE: %w", err)
	}
	return err
}
