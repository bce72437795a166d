package wholehost

import (
	"context"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/machine"
)

// watchdog: a belayd that hangs is killed by systemd, and another one serves.
func (b *bed) watchdog() {
	t, h := b.t, b.Hosts[0]
	before := show(t, h, "belayd.service", "MainPID")
	restarts := show(t, h, "belayd.service", "NRestarts")
	must(t, h, "kill", "-STOP", before)
	awaitShow(t, b.ctx(3*time.Minute), h, "belayd.service", "NRestarts", func(now string) bool { return now != restarts })
	awaitShow(t, b.ctx(time.Minute), h, "belayd.service", "ActiveState", func(now string) bool { return now == "active" })
	must(t, h, "belay", "status")
	if now := show(t, h, "belayd.service", "MainPID"); now == before {
		t.Errorf("it is the same belayd, process %s", now)
	}
	b.isWhole(h)
}

// reboot: a host that is to reboot does so when the hold has come to its end.
func (b *bed) reboot() {
	t, h := b.t, b.Hosts[0]
	ctx := b.ctx(5 * time.Minute)
	before, err := h.BootID(ctx)
	if err != nil {
		t.Fatal(err)
	}
	op, err := h.Client().Hold(ctx, maint.HoldRequest{All: true, MaxPause: 30 * time.Second, Reason: "test",
		Step: maint.HostStep{Command: []string{"sh", "-c", "systemctl reboot && sleep 8"}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.AwaitUp(ctx, before); err != nil {
		t.Fatal(err)
	}
	b.awaitBelayd(h)
	if op, err = h.Client().Op(ctx, op.ID); err != nil {
		t.Fatal(err)
	}
	if op.Outcome != maint.OutcomeDone || op.Held == nil || op.Held.Step == nil || !op.Held.Step.OK() || op.Held.Guests[0].ReleasedBy != "belayd" {
		t.Errorf("the hold did not come to its end before the reboot: %+v, %+v", op, op.Held)
	}
}

// awaitShow waits until a property of a unit is as it should be.
func awaitShow(t *testing.T, ctx context.Context, h *machine.Host, unit, property string, good func(string) bool) {
	t.Helper()
	for {
		now := show(t, h, unit, property)
		if good(now) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s of %s is still %q", property, unit, now)
		case <-time.After(500 * time.Millisecond):
		}
	}
}
