package vmtests

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/patch/vmm"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
	"belay/vmtests/probe"
)

// vmmHost is a host of the lab as package vmm sees it.
type vmmHost struct{ *hypervisor.Host }

func (h vmmHost) Describe(ctx context.Context, uuid string) (vmm.Description, error) {
	x, err := h.GuestXML(ctx, uuid)
	return vmm.Description{Live: x.Live, Portable: x.Portable, Inactive: x.Inactive}, err
}

// notebook is a Scratch in memory. It outlives a replacement that is killed.
type notebook struct {
	mu    sync.Mutex
	phase string
	saved map[string][]byte
	notes []string
}

func newNotebook() *notebook { return &notebook{saved: make(map[string][]byte)} }

func (n *notebook) Note(format string, args ...any) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.notes = append(n.notes, n.phase+": "+fmt.Sprintf(format, args...))
	return nil
}

func (n *notebook) Save(v any) (err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.saved[n.phase], err = json.Marshal(v)
	return err
}

func (n *notebook) Load(phase string, v any) (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, ok := n.saved[phase]
	if !ok {
		return false, nil
	}
	return true, json.Unmarshal(b, v)
}

// swapBed is a lab with one guest whose QEMU is to be replaced.
type swapBed struct {
	t     *testing.T
	lab   *lab.Lab
	host  *lab.Host
	hv    *hypervisor.Host
	guest *guest.Guest
	uuid  string
	obs   *observer.Observer
	first probe.Status
	mem   probe.MemoryReport
	ops   int
}

