package feed

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"belay/agent/maint"
)

func TestNothingIsLostAndOrderIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const events = 1000
		var hub Hub
		var readers sync.WaitGroup
		for range 3 {
			ch, cancel := hub.Subscribe()
			readers.Go(func() {
				defer cancel()
				for i := range events {
					if ev := <-ch; ev.Name != fmt.Sprint(i) || ev.Time.IsZero() {
						t.Errorf("event %d is %+v", i, ev)
						return
					}
				}
			})
		}
		_, idle := hub.Subscribe() // reads nothing and delays nobody
		for i := range events {
			hub.Publish(maint.Event{Kind: maint.EventLifecycle, Name: fmt.Sprint(i)})
		}
		readers.Wait()
		idle()
	})
}

func TestFirstEventTellsWhetherConnected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var hub Hub
		defer hub.Close()
		first := func() (maint.EventKind, bool) {
			ch, cancel := hub.Subscribe()
			defer cancel()
			synctest.Wait()
			select {
			case ev := <-ch:
				return ev.Kind, true
			default:
				return "", false
			}
		}
		if kind, ok := first(); ok {
			t.Errorf("%s before any connection", kind)
		}
		hub.Publish(maint.Event{Kind: maint.EventResync})
		if kind, _ := first(); kind != maint.EventResync {
			t.Errorf("first event %q while connected", kind)
		}
		hub.Publish(maint.Event{Kind: maint.EventDown})
		if kind, ok := first(); ok {
			t.Errorf("%s while disconnected", kind)
		}
	})
}

func TestEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var hub Hub
		a, cancel := hub.Subscribe()
		b, cancelB := hub.Subscribe()
		hub.Publish(maint.Event{Kind: maint.EventDown}) // undelivered
		cancel()
		cancel()
		for range a {
		}
		hub.Close()
		for range b {
		}
		cancelB()
		c, cancelC := hub.Subscribe()
		cancelC()
		if _, ok := <-c; ok {
			t.Error("an event from a closed hub")
		}
	})
}
