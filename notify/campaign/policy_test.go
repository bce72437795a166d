package campaign_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/notify/campaign"
)

func TestFits(t *testing.T) {
	// Each is more than the one before.
	order := []maint.Impact{"", maint.ImpactFreeze, maint.ImpactReboot, maint.ImpactRedeploy, maint.ImpactPreempt, maint.ImpactTerminate}
	for n, announced := range order {
		for m, actual := range order {
			if got := campaign.Fits(announced, actual); got != (m <= n) {
				t.Errorf("announced %q, is %q: %t", announced, actual, got)
			}
		}
		if campaign.Fits(announced, "Nap") || campaign.Fits("Nap", announced) {
			t.Errorf("an impact that nobody knows fits %q", announced)
		}
	}
}

func TestPartition(t *testing.T) {
	guests := []maint.EventGuest{{UUID: "1", Name: "a1"}, {UUID: "2", Name: "b1"}, {UUID: "3", Name: "?1"}, {UUID: "4", Name: "a2"}, {UUID: "5", Name: "?2"}}
	owner := func(uuid string) string { return map[string]string{"1": "ann", "2": "bob", "4": "ann"}[uuid] }
	for policy, want := range map[maint.Policy]string{
		maint.PolicyAll:       "[a1] [b1] [?1] [a2] [?2]",
		"":                    "[a1] [b1] [?1] [a2] [?2]",
		maint.PolicyAny:       "[a1 a2] [b1] [?1] [?2]",
		maint.PolicyHostOwner: "[a1 a2] [b1] [?1] [?2]",
	} {
		var got []string
		for _, event := range campaign.Partition(guests, owner, policy) {
			var names []string
			for _, g := range event {
				names = append(names, g.Name)
			}
			got = append(got, fmt.Sprint(names))
		}
		if got := strings.Join(got, " "); got != want {
			t.Errorf("%q: got %s, want %s", policy, got, want)
		}
	}
	if got := campaign.Partition(nil, owner, maint.PolicyAll); len(got) != 0 {
		t.Errorf("no guests make %v", got)
	}
}

func TestNotBefore(t *testing.T) {
	deadline := start.Add(10 * day)
	for _, c := range []struct {
		policy    maint.Policy
		impact    maint.Impact
		duration  time.Duration
		announced time.Time
		want      time.Time
	}{
		{maint.PolicyAll, maint.ImpactFreeze, time.Second, start, start.Add(15 * time.Minute)},
		{maint.PolicyAny, maint.ImpactRedeploy, time.Second, start, start.Add(10 * time.Minute)},
		{maint.PolicyHostOwner, maint.ImpactFreeze, time.Second, start, deadline},
		{maint.PolicyHostOwner, maint.ImpactFreeze, maint.DurationUnknown, start, deadline},
		{maint.PolicyHostOwner, maint.ImpactFreeze, 0, start, start.Add(15 * time.Minute)},
		{maint.PolicyHostOwner, maint.ImpactFreeze, time.Second, deadline, deadline.Add(15 * time.Minute)},
	} {
		if got := campaign.NotBefore(c.policy, c.impact, c.duration, c.announced, deadline); !got.Equal(c.want) {
			t.Errorf("%v: got %s", c, got)
		}
	}
}
