package vmtests

import (
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/lab"
)

// A guest arrives as it was kept: its definition, also what of it waits for the next boot,
// title, description and metadata; its new host sees to the rest.
func TestArrivesAsItWas(t *testing.T) {
	t.Parallel()
	b := newBed(t, lab.Config{})
	b.virsh(b.a, "desc", "web-1", "--live", "--config", "--title", "Shop, first")
	b.virsh(b.a, "desc", "web-1", "--live", "--config", "Sells things.")
	b.virsh(b.a, "metadata", "web-1", "urn:example:shop", "--live", "--config", "--key", "shop", "--set", "<owner>ada</owner>")
	b.virsh(b.a, "metadata", "web-1", "urn:example:next", "--config", "--key", "next", "--set", "<from>next boot</from>")
	b.virsh(b.a, "setmem", "web-1", "100M", "--config")
	kept := b.virsh(b.a, "dumpxml", "--inactive", "web-1")
	op := b.migrate(b.a, b.b)
	b.isWhole(b.b)
	if now := b.virsh(b.b, "dumpxml", "--inactive", "web-1"); now != kept {
		t.Errorf("its definition was\n%s\nand is\n%s", kept, now)
	}
	for _, live := range [][2]string{{b.virsh(b.b, "desc", "web-1", "--title"), "Shop, first"}, {b.virsh(b.b, "desc", "web-1"), "Sells things."},
		{b.virsh(b.b, "metadata", "web-1", "urn:example:shop", "--live"), "<owner>ada</owner>"}} {
		if live[0] != live[1] {
			t.Errorf("it has %q, want %q", live[0], live[1])
		}
	}
	r := b.seenTo(b.a, op.ID)
	if r.Agent != maint.AgentAnswers || len(r.Ports) != 1 || !r.Ports[0].Learned || r.Ports[0].SeenAt != lab.Uplink {
		t.Errorf("its new host reports %+v", r)
	}
	t.Logf("report: %+v", r)
}

// A guest that was paused moves and stays paused, and stays so where it was when its copy
// comes to nothing.
func TestPausedGuest(t *testing.T) {
	t.Parallel()
	b := newBed(t, lab.Config{})
	ctx := b.ctx(5 * time.Minute)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	paused := func(n *cluster.Node) {
		t.Helper()
		if s := b.virsh(n, "domstate", "--reason", "web-1"); s != "paused (user)" {
			t.Fatalf("on %s it is %s", n.Name, s)
		}
	}
	b.virsh(b.a, "suspend", "web-1")
	op := b.migrate(b.a, b.b)
	paused(b.b)
	t.Logf("%s in %s: %s", op.Outcome, op.Ended.Sub(op.Started).Round(time.Millisecond), notes(op))
	b.virsh(b.b, "resume", "web-1")
	b.isWhole(b.b)
	b.migrate(b.b, b.a)
	b.virsh(b.a, "suspend", "web-1")

	op = b.begin()
	_, err := b.a.Client().Abort(ctx, op.ID)
	must(err)
	if op = b.end(b.a, op.ID); op.Outcome != maint.OutcomeAborted {
		t.Fatalf("%+v", op)
	}
	paused(b.a)
	op = b.begin()
	must(b.a.Host.Kill(ctx, lab.Libvirtd, syscall.SIGKILL))
	must(b.a.StartDaemon(ctx, lab.Libvirtd))
	if op = b.end(b.a, op.ID); op.Outcome != maint.OutcomeFailed {
		t.Fatalf("%+v", op)
	}
	t.Logf("source libvirtd killed: %v", op.Problems)
	paused(b.a)
	b.awaitGone(b.b)
	op = b.begin()
	must(b.a.Kill())
	b.hurry()
	b.awaitGone(b.a)
	must(b.a.Start(ctx))
	if op = b.end(b.a, op.ID); op.Outcome != maint.OutcomeDone {
		t.Fatalf("%+v", op)
	}
	paused(b.b)
	b.virsh(b.b, "resume", "web-1")
	b.isWhole(b.b)
}

// seenTo waits for what the new host of an operation's guest reports.
func (b *bed) seenTo(n *cluster.Node, id maint.OpID) maint.ArrivalReport {
	b.t.Helper()
	ctx := b.ctx(time.Minute)
	for {
		op, err := n.Client().Op(ctx, id)
		if err == nil && op.Arrival != nil {
			return *op.Arrival
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			b.t.Fatalf("nothing is heard of the guest of %s: %v", id, err)
		}
	}
}
