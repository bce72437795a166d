package vmtests

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/patch/vmm/twin"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
	"belay/vmtests/probe"
)

// twinBed is a lab with a guest at home on host-a, and an observer.
type twinBed struct {
	t     *testing.T
	lab   *lab.Lab
	home  *lab.Host
	away  twinHost // its twin
	guest *guest.Guest
	uuid  string
	obs   *observer.Observer

	boot       string // of the guest
	first      probe.MemoryReport
	definition string
	visits     int
}

// twinHost is the twin as the guest's tools see a host.
type twinHost struct{ *lab.Host }

func (h twinHost) socket() string { return h.Host.Path(twin.DefaultRoot + "/run/libvirt-sock") }

// DialUnix takes the twin's folders for libvirt's.
func (h twinHost) DialUnix(ctx context.Context, inside string) (net.Conn, error) {
	for dir, own := range map[string]string{"/var/lib/libvirt/qemu/": "lib/", "/run/libvirt/": "run/"} {
		if rest, ok := strings.CutPrefix(inside, dir); ok && !strings.HasPrefix(inside, lab.MemoryDir+"/") {
			return h.Host.DialUnix(ctx, filepath.Join(twin.DefaultRoot, own, rest))
		}
	}
	return h.Host.DialUnix(ctx, inside)
}

// Virsh runs virsh against the twin.
func (h twinHost) Virsh(ctx context.Context, args ...string) (string, error) {
	return h.Host.Virsh(ctx, append([]string{"-c", "qemu+unix:///system?socket=" + h.socket()}, args...)...)
}

func newTwinBed(t *testing.T, c lab.Config, s guest.Spec) *twinBed {
	t.Helper()
	img, accel := guest.ForTest(t)
	switch c.QEMU {
	case "":
		c.QEMU = img.QEMU
	case "/":
		c.QEMU = ""
	}
	b := &twinBed{t: t, lab: lab.ForTest(t, c)}
	b.home = b.lab.Hosts[0]
	b.away = twinHost{b.home}
	err := b.lab.InSwitch(func() error {
		conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(twinHeartbeats()))
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
	disk, err := b.lab.AddDisk(b.ctx(time.Minute), "web-1.raw", 32<<20)
	if err != nil {
		t.Fatal(err)
	}
	s.Name, s.Accel, s.IP, s.Heartbeat, s.Disk = "web-1", accel, netip.MustParsePrefix("10.77.1.1/16"), twinHeartbeats(), disk
	if s.MemoryMiB == 0 {
		s.MemoryMiB = 192
	}
	if b.guest, err = guest.Start(b.ctx(4*time.Minute), b.home, s, img); err != nil {
		t.Fatal(err)
	}
	b.virsh(b.home, "autostart", "web-1")
	b.uuid = b.virsh(b.home, "domuuid", "web-1")
	b.definition = b.virsh(b.home, "dumpxml", "--inactive", "--security-info", "web-1")
	control := b.dial(b.home)
	_, err = control.DiskWrite(b.ctx(time.Minute), diskPattern())
	if err := errors.Join(err, control.Close()); err != nil { // it serves one at a time
		t.Fatal(err)
	}
	b.boot, b.first = b.look(b.home)
	b.dirty(b.home, 8)
	return b
}

func twinHeartbeats() netip.AddrPort { return netip.AddrPortFrom(lab.SwitchAddr(), 9099) }

func diskPattern() probe.DiskSettings { return probe.DiskSettings{SizeMiB: 16, Seed: 7} }

// twinHooks is a folder with Belay's hook, as lab.Config wants it.
func twinHooks(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "qemu.d", filepath.Base(twin.HookPath))
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(twin.HomeHook(twin.DefaultRoot)), 0o755)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (b *twinBed) ctx(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(b.t.Context(), d)
	b.t.Cleanup(cancel)
	return ctx
}

