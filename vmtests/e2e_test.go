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
	"belay/vmtests/probe"
)

// heartbeats is where guests of these tests send theirs, every beat: with a thousand a
// second an emulated guest keeps a third of a processor busy.
var heartbeats = netip.AddrPortFrom(lab.SwitchAddr(), 9099)

const beatUs = 20_000

// bed is a cluster with one guest that dirties memory, and an observer.
type bed struct {
	*cluster.Cluster
	t     *testing.T
	a, b  *cluster.Node
	spec  guest.Spec
	img   guest.Image
	guest *guest.Guest
	obs   *observer.Observer
	first probe.Status
	mem   probe.MemoryReport
}

// long reports whether the long forms of the tests are wanted.
func long() bool { return os.Getenv("BELAY_LONG") != "" }

// longOnly leaves a test out of the short form: it takes minutes.
func longOnly(t *testing.T) {
	t.Helper()
	if !long() {
		t.Skip("of the long campaigns: BELAY_LONG=1, make test-long")
	}
}

// newBed has the guest be as edits change it, when there are hosts and it is none yet.
func newBed(t *testing.T, c lab.Config, edits ...func(*bed, *guest.Spec)) *bed {
	t.Helper()
	img, accel := guest.ForTest(t)
	c.QEMU = img.QEMU
	b := &bed{Cluster: cluster.ForTest(t, c), t: t, img: img}
	b.a, b.b = b.Nodes[0], b.Nodes[1]
	err := b.Lab.InSwitch(func() error {
		conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(heartbeats))
		if err != nil {
			return err
		}
		b.obs, err = observer.Listen(conn, observer.Options{})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.obs.Close() })
	b.spec = guest.Spec{Name: "web-1", Accel: accel, IP: netip.MustParsePrefix("10.77.1.1/16"), Heartbeat: heartbeats, IntervalUs: beatUs}
	for _, edit := range edits {
		edit(b, &b.spec)
	}
	b.start()
	return b
}

// start starts the guest on host-a.
func (b *bed) start() {
	b.t.Helper()
	var err error
	if b.guest, err = guest.Start(b.ctx(2*time.Minute), b.a, b.spec, b.img); err != nil {
		b.t.Fatal(err)
	}
	b.virsh(b.a, "autostart", "web-1")
	b.dirty(b.a, 8)
	b.first, b.mem = b.look(b.a)
}

func (b *bed) ctx(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(b.t.Context(), d)
	b.t.Cleanup(cancel)
	return ctx
}

// look asks the guest, on the host where it must be.
func (b *bed) look(n *cluster.Node) (s probe.Status, m probe.MemoryReport) {
	b.t.Helper()
	ctx := b.ctx(time.Minute)
	c, err := b.guest.Dial(ctx, n)
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	if s, err = c.Status(ctx); err == nil {
		m, err = c.Verify(ctx)
	}
	if err != nil {
		b.t.Fatalf("%v\n%s", err, b.diagnosis(n))
	}
	return s, m
}

// diagnosis tells what can be seen from outside of a guest that does not
// answer: whether its vCPUs, its agent and its network are alive.
func (b *bed) diagnosis(n *cluster.Node) string {
	ctx := b.ctx(30 * time.Second)
	var d strings.Builder
	mark := b.obs.Mark()
	fmt.Fprintf(&d, "agent: %v\n", b.guest.AgentPing(ctx, n))
	r := b.obs.Since(mark, "web-1")
	fmt.Fprintf(&d, "heartbeats since: %d, largest gap %s, standstill %s\n", r.Received, r.LargestGap.Length, r.Standstill)
	for _, args := range [][]string{{"domstate", "--reason", "web-1"}, {"qemu-monitor-command", "--hmp", "web-1", "info status"},
		{"qemu-monitor-command", "--hmp", "web-1", "info cpus"}, {"qemu-monitor-command", "--hmp", "web-1", "info registers"}, {"qemu-monitor-command", "--hmp", "web-1", "info chardev"}} {
		out, err := n.Virsh(ctx, args...)
		fmt.Fprintf(&d, "%s: %s %v\n", strings.Join(args, " "), strings.TrimSpace(out), err)
	}
	console, err := b.guest.Console(ctx, n)
	fmt.Fprintf(&d, "console ends: %s %v\n", console[max(0, len(console)-1500):], err)
	return d.String()
}

// dirty has the guest write memory at a rate, MiB/s.
func (b *bed) dirty(n *cluster.Node, rate float64) {
	b.t.Helper()
	ctx := b.ctx(time.Minute)
	c, err := b.guest.Dial(ctx, n)
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Dirty(ctx, probe.DirtySettings{RateMiBs: rate, WorkingSetMiB: 16}); err != nil {
		b.t.Fatal(err)
	}
}

