package vmtests

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
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
	return vmm.Description{Live: x.Live, Portable: x.Portable, Inactive: x.Inactive, CPU: x.CPU}, err
}

// notebook is a Scratch that outlives a replacement that is killed: with a file,
// also one in a process of its own.
type notebook struct {
	file  string
	phase string

	Done  map[string]bool
	Saved map[string]json.RawMessage
	Notes []string
}

func newNotebook() *notebook {
	return &notebook{Done: make(map[string]bool), Saved: make(map[string]json.RawMessage)}
}

// openNotebook takes up one that is in a file, if it is there.
func openNotebook(file string) (*notebook, error) {
	n := newNotebook()
	n.file = file
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return n, nil
	}
	if err == nil {
		err = json.Unmarshal(b, n)
	}
	return n, err
}

func (n *notebook) write() error {
	if n.file == "" {
		return nil
	}
	b, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.file+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(n.file+".new", n.file)
}

func (n *notebook) Note(format string, args ...any) error {
	n.Notes = append(n.Notes, n.phase+": "+fmt.Sprintf(format, args...))
	return n.write()
}

func (n *notebook) Save(v any) (err error) {
	if n.Saved[n.phase], err = json.Marshal(v); err != nil {
		return err
	}
	return n.write()
}

func (n *notebook) Load(phase string, v any) (bool, error) {
	b, ok := n.Saved[phase]
	if !ok {
		return false, nil
	}
	return true, json.Unmarshal(b, v)
}

