package agent_test

import (
	"context"
	"errors"
	"net"
	"net/http"
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

// Notice is not waived for no reason.
func TestBlankEmergency(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a", "b")
	a := w.Nodes[0]
	ctx := ctxFor(t, patience)
	a.Host.PutGuest("web-1")
	r := holdAll
	r.Emergency = " "
	_, held := a.Client.Hold(ctx, r)
	_, moved := a.Client.Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: "b", Emergency: "\u00a0"})
	_, replaced := a.Client.Replace(ctx, maint.ReplaceRequest{Guest: "web-1", Emergency: "  "})
	for _, err := range []error{held, moved, replaced} {
		var p *maint.Problem
		if !errors.As(err, &p) || p.Subject != "emergency" {
			t.Errorf("%v", err)
		}
	}
}

// A moment that nobody has picked, as programs write it, is not taken for now.
func TestBookNoMoment(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), telling, "a", "b")
	a := w.Nodes[0]
	ctx := ctxFor(t, patience)
	a.Host.PutGuest("web-1")
	awaitInventory(t, ctx, a, 1)
	if _, err := a.Client.CreateCampaign(ctx, maint.CampaignRequest{ID: "c", Action: maint.CampaignAction{Migrate: &maint.MigrateRequest{To: "b"}}}); err != nil {
		t.Fatal(err)
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", a.Config.API.Socket)
	}
	client := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	answer, err := client.Post("http://belayd/v1/campaigns/c/book", "application/json", strings.NewReader(`{"guest":"web-1","at":"0001-01-01T00:00:00Z"}`))
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if c, err := a.Client.Campaign(ctx, "c"); answer.StatusCode != http.StatusBadRequest || err != nil || stateIn(c, "web-1") != maint.CampaignPending {
		t.Errorf("%s: %+v, %v", answer.Status, c, err)
	}
}
