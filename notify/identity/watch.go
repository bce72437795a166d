package identity

import (
	"bytes"
	"fmt"
	"net"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// subscribe asks the kernel to tell of devices until done.
func (g *Gate) subscribe(done <-chan struct{}) (<-chan netlink.LinkUpdate, error) {
	updates, ns := make(chan netlink.LinkUpdate), g.away()
	err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{
		Namespace:              &ns,
		ErrorCallback:          func(error) {}, // the channel is closed
		ReceiveBufferSize:      4 << 20,
		ReceiveBufferForceSize: true,
	})
	if err != nil {
		return nil, fmt.Errorf("cannot watch network devices: %w", err)
	}
	return updates, nil
}

// watch follows what becomes of taps and bridges, until g.stop. It ends by itself
// when it can no longer, and then no port is known.
func (g *Gate) watch() error {
	stopped := make(chan struct{})
	updates, err := g.subscribe(stopped)
	if err != nil {
		return err
	}
	done := make(chan struct{})
	g.stop, g.done = sync.OnceFunc(func() { close(stopped) }), done
	go func() {
		defer close(done)
		for {
			for u := range updates {
				g.follow(u)
			}
			select {
			case <-stopped:
				return
			default:
			}
			// Something was missed: look at all there is. Where that cannot be
			// had, a device can be another's by now.
			var err error
			if updates, err = g.subscribe(stopped); err != nil {
				g.renew("network devices cannot be followed: no guest is known until ports are set", func(tap) bool { return false })
				return
			}
			g.renew("changes of network devices were missed", func(tap) bool { return true })
		}
	}()
	return nil
}

// follow does what a change of a device asks for. The bridge's own view of its
// ports (AF_BRIDGE) says nothing of who they are.
func (g *Gate) follow(u netlink.LinkUpdate) {
	if u.IfInfomsg.Family == unix.AF_BRIDGE {
		return
	}
	g.change.Lock()
	index := int(u.Index)
	tapGone := u.Header.Type == unix.RTM_DELLINK && slices.ContainsFunc(g.taps, func(t tap) bool { return t.Ifindex == index })
	b, isBridge := g.bridges[index]
	a := u.Attrs()
	changed := isBridge && (u.Header.Type == unix.RTM_DELLINK || b.up != (a.Flags&net.FlagUp != 0) || !bytes.Equal(b.mac, a.HardwareAddr))
	g.change.Unlock()
	switch {
	case tapGone:
		g.renew("a tap has gone", func(t tap) bool { return t.Ifindex != index })
	case changed:
		g.renew("a bridge has changed", func(tap) bool { return true })
	}
}

// renew sets again the ports that are to be kept and are there.
func (g *Gate) renew(why string, keep func(tap) bool) {
	g.change.Lock()
	defer g.change.Unlock()
	g.retain(keep)
	var ports []Port
	for _, t := range g.taps {
		ports = append(ports, t.Port)
	}
	if err := g.apply(ports); err != nil {
		g.log.Warn("the rules of guests are not as they should be: "+why, "err", err)
	} else {
		g.log.Debug("the rules of guests are made anew: " + why)
	}
}
