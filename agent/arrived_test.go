package agent_test

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/journal"
	"belay/agent/maint"
	"belay/patch/preserve/preservetest"
)

// A guest that has come, and whose old host died before it could settle it, is seen to
// when the room that was promised to it has lapsed.
func TestSeenToUnsettled(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	b := w.Nodes[1]
	uuid := b.Host.PutGuest("web-1")
	b.Stop()
	promised := map[maint.OpID]maint.Reservation{
		"mig-lapsed": {From: "a", GuestUUID: uuid, Guest: "web-1", Expires: time.Now().Add(-time.Second)},
		"mig-alive":  {From: "a", GuestUUID: uuid, Guest: "web-1", Expires: time.Now().Add(time.Hour)},
		"mig-failed": {From: "a", GuestUUID: "30000000-0000-4000-8000-000000000009", Guest: "web-9", Expires: time.Now().Add(-time.Second)},
	}
	j, err := journal.Open(b.Config.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	for id, r := range promised {
		r.Op = id
		data, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := j.Append(maint.Record{Op: id, Kind: maint.RecReserved, Data: data}); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	b.Start(nil)
	ctx := ctxFor(t, patience)
	for {
		r, err := peerOf(t, b, "a").Arrival(ctx, "mig-lapsed")
		if err == nil {
			if r.Clock.State != maint.ClockSynchronised || r.Clock.UUID != uuid {
				t.Errorf("it was seen to by %+v", r)
			}
			break
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal(err)
		}
	}
	for _, id := range []maint.OpID{"mig-alive", "mig-failed", "mig-unknown"} {
		if r, err := peerOf(t, b, "a").Arrival(ctx, id); err == nil {
			t.Errorf("%s was seen to by %+v", id, r)
		}
	}
}

// A peer is told of guests only that have come from it.
func TestArrivalIsOfItsSource(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b", "c")
	w.Nodes[0].Host.PutGuest("web-1")
	op := move(t, w)
	ctx := ctxFor(t, patience)
	awaitArrival(t, ctx, w.Nodes[0], op.ID)
	if _, err := peerOf(t, w.Nodes[1], "a").Arrival(ctx, op.ID); err != nil {
		t.Error(err)
	}
	if r, err := peerOf(t, w.Nodes[1], "c").Arrival(ctx, op.ID); err == nil {
		t.Errorf("c was told of a guest of a's: %+v", r)
	}
}

// A new host that is taken out of the configuration meanwhile cannot be asked: that
// is written down, once.
func TestArrivalNotHeardOf(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a, b := w.Nodes[0], w.Nodes[1]
	a.Host.PutGuest("web-1")
	b.Stop()
	b.Clocks = slowClocks{}
	b.Start(nil)
	op := move(t, w)
	a.Stop()
	delete(a.Config.Peers, "b")
	a.Start(nil)
	ctx := ctxFor(t, patience)
	if r := awaitArrival(t, ctx, a, op.ID); r.Clock.State != maint.ClockUnsynchronised || r.Clock.Reason == "" {
		t.Errorf("it says %+v", r)
	}
}

// slowClocks are of guests whose agents do not answer.
type slowClocks struct{ preservetest.Clocks }

func (slowClocks) Restore(ctx context.Context, g maint.Guest, _ time.Duration) maint.ClockReport {
	<-ctx.Done()
	return maint.ClockReport{Guest: g.Name, UUID: g.UUID, State: maint.ClockUnsynchronised}
}
