package wholehost

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/machine"
)

// TestPair: two hosts, each with libvirt over TLS and belayd from its package, and a guest
// under KVM, which goes to and fro. belayd is upgraded in the midst of it.
func TestPair(t *testing.T) {
	b := newBed(t, machine.Config{Hosts: 2})
	here, there := b.Hosts[0], b.Hosts[1]

	t.Run("migrate", func(t *testing.T) {
		b := b.within(t)
		mark := b.obs.Mark()
		op := b.belay(here, "migrate", "web-1", "--to", there.Name)
		b.isWhole(there)
		r := b.obs.Since(mark, "web-1")
		t.Logf("silent for %s on the LAN, downtime %s by QEMU, total %s", r.Pause().Round(time.Millisecond), op.Move.Downtime, op.Move.Total.Round(time.Millisecond))
		if r.Restarts != 0 || r.Duplicated != 0 {
			t.Errorf("the guest was started anew, or ran twice: %+v", r)
		}
	})
	if t.Failed() {
		return
	}
	here, there = there, here

	t.Run("upgrade within a hold", func(t *testing.T) {
		inFull(t)
		b := b.within(t)
		deb := b.newer(here, "99.0")
		op := b.belay(here, "hold", "--all", "--max-pause", "4m", "--reason", "upgrade", "--", "dpkg", "--install", deb)
		if op.Held == nil || op.Held.Step == nil || !op.Held.Step.OK() || len(op.Held.Guests) != 1 || op.Held.Guests[0].ReleasedBy != "belayd" {
			t.Fatalf("%+v", op.Held)
		}
		t.Logf("the guest was paused for %s", op.Held.Guests[0].Pause)
		b.awaitVersion(here, "99.0")
		b.isWhole(here)
	})
	if t.Failed() {
		return
	}

	t.Run("upgrade within a migration", func(t *testing.T) {
		inFull(t)
		b := b.within(t)
		deb := b.newer(here, "99.1")
		ctx := b.ctx(8 * time.Minute)
		mark := b.obs.Mark()
		// It cannot end at this rate: the guest writes more.
		op, err := here.Client().Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: there.Name, BandwidthMiBs: 1})
		if err != nil {
			t.Fatal(err)
		}
		b.awaitCopy(ctx, here, op.ID)
		must(t, here, "dpkg", "--install", deb)
		b.awaitVersion(here, "99.1")
		for _, args := range [][]string{{"migrate-setspeed", "web-1", "2000"}, {"migrate-setmaxdowntime", "web-1", "2000"}} {
			if _, err := here.Virsh(ctx, args...); err != nil {
				t.Fatal(err)
			}
		}
		if op, err = here.Client().Watch(ctx, op.ID, func(maint.Op) {}); err != nil || op.Outcome != maint.OutcomeDone {
			t.Fatalf("%v: %+v", err, op)
		}
		b.isWhole(there)
		if r := b.obs.Since(mark, "web-1"); r.Restarts != 0 || r.Duplicated != 0 {
			t.Errorf("the guest was started anew, or ran twice: %+v", r)
		}
	})
}

// within is the bed for a subtest.
func (b *bed) within(t *testing.T) *bed {
	sub := *b
	sub.t = t
	return &sub
}

// newer builds Belay's package once more, as a later version, and puts it into the host.
func (b *bed) newer(h *machine.Host, version string) string {
	b.t.Helper()
	ctx := b.ctx(5 * time.Minute)
	deb, err := machine.BuildPackage(ctx, b.t.TempDir(), version)
	if err != nil {
		b.t.Fatal(err)
	}
	to := "/root/belay_" + version + ".deb"
	if err := h.Copy(ctx, deb, to); err != nil {
		b.t.Fatal(err)
	}
	return to
}

// awaitVersion waits until the belayd that answers is of the version.
func (b *bed) awaitVersion(h *machine.Host, version string) {
	b.t.Helper()
	ctx := b.ctx(2 * time.Minute)
	for {
		r, err := h.Belay(ctx, "-o", "json", "status")
		if err != nil {
			b.t.Fatal(err)
		}
		var s maint.Status
		if r.Code == 0 {
			if err := json.Unmarshal([]byte(r.Stdout), &s); err != nil {
				b.t.Fatal(err)
			}
		}
		if strings.HasPrefix(s.Version, version) {
			return
		}
		select {
		case <-ctx.Done():
			b.t.Fatalf("belayd on %s is not of version %s but %q: %s", h.Name, version, s.Version, r.Stderr)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// awaitCopy waits until a migration's memory is on its way.
func (b *bed) awaitCopy(ctx context.Context, h *machine.Host, id maint.OpID) {
	b.t.Helper()
	watch, stop := context.WithCancel(ctx)
	defer stop()
	under := false
	last, err := h.Client().Watch(watch, id, func(now maint.Op) {
		if now.Progress != nil && now.Progress.MemorySent > 0 {
			under = true
			stop()
		}
	})
	if !under {
		b.t.Fatalf("the copy did not get under way: %v, %+v", err, last)
	}
}
