package vmtests

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
)

// TestReplaceVMM puts new QEMUs under a guest, one method after the other, as
// an operator would.
func TestReplaceVMM(t *testing.T) {
	t.Parallel()
	img, accel := guest.ForTest(t)
	hooks, err := filepath.Abs("../dist/hooks")
	if err != nil {
		t.Fatal(err)
	}
	c := cluster.ForTest(t, lab.Config{Hosts: 1, QEMU: img.QEMU, Hooks: hooks})
	n := c.Nodes[0]
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var obs *observer.Observer
	err = c.Lab.InSwitch(func() error {
		conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(heartbeats))
		if err != nil {
			return err
		}
		obs, err = observer.Listen(conn, observer.Options{})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer obs.Close()
	g, err := guest.Start(ctx, n, guest.Spec{Name: "web-1", Accel: accel, FileMemory: true,
		IP: netip.MustParsePrefix("10.77.1.1/16"), Heartbeat: heartbeats, IntervalUs: beatUs}, img)
	if err != nil {
		t.Fatal(err)
	}
	dial := func() *guest.Control {
		t.Helper()
		control, err := g.Dial(ctx, n)
		if err != nil {
			t.Fatal(err)
		}
		return control
	}
	before := dial()
	first, err := before.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	before.Close()

	if r, err := n.Belay(ctx, "replace-vmm", "web-1", "--dry-run"); err != nil || r.Code != 0 {
		t.Fatalf("%v %+v", err, r)
	} else {
		t.Log("\n" + r.Stdout)
	}
	for _, method := range []maint.VMMMethod{maint.VMMInPlace, maint.VMMCopy, maint.VMMPrewarmed, maint.VMMBounce, maint.VMMInPlace} {
		mark := obs.Mark()
		var op maint.Op
		if err := n.BelayJSON(ctx, &op, "replace-vmm", "web-1", "--method", string(method)); err != nil {
			t.Fatal(err)
		}
		if op.Outcome != maint.OutcomeDone || op.Replaced == nil || op.Replaced.Method != method || op.Replaced.Pause <= 0 {
			t.Fatalf("%s %v %+v", op.Outcome, op.Problems, op.Replaced)
		}
		// How near it is on a busy machine is the benchmarks' affair.
		if op.Replaced.Clock == nil {
			t.Errorf("nothing is said of the clock after %s", method)
		}
		control := dial()
		s, err := control.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := control.Verify(ctx); err != nil {
			t.Errorf("memory after %s: %v", method, err)
		}
		control.Close()
		if s.BootID != first.BootID {
			t.Errorf("boot ID was %s, is %s", first.BootID, s.BootID)
		}
		t.Logf("%s: paused for %s, seen from outside %s, clock %+v, leash %+v", method, op.Replaced.Pause, obs.Since(mark, "web-1").LargestGap.Length, op.Replaced.Clock, op.Leash)
	}
	var ops []maint.Op
	if err := n.BelayJSON(ctx, &ops, "ops", "list"); err != nil || len(ops) != 5 {
		t.Errorf("%d operations, %v", len(ops), err)
	}
}
