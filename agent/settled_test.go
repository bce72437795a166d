package agent_test

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/maint"
)

// arrived is a guest of b that has come from a, in an operation of a's.
func arrived(t *testing.T, ctx context.Context, b *agenttest.Node) (uuid string, op maint.OpID) {
	t.Helper()
	uuid, op = "10000000-0000-4000-8000-00000000a0a0", "mig-a"
	r := maint.Arrival{Op: op, Guest: "web-1", GuestUUID: uuid, MemoryBytes: 1 << 20, DomainType: "qemu"}
	if _, err := b.Agent.Reserve(ctx, "a", r); err != nil {
		t.Fatal(err)
	}
	b.Host.PutGuest("web-1", func(g *maint.Guest) { g.UUID = uuid })
	return uuid, op
}

// due is a campaign that a guest brings, and in which it is to be begun now.
func due(id maint.CampaignID, uuid string, do maint.CampaignAction) maint.Campaign {
	now := time.Now().UTC().Round(0)
	return maint.Campaign{ID: id, Description: "work", Impact: maint.ImpactFreeze, Created: now, Opens: now, Deadline: now.Add(time.Hour), MaxDefers: 3,
		Guests: map[string]maint.GuestCampaign{uuid: {Guest: "web-1", State: maint.CampaignDue, At: now, By: "guest"}}, Action: do}
}

// A peer may not have this host run a command by sending a campaign with one: only
// who hold.commands_by names may, on this host.
func TestPeersBringNoCommands(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a", "b")
	b := w.Nodes[1]
	ctx := ctxFor(t, patience)
	uuid, op := arrived(t, ctx, b)
	command := due("evil", uuid, maint.CampaignAction{Hold: &maint.HoldRequest{Step: holdAll.Step, MaxPause: holdAll.MaxPause}})
	good := due("good", uuid, maint.CampaignAction{Migrate: &maint.MigrateRequest{To: "a"}})
	good.Guests[uuid] = maint.GuestCampaign{Guest: "web-1", State: maint.CampaignPending, At: good.Deadline}
	for _, by := range []string{"settlement", "note"} {
		s := maint.Settlement{Op: op, GuestUUID: uuid, Persistent: true}
		events := &maint.GuestEvents{UUID: uuid, Incarnation: 7, Campaigns: []maint.Campaign{command, good}}
		if by == "settlement" {
			s.Events = events
		} else {
			text, err := json.Marshal(events)
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Host.SetNote(ctx, uuid, string(text)); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.Agent.Settle(ctx, "a", s); err != nil {
			t.Fatal(err)
		}
		all, err := b.Client.Campaigns(ctx)
		if err != nil || len(all) != 1 || all[0].ID != "good" {
			t.Fatalf("by %s: %+v, %v", by, all, err)
		}
	}
}

// A peer adds nothing to what an operation of this host waits for, and leaves no
// event behind that nobody ends.
func TestPeersAddNoEvents(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a", "b")
	b := w.Nodes[1]
	ctx := ctxFor(t, patience)
	b.Host.PutGuest("db-1")
	r := holdAll
	r.All, r.Guests = false, []string{"db-1"}
	hold, err := b.Client.Hold(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	own := awaitEvents(t, ctx, b, many(1))[0]
	uuid, op := arrived(t, ctx, b)
	brought := func(id maint.EventID, op maint.OpID, state maint.EventState) maint.ScheduledEvent {
		return maint.ScheduledEvent{ID: id, Impact: maint.ImpactFreeze, State: state, Op: op, Guests: []maint.EventGuest{{UUID: uuid, Name: "web-1"}},
			Announced: own.Announced, NotBefore: time.Now().AddDate(1, 0, 0)}
	}
	if err := b.Agent.Settle(ctx, "a", maint.Settlement{Op: op, GuestUUID: uuid, Persistent: true, Events: &maint.GuestEvents{UUID: uuid, Incarnation: 7,
		Events: []maint.ScheduledEvent{brought("waits", hold.ID, maint.EventScheduled), brought("started", hold.ID, maint.EventStarted),
			brought("for ever", "", maint.EventScheduled), brought("mine", op, maint.EventScheduled)}}}); err != nil {
		t.Fatal(err)
	}
	all, err := b.Client.Events(ctx, true)
	if err != nil || len(all) != 2 {
		t.Fatalf("there are %+v, %v", all, err)
	}
	if _, err := b.Client.ApproveEvent(ctx, own.ID, ""); err != nil {
		t.Fatal(err)
	}
	if hold = await(t, ctx, b, hold.ID); hold.Outcome != maint.OutcomeDone {
		t.Errorf("%s: %+v", hold.Outcome, hold.Problems)
	}
}
