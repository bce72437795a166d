package agent

import (
	"encoding/json"
	"log/slog"
	"testing"
	"time"

	"belay/agent/config"
	"belay/agent/journal"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/notify/board"
)

// A campaign is done with a guest that it was to bring here, and did: also when its
// source is not heard of any more, or somebody else has moved it.
func TestCampaignOfGuestThatIsHere(t *testing.T) {
	w := hypervisortest.NewWorld()
	defer w.Close()
	host := w.AddHost("b", hypervisortest.HostOptions{})
	uuid := host.PutGuest("web-1")
	j, err := journal.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	a := New(config.Config{Host: "b", Events: config.Events{Enabled: true}}, "test", host, j, Preserve{}, nil, slog.New(slog.DiscardHandler))
	a.view.refresh(t.Context())
	arrive := func(id maint.CampaignID, g maint.GuestCampaign) maint.Campaign {
		g.Guest = "web-1"
		c := maint.Campaign{ID: id, Impact: maint.ImpactFreeze, Created: time.Now(), Deadline: time.Now().Add(time.Hour),
			Action: maint.CampaignAction{Migrate: &maint.MigrateRequest{To: "b"}}, Guests: map[string]maint.GuestCampaign{uuid: g}}
		if err := a.keeper.Do(func(b board.Board, now time.Time) (maint.EventChange, error) {
			return b.Adopt(now, maint.GuestEvents{UUID: uuid, Incarnation: 1, Campaigns: []maint.Campaign{c}}), nil
		}); err != nil {
			t.Fatal(err)
		}
		c, err := a.Campaign(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		return a.advance(t.Context(), c, make(map[string]string))
	}
	reserve := func(until time.Time) {
		data, err := json.Marshal(maint.Reservation{Op: "mig-1", From: "a", GuestUUID: uuid, Guest: "web-1", Expires: until})
		if err != nil {
			t.Fatal(err)
		}
		if err := j.Append(maint.Record{Op: "mig-1", Kind: maint.RecReserved, By: "a", Data: data}); err != nil {
			t.Fatal(err)
		}
	}
	reserve(time.Now().Add(time.Minute))
	running := maint.GuestCampaign{State: maint.CampaignRunning, Op: "mig-1", At: time.Now()}
	if c := arrive("one", running); c.Guests[uuid].State != maint.CampaignRunning {
		t.Errorf("its source may still tell, and it is %+v", c)
	}
	reserve(time.Now().Add(-time.Second))
	if c := arrive("one", running); c.Guests[uuid].State != maint.CampaignDone || c.Closed.IsZero() {
		t.Errorf("its source is not heard of any more, and it is %+v", c)
	}
	if c := arrive("two", maint.GuestCampaign{State: maint.CampaignDue, At: time.Now()}); c.Guests[uuid].State != maint.CampaignDone {
		t.Errorf("somebody else has moved it here, and it is %+v", c)
	}
}
