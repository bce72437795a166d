package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/fnv"
	"time"
)

// HeartbeatSize is the length of an encoded heartbeat in bytes.
const HeartbeatSize = 60

const (
	heartbeatMagic   = 0x424c4842 // "BLHB"
	heartbeatVersion = 1
)

// ErrNotHeartbeat is returned for a datagram that is no heartbeat of this
// version: wrong length, magic, version or checksum.
var ErrNotHeartbeat = errors.New("not a heartbeat")

// Heartbeat is one datagram. On the wire it is HeartbeatSize bytes, big endian:
//
//	 0  u32 magic "BLHB"
//	 4  u16 version
//	 6  u16 length
//	 8  u64 guest
//	16  u64 incarnation
//	24  u64 sequence
//	32  i64 monotonic, ns
//	40  i64 wall, ns since 1970
//	48  u32 interval, µs
//	52  u32 skipped
//	56  u32 CRC-32 (IEEE) of bytes 0 to 55
//
// The checksum is there because virtio-net guests leave UDP checksums to a
// device that may never compute them.
type Heartbeat struct {
	Guest       uint64        // GuestID of the guest's name
	Incarnation uint64        // changes with each boot and each start of the probe
	Sequence    uint64        // counts datagrams sent by this incarnation, from 1
	Monotonic   time.Duration // the guest's CLOCK_MONOTONIC
	Wall        int64         // the guest's CLOCK_REALTIME, ns since 1970
	Interval    time.Duration // the schedule in force, in whole µs
	Skipped     uint32        // ticks this incarnation missed because it was late
}

// GuestID is the number under which a guest of that name sends.
func GuestID(name string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(name)) // never fails
	return h.Sum64()
}

// Put encodes h into b, which must be at least HeartbeatSize long, and returns
// the encoded bytes.
func (h *Heartbeat) Put(b []byte) []byte {
	b = b[:HeartbeatSize]
	be := binary.BigEndian
	be.PutUint32(b[0:], heartbeatMagic)
	be.PutUint16(b[4:], heartbeatVersion)
	be.PutUint16(b[6:], HeartbeatSize)
	be.PutUint64(b[8:], h.Guest)
	be.PutUint64(b[16:], h.Incarnation)
	be.PutUint64(b[24:], h.Sequence)
	be.PutUint64(b[32:], uint64(h.Monotonic))
	be.PutUint64(b[40:], uint64(h.Wall))
	be.PutUint32(b[48:], uint32(h.Interval/time.Microsecond))
	be.PutUint32(b[52:], h.Skipped)
	be.PutUint32(b[56:], crc32.ChecksumIEEE(b[:56]))
	return b
}

// Parse decodes a datagram into h without allocating. The error, if any, is
// ErrNotHeartbeat and leaves h as it was.
func (h *Heartbeat) Parse(b []byte) error {
	be := binary.BigEndian
	if len(b) != HeartbeatSize ||
		be.Uint32(b[0:]) != heartbeatMagic ||
		be.Uint16(b[4:]) != heartbeatVersion ||
		be.Uint16(b[6:]) != HeartbeatSize ||
		be.Uint32(b[56:]) != crc32.ChecksumIEEE(b[:56]) {
		return ErrNotHeartbeat
	}
	h.Guest = be.Uint64(b[8:])
	h.Incarnation = be.Uint64(b[16:])
	h.Sequence = be.Uint64(b[24:])
	h.Monotonic = time.Duration(be.Uint64(b[32:]))
	h.Wall = int64(be.Uint64(b[40:]))
	h.Interval = time.Duration(be.Uint32(b[48:])) * time.Microsecond
	h.Skipped = be.Uint32(b[52:])
	return nil
}

func (h *Heartbeat) String() string {
	return fmt.Sprintf("guest %016x/%016x seq %d mono %v", h.Guest, h.Incarnation, h.Sequence, h.Monotonic)
}
