package agent_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/maint"
)

// What an operation would be refused for is refused when its campaign is created, not
// at a deadline weeks later, and nothing of it is kept.
func TestCampaignsThatCouldNotBegin(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a", "b")
	a := w.Nodes[0]
	ctx := ctxFor(t, patience)
	a.Host.PutGuest("web-1")
	awaitInventory(t, ctx, a, 1)
	move := func(r maint.MigrateRequest) maint.CampaignAction {
		r.To = "b"
		return maint.CampaignAction{Migrate: &r}
	}
	renew := func(r maint.ReplaceRequest) maint.CampaignAction { return maint.CampaignAction{Replace: &r} }
	hold := func(r maint.HoldRequest) maint.CampaignAction {
		r.Step = holdAll.Step
		return maint.CampaignAction{Hold: &r}
	}
	for name, r := range map[string]maint.CampaignRequest{
		"a description of two lines":        {Description: "new\nQEMU", Action: renew(maint.ReplaceRequest{})},
		"a description that moves a cursor": {Description: "\x1b[2Jnew QEMU", Action: move(maint.MigrateRequest{})},
		"a negative time-out":               {Action: move(maint.MigrateRequest{Timeout: -1})},
		"a bandwidth out of range":          {Action: move(maint.MigrateRequest{BandwidthMiBs: 1 << 60})},
		"a method that is none":             {Action: renew(maint.ReplaceRequest{Method: "magic"})},
		"a pause that is negative":          {Action: renew(maint.ReplaceRequest{MaxPause: -1})},
		"a pause out of range":              {Action: hold(maint.HoldRequest{MaxPause: 1 << 62})},
		"an emergency":                      {Action: move(maint.MigrateRequest{Emergency: "now"})},
		"an emergency of a replacement":     {Action: renew(maint.ReplaceRequest{Emergency: "now"})},
		"an emergency of a hold":            {Action: hold(maint.HoldRequest{Emergency: "now"})},
	} {
		r.ID, r.MaxDefers, r.Duration = "c", 3, time.Second
		_, err := a.Client.CreateCampaign(ctx, r)
		var p *maint.Problem
		if !errors.As(err, &p) || p.Code != maint.CodeBadRequest || p.Subject == "" || p.Reason == "" || p.Remedy == "" {
			t.Errorf("%s: %v", name, err)
		}
		if all, err := a.Client.Campaigns(ctx); err != nil || len(all) != 0 {
			t.Fatalf("%s: there are %+v, %v", name, all, err)
		}
	}
	r := maint.CampaignRequest{ID: "c", Description: strings.Repeat("x", 1000), Action: move(maint.MigrateRequest{Reason: "r"})}
	if _, err := a.Client.CreateCampaign(ctx, r); err != nil {
		t.Error(err)
	}
}
