package agent

import "sync"

// herald tells whoever waits that something has happened. The zero value is ready.
type herald struct {
	mu sync.Mutex
	ch chan struct{}
}

// next gives a channel that is closed when something happens. Take it before you look.
func (h *herald) next() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ch == nil {
		h.ch = make(chan struct{})
	}
	return h.ch
}

// tell says that it has.
func (h *herald) tell() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ch != nil {
		close(h.ch)
		h.ch = nil
	}
}
