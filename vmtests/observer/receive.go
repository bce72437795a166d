package observer

import (
	"encoding/binary"
	"fmt"
	"math"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// datagram is one datagram as it came; body is valid until the next.
type datagram struct {
	body  []byte
	mono  int64  // arrival on CLOCK_MONOTONIC, ns
	wall  int64  // arrival on CLOCK_REALTIME, ns
	drops uint32 // cumulative datagrams the socket had no room for
}

// receiver reads datagrams with the kernel's time of arrival, without
// allocating.
type receiver struct {
	body [2048]byte
	oob  [128]byte
	d    datagram
}

// maxQueued is the longest time a datagram may credibly have waited in the
// socket. A longer one means that the wall clock was stepped meanwhile.
const maxQueued = 10 * time.Second

// prepare sets the socket's options: SO_TIMESTAMPNS and SO_RXQ_OVFL (see
// socket(7) and the kernel's networking/timestamping.rst), and a long queue.
func prepare(fd, buffer int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
		return fmt.Errorf("ask for arrival times: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1); err != nil {
		return fmt.Errorf("ask for drop counts: %w", err)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer) == nil {
		return nil
	}
	// Not privileged: as much as the system allows.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, buffer); err != nil {
		return fmt.Errorf("set receive buffer: %w", err)
	}
	return nil
}

// next returns the next datagram, or nil when none is waiting.
func (r *receiver) next(fd int) (*datagram, error) {
	// By hand: unix.Recvmsg allocates the sender's address.
	iov := unix.Iovec{Base: &r.body[0], Len: uint64(len(r.body))}
	msg := unix.Msghdr{Iov: &iov, Iovlen: 1, Control: &r.oob[0], Controllen: uint64(len(r.oob))}
	for {
		n, _, errno := unix.Syscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&msg)), unix.MSG_DONTWAIT)
		switch errno {
		case 0:
			r.d.body = r.body[:n]
			r.stamp(r.oob[:msg.Controllen])
			return &r.d, nil
		case unix.EAGAIN:
			return nil, nil
		case unix.EINTR:
			continue
		}
		return nil, errno
	}
}

// stamp fills in when the datagram arrived.
//
// The kernel gives the time on the wall clock. Gaps must not depend on that,
// as it may be stepped, so only the difference to the present wall clock, the
// time in the queue, is taken off the present monotonic one.
func (r *receiver) stamp(oob []byte) {
	mono, wall := now()
	r.d.mono, r.d.wall = mono, wall
	for len(oob) >= unix.SizeofCmsghdr {
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return
		}
		oob = rest
		if h.Level != unix.SOL_SOCKET {
			continue
		}
		switch {
		case h.Type == unix.SO_TIMESTAMPNS && len(data) >= 16: // SCM_TIMESTAMPNS
			sec := int64(binary.NativeEndian.Uint64(data))
			at := sec*1e9 + int64(binary.NativeEndian.Uint64(data[8:]))
			if queued := wall - at; queued >= 0 && queued < int64(maxQueued) {
				r.d.mono, r.d.wall = mono-queued, at
			}
		case h.Type == unix.SO_RXQ_OVFL && len(data) >= 4:
			r.d.drops = binary.NativeEndian.Uint32(data)
		}
	}
}

// now reads both clocks, in ns.
func now() (mono, wall int64) {
	least := int64(math.MaxInt64)
	for range 10 { // who is kept from running in between has two clocks of two moments
		before, w, after := read(unix.CLOCK_MONOTONIC), read(unix.CLOCK_REALTIME), read(unix.CLOCK_MONOTONIC)
		if took := after - before; took < least {
			least, mono, wall = took, before+took/2, w
		}
		if least < int64(20*time.Microsecond) {
			break
		}
	}
	return mono, wall
}

func read(id int32) int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(id, &ts); err != nil {
		// Only an unknown clock or a bad pointer can fail.
		panic(fmt.Sprintf("clock_gettime(%d): %v", id, err))
	}
	return ts.Nano()
}
