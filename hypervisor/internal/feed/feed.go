// Package feed hands events to any number of subscribers without losing any.
package feed

import (
	"sync"
	"time"

	"belay/agent/maint"
)

// Hub hands each event to every subscriber. A slow subscriber delays nobody
// and loses nothing: its queue grows. The zero value is ready.
type Hub struct {
	mu        sync.Mutex
	subs      map[*subscriber]struct{}
	connected bool // the last of EventResync and EventDown was EventResync
	closed    bool
}

// Subscribe gives all events from now on, beginning with EventResync if the
// hub is connected. cancel closes the channel and may be called repeatedly.
func (b *Hub) Subscribe() (events <-chan maint.Event, cancel func()) {
	s := &subscriber{
		wake: make(chan struct{}, 1),
		stop: make(chan struct{}),
		out:  make(chan maint.Event),
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		close(s.out)
		return s.out, func() {}
	}
	if b.subs == nil {
		b.subs = make(map[*subscriber]struct{})
	}
	b.subs[s] = struct{}{}
	if b.connected {
		s.push(maint.Event{Kind: maint.EventResync, Time: time.Now()})
	}
	go s.deliver()
	return s.out, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.drop(s)
	}
}

// drop ends a subscription. The caller holds b.mu.
func (b *Hub) drop(s *subscriber) {
	if _, ok := b.subs[s]; ok {
		delete(b.subs, s)
		close(s.stop)
	}
}

// Publish stamps ev with the time and hands it to every subscriber.
func (b *Hub) Publish(ev maint.Event) {
	ev.Time = time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	switch ev.Kind {
	case maint.EventResync:
		b.connected = true
	case maint.EventDown:
		b.connected = false
	}
	for s := range b.subs {
		s.push(ev)
	}
}

// Close ends all subscriptions; later ones get a closed channel.
func (b *Hub) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for s := range b.subs {
		b.drop(s)
	}
}

// subscriber is one subscription: an unbounded queue and a goroutine that
// empties it.
type subscriber struct {
	mu    sync.Mutex
	queue []maint.Event
	wake  chan struct{} // capacity 1: the queue has grown
	stop  chan struct{}
	out   chan maint.Event
}

func (s *subscriber) push(ev maint.Event) {
	s.mu.Lock()
	s.queue = append(s.queue, ev)
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *subscriber) take() []maint.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	batch := s.queue
	s.queue = nil
	return batch
}

func (s *subscriber) deliver() {
	defer close(s.out)
	for {
		for _, ev := range s.take() {
			select {
			case s.out <- ev:
			case <-s.stop:
				return
			}
		}
		// A push after take has left its mark in wake.
		select {
		case <-s.wake:
		case <-s.stop:
			return
		}
	}
}
