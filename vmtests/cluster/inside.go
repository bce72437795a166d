package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"belay/agent/maint"
	"belay/vmtests/guest"
)

// EventsInside is what a guest of the node is shown of its scheduled events, asked from
// inside the guest.
func (n *Node) EventsInside(ctx context.Context, name string) (d guest.ScheduledEvents, err error) {
	text, err := guest.Metadata(ctx, n, name, guest.EventsPath, "")
	if err == nil {
		err = json.Unmarshal([]byte(text), &d)
	}
	if err != nil {
		return d, fmt.Errorf("guest %s on %s is not shown its events: %w", name, n.Name, err)
	}
	return d, nil
}

// eventsPatience is how long a guest may take to be shown an event: one that has just
// arrived, or whose belayd has just started, is not known at once.
const eventsPatience = time.Minute

// AwaitEventInside asks from inside a guest until it is shown an event, the first.
func (n *Node) AwaitEventInside(ctx context.Context, name string) (guest.ScheduledEvent, error) {
	ctx, cancel := context.WithTimeout(ctx, eventsPatience)
	defer cancel()
	for {
		d, err := n.EventsInside(ctx, name)
		if err == nil && len(d.Events) > 0 {
			return d.Events[0], nil
		}
		select {
		case <-time.After(arrivalPoll):
		case <-ctx.Done():
			return guest.ScheduledEvent{}, fmt.Errorf("guest %s on %s is shown no event: %w, %w", name, n.Name, ctx.Err(), err)
		}
	}
}

// ApproveInside approves an event from inside a guest. That can be on its way to another
// QEMU before its agent tells how that went: then the host's record counts.
func (n *Node) ApproveInside(ctx context.Context, name, event string) error {
	_, err := guest.Metadata(ctx, n, name, guest.EventsPath, guest.Approval(event))
	if err == nil {
		return nil
	}
	if e, _ := n.Client().Event(ctx, maint.EventID(event)); e.Approval != nil && e.Approval.By == "guest "+name {
		return nil
	}
	return err
}