func (b *twinBed) virsh(h guest.Host, args ...string) string {
	b.t.Helper()
	out, err := h.Virsh(b.ctx(2*time.Minute), args...)
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func (b *twinBed) dial(h guest.Host) *guest.Control {
	b.t.Helper()
	c, err := b.guest.Dial(b.ctx(2*time.Minute), h)
	if err != nil {
		b.t.Fatal(err)
	}
	// An answer to a client that the guest does not know yet is lost.
	for range 10 {
		if _, err = c.Status(b.ctx(5 * time.Second)); err == nil {
			return c
		}
	}
	b.t.Fatal(err)
	return nil
}

func (b *twinBed) dirty(h guest.Host, rate float64) {
	b.t.Helper()
	c := b.dial(h)
	defer c.Close()
	if _, err := c.Dirty(b.ctx(2*time.Minute), probe.DirtySettings{RateMiBs: rate, WorkingSetMiB: 32}); err != nil {
		b.t.Fatal(err)
	}
}

// look asks the guest where it must be.
func (b *twinBed) look(h guest.Host) (boot string, m probe.MemoryReport) {
	b.t.Helper()
	c := b.dial(h)
	defer c.Close()
	s, err := c.Status(b.ctx(2 * time.Minute))
	if err == nil {
		m, err = c.Verify(b.ctx(2 * time.Minute))
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return s.BootID, m
}

// isWhole checks that the guest is the one that was started, with all of its
// memory and its disk, on h.
func (b *twinBed) isWhole(h guest.Host) {
	b.t.Helper()
	boot, m := b.look(h)
	if boot != b.boot || !m.OK() || m.FixedChecksum != b.first.FixedChecksum {
		b.t.Fatalf("the guest is not the one that was started, or not whole: boot ID %s (was %s), %+v (was %+v)", boot, b.boot, m, b.first)
	}
	c := b.dial(h)
	defer c.Close()
	if d, err := c.DiskVerify(b.ctx(time.Minute), diskPattern()); err != nil || d.BadBlocks != 0 {
		b.t.Fatalf("the guest's disk: %+v, %v", d, err)
	}
}

// isHome checks that the guest is whole at home, defined there as it was, that
// its QEMU is an ordinary one, and that nothing is left of the twin.
func (b *twinBed) isHome() {
	b.t.Helper()
	b.isWhole(b.home)
	if now := b.virsh(b.home, "dumpxml", "--inactive", "--security-info", "web-1"); now != b.definition {
		b.t.Errorf("its definition has changed:\n%s\nwas\n%s", now, b.definition)
	}
	if info := b.virsh(b.home, "dominfo", "web-1"); !strings.Contains(info, "Autostart:      enable") {
		b.t.Errorf("it has lost its autostart:\n%s", info)
	}
	caps := b.virsh(b.home, "qemu-monitor-command", "web-1", `{"execute":"query-migrate-capabilities"}`)
	if strings.Contains(strings.ReplaceAll(caps, " ", ""), `"state":true,"capability":"x-ignore-shared"`) {
		b.t.Error("its QEMU leaves its memory out of migrations")
	}
	if _, err := os.Stat(b.home.Path(twin.DefaultRoot)); !os.IsNotExist(err) {
		b.t.Errorf("the twin's folder is still there: %v", err)
	}
	if names := b.hostProcesses(); len(names) > 0 {
		b.t.Errorf("processes of the twin are left: %v", names)
	}
	if left, _ := filepath.Glob(b.home.Path(lab.MemoryDir) + "/belay-twin*"); len(left) > 0 {
		b.t.Errorf("memory is left: %v", left)
	}
	if taps := b.taps(); len(taps) != 1 {
		b.t.Errorf("taps: %v, want one", taps)
	}
}

// hostProcesses are the processes of the host that are in other mount namespaces
// than its own.
func (b *twinBed) hostProcesses() (names []string) {
	b.t.Helper()
	netns, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.home.InNet(func() (err error) { netns, err = os.Readlink("/proc/thread-self/ns/net"); return err }); err != nil {
		b.t.Fatal(err)
	}
	own, err := os.Readlink(filepath.Join(filepath.Dir(b.home.Root()), "ns/mnt"))
	if err != nil {
		b.t.Fatal(err)
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		b.t.Fatal(err)
	}
	for _, p := range procs {
		net, err := os.Readlink(p + "/ns/net")
		if err != nil || net != netns {
			continue
		}
		if mnt, err := os.Readlink(p + "/ns/mnt"); err == nil && mnt != own {
			comm, _ := os.ReadFile(p + "/comm")
			if name := strings.TrimSpace(string(comm)); !strings.HasPrefix(filepath.Base(p), "self") && filepath.Base(p) != "thread-self" {
				names = append(names, filepath.Base(p)+" "+name)
			}
		}
	}
	return slices.DeleteFunc(names, func(n string) bool { return strings.HasPrefix(n, itself()) })
}

// itself is the test's own process, of which a thread may be in the host's
// network for a moment.
func itself() string { link, _ := os.Readlink("/proc/self"); return link + " " }

func (b *twinBed) taps() (taps []string) {
	b.t.Helper()
	err := b.home.InNet(func() error {
		links, err := net.Interfaces()
		for _, l := range links {
			if strings.HasPrefix(l.Name, "vnet") {
				taps = append(taps, l.Name)
			}
		}
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return taps
}

// qemu is the process of the guest at home.
func (b *twinBed) qemu() string {
	b.t.Helper()
	text, err := os.ReadFile(b.home.Path("/run/libvirt/qemu/web-1.pid"))
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// visitor is a process in the host that makes a visit, as belayd would.
type visitor struct {
	b     *twinBed
	kill  func()
	lines chan string // closed at its end
	said  bytes.Buffer
}

// visit starts a process that does some phases. Processes with the same notebook
// do one visit.
func (b *twinBed) visit(r twinRole) *visitor {
	b.t.Helper()
	r.Guest, r.UUID = "web-1", b.uuid
	ctx, cancel := context.WithTimeout(b.t.Context(), 10*time.Minute)
	cmd := b.home.Command(ctx, os.Args[0], "-test.run=^TestTwinRole$", "-test.timeout=0")
	cmd.Env = append(os.Environ(), r.env())
	v := &visitor{b: b, kill: cancel, lines: make(chan string, 100)}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	cmd.Stderr = &v.said
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			v.lines <- s.Text()
		}
		_ = cmd.Wait() // a killed one fails, as it should
		cancel()
		close(v.lines)
	}()
	return v
}

// notebook is a new visit's.
func (b *twinBed) notebook() string {
	b.visits++
	return filepath.Join(b.t.TempDir(), "notebook.json")
}

// await waits until the visitor says this.
func (v *visitor) await(line string) {
	v.b.t.Helper()
	for got := range v.lines {
		if got == line {
			return
		}
		if strings.HasPrefix(got, "report ") {
			v.b.t.Fatalf("waited for %q, got %s", line, got)
		}
	}
	v.b.t.Fatalf("waited for %q until its end", line)
}

// end kills it, and gives what it has said that was not awaited.
func (v *visitor) end() (said []string) {
	v.kill()
	for line := range v.lines {
		said = append(said, line)
	}
	return said
}

// report waits for the visit's end.
func (v *visitor) report() (r twinReport) {
	v.b.t.Helper()
	for line := range v.lines {
		if text, ok := strings.CutPrefix(line, "report "); ok {
			if err := json.Unmarshal([]byte(text), &r); err != nil {
				v.b.t.Fatal(err)
			}
			v.end()
			return r
		}
	}
	v.b.t.Fatalf("it has ended without a report; it said:\n%s", v.said.String())
	return r
}

// good is report for a visit that must succeed.
func (v *visitor) good() twinReport {
	v.b.t.Helper()
	r := v.report()
	if r.Problem != "" {
		v.b.t.Fatalf("%s\nnotes: %v\nit said:\n%s", r.Problem, r.Notes, tail(v.said.String()))
	}
	return r
}

func tail(text string) string { return text[max(0, len(text)-3000):] }

// phases are those of a visit.
func twinPhases() []string {
	return []string{twin.PhasePreflight, twin.PhaseOut, twin.PhaseBack, twin.PhaseFinish}
}

// outage is what the LAN saw of the guest since the mark.
func (b *twinBed) outage(mark observer.Mark) observer.Report {
	b.t.Helper()
	if err := b.obs.Await(b.ctx(30*time.Second), "web-1", 100); err != nil {
		b.t.Fatal(err)
	}
	r := b.obs.Since(mark, "web-1")
	if r.Restarts != 0 {
		b.t.Fatalf("the probe was restarted: %+v", r)
	}
	return r
}

// measured is one way of a visit as the guest felt it.
type measured struct {
	Outage, Standstill, Took time.Duration
}

func (m measured) String() string {
	ms := func(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
	return fmt.Sprintf("outage on the LAN %s, its clock stood for %s, in all %s", ms(m.Outage), ms(m.Standstill), ms(m.Took))
}

// leg has one phase of a visit done, and measures it.
func (b *twinBed) leg(r twinRole, phase string) measured {
	b.t.Helper()
	mark, begin := b.obs.Mark(), time.Now()
	r.Phases = []string{phase}
	b.visit(r).good()
	took := time.Since(begin)
	o := b.outage(mark)
	return measured{o.Pause(), o.Standstill, took}
}

func (b *twinBed) read(path string) string {
	b.t.Helper()
	text, err := os.ReadFile(b.home.Path(path))
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// killSupervisor kills the process that holds the twin's lock.
func (b *twinBed) killSupervisor() {
	b.t.Helper()
	f, err := os.Open(b.home.Path(twin.DefaultRoot + "/lock"))
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &l); err != nil || l.Type == unix.F_UNLCK {
		b.t.Fatalf("nobody holds the twin's lock: %v", err)
	}
	if err := unix.Kill(int(l.Pid), unix.SIGKILL); err != nil {
		b.t.Fatal(err)
	}
}

// awaitCopy waits until the guest is being copied from h.
func (b *twinBed) awaitCopy(h guest.Host) {
	b.t.Helper()
	ctx := b.ctx(2 * time.Minute)
	for {
		if out, err := h.Virsh(ctx, "domjobinfo", "web-1"); err == nil && strings.Contains(out, "Data processed") {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			b.t.Fatal("the copy does not get under way")
		}
	}
}
