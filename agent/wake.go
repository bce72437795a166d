package agent

import (
	"context"
	"time"

	"belay/agent/maint"
	"belay/notify/board"
)

const (
	// wakeTimeout bounds the call to one guest's agent.
	wakeTimeout = 3 * time.Second
	// wakeAtOnce is how many guests' agents are spoken to at once.
	wakeAtOnce = 4
)

// wake has the guest agent of each guest whose events have changed start a
// program there, for those that would not ask by themselves. It is tried once: what
// comes of it nobody learns.
//
// Source: guest-exec of the QEMU guest agent protocol.
func (s *guestServer) wake(ctx context.Context, program string) {
	known := make(map[string]uint64)
	slots := make(chan struct{}, wakeAtOnce)
	for first := true; ctx.Err() == nil; first = false {
		var woken []string
		changed := s.agent.keeper.See(func(b board.Board) {
			for uuid, n := range b.Incarnations {
				if known[uuid] == n {
					continue
				}
				known[uuid] = n
				if !started(b, uuid) {
					woken = append(woken, uuid)
				}
			}
		})
		for _, uuid := range woken {
			if first || !s.hasAgent(uuid) {
				continue
			}
			slots <- struct{}{}
			go func() {
				defer func() { <-slots }()
				ctx, cancel := context.WithTimeout(ctx, wakeTimeout)
				defer cancel()
				if _, err := s.agent.hyp.AgentCommand(ctx, uuid, "guest-exec", map[string]any{"path": program}); err != nil {
					s.agent.log.Debug("a guest could not be woken for its events", "guest", uuid, "err", err)
				}
			}()
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// started reports whether an event of a guest is under way: it may be paused at any
// moment, and its agent is needed for its clock.
func started(b board.Board, uuid string) bool {
	for _, e := range b.Events {
		if e.State == maint.EventStarted && board.About(e, uuid) {
			return true
		}
	}
	return false
}

// hasAgent reports whether a guest runs with an agent that can be spoken to.
func (s *guestServer) hasAgent(uuid string) bool {
	for _, g := range s.agent.view.last.Load().guests {
		if g.UUID == uuid {
			return g.State == maint.GuestRunning && g.Agent == maint.AgentConnected
		}
	}
	return false
}
