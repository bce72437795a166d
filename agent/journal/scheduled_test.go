package journal

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"belay/agent/maint"
)

// Whatever is scheduled, ends, goes and comes back, and is pruned meanwhile: what a
// reopened journal folds is what the live one had, and nothing that is still so is
// lost.
func TestScheduledSurvives(t *testing.T) {
	base := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(base, "j")
		if err != nil {
			rt.Fatal(err)
		}
		j, err := Open(dir)
		if err != nil {
			rt.Fatal(err)
		}
		now := time.Now().UTC().Round(0)
		want := maint.NewScheduled()
		some := func(what string) string { return fmt.Sprint(what, rapid.IntRange(0, 2).Draw(rt, what)) }
		for range rapid.IntRange(1, 30).Draw(rt, "n") {
			var c maint.EventChange
			switch rapid.IntRange(0, 7).Draw(rt, "kind") {
			case 0:
				c.Events = []maint.ScheduledEvent{{ID: maint.EventID(some("e")), State: maint.EventScheduled, Announced: now}}
				c.Incarnations = map[string]uint64{some("g"): rapid.Uint64Range(1, 100).Draw(rt, "incarnation")}
			case 1:
				c.Events = []maint.ScheduledEvent{{ID: maint.EventID(some("e")), State: maint.EventCompleted, Ended: now}}
			case 2:
				c.Gone = []maint.EventID{maint.EventID(some("e"))}
			case 3:
				c.GuestsGone = []string{some("g")}
			case 4:
				c.Listeners = map[string][]maint.Listener{some("g"): {{Name: some("l")}}}
			case 5:
				c.Listeners = map[string][]maint.Listener{some("g"): nil}
			case 6:
				c.Campaigns = []maint.Campaign{{ID: maint.CampaignID(some("c")), Created: now, Guests: map[string]maint.GuestCampaign{some("g"): {Guest: "x"}}}}
				if rapid.Bool().Draw(rt, "closed") {
					c.Campaigns[0].Closed = now
				}
			}
			if id := maint.CampaignID("c1"); c.Empty() && want.Campaigns[id].ID == id { // 7
				c.CampaignGuests = map[maint.CampaignID]map[string]maint.GuestCampaign{id: {some("g"): {Defers: rapid.IntRange(1, 9).Draw(rt, "defers")}}}
			}
			if err := j.Append(maint.Record{Kind: maint.RecEvent, Data: data(c)}); err != nil {
				rt.Fatal(err)
			}
			want.Fold(c)
			if rapid.IntRange(0, 5).Draw(rt, "prune") == 0 {
				if _, err := j.Prune(time.Now().Add(time.Minute)); err != nil {
					rt.Fatal(err)
				}
				for id, e := range want.Events {
					if e.State.Over() {
						delete(want.Events, id)
					}
				}
				for id, k := range want.Campaigns {
					if !k.Closed.IsZero() {
						delete(want.Campaigns, id)
					}
				}
			}
		}
		if d := cmp.Diff(want, j.Scheduled()); d != "" {
			rt.Fatalf("live (-want +is):\n%s", d)
		}
		j.Close()
		if j, err = Open(dir); err != nil {
			rt.Fatal(err)
		}
		defer j.Close()
		if d := cmp.Diff(want, j.Scheduled()); d != "" {
			rt.Fatalf("reopened (-want +is):\n%s", d)
		}
		// What is left is no more than there is to know.
		if _, err := j.Prune(time.Now().Add(time.Minute)); err != nil {
			rt.Fatal(err)
		}
		recs, err := j.Records("")
		if err != nil || len(recs) > 3+3+3+3 {
			rt.Fatalf("%d records are left, %v", len(recs), err)
		}
	})
}

func TestPruneKeepsWhatIsNew(t *testing.T) {
	j := open(t, t.TempDir())
	e := maint.ScheduledEvent{ID: "e", State: maint.EventCompleted, Ended: time.Now()}
	if err := j.Append(maint.Record{Kind: maint.RecEvent, Data: data(maint.EventChange{Events: []maint.ScheduledEvent{e}})}); err != nil {
		t.Fatal(err)
	}
	if n, err := j.Prune(time.Now().Add(-time.Hour)); n != 0 || err != nil {
		t.Errorf("pruned %d, %v", n, err)
	}
	if len(j.Scheduled().Events) != 1 {
		t.Error("the event is forgotten")
	}
	if err := j.Append(maint.Record{Kind: maint.RecEvent, Data: []byte(`{"events":7}`)}); err == nil {
		t.Error("what cannot be read was written")
	}
}
