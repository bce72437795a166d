package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"belay/notify/channel/wire"
)

// dialTimeout is how long a program waits for a way to the host.
const dialTimeout = 10 * time.Second

// forward carries connections until ctx ends. Those beyond what the host takes
// from a guest wait for their turn in the kernel.
func forward(ctx context.Context, l net.Listener, w way, log *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cancel()
	parts.Go(func() { w.run(ctx, log) })
	defer context.AfterFunc(ctx, func() { l.Close() })()
	turns := make(chan struct{}, wire.MaxStreams)
	for {
		turns <- struct{}{}
		c, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil
		case err != nil: // too many files are open, say: that passes
			log.Warn("cannot take a connection", "err", err)
			<-turns
			time.Sleep(time.Second)
			continue
		}
		parts.Go(func() {
			defer func() { <-turns }()
			if err := carry(ctx, c.(*net.TCPConn), w); err != nil {
				log.Warn("cannot forward a connection", "from", c.RemoteAddr(), "err", err)
			}
		})
	}
}

// carry carries one connection both ways.
func carry(ctx context.Context, c *net.TCPConn, w way) error {
	defer c.Close()
	dialing, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	host, err := w.dial(dialing)
	if err != nil {
		return fmt.Errorf("cannot reach belayd by %s: %w", w, err)
	}
	defer host.Close()
	defer context.AfterFunc(ctx, func() { c.Close(); host.Close() })()
	var asking sync.WaitGroup
	asking.Go(func() {
		if _, err := io.Copy(host, c); err != nil {
			host.Close() // the program is gone, or the host reads no more
			return
		}
		host.CloseWrite() // the program may still read the answer
	})
	io.Copy(c, host) // whatever ends it, no more answers come
	c.Close()
	asking.Wait()
	return nil
}
