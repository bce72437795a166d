package hypervisor

import (
	"context"
	"time"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// How long Run waits between attempts to connect: doubled each time.
const (
	backoffMin = 100 * time.Millisecond
	backoffMax = 5 * time.Second
)

// Subscribe gives all events from now on. When the connection to libvirt
// stands, the first is EventResync. EventDown is sent when the connection is
// lost, EventResync when it is back and events flow again: what happened in
// between must be found by listing. The lifecycle events of a domain come in
// libvirt's order; between agent and lifecycle events there is none.
//
// cancel ends the subscription and closes the channel; it may be called more
// than once. Close does the same for all. Events flow while Run runs.
func (h *Host) Subscribe() (events <-chan maint.Event, cancel func()) {
	return h.hub.Subscribe()
}

// Run keeps the events connection until ctx ends or the Host is closed, and
// then returns nil. A lost connection is replaced, for as long as it takes. Run
// it once.
func (h *Host) Run(ctx context.Context) error {
	ctx, cancel := h.untilClosed(ctx)
	defer cancel()
	wait, down := backoffMin, false
	for {
		connected, err := h.pump(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if connected {
			wait, down = backoffMin, false
		}
		if !down { // once per outage, not per attempt
			h.log.Warn("no events from libvirt", "err", err)
			down = true
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
		wait = min(2*wait, backoffMax)
	}
}

// pump publishes the events of one connection until it is lost. connected
// says whether any could have been.
func (h *Host) pump(ctx context.Context) (connected bool, err error) {
	open, cancel := context.WithTimeout(ctx, h.timeout)
	defer cancel()
	c, err := h.dial(open)
	if err != nil {
		return false, err
	}
	h.fixed.Store(nil) // this may be another libvirt than before
	subs, unsubscribe := context.WithCancel(context.Background())
	var (
		life                  <-chan libvirt.DomainEventLifecycleMsg
		agent, added, removed <-chan any
	)
	// The order matters: go-libvirt's relays may be cancelled only when its
	// reader is gone, or the two can block each other; and they end only
	// when what they still hold is taken off them.
	defer func() {
		c.close()
		<-c.wire.lost
		unsubscribe()
		if life != nil {
			for range life {
			}
		}
		for _, some := range []<-chan any{agent, added, removed} {
			if some != nil {
				for range some {
				}
			}
		}
	}()
	life, err = invoke(open, c, "ConnectDomainEventRegisterAny(lifecycle)",
		func(l *libvirt.Libvirt) (<-chan libvirt.DomainEventLifecycleMsg, error) {
			return l.LifecycleEvents(subs)
		})
	if err != nil {
		return false, err
	}
	for name, e := range map[string]struct {
		id   libvirt.DomainEventID
		into *<-chan any
	}{
		"agent":          {libvirt.DomainEventIDAgentLifecycle, &agent},
		"device added":   {libvirt.DomainEventIDDeviceAdded, &added},
		"device removed": {libvirt.DomainEventIDDeviceRemoved, &removed},
	} {
		*e.into, err = invoke(open, c, "ConnectDomainEventRegisterAny("+name+")", func(l *libvirt.Libvirt) (<-chan any, error) {
			return l.SubscribeEvents(subs, e.id, nil)
		})
		if err != nil {
			return false, err
		}
	}

	h.hub.Publish(maint.Event{Kind: maint.EventResync})
	defer func() { h.hub.Publish(maint.Event{Kind: maint.EventDown}) }()
	h.log.Info("receiving events from libvirt", "socket", c.socket)
	for {
		select {
		case msg, ok := <-life:
			if !ok {
				return true, NewError("events", c.socket, 0, "connection lost", maint.ErrHypervisorDown)
			}
			h.hub.Publish(lifecycleEvent(msg))
		case msg, ok := <-agent:
			if !ok {
				return true, NewError("events", c.socket, 0, "connection lost", maint.ErrHypervisorDown)
			}
			if m, ok := msg.(*libvirt.DomainEventCallbackAgentLifecycleMsg); ok {
				h.hub.Publish(agentEvent(m))
			}
		case msg, ok := <-added:
			if !ok {
				return true, NewError("events", c.socket, 0, "connection lost", maint.ErrHypervisorDown)
			}
			if m, ok := msg.(*libvirt.DomainEventCallbackDeviceAddedMsg); ok {
				h.hub.Publish(deviceEvent(m.Dom, "added", m.DevAlias))
			}
		case msg, ok := <-removed:
			if !ok {
				return true, NewError("events", c.socket, 0, "connection lost", maint.ErrHypervisorDown)
			}
			if m, ok := msg.(*libvirt.DomainEventCallbackDeviceRemovedMsg); ok {
				h.hub.Publish(deviceEvent(m.Msg.Dom, "removed", m.Msg.DevAlias))
			}
		case <-ctx.Done():
			return true, ctx.Err()
		}
	}
}

func deviceEvent(d libvirt.Domain, change, alias string) maint.Event {
	return maint.Event{Kind: maint.EventDevice, UUID: formatUUID(d.UUID), Name: d.Name, Change: change, Detail: alias}
}

func lifecycleEvent(msg libvirt.DomainEventLifecycleMsg) maint.Event {
	change, detail := lifecycleWords(msg.Event, msg.Detail)
	return maint.Event{
		Kind: maint.EventLifecycle,
		UUID: formatUUID(msg.Dom.UUID), Name: msg.Dom.Name,
		Change: change, Detail: detail,
	}
}

func agentEvent(msg *libvirt.DomainEventCallbackAgentLifecycleMsg) maint.Event {
	return maint.Event{
		Kind: maint.EventAgent,
		UUID: formatUUID(msg.Dom.UUID), Name: msg.Dom.Name,
		Change: agentChange(msg.State), Detail: agentReason(msg.Reason),
	}
}
