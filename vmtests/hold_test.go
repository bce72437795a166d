package vmtests

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
)

// ward is one host whose guests are held.
type ward struct {
	*cluster.Node
	t      *testing.T
	guests []*guest.Guest
	obs    *observer.Observer
}

// theirs is a guest without a system that somebody else has paused.
const theirs = "theirs"

// newWard brings up a host with n guests that run, and one that somebody else
// has paused.
func newWard(t *testing.T, n int) *ward {
	t.Helper()
	img, accel := guest.ForTest(t)
	c := cluster.ForTest(t, lab.Config{Hosts: 1, QEMU: img.QEMU})
	w := &ward{Node: c.Nodes[0], t: t}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	err := c.Lab.InSwitch(func() error {
		conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(heartbeats))
		if err != nil {
			return err
		}
		w.obs, err = observer.Listen(conn, observer.Options{})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.obs.Close() })
	for i := range n {
		g, err := guest.Start(ctx, w.Node, guest.Spec{Name: fmt.Sprintf("web-%d", i+1), Accel: accel, IntervalUs: 10_000,
			IP: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 1, byte(i + 1)}), 16), Heartbeat: heartbeats}, img)
		if err != nil {
			t.Fatal(err)
		}
		w.guests = append(w.guests, g)
	}
	xml := w.Path("/tmp-theirs.xml")
	if err := os.WriteFile(xml, []byte("<domain type='qemu'><name>"+theirs+"</name><memory unit='MiB'>16</memory>"+
		"<os><type arch='x86_64' machine='"+guest.Machine+"'>hvm</type></os><features><acpi/></features></domain>"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"create", xml}, {"suspend", theirs}} {
		if _, err := w.Virsh(ctx, args...); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// state is virsh's word on a guest.
func (w *ward) state(ctx context.Context, name string) string {
	w.t.Helper()
	out, err := w.Virsh(ctx, "domstate", "--reason", name)
	if err != nil {
		w.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// TestHold holds real guests around a real command.
func TestHold(t *testing.T) {
	t.Parallel()
	w := newWard(t, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	g := w.guests[0]
	c, err := g.Dial(ctx, w.Node)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	before, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	marks := w.obs.Mark()

	var op maint.Op
	if err := w.BelayJSON(ctx, &op, "hold", "--all", "--reason", "a test", "--", "sh", "-c", "echo $BELAY_GUESTS; sleep 1"); err != nil {
		t.Fatal(err)
	}
	if op.Outcome != maint.OutcomeDone || op.Held.Step.Output != "web-1 web-2\n" {
		t.Errorf("%s %v %+v", op.Outcome, op.Problems, op.Held.Step)
	}
	for _, h := range op.Held.Guests {
		t.Logf("%+v clock %+v", h, h.Clock)
		if h.Guest == theirs {
			if h.Left == "" || w.state(ctx, theirs) != "paused (user)" {
				t.Errorf("the guest that somebody else had paused: %+v, %s", h, w.state(ctx, theirs))
			}
			continue
		}
		if h.Pause < time.Second || h.Pause > 3*time.Second || h.ReleasedBy != "belayd" {
			t.Errorf("%+v", h)
		}
		if h.Clock == nil || h.Clock.State != maint.ClockSynchronised || h.Clock.After == nil {
			t.Errorf("clock of %s: %+v", h.Guest, h.Clock)
		}
		r := w.obs.Since(marks, h.Guest)
		if r.LargestGap.Length < time.Second {
			t.Errorf("%s was not seen to stand still: %s", h.Guest, r.LargestGap.Length)
		}
	}
	after, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Verify(ctx); err != nil {
		t.Error(err)
	}
	if after.BootID != before.BootID {
		t.Errorf("boot ID was %s, is %s", before.BootID, after.BootID)
	}
}
