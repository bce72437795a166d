package vmtests

import (
	"context"
	"encoding/base64"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
)

// eventsOn has belayd tell guests.
const eventsOn = "[events]\nenabled = true\nwake = \"/bin/wake\"\n"

// restartWith starts belayd anew with further settings.
func restartWith(ctx context.Context, t *testing.T, n *cluster.Node, settings string) {
	t.Helper()
	n.Settings = settings
	if err := n.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(ctx); err != nil {
		t.Fatal(err)
	}
}

func document(ctx context.Context, t *testing.T, n *cluster.Node, name string) guest.ScheduledEvents {
	t.Helper()
	d, err := n.EventsInside(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// awaitDocument asks until the document is as it should be.
func awaitDocument(ctx context.Context, t *testing.T, n *cluster.Node, name string, so func(guest.ScheduledEvents) bool) guest.ScheduledEvents {
	t.Helper()
	for {
		d := document(ctx, t, n, name)
		if so(d) {
			return d
		}
		if ctx.Err() != nil {
			t.Fatalf("%s is shown %+v", name, d)
		}
	}
}

// Two guests on one bridge are told of a hold through their taps, each of its own
// event; each approves its own and cannot another's; the hold waits for both.
func TestGuestsAreToldAndApprove(t *testing.T) {
	t.Parallel()
	img, accel := guest.ForTest(t)
	c := cluster.ForTest(t, lab.Config{Hosts: 1, QEMU: img.QEMU})
	n := c.Nodes[0]
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	restartWith(ctx, t, n, eventsOn)
	names := []string{"web-1", "web-2"}
	for i, name := range names {
		spec := guest.Spec{Name: name, Accel: accel, IP: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 1, byte(i + 1)}), 16), Gateway: lab.SwitchAddr()}
		if _, err := guest.Start(ctx, n, spec, img); err != nil {
			t.Fatal(err)
		}
	}
	before := make(map[string]guest.ScheduledEvents)
	for _, name := range names {
		if before[name] = awaitAnswer(ctx, t, n, name); len(before[name].Events) > 0 {
			t.Errorf("%s is shown %+v", name, before[name])
		}
	}
	var op maint.Op
	if err := n.BelayJSON(ctx, &op, "hold", "--all", "--detach", "--", "sleep", "0.2"); err != nil {
		t.Fatal(err)
	}
	if _, err := guest.Inside(ctx, n, "web-1", "", "/bin/busybox", "sh", "-c", "printf '#!/bin/sh\\necho woken >>/run/woken\\n' >/bin/wake; chmod 755 /bin/wake"); err != nil {
		t.Fatal(err)
	}
	hotPlug(ctx, t, n, "web-1")
	ids := make(map[string]string)
	for _, name := range names {
		d := awaitDocument(ctx, t, n, name, func(d guest.ScheduledEvents) bool { return len(d.Events) > 0 })
		e := d.Events[0]
		if len(d.Events) != 1 || e.EventType != "Freeze" || e.EventStatus != "Scheduled" || len(e.Resources) != 1 || e.Resources[0] != name || d.DocumentIncarnation == before[name].DocumentIncarnation {
			t.Errorf("%s is shown %+v", name, d)
		}
		if at, err := time.Parse(time.RFC1123, e.NotBefore); err != nil || time.Until(at) < 14*time.Minute {
			t.Errorf("%s: not before %q, %v", name, e.NotBefore, err)
		}
		ids[name] = e.EventID
	}
	if err := n.ApproveInside(ctx, "web-1", ids["web-2"]); err == nil {
		t.Error("one guest has approved the event of another")
	}
	if err := n.ApproveInside(ctx, "web-1", ids["web-1"]); err != nil {
		t.Error(err)
	}
	if d := document(ctx, t, n, "web-2"); len(d.Events) != 1 || d.Events[0].EventStatus != "Scheduled" {
		t.Errorf("one guest's approval is another's: %+v", d)
	}
	if err := n.ApproveInside(ctx, "web-2", ids["web-2"]); err != nil {
		t.Error(err)
	}
	op, err := n.Client().Watch(ctx, op.ID, func(maint.Op) {})
	if err != nil || op.Outcome != maint.OutcomeDone {
		t.Fatalf("%s %+v, %v", op.Outcome, op.Problems, err)
	}
	for _, name := range names {
		awaitDocument(ctx, t, n, name, func(d guest.ScheduledEvents) bool { return len(d.Events) == 0 })
		history, err := guest.Metadata(ctx, n, name, "/belay/v1/history", "")
		if err != nil || !strings.Contains(history, ids[name]) || !strings.Contains(history, `"pause_seconds":0.`) {
			t.Errorf("%s: history %s, %v", name, history, err)
		}
	}
	if out, err := guest.Inside(ctx, n, "web-1", "", "/bin/busybox", "cat", "/run/woken"); err != nil || !strings.Contains(out, "woken") {
		t.Errorf("its agent was not asked to wake it: %q, %v", out, err)
	}
	var checks []maint.Check
	if err := n.BelayJSON(ctx, &checks, "doctor"); err != nil {
		t.Errorf("doctor: %v %+v", err, checks)
	}
}