func newSwapBed(t *testing.T, c lab.Config, s guest.Spec) *swapBed {
	t.Helper()
	img, accel := guest.ForTest(t)
	if c.QEMU == "" {
		c.QEMU = img.QEMU
	}
	if c.Hosts == 0 {
		c.Hosts = 1
	}
	if c.Hooks == "" {
		c.Hooks = "../dist/hooks"
	}
	b := &swapBed{t: t, lab: lab.ForTest(t, c)}
	b.host = b.lab.Hosts[0]
	b.hv = hypervisor.New(hypervisor.Config{Socket: b.host.LibvirtSocket()})
	t.Cleanup(func() { b.hv.Close() })
	err := b.lab.InSwitch(func() error {
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
	s.Name, s.Accel, s.IP, s.Heartbeat = "web-1", accel, netip.MustParsePrefix("10.77.1.1/16"), heartbeats
	if s.MemoryMiB == 0 {
		s.MemoryMiB = 192
	}
	if s.Disk == "" {
		s.Disk = filepath.Join(b.lab.Shared, "web-1.qcow2")
	}
	if !strings.HasPrefix(s.Disk, "/dev/") {
		if err := guest.CreateDisk(t.Context(), s.Disk, 64); err != nil {
			t.Fatal(err)
		}
	}
	if b.guest, err = guest.Start(b.ctx(3*time.Minute), b.host, s, img); err != nil {
		t.Fatal(err)
	}
	if !s.Transient {
		b.virsh("autostart", "web-1")
	}
	b.uuid = b.virsh("domuuid", "web-1")
	c0, ctx := b.dial(b.host), b.ctx(time.Minute)
	_, err = c0.Dirty(ctx, probe.DirtySettings{RateMiBs: 8, WorkingSetMiB: 32})
	if err == nil {
		_, err = c0.DiskWrite(ctx, probe.DiskSettings{SizeMiB: 16, Seed: 7})
	}
	c0.Close() // the probe has one client at a time
	if err != nil {
		t.Fatal(err)
	}
	b.first, b.mem = b.look(b.host)
	return b
}

func (b *swapBed) ctx(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(b.t.Context(), d)
	b.t.Cleanup(cancel)
	return ctx
}

func (b *swapBed) virsh(args ...string) string {
	b.t.Helper()
	out, err := b.host.Virsh(b.ctx(time.Minute), args...)
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func (b *swapBed) dial(h *lab.Host) *guest.Control {
	b.t.Helper()
	c, err := b.guest.Dial(b.ctx(time.Minute), h)
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

func (b *swapBed) look(h *lab.Host) (s probe.Status, m probe.MemoryReport) {
	b.t.Helper()
	c := b.dial(h)
	defer c.Close()
	ctx := b.ctx(time.Minute)
	s, err := c.Status(ctx)
	if err == nil {
		m, err = c.Verify(ctx)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return s, m
}

func (b *swapBed) places() vmm.Places {
	return vmm.Places{Root: b.host.Root(), Copies: lab.MemoryDir + "/copies"}
}

// replacement is a new operation on the guest.
func (b *swapBed) replacement(method maint.VMMMethod) *vmm.Replacement {
	b.ops++
	return &vmm.Replacement{Op: maint.OpID(fmt.Sprintf("rep-%d", b.ops)), Guest: "web-1", UUID: b.uuid, Method: method,
		Host: vmmHost{b.hv}, Places: b.places(), Log: slog.New(slog.NewTextHandler(b.t.Output(), nil))}
}

// run takes a replacement through its phases as the agent does, undoing when
// one before the end of the swap fails.
func (b *swapBed) run(r *vmm.Replacement, n *notebook) error {
	ctx := b.ctx(4 * time.Minute)
	do := func(phase string, f func(context.Context, vmm.Scratch) error) error {
		n.phase = phase
		if err := f(ctx, n); err != nil {
			return fmt.Errorf("%s: %w", phase, err)
		}
		return nil
	}
	return swapPhases(r, do)
}

// isWhole checks that the guest is the one that was started, alive and whole,
// with its disk, its agent and its autostart.
func (b *swapBed) isWhole(h *lab.Host) {
	b.t.Helper()
	s, m := b.look(h)
	if s.BootID != b.first.BootID || s.Incarnation != b.first.Incarnation {
		b.t.Fatalf("the guest or its probe has been started anew: %+v, was %+v", s, b.first)
	}
	if s.Heartbeat.Sequence <= b.first.Heartbeat.Sequence {
		b.t.Fatalf("its heartbeats do not go on: %d, was %d", s.Heartbeat.Sequence, b.first.Heartbeat.Sequence)
	}
	b.first.Heartbeat.Sequence = s.Heartbeat.Sequence
	if !m.OK() || m.FixedChecksum != b.mem.FixedChecksum {
		b.t.Fatalf("its memory is damaged: %+v, was %+v", m, b.mem)
	}
	c, ctx := b.dial(h), b.ctx(time.Minute)
	defer c.Close()
	if d, err := c.DiskVerify(ctx, probe.DiskSettings{SizeMiB: 16, Seed: 7}); err != nil || d.BadBlocks != 0 {
		b.t.Fatalf("its disk is damaged: %+v, %v", d, err)
	}
	// and it can be written
	if _, err := c.DiskWrite(ctx, probe.DiskSettings{SizeMiB: 16, Seed: 7}); err != nil {
		b.t.Fatal(err)
	}
	if err := b.guest.AgentPing(ctx, h); err != nil {
		b.t.Fatal(err)
	}
	if k, err := c.Kmsg(ctx); err != nil || k.Bugs != 0 {
		b.t.Fatalf("its kernel complains: %+v, %v", k, err)
	}
}

// isTidy checks that nothing is left of a replacement.
func (b *swapBed) isTidy() {
	b.t.Helper()
	for _, pattern := range []string{"/run/belay/vmm/*-*", lab.MemoryDir + "/belay/*", lab.MemoryDir + "/copies/*", "/var/lib/libvirt/qemu/domain-*/belay*"} {
		if left, _ := filepath.Glob(b.host.Path(pattern)); len(left) > 0 {
			b.t.Errorf("left behind: %v", left)
		}
	}
	caps := b.virsh("qemu-monitor-command", "web-1", `{"execute":"query-migrate-capabilities"}`)
	if !strings.Contains(strings.ReplaceAll(caps, " ", ""), `{"state":false,"capability":"x-ignore-shared"}`) {
		b.t.Errorf("a migration would leave memory behind: %s", caps)
	}
}

func swapPhases(r *vmm.Replacement, do func(string, func(context.Context, vmm.Scratch) error) error) error {
	if err := do(vmm.PhasePreflight, r.Preflight); err != nil {
		return err
	}
	err := do(vmm.PhasePrepare, r.Prepare)
	if err == nil {
		err = do(vmm.PhaseSwap, r.Swap)
	}
	if err != nil {
		for _, undo := range []func(context.Context, vmm.Scratch) error{r.Back, r.Unprepare} {
			if undone := do("undo", undo); undone != nil {
				return fmt.Errorf("%w; %w", err, undone)
			}
		}
		return err
	}
	if err := do(vmm.PhaseProve, r.Prove); err != nil {
		return err
	}
	return do(vmm.PhaseFinish, r.Finish)
}

// A guest gets new QEMUs, one after the other, its memory where it is.
func TestNewQEMUInPlace(t *testing.T) {
	t.Parallel()
	b := newSwapBed(t, lab.Config{}, guest.Spec{FileMemory: true})
	definition := b.virsh("dumpxml", "--inactive", "--security-info", "web-1")
	for round := range 3 {
		pid := b.pid()
		mark := b.obs.Mark()
		r, n := b.replacement(maint.VMMInPlace), newNotebook()
		if err := b.run(r, n); err != nil {
			t.Fatalf("round %d: %v; %q", round, err, n.notes)
		}
		res, err := r.Measure(b.ctx(time.Minute), n)
		if err != nil {
			t.Fatal(err)
		}
		if now := b.pid(); now == pid {
			t.Fatalf("its QEMU is still process %s", pid)
		}
		b.isWhole(b.host)
		b.isTidy()
		if err := b.obs.Await(b.ctx(10*time.Second), "web-1", 100); err != nil {
			t.Fatal(err)
		}
		seen := b.obs.Since(mark, "web-1")
		if seen.Restarts != 0 {
			t.Fatalf("the probe was restarted: %+v", seen)
		}
		t.Logf("round %d: pause %v (%s), outage %v on the LAN, standstill %v", round, res.Pause.Round(time.Millisecond), n.saved[vmm.PhaseSwap], seen.Pause().Round(time.Millisecond), seen.Standstill.Round(time.Millisecond))
		if now := b.virsh("dumpxml", "--inactive", "--security-info", "web-1"); now != definition {
			t.Fatalf("its definition has changed:\n%s\nwas\n%s", now, definition)
		}
		if got := b.virsh("list", "--autostart", "--name"); got != "web-1" {
			t.Fatalf("it lost its autostart: %q", got)
		}
	}
}

// pid is the process of the guest's QEMU.
func (b *swapBed) pid() string {
	b.t.Helper()
	return b.read("/run/libvirt/qemu/web-1.pid")
}

func (b *swapBed) read(path string) string {
	b.t.Helper()
	text, err := readHostFile(b.host, path)
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.TrimSpace(text)
}

func readHostFile(h *lab.Host, path string) (string, error) {
	b, err := os.ReadFile(h.Path(path))
	return string(b), err
}
