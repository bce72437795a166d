package hypervisor

import (
	"context"
	"sync"

	"belay/agent/maint"
)

// poolSize bounds the control connections. libvirtd serves 20 calls at once
// in all (max_workers), migrations in both directions included.
const poolSize = 4

// pool lends control connections, each to one caller at a time.
type pool struct {
	dial  func(context.Context) (*conn, error)
	slots chan struct{}

	mu     sync.Mutex
	idle   []*conn // most recently used last
	closed bool
}

func newPool(dial func(context.Context) (*conn, error)) *pool {
	return &pool{dial: dial, slots: make(chan struct{}, poolSize)}
}

// get lends a connection: an idle one that still stands, or a new one.
func (p *pool) get(ctx context.Context) (*conn, error) {
	select {
	case p.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, unanswered("connect", "a busy connection", context.Cause(ctx))
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
