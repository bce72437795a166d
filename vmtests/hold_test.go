package vmtests

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
	"belay/vmtests/probe"
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

// newWard brings up a host with n guests that run, each with a disk, and one
// that somebody else has paused.
func newWard(t *testing.T, n int) *ward {
	t.Helper()
	img, accel := guest.ForTest(t)
	c := cluster.ForTest(t, lab.Config{Hosts: 1, QEMU: img.QEMU})
	w := &ward{Node: c.Nodes[0], t: t, guests: make([]*guest.Guest, n)}
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
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		spec := guest.Spec{Name: fmt.Sprintf("web-%d", i+1), Accel: accel, IntervalUs: 10_000, Cmdline: guest.SteadyClock,
			IP: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 1, byte(i + 1)}), 16), Heartbeat: heartbeats}
		spec.Disk = filepath.Join(c.Lab.Shared, spec.Name+".qcow2")
		all.Go(func() {
			if errs[i] = guest.CreateDisk(ctx, spec.Disk, 16); errs[i] == nil {
				w.guests[i], errs[i] = guest.Start(ctx, w.Node, spec, img)
			}
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	// An emulated guest on a busy machine boots with a clock that is behind.
	if _, err := w.Client().SyncClock(ctx, ""); err != nil {
		t.Fatal(err)
	}
	w.create(ctx, t, theirs)
	if _, err := w.Virsh(ctx, "suspend", theirs); err != nil {
		t.Fatal(err)
	}
	return w
}

// create starts a guest without a system, and so without an agent.
func (w *ward) create(ctx context.Context, t *testing.T, name string) {
	t.Helper()
	xml := filepath.Join(w.Dir, name+".xml")
	if err := os.WriteFile(xml, []byte("<domain type='qemu'><name>"+name+"</name><memory unit='MiB'>16</memory>"+
		"<os><type arch='x86_64' machine='"+guest.Machine+"'>hvm</type></os><features><acpi/></features></domain>"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Virsh(ctx, "create", xml); err != nil {
		t.Fatal(err)
	}
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

// look asks every guest how it and its memory are.
func (w *ward) look(ctx context.Context) (all []look) {
	w.t.Helper()
	for _, g := range w.guests {
		c, err := g.Dial(ctx, w.Node)
		if err != nil {
			w.t.Fatal(err)
		}
		status, err1 := c.Status(ctx)
		memory, err2 := c.Verify(ctx)
		c.Close()
		if err := errors.Join(err1, err2); err != nil {
			w.t.Fatal(err)
		}
		all = append(all, look{status, memory})
	}
	return all
}

type look struct {
	status probe.Status
	memory probe.MemoryReport
}

// same checks that the guests are what they were.
func (w *ward) same(before, after []look) {
	w.t.Helper()
	for i, b := range before {
		a := after[i]
		if a.status.BootID != b.status.BootID || a.status.Incarnation != b.status.Incarnation {
			w.t.Errorf("%s has rebooted: boot ID was %s, is %s", a.status.Guest, b.status.BootID, a.status.BootID)
		}
		if !a.memory.OK() || a.memory.FixedChecksum != b.memory.FixedChecksum {
			w.t.Errorf("the memory of %s is damaged: %+v, was %+v", a.status.Guest, a.memory, b.memory)
		}
	}
}

// TestHold holds real guests around a real command.
func TestHold(t *testing.T) {
	t.Parallel()
	w := newWard(t, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	before := w.look(ctx)
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
		if h.Pause < time.Second || h.Pause > 10*time.Second || h.ReleasedBy != "belayd" {
			t.Errorf("%+v", h)
		}
		// How near it gets on a busy machine is the benchmarks' affair; left
		// alone it would be behind by the pause.
		if h.Clock == nil || h.Clock.After == nil || h.Clock.After.Offset.Abs() > h.Pause/2 {
			t.Errorf("clock of %s: %+v", h.Guest, h.Clock)
		}
		r := w.obs.Since(marks, h.Guest)
		if r.LargestGap.Length < time.Second {
			t.Errorf("%s was not seen to stand still: %s", h.Guest, r.LargestGap.Length)
		}
	}
	w.same(before, w.look(ctx))
}
