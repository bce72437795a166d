package guest_test

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
	"belay/vmtests/probe"
)

const beatPort = 9099

// world is a lab with an observer on its LAN and a way to start guests.
type world struct {
	*lab.Lab
	obs   *observer.Observer
	img   guest.Image
	accel guest.Accel
}

func newWorld(t *testing.T, hosts int) *world {
	t.Helper()
	w := &world{}
	w.img, w.accel = guest.ForTest(t)
	w.Lab = lab.ForTest(t, lab.Config{Hosts: hosts, QEMU: w.img.QEMU})
	var conn *net.UDPConn
	err := w.InSwitch(func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: lab.SwitchAddr().AsSlice(), Port: beatPort})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if w.obs, err = observer.Listen(conn, observer.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.obs.Close() })
	return w
}

// spec is a guest that sends heartbeats; n makes its address.
func (w *world) spec(name string, n byte) guest.Spec {
	return guest.Spec{
		Name:      name,
		IP:        netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 1, n}), 16),
		Accel:     w.accel,
		Heartbeat: netip.AddrPortFrom(lab.SwitchAddr(), beatPort),
	}
}

func (w *world) start(t *testing.T, ctx context.Context, h *lab.Host, s guest.Spec) (*guest.Guest, *guest.Control) {
	t.Helper()
	g, err := guest.Start(ctx, h, s, w.img)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s (%d MiB, disk %t): probe after %v, agent after %v", s.Name, g.Spec.MemoryMiB, s.Disk != "",
		g.Boot.Probe.Round(time.Millisecond), g.Boot.Agent.Round(time.Millisecond))
	return g, w.dial(t, ctx, h, s.Name)
}

func (w *world) dial(t *testing.T, ctx context.Context, h *lab.Host, name string) *guest.Control {
	t.Helper()
	c, err := guest.Dial(ctx, h, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func timeout(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func virsh(t *testing.T, ctx context.Context, h *lab.Host, args ...string) string {
	t.Helper()
	out, err := h.Virsh(ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Small and large, with and without a disk: they boot, their rulers are sound,
// and they stop when asked.
func TestGuestBoots(t *testing.T) {
	w := newWorld(t, 1)
	ctx := timeout(t, 10*time.Minute)
	h := w.Hosts[0]
	n := byte(0)
	for _, mib := range []int{128, 1024} {
		for _, disk := range []string{"", ".qcow2"} {
			if os.Getenv("BELAY_LONG") == "" && (mib == 1024) != (disk != "") {
				continue
			}
			n++
			s := w.spec("boot"+string('0'+rune(n)), n)
			s.MemoryMiB, s.IntervalUs = mib, 20_000
			if disk != "" {
				s.Disk = filepath.Join(w.Shared, s.Name+disk)
				if err := guest.CreateDisk(ctx, s.Disk, 16); err != nil {
					t.Fatal(err)
				}
				if guest.CreateDisk(ctx, s.Disk, 16) == nil {
					t.Error("an existing disk was overwritten")
				}
			}
			g, c := w.start(t, ctx, h, s)
			if err := w.obs.Await(ctx, s.Name, 10); err != nil {
				t.Error(err)
			}
			st, err := c.Status(ctx)
			if err != nil || st.Guest != s.Name || st.Disk != (disk != "") || len(st.BootID) != 36 {
				t.Errorf("status: %+v, %v", st, err)
			}
			checkMemory(t, ctx, c, mib)
			if disk != "" {
				checkDisk(t, ctx, c)
			}
			if k, err := c.Kmsg(ctx); err != nil || k.Bugs != 0 {
				t.Errorf("kernel log: %+v, %v", k, err)
			}
			// Agent and ACPI in turn.
			mode := []string{"agent", "acpi"}[n%2]
			stop(t, ctx, h, g, mode)
		}
	}
}

// checkMemory proves that a sound guest verifies and a spoilt one does not.
func checkMemory(t *testing.T, ctx context.Context, c *guest.Control, mib int) {
	t.Helper()
	if _, err := c.Dirty(ctx, probe.DirtySettings{RateMiBs: 20, WorkingSetMiB: mib / 8}); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Verify(ctx); err != nil || !r.OK() {
		t.Errorf("while dirtying: %+v, %v", r, err)
	}
	if _, err := c.Dirty(ctx, probe.DirtySettings{}); err != nil {
		t.Fatal(err)
	}
	a, err := c.Verify(ctx)
	if err != nil || !a.OK() || a.Pages < uint64(mib/8*256) {
		t.Errorf("memory: %+v, %v", a, err)
	}
	b, err := c.Verify(ctx)
	if err != nil || b.Checksum != a.Checksum || b.FixedChecksum != a.FixedChecksum {
		t.Errorf("checksums moved by themselves: %+v, %+v, %v", a, b, err)
	}
	if err := c.Corrupt(ctx, probe.CorruptSettings{Page: 99}); err != nil {
		t.Error(err)
	}
	if r, err := c.Verify(ctx); err != nil || r.BadPages != 1 || r.BadSample[0] != 99 || r.Checksum == a.Checksum {
		t.Errorf("one spoilt page: %+v, %v", r, err)
	}
	if err := c.Corrupt(ctx, probe.CorruptSettings{Page: 1 << 40}); err == nil {
		t.Error("the probe's error did not arrive")
	}
}

func checkDisk(t *testing.T, ctx context.Context, c *guest.Control) {
	t.Helper()
	d := probe.DiskSettings{SizeMiB: 8, Seed: 5}
	a, err := c.DiskWrite(ctx, d)
	if err != nil {
		t.Error(err)
	}
	if b, err := c.DiskVerify(ctx, d); err != nil || b.BadBlocks != 0 || b.Checksum != a.Checksum {
		t.Errorf("disk: wrote %+v, read %+v, %v", a, b, err)
	}
	d.Seed++
	if b, err := c.DiskVerify(ctx, d); err != nil || b.BadBlocks != 8*256 {
		t.Errorf("disk with another pattern: %+v, %v", b, err)
	}
}

// stop shuts the guest down in an orderly way and waits until it is off.
func stop(t *testing.T, ctx context.Context, h *lab.Host, g *guest.Guest, mode string) {
	t.Helper()
	name := g.Spec.Name
	begin := time.Now()
	virsh(t, ctx, h, "shutdown", "--mode", mode, name)
	for state := ""; !strings.Contains(state, "shut off"); {
		if time.Since(begin) > time.Minute {
			text, _ := g.Console(ctx, h)
			t.Fatalf("%s: no shutdown by %s; console:\n%s", name, mode, text)
		}
		state = virsh(t, ctx, h, "domstate", name)
	}
	t.Logf("%s: off by %s after %v", name, mode, time.Since(begin).Round(time.Millisecond))
	if err := g.Destroy(ctx, h); err != nil {
		t.Error(err)
	}
	if err := g.Destroy(ctx, h); err != nil {
		t.Errorf("destroying what is gone: %v", err)
	}
}