// isWhole checks that the guest is the one that was started, alive and whole,
// on n and nowhere else, defined and autostarted on n and nowhere else.
func (b *bed) isWhole(n *cluster.Node) {
	b.t.Helper()
	s, m := b.look(n)
	if s.BootID != b.first.BootID {
		b.t.Fatalf("the guest has rebooted: boot ID %s, was %s", s.BootID, b.first.BootID)
	}
	if !m.OK() || m.FixedChecksum != b.mem.FixedChecksum {
		b.t.Fatalf("the guest's memory is damaged: %+v, was %+v", m, b.mem)
	}
	for _, other := range b.Nodes {
		running := b.virsh(other, "list", "--name")
		defined := b.virsh(other, "list", "--all", "--persistent", "--name")
		autostart := b.virsh(other, "list", "--all", "--autostart", "--name")
		want := ""
		if other == n {
			want = "web-1"
		}
		if running != want || defined != want || autostart != want {
			b.t.Fatalf("%s: running %q, defined %q, autostarted %q; want %q for all", other.Name, running, defined, autostart, want)
		}
	}
}

func (b *bed) virsh(n *cluster.Node, args ...string) string {
	b.t.Helper()
	out, err := n.Virsh(b.ctx(time.Minute), args...)
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// migrate runs belay migrate and returns the operation as it ended.
func (b *bed) migrate(from, to *cluster.Node, args ...string) maint.Op {
	b.t.Helper()
	var op maint.Op
	args = append([]string{"migrate", "web-1", "--to", to.Name}, args...)
	if err := from.BelayJSON(b.ctx(3*time.Minute), &op, args...); err != nil {
		b.t.Fatal(err)
	}
	return op
}

// begin starts a migration that cannot converge (1 MiB/s against 8), and
// returns when its copy is under way.
func (b *bed) begin() maint.Op {
	b.t.Helper()
	ctx := b.ctx(time.Minute)
	op, err := b.a.Client().Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: b.b.Name, BandwidthMiBs: 1})
	if err != nil {
		b.t.Fatal(err)
	}
	watch, stop := context.WithCancel(ctx)
	defer stop()
	under := false
	last, err := b.a.Client().Watch(watch, op.ID, func(now maint.Op) {
		if now.Progress != nil && now.Progress.MemorySent > 0 {
			under = true
			stop()
		}
	})
	if !under {
		b.t.Fatalf("the copy did not get under way: %v, %+v", err, last)
	}
	return op
}

// hurry lets a copy that was held back converge.
func (b *bed) hurry() {
	b.t.Helper()
	b.virsh(b.a, "migrate-setspeed", "web-1", "2000")
	b.virsh(b.a, "migrate-setmaxdowntime", "web-1", "2000")
}

// end waits for the operation's end, through restarts of belayd.
func (b *bed) end(n *cluster.Node, id maint.OpID) maint.Op {
	b.t.Helper()
	ctx := b.ctx(3 * time.Minute)
	for {
		op, err := n.Client().Watch(ctx, id, func(maint.Op) {})
		if err == nil {
			return op
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			b.t.Fatalf("operation %s does not end: %v", id, err)
		}
	}
}

// A guest under load goes to the other host and back, again and again.
func TestThereAndBack(t *testing.T) {
	t.Parallel()
	b := newBed(t, lab.Config{TLS: true})
	rounds := 1
	if long() {
		rounds = 20
	}
	for round := range rounds {
		for _, way := range [][2]*cluster.Node{{b.a, b.b}, {b.b, b.a}} {
			mark := b.obs.Mark()
			op := b.migrate(way[0], way[1])
			if op.Outcome != maint.OutcomeDone || op.Move == nil || op.Move.MemorySent == 0 {
				t.Fatalf("round %d: %+v", round, op)
			}
			b.isWhole(way[1])
			if err := b.obs.Await(b.ctx(time.Minute), "web-1", 20); err != nil {
				t.Fatal(err)
			}
			r := b.obs.Since(mark, "web-1")
			if r.Restarts != 0 {
				t.Fatalf("round %d: the probe was restarted: %+v", round, r)
			}
			t.Logf("round %d %s→%s: outage %s on the LAN (standstill %s, lost %d), downtime %s by QEMU, total %s, %d MiB", round, way[0].Name, way[1].Name,
				r.Pause().Round(time.Millisecond), r.Standstill.Round(time.Millisecond), r.Lost, op.Move.Downtime, op.Move.Total.Round(time.Millisecond), op.Move.MemorySent>>20)
		}
	}
}

// awaitGone waits until the guest no longer runs on n.
func (b *bed) awaitGone(n *cluster.Node) {
	b.t.Helper()
	ctx := b.ctx(time.Minute)
	for b.virsh(n, "list", "--name") != "" {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			b.t.Fatalf("the guest does not leave %s", n.Name)
		}
	}
}
