package agent

import (
	"fmt"
	"sync"

	"golang.org/x/time/rate"

	"belay/agent/maint"
)

// What a peer asks for is in this host's journal before it is answered, and stays there for
// as long as history is kept: a peer that has gone wild must not fill the disk with it. The
// bounds are far above what migrations need, which take seconds each.
const (
	// paceBurst is how much a peer may have written down at once, and paceEvery is how
	// often once more after that, per second.
	paceBurst = 240
	paceEvery = 2
)

// pace bounds how often each peer has something written down here. The zero value is ready.
type pace struct {
	mu    sync.Mutex
	peers map[string]*rate.Limiter
}

// refuse takes one turn of a peer's, or says that it has none left.
func (p *pace) refuse(host, from string) *maint.Problem {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.peers == nil {
		p.peers = make(map[string]*rate.Limiter) // of configured peers, who alone get here
	}
	l := p.peers[from]
	if l == nil {
		l = rate.NewLimiter(paceEvery, paceBurst)
		p.peers[from] = l
	}
	if l.Allow() {
		return nil
	}
	return maint.Problemf(maint.CodeHostBusy, "host "+host, fmt.Sprintf("find out on %s why it asks so often, and ask again in a while", from),
		"%s has asked it for more than %d things to be written down, and more than %d a second since", from, paceBurst, paceEvery)
}
