package agent_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent"
	"belay/agent/config"
	"belay/agent/journal"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// TestSlyPeer: what a peer once reserved gives it no hold on what comes later
// from elsewhere, and no operation can be taken for another.
func TestSlyPeer(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := hypervisortest.NewWorld()
		defer w.Close()
		j, err := journal.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		if err := j.Append(maint.Record{Op: "mig-own", Kind: maint.RecAccepted, Data: []byte(`{"guest":"db-1"}`)},
			maint.Record{Op: "mig-own", Kind: maint.RecEnded, Data: []byte(`{"outcome":"done"}`)}); err != nil {
			t.Fatal(err)
		}
		host := w.AddHost("b", hypervisortest.HostOptions{})
		cfg := config.Config{Host: "b", StateDir: dir, Limits: config.Limits{MigrationsIn: 4}, Journal: config.Journal{Keep: config.Duration{Duration: time.Hour}}}
		a := agent.New(cfg, "test", host, j, agent.Preserve{}, nil, quiet(t))
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); _ = a.Run(ctx) }()
		defer func() { stop(); <-ended }()

		refused := func(what string, code maint.Code, err error) {
			t.Helper()
			var p *maint.Problem
			if !errors.As(err, &p) || p.Code != code {
				t.Errorf("%s: %v", what, err)
			}
		}
		arrival := func(op maint.OpID) maint.Arrival {
			return maint.Arrival{Op: op, Guest: "web-1", GuestUUID: "10000000-0000-4000-8000-000000000001", MemoryBytes: 1 << 20, DomainType: "qemu"}
		}
		refused("the ID of an operation of this host", maint.CodeForbidden, errOf(a.Reserve(ctx, "sly", arrival("mig-own"))))
		for _, name := range []string{strings.Repeat("x", 256), "web\n-1", "\x1b[2J"} {
			r := arrival("mig-x")
			r.Guest = name
			refused("a guest named "+name, maint.CodeBadRequest, errOf(a.Reserve(ctx, "sly", r)))
		}

		// It reserves for a guest that is not its own, and lets that lapse.
		if _, err := a.Reserve(ctx, "sly", arrival("mig-sly")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		other := arrival("mig-sly")
		other.GuestUUID = "10000000-0000-4000-8000-000000000002"
		refused("the ID of a lapsed reservation of another", maint.CodeForbidden, errOf(a.Reserve(ctx, "a", other)))
		if _, err := a.Reserve(ctx, "a", arrival("mig-a")); err != nil {
			t.Fatal(err)
		}
		uuid := host.PutGuest("web-1", func(g *maint.Guest) { g.UUID, g.Persistent = arrival("").GuestUUID, false })
		settlement := maint.Settlement{Op: "mig-sly", GuestUUID: uuid, Autostart: true, Persistent: true}
		refused("settling with a lapsed reservation, after the guest has come from elsewhere", maint.CodeForbidden, a.Settle(ctx, "sly", settlement))
		for _, end := range []bool{false, true} {
			q := maint.Connections{End: end}
			refused("the connections of another's guest", maint.CodeForbidden, a.Connections(ctx, "sly", "mig-a", q))
			refused("the connections of a guest that has come", maint.CodeFailed, a.Connections(ctx, "a", "mig-a", q))
		}

		// libvirt takes the first uuid, and none that is in a namespace.
		const victim = "10000000-0000-4000-8000-00000000beef"
		settlement.Op = "mig-a"
		for _, xml := range []string{
			"<domain><uuid>" + victim + "</uuid><uuid>" + uuid + "</uuid></domain>",
			"<domain><uuid>" + uuid + "</uuid><uuid>" + victim + "</uuid></domain>",
			"<domain xmlns:x='urn:x'><x:uuid>" + uuid + "</x:uuid></domain>",
			"<network><uuid>" + uuid + "</uuid></network>",
			"<!DOCTYPE d [<!ENTITY a '" + strings.Repeat("ha", 99) + "'><!ENTITY u '&a;&a;&a;&a;&a;'>]><domain><uuid>&u;</uuid></domain>",
			strings.Repeat("<domain>", 100_000),
		} {
			settlement.XML = xml
			refused("a definition "+xml[:min(len(xml), 60)], maint.CodeBadRequest, a.Settle(ctx, "a", settlement))
		}
	})
}
