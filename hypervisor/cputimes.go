package hypervisor

import (
	"context"
	"encoding/binary"
	"time"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// CPUTimes calls f each time that QEMU has stopped the guest's vCPUs (running is false)
// or started them, with the moment by this host's clock, to the microsecond: it is
// QEMU's own, however late libvirt tells. ready, unless nil, is called once nothing is missed
// any more. CPUTimes returns nil when ctx ends, and an error when the connection
// is lost or cannot be had. The connection is its own.
//
// Source: virConnectDomainQemuMonitorEventRegister; QMP's events STOP and RESUME. They
// have no details, and go-libvirt drops such an event: it is read below it.
func (h *Host) CPUTimes(ctx context.Context, uuid string, ready func(), f func(running bool, at time.Time)) error {
	const op = "QEMUConnectDomainMonitorEventRegister"
	ctx, cancel := h.untilClosed(ctx)
	defer cancel()
	open, cancelOpen := context.WithTimeout(ctx, h.timeout)
	defer cancelOpen()
	c, err := h.dial(open)
	if err != nil {
		return err
	}
	defer c.close()
	d, err := (&session{ctx: open, conn: c}).domain(uuid)
	if err != nil {
		return err
	}
	events := make(chan monitorEvent, 64) // two come with a move
	tap := func(packet []byte) {
		if e, ok := parseMonitorEvent(packet); ok && (e.name == "STOP" || e.name == "RESUME") {
			select {
			case events <- e:
			default:
			}
		}
	}
	c.wire.tap.Store(&tap)
	if _, err := invoke(open, c, op, func(l *libvirt.Libvirt) (int32, error) {
		return l.QEMUConnectDomainMonitorEventRegister([]libvirt.Domain{d}, nil, 0)
	}); err != nil {
		return err
	}
	if ready != nil {
		ready()
	}
	for {
		select {
		case e := <-events:
			f(e.name == "RESUME", e.at)
		case <-c.wire.lost:
			return NewError(op, c.socket, 0, "connection lost", maint.ErrHypervisorDown)
		case <-ctx.Done():
			return nil
		}
	}
}

// monitorEvent is an event of QMP that libvirt passes on.
type monitorEvent struct {
	name string
	at   time.Time // by QEMU
}

const (
	qemuProgram      = 0x20008087 // QEMU_PROGRAM
	procMonitorEvent = 6          // QEMU_PROC_DOMAIN_MONITOR_EVENT
	rpcHeader        = 24         // program, version, procedure, type, serial, status
)

// parseMonitorEvent reads a qemu_domain_monitor_event_msg (libvirt's qemu_protocol.x) from
// a packet without its length. Any other packet is none.
func parseMonitorEvent(packet []byte) (e monitorEvent, ok bool) {
	word := func() (v uint32) {
		if len(packet) < 4 {
			packet, ok = nil, false
			return 0
		}
		v, packet = binary.BigEndian.Uint32(packet), packet[4:]
		return v
	}
	text := func() string {
		n := int(word())
		padded := (n + 3) &^ 3
		if n < 0 || padded > len(packet) {
			packet, ok = nil, false
			return ""
		}
		s := string(packet[:n])
		packet = packet[padded:]
		return s
	}
	ok = true
	program, _, proc := word(), word(), word()
	if program != qemuProgram || proc != procMonitorEvent || len(packet) < rpcHeader-12 {
		return e, false
	}
	packet = packet[rpcHeader-12:]
	word() // callback
	text() // the domain's name
	for range 4 {
		word() // its UUID
	}
	word() // its ID
	e.name = text()
	seconds := int64(word())<<32 | int64(word())
	e.at = time.Unix(seconds, int64(word())*1000)
	return e, ok
}