// hotPlug gives a running guest one more interface, and waits until it is known.
func hotPlug(ctx context.Context, t *testing.T, n *cluster.Node, name string) {
	t.Helper()
	if _, err := n.Virsh(ctx, "attach-interface", name, "bridge", "br0", "--model", "virtio", "--mac", "52:54:00:99:00:01", "--live"); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ; {
		var checks []maint.Check
		err := n.BelayJSON(ctx, &checks, "doctor")
		known := 0
		for _, c := range checks {
			if strings.HasPrefix(c.Name, "metadata of vnet") && c.Result == maint.CheckOK {
				known++
			}
		}
		if known == 3 {
			return
		}
		if err != nil || time.Now().After(end) {
			t.Fatalf("%d interfaces are known, %v: %+v", known, err, checks)
		}
	}
}

// awaitAnswer asks in a guest that has just booted until it is known.
func awaitAnswer(ctx context.Context, t *testing.T, n *cluster.Node, name string) guest.ScheduledEvents {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		d, err := n.EventsInside(ctx, name)
		if err == nil {
			return d
		}
		if ctx.Err() != nil || time.Now().After(end) {
			r, _ := n.Belay(ctx, "doctor")
			t.Fatalf("guest %s gets no answer: %v\n%s", name, err, r.Stdout)
		}
	}
}

// A guest that moves is shown the same event on the other host, in the course of
// it, and its incarnations are never used again.
func TestEventsMoveWithTheirGuest(t *testing.T) {
	t.Parallel()
	img, accel := guest.ForTest(t)
	c := cluster.ForTest(t, lab.Config{QEMU: img.QEMU})
	a, b := c.Nodes[0], c.Nodes[1]
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	for _, n := range c.Nodes {
		restartWith(ctx, t, n, eventsOn)
	}
	spec := guest.Spec{Name: "web-1", Accel: accel, IP: netip.MustParsePrefix("10.77.1.1/16"), Gateway: lab.SwitchAddr()}
	if _, err := guest.Start(ctx, a, spec, img); err != nil {
		t.Fatal(err)
	}
	seen := map[uint64]bool{awaitAnswer(ctx, t, a, "web-1").DocumentIncarnation: true}
	var op maint.Op
	if err := a.BelayJSON(ctx, &op, "migrate", "web-1", "--to", b.Name, "--detach"); err != nil {
		t.Fatal(err)
	}
	d := awaitDocument(ctx, t, a, "web-1", func(d guest.ScheduledEvents) bool { return len(d.Events) == 1 })
	seen[d.DocumentIncarnation] = true
	if err := a.ApproveInside(ctx, "web-1", d.Events[0].EventID); err != nil {
		t.Fatal(err)
	}
	op, err := a.Client().Watch(ctx, op.ID, func(maint.Op) {})
	if err != nil || op.Outcome != maint.OutcomeDone {
		t.Fatalf("%s %+v, %v", op.Outcome, op.Problems, err)
	}
	after := awaitAnswer(ctx, t, b, "web-1")
	if len(after.Events) != 0 || seen[after.DocumentIncarnation] {
		t.Errorf("on %s it is shown %+v, and has seen %v", b.Name, after, seen)
	}
	history, err := guest.Metadata(ctx, b, "web-1", "/belay/v1/history", "")
	if err != nil || !strings.Contains(history, d.Events[0].EventID) || !strings.Contains(history, "pause_seconds") {
		t.Errorf("history %s, %v", history, err)
	}
	if left, err := a.Client().Events(ctx, false); err != nil || len(left) > 0 {
		t.Errorf("on %s is left %+v, %v", a.Name, left, err)
	}
}

