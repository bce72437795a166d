package channel

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"syscall"
	"time"

	"golang.org/x/time/rate"

	"belay/notify/channel/wire"
)

const (
	dialFirst = 250 * time.Millisecond
	dialMost  = 5 * time.Second
	// sessionPause is between a guest's sessions: one that begins them without
	// end does not keep the host busy.
	sessionPause = 200 * time.Millisecond
	// mostRead is how much is read of what a guest sends, bytes a second, and
	// burstRead as much at once: many times what its requests need, and so little
	// that one which sends without end does not keep the host busy.
	mostRead  = 1 << 20
	burstRead = 1 << 18
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
	for p := wire.NewPort(paced{t, ctx, rate.NewLimiter(mostRead, burstRead)}); ; pause(ctx, sessionPause) {
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

// paced is a transport of which no more is read than the limit allows.
type paced struct {
	net.Conn
	ctx   context.Context
	limit *rate.Limiter
}

func (c paced) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p[:min(len(p), c.limit.Burst())])
	_ = c.limit.WaitN(c.ctx, n) // when ctx ends so does the transport
	return n, err
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
