package vmtests

import (
	"context"
	"crypto/rand"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/measure"
	"belay/vmtests/probe"
)

// newFlock makes guests that write a little, on the first of some hosts. edit may say more of
// each.
func newFlock(t *testing.T, hosts, guests int, edit ...func(*guest.Spec)) *measure.Flock {
	t.Helper()
	guest.ForTest(t) // or the test is left out
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	bin, discard, err := cluster.Programs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = discard() })
	f, err := measure.FlockUp(ctx, measure.FlockConfig{Lab: lab.Config{Name: "t" + strings.ToLower(rand.Text()[:8]), Hosts: hosts}, Bin: bin, Guests: guests,
		Interval: 50 * time.Millisecond, Dirty: probe.DirtySettings{RateMiBs: 2, WorkingSetMiB: 16},
		Edit: func(s *guest.Spec) {
			for _, e := range edit {
				e(s)
			}
		}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := f.Down(ctx); err != nil {
			t.Error(err)
		}
	})
	return f
}

// A host is drained of its guests, with its belayd killed in the middle, and has them
// back, with a peer's belayd killed in the middle. Guests of a group stay apart, and
// all stay whole.
func TestDrainAndRestore(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3, 3)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	a := f.Cluster.Nodes[0]
	for _, name := range []string{"web-1", "web-2"} {
		for _, args := range [][]string{
			{"autostart", name},
			{"metadata", name, "urn:belay:placement:1", "--key", "placement", "--set", "<placement anti-affinity='web'/>", "--live", "--config"}} {
			if _, err := a.Virsh(ctx, args...); err != nil {
				t.Fatal(err)
			}
		}
	}
	var plan maint.DrainPlan
	if err := a.BelayJSON(ctx, &plan, "drain", "--dry-run"); err != nil {
		t.Fatal(err)
	}
	to := make(map[string]string)
	for _, m := range plan.Guests {
		to[m.Guest] = m.Peer
	}
	if len(plan.Guests) != 3 || to["web-1"] == to["web-2"] {
		t.Fatalf("plan: %+v", plan)
	}

	// So slow that the copies last until they are hurried.
	op, err := a.Client().Drain(ctx, maint.DrainRequest{BandwidthMiBs: 2, Parallel: 2})
	if err != nil {
		t.Fatal(err)
	}
	moving := awaitMoving(t, ctx, a, op.ID, 2)
	if err := a.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for _, name := range moving {
		hurry(t, ctx, a, name)
	}
	for _, name := range []string{"web-1", "web-2", "web-3"} {
		if !slices.Contains(moving, name) {
			awaitCopy(t, ctx, a, name)
			hurry(t, ctx, a, name)
		}
	}
	op = ended(t, ctx, a, op.ID)
	if op.Outcome != maint.OutcomeDone || op.Resumed != 1 || len(op.Moves) != 3 {
		t.Fatalf("%s, resumed %d times: %v", op.Outcome, op.Resumed, op.Problems)
	}
	at := make(map[string]string)
	for _, m := range op.Moves {
		at[m.Guest] = m.Peer
		if m.Tries != 0 {
			t.Errorf("%+v", m)
		}
	}
	if at["web-1"] == at["web-2"] {
		t.Errorf("guests of a group are on one host: %v", at)
	}
	if err := f.Prove(ctx, at); err != nil {
		t.Fatal(err)
	}
	migratedOnce(t, ctx, a, 3)

	// The host is nobody's target.
	b := f.Cluster.Nodes[1]
	r, err := b.Belay(ctx, "migrate", guestAt(t, at, b.Name), "--to", a.Name)
	if err != nil || r.Code != 3 || !strings.Contains(r.Stderr, "cordoned") {
		t.Errorf("a drained host takes a guest in: %d, %v, %s", r.Code, err, r.Stderr)
	}

	back, err := a.Client().Restore(ctx, maint.RestoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	awaitMoving(t, ctx, a, back.ID, 1)
	if err := b.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := b.Start(ctx); err != nil {
		t.Fatal(err)
	}
	back = ended(t, ctx, a, back.ID)
	if back.Outcome != maint.OutcomeDone {
		t.Fatalf("%s: %v, %+v", back.Outcome, back.Problems, back.Moves)
	}
	if err := f.Prove(ctx, nil); err != nil {
		t.Fatal(err)
	}
	out, err := a.Virsh(ctx, "list", "--all", "--autostart", "--name")
	if got := strings.Fields(out); err != nil || !slices.Equal(slices.Sorted(slices.Values(got)), []string{"web-1", "web-2"}) {
		t.Errorf("autostarted: %v, %v", got, err)
	}
}

// awaitMoving waits until the copies of n guests of a drain, or of a restore, are
// under way, and names them.
func awaitMoving(t *testing.T, ctx context.Context, n *cluster.Node, id maint.OpID, want int) (names []string) {
	t.Helper()
	watch, stop := context.WithCancel(ctx)
	defer stop()
	_, err := n.Client().Watch(watch, id, func(op maint.Op) {
		names = nil
		for _, m := range op.Moves {
			child, _ := n.Client().Op(ctx, m.Op)
			if m.State == maint.MoveMoving && (op.Kind == maint.OpRestore && m.Op != "" || child.Progress != nil && child.Progress.MemorySent > 0) {
				names = append(names, m.Guest)
			}
		}
		if len(names) >= want {
			stop()
		}
	})
	if len(names) < want {
		t.Fatalf("moving are %v, not %d: %v", names, want, err)
	}
	return names
}

// awaitCopy waits until memory of a guest is copied: before that libvirt sets the speed
// that it was asked for.
func awaitCopy(t *testing.T, ctx context.Context, n *cluster.Node, name string) {
	t.Helper()
	for {
		ops, err := n.Client().Ops(ctx)
		if err != nil {
			t.Fatalf("the copy of %s does not begin: %v", name, err)
		}
		if slices.ContainsFunc(ops, func(op maint.Op) bool {
			return op.Guest == name && op.Progress != nil && op.Progress.MemorySent > 0
		}) {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("the copy of %s does not begin", name)
		}
	}
}

// hurry lets a copy that was held back come to its end.
func hurry(t *testing.T, ctx context.Context, n *cluster.Node, name string) {
	t.Helper()
	if _, err := n.Virsh(ctx, "migrate-setspeed", name, "2000"); err != nil {
		t.Fatal(err)
	}
}

// ended follows an operation to its end, through restarts of belayd.
func ended(t *testing.T, ctx context.Context, n *cluster.Node, id maint.OpID) maint.Op {
	t.Helper()
	for {
		op, err := n.Client().Watch(ctx, id, func(maint.Op) {})
		if err == nil {
			return op
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("operation %s does not end: %v", id, err)
		}
	}
}

// migratedOnce checks that a host has begun so many migrations, all done.
func migratedOnce(t *testing.T, ctx context.Context, n *cluster.Node, want int) {
	t.Helper()
	ops, err := n.Client().Ops(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var begun []maint.Op
	for _, op := range ops {
		if op.Kind == maint.OpMigrate {
			begun = append(begun, op)
			if op.Outcome != maint.OutcomeDone {
				t.Errorf("%s of %s: %s", op.ID, op.Guest, op.Outcome)
			}
		}
	}
	if len(begun) != want {
		t.Errorf("%d migrations, not %d", len(begun), want)
	}
}

// guestAt is a guest that is on a host.
func guestAt(t *testing.T, at map[string]string, host string) string {
	t.Helper()
	for name, is := range at {
		if is == host {
			return name
		}
	}
	t.Fatalf("no guest is on %s: %v", host, at)
	return ""
}
