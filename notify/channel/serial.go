package channel

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"syscall"
	"time"

	"belay/notify/channel/wire"
)

const (
	dialFirst = 250 * time.Millisecond
	dialMost  = 5 * time.Second
	// sessionPause is between a guest's sessions: one that begins them without
	// end does not keep the host busy.
	sessionPause = 200 * time.Millisecond
)

// Connect serves the guest that is behind a virtio-serial channel's socket until
// ctx ends. The socket, the guest and belay-guest in it may come and go. What
// the guest has open is closed when Connect returns.
func (l *Listener) Connect(ctx context.Context, guest, socket string) {
	var d net.Dialer
	said := false
	for wait := dialFirst; ctx.Err() == nil; wait = min(2*wait, dialMost) {
		t, err := d.DialContext(ctx, "unix", socket)
		switch {
		case err == nil:
			begun := time.Now()
			err = l.attend(ctx, guest, t)
			l.log.Debug("a guest's virtio-serial channel has ended", "guest", guest, "err", err)
			if time.Since(begun) > dialMost {
				wait = dialFirst
			}
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED): // the guest is off
		case ctx.Err() == nil && !said:
			l.log.Warn("cannot connect to a guest's virtio-serial channel; it goes on being tried", "guest", guest, "err", err)
			said = true
		}
		pause(ctx, wait)
	}
}

// attend serves the guest for as long as there is a QEMU.
func (l *Listener) attend(ctx context.Context, guest string, t net.Conn) error {
	defer t.Close()
	defer context.AfterFunc(ctx, func() { t.Close() })()
	for p := wire.NewPort(t); ; pause(ctx, sessionPause) {
		s, err := p.Accept()
		if err != nil {
			return err
		}
		for {
			c, err := s.Accept()
			if err != nil {
				l.log.Debug("a guest's session is over", "guest", guest, "err", err)
				break
			}
			l.offer(&conn{Conn: c, l: l, guest: guest})
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
