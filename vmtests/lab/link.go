package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Link is a host's link into the LAN with this process in the middle of it, which
// delays and loses frames as it is told. It takes the place of sch_netem, which
// kernels made for small virtual machines do not have.
//
//	host-a:uplink ══ host-a ◄─ Link ─► fault-host-a ══ port-host-a ─ lan
//	                 └────────── the switch's namespace ──────────┘
//
// A link is perfect until it is told otherwise. Frames stay in order. What is
// cut by [Host.SetLink] is cut here as well.
type Link struct {
	host  *Host
	delay atomic.Int64  // ns
	loss  atomic.Uint64 // of 1000

	ports []*os.File
	run   sync.WaitGroup
}

const (
	// linkQueue is how many frames may be on their way in each direction;
	// more are lost. 60 MB of full frames: 300 MB/s at a delay of 200 ms.
	linkQueue = 40_000
	// linkFrame is the most that a frame may have: 64 KiB of segments that
	// have not been cut up, and headers.
	linkFrame = 65536 + 128
	// linkBuffer is the sockets' buffer, bytes.
	linkBuffer = 16 << 20
)

// Emulate puts a Link where the host's cable is, until Close, or Down of the lab.
// Meanwhile, and afterwards, the LAN does not reach the host for up to a second:
// the kernel takes its time to notice a new link. The link lives in this process.
func (h *Host) Emulate(ctx context.Context) (_ *Link, err error) {
	l := &Link{host: h}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("cannot emulate link of %s: %w", h.Name, err), l.Close())
		}
	}()
	sw := h.lab.netns("switch")
	port, fault := "port-"+h.Name, "fault-"+h.Name
	// Segments one by one, as on a real cable: else a lost frame would be
	// forty of them.
	if err := h.lab.ip(ctx, h.netns, "link set "+Uplink+" gso_max_segs 1"); err != nil {
		return nil, err
	}
	err = h.lab.ip(ctx, sw,
		// Without its bridge it is a link of the switch's own, which is not
		// to answer for it.
		"link set "+h.Name+" nomaster arp off",
		"link add "+port+" type veth peer name "+fault,
		"link set "+fault+" arp off",
		"link set "+port+" gso_max_segs 1",
		"link set "+port+" master "+lan,
		"link set "+fault+" up",
		"link set "+port+" up")
	if err != nil {
		return nil, err
	}
	err = h.lab.InSwitch(func() error {
		for _, name := range []string{h.Name, fault} {
			file, err := packetSocket(name)
			if err != nil {
				return fmt.Errorf("link %s: %w", name, err)
			}
			l.ports = append(l.ports, file)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	l.forward(l.ports[0], l.ports[1])
	l.forward(l.ports[1], l.ports[0])
	h.lab.mu.Lock()
	h.lab.links = append(h.lab.links, l)
	h.lab.mu.Unlock()
	return l, nil
}

// Delay has each frame, in either direction, take so long.
func (l *Link) Delay(d time.Duration) { l.delay.Store(int64(d)) }

// Loss has so many of 100 frames be lost, in either direction; 100 is a cable that
// is cut without the ends noticing.
func (l *Link) Loss(percent float64) { l.loss.Store(uint64(percent * 10)) }

// Perfect ends delay and loss. What is on its way still arrives when it was to.
func (l *Link) Perfect() { l.Delay(0); l.Loss(0) }

// Close takes the link away and connects the host as before. It may be called again.
func (l *Link) Close() error {
	for _, p := range l.ports {
		_ = p.Close() // again
	}
	l.run.Wait()
	h := l.host
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	sw := h.lab.netns("switch")
	if _, err := os.Stat(netnsPath(sw)); err != nil {
		return nil // gone with the lab
	}
	there := false
	if err := h.lab.InSwitch(func() error {
		_, err := net.InterfaceByName("port-" + h.Name)
		there = err == nil
		return nil
	}); err != nil || !there {
		return err
	}
	return errors.Join(
		h.lab.ip(ctx, sw, "link del port-"+h.Name, "link set "+h.Name+" arp on master "+lan),
		h.lab.ip(ctx, h.netns, fmt.Sprintf("link set %s gso_max_segs %d", Uplink, 65535)))
}

// closeLinks ends the links that this process has in the lab, whose sockets would
// keep its namespaces alive.
func (l *Lab) closeLinks() error {
	l.mu.Lock()
	links := l.links
	l.links = nil
	l.mu.Unlock()
	var errs []error
	for _, link := range links {
		errs = append(errs, link.Close())
	}
	return errors.Join(errs...)
}

// packetSocket reads and writes the frames of a link of the caller's network
// namespace (packet(7)). Each has a struct virtio_net_hdr before it, which says
// which checksums are still to be made.
func packetSocket(name string) (*os.File, error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	// No protocol yet: nothing is to arrive before it is bound.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, linkBuffer),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, linkBuffer),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}))
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

type frame struct {
	due  time.Time
	text []byte
}

// forward carries frames one way until from is closed.
func (l *Link) forward(from, to *os.File) {
	queue := make(chan frame, linkQueue)
	l.run.Go(func() {
		defer close(queue)
		buf := make([]byte, linkFrame)
		for {
			n, err := from.Read(buf)
			if errors.Is(err, unix.ENETDOWN) {
				continue // the link is cut, which is told once
			}
			if err != nil {
				return
			}
			if rand.Uint64N(1000) < l.loss.Load() {
				continue
			}
			select {
			case queue <- frame{time.Now().Add(time.Duration(l.delay.Load())), append([]byte(nil), buf[:n]...)}:
			default: // full
			}
		}
	})
	l.run.Go(func() {
		for f := range queue {
			if wait := time.Until(f.due); wait > 0 {
				time.Sleep(wait)
			}
			_, _ = to.Write(f.text) // a link that is down loses it
		}
	})
}
