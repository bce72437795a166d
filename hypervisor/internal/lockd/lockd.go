// Package lockd gives up leases in virtlockd that a guest's own QEMU holds, as
// libvirtd does when it pauses a guest.
//
// A libvirtd that dies while it pauses or resumes a guest can leave the guest
// paused with its leases held. The next libvirtd believes them given up, and
// each resume fails, because virtlockd grants a lease once, even to its holder.
//
// It is virtlockd that sees to it that nobody else's lease is touched: it gives
// up a lease for the process only that holds it.
package lockd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Owner is the guest that holds a lease. For virtlockd the PID tells.
type Owner struct {
	UUID [16]byte
	Name string
	ID   int
	PID  int
}

// ErrRefused: virtlockd holds no such lease for this owner.
var ErrRefused = errors.New("virtlockd refuses")

// The protocol is libvirt's RPC (virnetprotocol.x) with virtlockd's program
// (lock_protocol.x).
const (
	program    = 0xEA7BEEF
	version    = 1
	register   = 1 // VIR_LOCK_SPACE_PROTOCOL_PROC_REGISTER
	release    = 7 // VIR_LOCK_SPACE_PROTOCOL_PROC_RELEASE_RESOURCE
	headerSize = 28
	replyMax   = 64 << 10
	typeReply  = 1
	statusOK   = 0
)

// Release gives up the leases on those of the resources (paths of disks) that
// the owner holds, and says how many that were. A resource that it does not hold
// is passed over.
func Release(ctx context.Context, socket string, owner Owner, resources []string) (released int, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return 0, fmt.Errorf("cannot reach virtlockd: %w", err)
	}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()

	c := &client{conn: conn}
	var args []byte
	args = append(args, owner.UUID[:]...)
	args = text(args, owner.Name)
	args = binary.BigEndian.AppendUint32(args, uint32(owner.ID))
	args = binary.BigEndian.AppendUint32(args, uint32(owner.PID))
	args = binary.BigEndian.AppendUint32(args, 0) // flags
	if err := c.call(register, args); err != nil {
		return 0, fmt.Errorf("cannot speak to virtlockd for process %d: %w", owner.PID, err)
	}
	for _, r := range resources {
		args = text(text(nil, ""), r) // the lockspace of files themselves has no name
		args = binary.BigEndian.AppendUint32(args, 0)
		switch err := c.call(release, args); {
		case err == nil:
			released++
		case !errors.Is(err, ErrRefused):
			return released, fmt.Errorf("cannot give up the lease on %s: %w", r, err)
		}
	}
	return released, nil
}

type client struct {
	conn   net.Conn
	serial uint32
}

// call makes one call. An answer that it failed wraps ErrRefused.
func (c *client) call(procedure uint32, args []byte) error {
	c.serial++
	packet := make([]byte, 0, headerSize+len(args))
	for _, word := range []uint32{uint32(headerSize + len(args)), program, version, procedure, 0, c.serial, 0} {
		packet = binary.BigEndian.AppendUint32(packet, word)
	}
	if _, err := c.conn.Write(append(packet, args...)); err != nil {
		return err
	}
	header := make([]byte, headerSize)
	if _, err := io.ReadFull(c.conn, header); err != nil {
		return err
	}
	word := func(i int) uint32 { return binary.BigEndian.Uint32(header[4*i:]) }
	size := word(0)
	if size < headerSize || size > replyMax {
		return fmt.Errorf("an answer of %d bytes", size)
	}
	if _, err := io.CopyN(io.Discard, c.conn, int64(size-headerSize)); err != nil {
		return err
	}
	if word(1) != program || word(3) != procedure || word(4) != typeReply || word(5) != c.serial {
		return errors.New("an answer to something else")
	}
	if word(6) != statusOK {
		return ErrRefused
	}
	return nil
}

// text appends a string in XDR.
func text(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	b = append(b, s...)
	return append(b, make([]byte, -len(s)&3)...)
}
