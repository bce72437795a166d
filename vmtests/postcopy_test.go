package vmtests

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
)

// until follows an operation until it is as wanted, through restarts of belayd.
func (b *bed) until(n *cluster.Node, id maint.OpID, what string, ok func(maint.Op) bool) {
	b.t.Helper()
	ctx := b.ctx(2 * time.Minute)
	for {
		op, err := n.Client().Op(ctx, id)
		switch {
		case err == nil && ok(op):
			return
		case err == nil && op.State == maint.OpEnded:
			b.t.Fatalf("it has ended before it was %s: %+v", what, op)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			b.t.Fatalf("never %s: %+v, %v", what, op, err)
		}
	}
}

func inPostCopy(how maint.PostCopy) func(maint.Op) bool {
	return func(op maint.Op) bool { return op.Progress != nil && op.Progress.PostCopy == how }
}

// A guest that writes faster than a limited link takes it converges by post-copy.
func TestPostCopy(t *testing.T) {
	t.Parallel()
	b := newBed(t, lab.Config{})
	b.dirty(b.a, 60)
	mark := b.obs.Mark()
	op, err := b.a.Client().Migrate(b.ctx(time.Minute), maint.MigrateRequest{Guest: "web-1", To: b.b.Name, BandwidthMiBs: 20,
		Timeout: 2 * time.Minute, Allow: []maint.Means{maint.MeansPostCopy}})
	if err != nil {
		t.Fatal(err)
	}
	op = b.end(b.a, op.ID)
	t.Logf("%s after %s, %+v, largest gap on the LAN %s\n%s", op.Outcome, op.Ended.Sub(op.Started), op.Move, b.obs.Since(mark, "web-1").LargestGap.Length, notes(op))
	if op.Outcome != maint.OutcomeDone || !strings.Contains(notes(op), "it goes on as post-copy: the guest is started on host-b") {
		t.Fatalf("%q, %+v", op.Outcome, op.Problems)
	}
	b.isWhole(b.b)
}

// small has a guest's first pass take less time.
func small(_ *bed, s *guest.Spec) { s.MemoryMiB = 128 }

// postCopy has the guest be in post-copy, at 1 MiB/s, on a network that TCP gives up after
// some seconds instead of a quarter of an hour, with its connection held.
func (b *bed) postCopy(ctx context.Context) maint.Op {
	b.t.Helper()
	b.dirty(b.a, 60)
	for _, n := range b.Nodes {
		if out, err := n.Command(ctx, "sysctl", "-w", "net.ipv4.tcp_retries2=4").CombinedOutput(); err != nil {
			b.t.Fatalf("%v: %s", err, out)
		}
	}
	op, err := b.a.Client().Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: b.b.Name, BandwidthMiBs: 20,
		Timeout: 5 * time.Minute, MaxPause: 50 * time.Millisecond, Allow: []maint.Means{maint.MeansPostCopy}})
	if err != nil {
		b.t.Fatal(err)
	}
	b.until(b.a, op.ID, "under way", func(op maint.Op) bool { return op.Progress != nil && op.Progress.MemorySent > 0 })
	b.virsh(b.a, "migrate-setspeed", "web-1", "1", "--postcopy")
	b.until(b.a, op.ID, "held in post-copy", func(op maint.Op) bool {
		records, err := b.a.Client().Records(ctx, op.ID)
		return err == nil && inPostCopy(maint.PostCopyRunning)(op) &&
			slices.ContainsFunc(records, func(r maint.Record) bool { return strings.Contains(string(r.Data), `"held":true`) })
	})
	return op
}

// isTold checks that an abort of a post-copy that is broken is refused, and that the host's
// status says what is wrong, also by the next belayd.
func (b *bed) isTold(ctx context.Context, id maint.OpID) {
	b.t.Helper()
	var p *maint.Problem
	if _, err := b.a.Client().Abort(ctx, id); !errors.As(err, &p) || p.Code != maint.CodePostCopy {
		b.t.Errorf("the abort: %v", err)
	}
	if err := b.a.Kill(); err != nil {
		b.t.Fatal(err)
	}
	if err := b.a.Start(ctx); err != nil {
		b.t.Fatal(err)
	}
	b.until(b.a, id, "in trouble again", func(op maint.Op) bool { return op.Trouble != nil && op.Trouble.Code == maint.CodePostCopy })
	s, err := b.a.Client().Status(ctx)
	if err != nil || !slices.ContainsFunc(s.Conditions, func(c maint.Condition) bool { return c.Code == maint.CodePostCopy && c.Remedy != "" }) {
		b.t.Errorf("the host's conditions are %+v, %v", s.Conditions, err)
	}
}

