package agent

import (
	"context"
	"crypto/rand"
	"sync"

	"belay/agent/maint"
)

// vigil watches which guests run on this host, so that the source of one that has not come
// can be told so, and of one that has come and gone, too: somebody may have moved it on, by
// hand, before anything was written down of it. The zero value watches nothing yet.
type vigil struct {
	mu  sync.Mutex
	id  string         // of the watch, "" while there is none
	ran map[string]int // how often a guest was seen, by UUID
}

// follow watches until ctx ends. A watch lasts as long as the connection to libvirt on which
// its events come: what happens between two of them nobody sees.
func (v *vigil) follow(ctx context.Context, hyp Follower) {
	events, cancel := hyp.Subscribe()
	defer cancel()
	for {
		select {
		case e, open := <-events:
			if !open {
				return
			}
			v.note(e)
		case <-ctx.Done():
			return
		}
	}
}

func (v *vigil) note(e maint.Event) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case e.Kind == maint.EventDown:
		v.id = ""
	case e.Kind == maint.EventResync:
		v.id, v.ran = rand.Text(), make(map[string]int)
	case e.Kind != maint.EventLifecycle || v.id == "":
	case e.Change == "resumed", e.Change == "suspended", e.Change == "started" && e.Detail != "migrated":
		v.ran[e.UUID]++ // its process is there, stopped, from the beginning of its copy
	}
}

// of tells of one guest.
func (v *vigil) of(uuid string) maint.Vigil {
	v.mu.Lock()
	defer v.mu.Unlock()
	return maint.Vigil{ID: v.id, Ran: v.ran[uuid]}
}
