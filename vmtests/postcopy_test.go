package vmtests

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
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

// The network breaks in post-copy, for longer than QEMU's connection lives, and belayd is
// killed meanwhile; an abort is refused. When the network is back, the next belayd resumes
// the migration, and the guest is whole.
func TestPostCopyBroken(t *testing.T) {
	longOnly(t)
	t.Parallel()
	b := newBed(t, lab.Config{})
	b.dirty(b.a, 60)
	ctx := b.ctx(6 * time.Minute)
	for _, n := range b.Nodes { // TCP gives up after some seconds, not after a quarter of an hour
		if out, err := n.Command(ctx, "sysctl", "-w", "net.ipv4.tcp_retries2=4").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	op, err := b.a.Client().Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: b.b.Name, BandwidthMiBs: 3,
		Timeout: 5 * time.Minute, MaxPause: 50 * time.Millisecond, Allow: []maint.Means{maint.MeansPostCopy}})
	if err != nil {
		t.Fatal(err)
	}
	b.until(b.a, op.ID, "in post-copy", inPostCopy(maint.PostCopyRunning))
	if err := b.b.SetLink(ctx, false); err != nil {
		t.Fatal(err)
	}
	b.until(b.a, op.ID, "broken", inPostCopy(maint.PostCopyBroken))
	var p *maint.Problem
	if _, err := b.a.Client().Abort(ctx, op.ID); !errors.As(err, &p) || p.Code != maint.CodePostCopy {
		t.Errorf("the abort: %v", err)
	}
	if err := b.a.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := b.a.Start(ctx); err != nil {
		t.Fatal(err)
	}
	b.until(b.a, op.ID, "in trouble again", func(op maint.Op) bool { return op.Trouble != nil && op.Trouble.Code == maint.CodePostCopy })
	s, err := b.a.Client().Status(ctx)
	if err != nil || !slices.ContainsFunc(s.Conditions, func(c maint.Condition) bool { return c.Code == maint.CodePostCopy && c.Remedy != "" }) {
		t.Errorf("the host's conditions are %+v, %v", s.Conditions, err)
	}
	b.gaveUp(ctx)
	if err := b.b.SetLink(ctx, true); err != nil {
		t.Fatal(err)
	}
	// The other QEMU has nothing to send, and believes in its connection until it has: see
	// the runbook.
	if out, err := b.b.Command(ctx, "ss", "-K", "state", "established", "sport", ">=", ":49152", "and", "sport", "<=", ":49215").CombinedOutput(); err != nil {
		t.Logf("ss: %v: %s", err, out)
	}
	op = b.end(b.a, op.ID)
	t.Logf("%s after %s, %+v\n%s", op.Outcome, op.Ended.Sub(op.Started), op.Problems, notes(op))
	if op.Outcome != maint.OutcomeDone || !strings.Contains(notes(op), "post-copy has come to its end, ") {
		t.Fatalf("%q, %+v", op.Outcome, op.Problems)
	}
	b.isWhole(b.b)
}

// gaveUp waits until the source's QEMU has given the other one up.
func (b *bed) gaveUp(ctx context.Context) {
	b.t.Helper()
	for {
		out, err := b.a.Virsh(ctx, "qemu-monitor-command", "web-1", `{"execute":"query-migrate"}`)
		switch {
		case strings.Contains(out, `"postcopy-paused"`):
			return
		case ctx.Err() != nil:
			b.t.Fatalf("QEMU never gave its connection up: %s, %v", out, err)
		}
		time.Sleep(500 * time.Millisecond)
	}
}