// cutLink cuts the destination off, or ends that.
func (b *bed) cutLink(ctx context.Context, cut bool) {
	b.t.Helper()
	if err := b.b.SetLink(ctx, !cut); err != nil {
		b.t.Fatal(err)
	}
}

// arrives waits for the end of a post-copy, and checks that the guest is whole.
func (b *bed) arrives(id maint.OpID) maint.Op {
	b.t.Helper()
	op := b.end(b.a, id)
	b.t.Logf("%s after %s, %+v\n%s", op.Outcome, op.Ended.Sub(op.Started), op.Problems, notes(op))
	if op.Outcome != maint.OutcomeDone {
		b.t.Fatalf("%q, %+v", op.Outcome, op.Problems)
	}
	b.isWhole(b.b)
	return op
}

// The network is cut in post-copy for longer than TCP waits, in the long form for longer
// than libvirt does, too, and belayd is killed meanwhile. QEMU goes on when the network is
// back.
func TestPostCopyCut(t *testing.T) {
	t.Parallel()
	b := newBed(t, lab.Config{}, small)
	ctx := b.ctx(6 * time.Minute)
	op := b.postCopy(ctx)
	b.cutLink(ctx, true)
	cut := time.Now()
	if long() {
		b.until(b.a, op.ID, "broken", inPostCopy(maint.PostCopyBroken))
		b.isTold(ctx, op.ID)
	}
	time.Sleep(10*time.Second - time.Since(cut)) // TCP would give up after 6.2 s
	if at := b.migrationOf(b.a); at != "postcopy-active" {
		t.Errorf("the source's QEMU has its migration %s", at)
	}
	b.cutLink(ctx, false)
	_, _ = b.a.Virsh(ctx, "migrate-setspeed", "web-1", "1000", "--postcopy") // it may have ended
	op = b.arrives(op.ID)
	if long() && !strings.Contains(notes(op), "post-copy has come to its end, ") {
		t.Error("it is not told that it was broken")
	}
}

// The connection of a post-copy is reset, for both QEMUs, while the network is cut, and
// belayd is killed meanwhile. When the network is back the migration is resumed.
func TestPostCopyBroken(t *testing.T) {
	longOnly(t)
	t.Parallel()
	b := newBed(t, lab.Config{}, small)
	ctx := b.ctx(6 * time.Minute)
	op := b.postCopy(ctx)
	// An interrupt of an emulated processor that waits for memory would keep QEMU from
	// answering libvirt: what the kernel needs is there once the guest speaks.
	if err := b.obs.Await(ctx, "web-1", 20); err != nil {
		t.Fatal(err)
	}
	b.cutLink(ctx, true)
	for _, n := range b.Nodes {
		ports := "( sport >= :49152 and sport <= :49215 ) or ( dport >= :49152 and dport <= :49215 )"
		if out, err := n.Command(ctx, "ss", "-t", "-K", "state", "established", ports).CombinedOutput(); err != nil {
			t.Fatalf("ss: %v: %s", err, out)
		}
	}
	b.until(b.a, op.ID, "broken", inPostCopy(maint.PostCopyBroken))
	b.isTold(ctx, op.ID)
	if at := b.migrationOf(b.a); at != "postcopy-paused" {
		t.Errorf("the source's QEMU has its migration %s", at)
	}
	b.cutLink(ctx, false)
	if op = b.arrives(op.ID); !strings.Contains(notes(op), "post-copy has come to its end, ") {
		t.Error("it is not told that it was broken")
	}
}

// migrationOf is how the guest's QEMU has its migration.
func (b *bed) migrationOf(n *cluster.Node) string {
	b.t.Helper()
	var r struct{ Return struct{ Status string } }
	if err := json.Unmarshal([]byte(b.virsh(n, "qemu-monitor-command", "web-1", `{"execute":"query-migrate"}`)), &r); err != nil {
		b.t.Fatal(err)
	}
	return r.Return.Status
}
