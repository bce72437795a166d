package hypervisor

import (
	"context"
	"sync"

	"belay/agent/maint"
)

// How many connections the pools have. libvirtd serves 20 calls at once in all
// (max_workers), migrations in both directions included. The fan may use all of
// them: its calls are short, and come when many guests are held at once. It has a
// few connections more, for those that come while guests' agents are waited for.
const (
	poolSize = 4
	fanSize  = 24
)

// pool lends control connections, each to one caller at a time.
type pool struct {
	dial  func(context.Context) (*conn, error)
	slots chan struct{}

	mu     sync.Mutex
	idle   []*conn // most recently used last
	closed bool
}

func newPool(size int, dial func(context.Context) (*conn, error)) *pool {
	return &pool{dial: dial, slots: make(chan struct{}, size)}
}

// warm opens connections until n stand, or as many as the pool may have. check
// tells of each whether it does: who is idle may not have noticed its end.
func (p *pool) warm(ctx context.Context, n int, check func(context.Context, *conn) error) error {
	held := make([]*conn, 0, cap(p.slots))
	defer func() {
		for _, c := range held {
			p.put(c)
		}
	}()
	for dead := 0; len(held) < min(n, cap(p.slots)); {
		c, err := p.get(ctx)
		if err != nil {
			return err
		}
		if err = check(ctx, c); err == nil {
			held = append(held, c)
			continue
		}
		c.close()
		p.put(c)
		if dead++; dead > cap(p.slots) { // this one was new
			return err
		}
	}
	return nil
}

// get lends a connection: an idle one that still stands, or a new one.
func (p *pool) get(ctx context.Context) (*conn, error) {
	select {
	case p.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, gaveUp("connect", "a busy connection", context.Cause(ctx))
	}
	c, err := p.take()
	if c == nil && err == nil {
		c, err = p.dial(ctx)
	}
	if err != nil {
		<-p.slots
		return nil, err
	}
	return c, nil
}

// take returns an idle connection, or nil if there is none.
func (p *pool) take() (*conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, NewError("connect", "a closed Host", 0, "closed", maint.ErrHypervisorDown)
	}
	for len(p.idle) > 0 {
		c := p.idle[len(p.idle)-1]
		p.idle = p.idle[:len(p.idle)-1]
		if !c.unusable() {
			return c, nil
		}
		c.close()
	}
	return nil, nil
}

// put takes a connection back.
func (p *pool) put(c *conn) {
	p.mu.Lock()
	if p.closed || c.unusable() {
		c.close()
	} else {
		p.idle = append(p.idle, c)
	}
	p.mu.Unlock()
	<-p.slots
}

// forget gives up the place of a lent connection, which is not to come back.
func (p *pool) forget() { <-p.slots }

// close closes the idle connections; lent ones follow as they come back.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, c := range p.idle {
		c.close()
	}
	p.idle = nil
}