// A guest that is on no bridge asks through a virtio-serial channel, by
// belay-guest.
func TestGuestAsksBySerialPort(t *testing.T) {
	t.Parallel()
	img, accel := guest.ForTest(t)
	c := cluster.ForTest(t, lab.Config{Hosts: 1, QEMU: img.QEMU})
	n := c.Nodes[0]
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	restartWith(ctx, t, n, eventsOn)
	spec := guest.Spec{Name: "web-1", Accel: accel, Devices: "<channel type='unix'><source mode='bind'/><target type='virtio' name='org.belay.events.0'/></channel>"}
	if _, err := guest.Start(ctx, n, spec, img); err != nil {
		t.Fatal(err)
	}
	upload(ctx, t, n, "web-1", filepath.Join(filepath.Dir(n.Belayd()), "belay-guest"), "/bin/belay-guest")
	if _, err := guest.Inside(ctx, n, "web-1", "", "/bin/busybox", "sh", "-c", "chmod 755 /bin/belay-guest; belay-guest -via serial >/run/belay-guest.log 2>&1 &"); err != nil {
		t.Fatal(err)
	}
	awaitAnswer(ctx, t, n, "web-1")
	var op maint.Op
	if err := n.BelayJSON(ctx, &op, "replace-vmm", "web-1", "--method", "copy", "--detach"); err != nil {
		t.Fatal(err)
	}
	d := awaitDocument(ctx, t, n, "web-1", func(d guest.ScheduledEvents) bool { return len(d.Events) == 1 })
	if err := n.ApproveInside(ctx, "web-1", d.Events[0].EventID); err != nil {
		t.Fatal(err)
	}
	op, err := n.Client().Watch(ctx, op.ID, func(maint.Op) {})
	if err != nil || op.Outcome != maint.OutcomeDone {
		t.Fatalf("%s %+v, %v", op.Outcome, op.Problems, err)
	}
	awaitAnswer(ctx, t, n, "web-1") // its new QEMU has another socket
}

// upload writes a file into a guest through its agent.
func upload(ctx context.Context, t *testing.T, n *cluster.Node, name, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	var handle int
	if err := guest.AgentCommand(ctx, n, name, "guest-file-open", map[string]any{"path": to, "mode": "w"}, &handle); err != nil {
		t.Fatal(err)
	}
	const chunk = 64 << 10 // virsh has it as an argument
	for len(b) > 0 {
		part := b[:min(chunk, len(b))]
		b = b[len(part):]
		var wrote struct{ Count int }
		err := guest.AgentCommand(ctx, n, name, "guest-file-write", map[string]any{"handle": handle, "buf-b64": base64.StdEncoding.EncodeToString(part)}, &wrote)
		if err != nil || wrote.Count != len(part) {
			t.Fatalf("wrote %d of %d bytes: %v", wrote.Count, len(part), err)
		}
	}
	if err := guest.AgentCommand(ctx, n, name, "guest-file-close", map[string]any{"handle": handle}, &struct{}{}); err != nil {
		t.Fatal(err)
	}
}