// run takes a replacement through its phases as the agent does, from the first
// that is not done, and undoes when one before the end of the swap fails.
func (n *notebook) run(ctx context.Context, r *vmm.Replacement) error {
	do := func(phase string, f func(context.Context, vmm.Scratch) error) error {
		if n.Done[phase] {
			return nil
		}
		n.phase = phase
		if err := f(ctx, n); err != nil {
			return fmt.Errorf("%s: %w", phase, err)
		}
		n.Done[phase] = true
		return n.write()
	}
	if err := do(vmm.PhasePreflight, r.Preflight); err != nil {
		return err
	}
	err := do(vmm.PhasePrepare, r.Prepare)
	if err == nil {
		err = do(vmm.PhaseSwap, r.Swap)
	}
	if err != nil && !errors.Is(err, vmm.ErrStuck) {
		return errors.Join(err, r.Back(ctx, n), r.Unprepare(ctx, n))
	}
	if err == nil {
		err = do(vmm.PhaseProve, r.Prove)
	}
	if err == nil {
		err = do(vmm.PhaseFinish, r.Finish)
	}
	return err
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
	switch c.QEMU {
	case "":
		c.QEMU = img.QEMU
	case machineQEMU:
		c.QEMU = ""
	}
	if c.Hosts == 0 {
		c.Hosts = 1
	}
	switch c.Hooks {
	case "":
		c.Hooks = "../dist/hooks"
	case noHooks:
		c.Hooks = ""
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
	s.Name, s.Accel, s.IP, s.Heartbeat, s.IntervalUs = "web-1", accel, netip.MustParsePrefix("10.77.1.1/16"), heartbeats, beatUs
	if s.MemoryMiB == 0 {
		s.MemoryMiB = 192
	}
	if s.Disk == sharedDevice {
		s.Disk, err = b.lab.AddDisk(t.Context(), "web-1", 64<<20)
	} else {
		s.Disk = filepath.Join(b.lab.Shared, cmp.Or(s.Disk, "web-1.qcow2"))
		err = guest.CreateDisk(t.Context(), s.Disk, 64)
	}
	if err != nil {
		t.Fatal(err)
	}
	if b.guest, err = guest.Start(b.ctx(3*time.Minute), b.host, s, img); err != nil {
		t.Fatal(err)
	}
	if !s.Transient {
		b.virsh("autostart", "web-1")
	}
	b.uuid = b.virsh("domuuid", "web-1")
	c0, ctx := b.dial(b.host), b.ctx(time.Minute)
	_, err = c0.Dirty(ctx, probe.DirtySettings{RateMiBs: 8, WorkingSetMiB: 16})
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
	ctx := b.ctx(3 * time.Minute)
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

// swap does one replacement that is to succeed, and checks the guest and that
// nothing is left. It returns what was measured.
func (b *swapBed) swap(method maint.VMMMethod) maint.VMMResult {
	b.t.Helper()
	pid, mark := b.pid(), b.obs.Mark()
	r, n := b.replacement(method), newNotebook()
	if err := n.run(b.ctx(4*time.Minute), r); err != nil {
		b.t.Fatalf("%v; notes %q", err, n.Notes)
	}
	res, err := r.Measure(b.ctx(time.Minute), n)
	if err != nil {
		b.t.Fatal(err)
	}
	if now := b.pid(); now == pid {
		b.t.Fatalf("its QEMU is still process %s", pid)
	}
	b.isWhole(b.host)
	b.isTidy()
	if err := b.obs.Await(b.ctx(time.Minute), "web-1", 20); err != nil {
		b.t.Fatal(err)
	}
	seen := b.obs.Since(mark, "web-1")
	if seen.Restarts != 0 || seen.Pause() == 0 {
		b.t.Fatalf("seen on the LAN: %+v", seen)
	}
	b.t.Logf("%s: pause %v %s, outage %v on the LAN", method, res.Pause.Round(time.Millisecond), n.Saved[vmm.PhaseSwap], seen.Pause().Round(time.Millisecond))
	return res
}

// A guest gets new QEMUs, one after the other, its memory where it is. Then
// libvirt does with it what it can do with any other.
func TestNewQEMUInPlace(t *testing.T) {
	t.Parallel()
	b := newSwapBed(t, lab.Config{Hosts: 2}, guest.Spec{FileMemory: true, Disk: sharedDevice})
	definition := b.virsh("dumpxml", "--inactive", "--security-info", "web-1")
	same := func() {
		t.Helper()
		if now := b.virsh("dumpxml", "--inactive", "--security-info", "web-1"); now != definition {
			t.Fatalf("its definition has changed:\n%s\nwas\n%s", now, definition)
		}
		if got := b.virsh("list", "--autostart", "--name"); got != "web-1" {
			t.Fatalf("it lost its autostart: %q", got)
		}
	}
	rounds := 1
	if long() {
		rounds = 5
	}
	for range rounds {
		b.swap(maint.VMMInPlace)
		same()
		if err := b.rival(b.lab.Hosts[1]); err == nil || !strings.Contains(err.Error(), "lock") {
			t.Fatalf("its disk's lease is not held: %v", err)
		}
	}

	// It is saved and restored with its memory.
	image := filepath.Join(b.lab.Shared, "saved")
	b.virsh("save", "web-1", image)
	b.virsh("restore", image)
	b.isWhole(b.host)
	b.swap(maint.VMMInPlace)

	// It leaves, and comes back.
	there, back := b.lab.Hosts[1], b.host
	move := func(from, to *lab.Host) {
		t.Helper()
		if _, err := from.Virsh(b.ctx(2*time.Minute), "migrate", "--live", "--p2p", "--persistent", "--undefinesource", "web-1", to.PeerURI(false)); err != nil {
			t.Fatal(err)
		}
		b.isWhole(to)
	}
	move(back, there)
	move(there, back)
	b.virsh("autostart", "web-1")
	b.swap(maint.VMMInPlace)

	// Its own reboot, and its end, are as ever.
	b.virsh("reset", "web-1")
	c := b.dial(b.host)
	defer c.Close()
	ctx := b.ctx(time.Minute)
	for {
		ask, cancel := context.WithTimeout(ctx, 5*time.Second)
		s, err := c.Status(ask)
		cancel()
		if err == nil && s.BootID != b.first.BootID {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("it did not boot anew: %+v, %v", s, err)
		}
	}
	b.virsh("destroy", "web-1")
	b.virsh("start", "web-1")
	if live := b.virsh("dumpxml", "web-1"); strings.Contains(live, "BELAY_REPLACE") || strings.Contains(live, "-incoming") {
		t.Errorf("something of the replacement is in its next start:\n%s", live)
	}
}

// rival starts another guest with the same disk.
func (b *swapBed) rival(on *lab.Host) error {
	b.t.Helper()
	file := filepath.Join(b.t.TempDir(), "rival.xml")
	text := `<domain type='qemu'><name>rival</name><memory unit='MiB'>64</memory><os><type arch='x86_64' machine='` + guest.Machine + `'>hvm</type></os><features><acpi/></features>
		<devices><disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/><source dev='` + b.guest.Spec.Disk + `'/><target dev='vda' bus='virtio'/></disk></devices></domain>`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
	_, err := on.Virsh(b.ctx(time.Minute), "create", file)
	return err
}

// sharedDevice asks newSwapBed for a disk that is a block device.
const sharedDevice = "/dev/"

// richDevices are what many guests have and the lab's do without.
const richDevices = `<graphics type='vnc' autoport='yes' passwd='secret'/>
    <video><model type='virtio'/></video>
    <input type='tablet' bus='virtio'/>
    <controller type='scsi' model='virtio-scsi'/>
    <disk type='file' device='cdrom'><target dev='sda' bus='scsi'/><readonly/></disk>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <watchdog model='i6300esb' action='reset'/>
    <panic model='isa'/>`

// A transient guest with many devices gets a QEMU of a newer version.
func TestNewQEMUIsNewer(t *testing.T) {
	t.Parallel()
	longOnly(t)
	img, _ := guest.ForTest(t)
	if img.QEMU == "" {
		t.Skip("the machine's own QEMU is the newest there is")
	}
	b := newSwapBed(t, lab.Config{QEMU: machineQEMU}, guest.Spec{FileMemory: true, Transient: true, VCPUs: 2, Devices: richDevices})
	old := b.virsh("qemu-monitor-command", "--hmp", "web-1", "info version")
	for _, part := range []string{"/usr/bin/qemu-system-x86_64", "/usr/lib/x86_64-linux-gnu/qemu", "/usr/share/qemu", "/usr/share/seabios"} {
		if out, err := b.host.Command(t.Context(), "mount", "--bind", img.QEMU+part, part).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	res := b.swap(maint.VMMInPlace)
	if !strings.HasPrefix(old, res.OldQEMU) || res.NewQEMU == res.OldQEMU {
		t.Errorf("from %q to %q; QEMU itself says it was %q", res.OldQEMU, res.NewQEMU, old)
	}
	if live := b.virsh("dumpxml", "--security-info", "web-1"); !strings.Contains(live, "passwd='secret'") {
		t.Error("it lost its password")
	}
	b.swap(maint.VMMInPlace)
	b.swap(maint.VMMCopy)
}

// machineQEMU asks newSwapBed for the machine's own QEMU, noHooks for no hook.
const (
	machineQEMU = "machine"
	noHooks     = "none"
)

// pid is the process of the guest's QEMU.
func (b *swapBed) pid() string {
	b.t.Helper()
	return b.read(pidFile)
}

const pidFile = "/run/libvirt/qemu/web-1.pid"

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
