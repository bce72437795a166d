package vmtests

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/vmm/twin"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/measure"
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

// A guest goes to the twin and comes home, and has a new QEMU; at each stage it is
// looked at with all of its memory and its disk.
func TestTwinVisit(t *testing.T) {
	t.Parallel()
	longOnly(t)
	for _, c := range []struct {
		name   string
		method maint.VMMMethod
		qemu   string // "" is the lab's newer one
		spec   guest.Spec
	}{
		{"bounce", maint.VMMBounce, "", guest.Spec{Devices: twinDevices}},
		{"prewarmed", maint.VMMPrewarmed, "", guest.Spec{FileMemory: true, Devices: twinDevices}},
		// The machine's own QEMU copies memory of emulated guests badly; here
		// none is copied.
		{"prewarmed, machine's own QEMU", maint.VMMPrewarmed, "/", guest.Spec{FileMemory: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newTwinBed(t, lab.Config{Hosts: 1, QEMU: c.qemu, Hooks: twinHooks(t)}, c.spec)
			old := b.qemu()
			r := twinRole{Method: c.method, Notebook: b.notebook()}
			pre := r
			pre.Phases = []string{twin.PhasePreflight}
			b.visit(pre).good()
			out := b.leg(r, twin.PhaseOut)
			b.isWhole(b.away)
			if _, err := b.home.Virsh(b.ctx(time.Minute), "start", "web-1"); err == nil || !strings.Contains(err.Error(), "Belay's twin") {
				t.Errorf("it was to be started at home while it is in the twin: %v", err)
			}
			stop := r
			stop.Phases = []string{"stop"}
			if refused := b.visit(stop).report(); !strings.Contains(refused.Problem, "web-1") {
				t.Errorf("the twin was stopped with a guest in it: %+v", refused)
			}
			back := b.leg(r, twin.PhaseBack)
			end := r
			end.Phases = []string{twin.PhaseFinish}
			report := b.visit(end).good()
			b.isHome()
			if now := b.qemu(); now == old {
				t.Errorf("its QEMU is still process %s", old)
			}
			if res := report.Result; res == nil || res.Pauses != 2 || res.Pause == 0 || res.NewQEMU == "" {
				t.Errorf("result: %+v", res)
			} else {
				t.Logf("out: %s; back: %s; QEMU's longest pause %s; %v", out, back, res.Pause.Round(time.Millisecond), report.Notes)
			}
		})
	}
}

// twinDevices are those of a guest that is more than a disk and an interface.
const twinDevices = `<memballoon model='virtio'/>
    <graphics type='vnc' port='-1' autoport='yes'/>
    <video><model type='vga' vram='16384'/></video>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>`

// belayd is killed at various moments; the next one brings the guest home.
func TestTwinVisitorKilled(t *testing.T) {
	t.Parallel()
	longOnly(t)
	for _, method := range []maint.VMMMethod{maint.VMMBounce, maint.VMMPrewarmed} {
		t.Run(string(method), func(t *testing.T) {
			t.Parallel()
			b := newTwinBed(t, lab.Config{Hosts: 1, Hooks: twinHooks(t)}, guest.Spec{FileMemory: method == maint.VMMPrewarmed})
			all := twinRole{Method: method, Phases: twinPhases()}

			// Between the legs, and brought home by one that undoes.
			all.Notebook = b.notebook()
			v := b.visit(all)
			v.await("ends out")
			v.end()
			undo := all
			undo.Phases = []string{twin.PhaseBack, twin.PhaseFinish}
			b.visit(undo).good()
			b.isHome()

			// In the middle of a pause, and before it.
			if method == maint.VMMPrewarmed {
				for _, halt := range []string{"before", "paused", "paused, and resumed at home"} {
					for _, phases := range [][]string{{twin.PhaseOut, twin.PhaseBack, twin.PhaseFinish}, undo.Phases} {
						all.Notebook = b.notebook()
						all.Halt, _, _ = strings.Cut(halt, ",")
						v := b.visit(all)
						v.await("halts " + all.Halt)
						v.end()
						if all.Halt != halt { // as a leash does
							b.virsh(b.home, "resume", "web-1")
						}
						next := all
						next.Phases, next.Halt = phases, ""
						report := b.visit(next).good()
						b.isHome()
						t.Logf("killed %s, then %v: %v", halt, phases, report.Notes)
					}
				}
				all.Halt = ""
			}

			// At any moment.
			rounds := 4
			if longTwin() {
				rounds = 40
			}
			for range rounds {
				all.Notebook = b.notebook()
				v := b.visit(all)
				v.await("begins out")
				after := time.Duration(rand.Int64N(int64(8 * time.Second)))
				select {
				case <-time.After(after):
				case <-t.Context().Done():
				}
				done := v.end()
				next := all
				if next.Phases = undo.Phases; !slices.Contains(done, "ends out") && rand.IntN(2) == 0 {
					next.Phases = []string{twin.PhaseOut, twin.PhaseBack, twin.PhaseFinish}
				}
				report := b.visit(next).good()
				b.isHome()
				t.Logf("killed %s after the beginning, then %v: %v", after.Round(time.Millisecond), next.Phases, report.Notes)
			}
		})
	}
}

// A prewarmed crossing that is called off in the pause leaves the guest where it
// was, and the next one is made.
func TestTwinCalledOff(t *testing.T) {
	t.Parallel()
	longOnly(t)
	for name, qemu := range map[string]string{"newer QEMU": "", "machine's own QEMU": "/"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTwinBed(t, lab.Config{Hosts: 1, QEMU: qemu, Hooks: twinHooks(t)}, guest.Spec{FileMemory: true})
			r := twinRole{Method: maint.VMMPrewarmed, Notebook: b.notebook(), CallOff: true, Phases: []string{twin.PhasePreflight, twin.PhaseOut}}
			mark := b.obs.Mark()
			report := b.visit(r).report()
			if !strings.Contains(report.Problem, "called off by the test") || report.Stuck {
				t.Errorf("called off: %+v", report)
			}
			t.Logf("called off: outage %s", b.outage(mark).Pause().Round(time.Millisecond))
			b.isWhole(b.home)
			r.CallOff, r.Phases = false, twinPhases()[1:]
			b.visit(r).good()
			b.isHome()
		})
	}
}

func longTwin() bool { return os.Getenv("BELAY_LONG") != "" }

// The daemons die, at home and in the twin; the guest comes home.
func TestTwinDaemonsKilled(t *testing.T) {
	t.Parallel()
	longOnly(t)
	b := newTwinBed(t, lab.Config{Hosts: 1, Hooks: twinHooks(t)}, guest.Spec{})
	ctx := b.ctx(20 * time.Minute)
	restartHome := func() {
		t.Helper()
		if err := b.home.Kill(ctx, lab.Libvirtd, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// Have it start what has autostart, as after a boot.
		if err := os.Remove(b.home.Path("/run/libvirt/qemu/autostarted")); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		if err := b.home.StartDaemon(ctx, lab.Libvirtd); err != nil {
			t.Fatal(err)
		}
	}
	killTwin := func(daemon string) func() {
		return func() {
			t.Helper()
			pid, err := strconv.Atoi(b.read(twin.DefaultRoot + "/run/" + daemon + ".pid"))
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		name   string
		during string // a phase, that the copy of which is under way; or "" for the time in the twin
		strike func()
	}{
		{"home's libvirtd, in the twin", "", restartHome},
		{"the twin's libvirtd, in the twin", "", killTwin("libvirtd")},
		{"the twin's virtlogd, in the twin", "", killTwin("virtlogd")},
		{"the supervisor, in the twin", "", func() { b.killSupervisor() }},
		{"all of the twin's, in the twin", "", func() {
			b.killSupervisor()
			killTwin("libvirtd")()
			killTwin("virtlogd")()
		}},
		{"home's libvirtd, on the way out", twin.PhaseOut, restartHome},
		{"the twin's libvirtd, on the way out", twin.PhaseOut, killTwin("libvirtd")},
		{"home's libvirtd, on the way back", twin.PhaseBack, restartHome},
		{"the twin's libvirtd, on the way back", twin.PhaseBack, killTwin("libvirtd")},
	} {
		r := twinRole{Method: maint.VMMBounce, Notebook: b.notebook()}
		do := func(slow bool, phases ...string) *visitor {
			r := r
			if r.Phases = phases; slow {
				r.Bandwidth = 8
			}
			return b.visit(r)
		}
		begin := time.Now()
		do(false, twin.PhasePreflight).good()
		if c.during != twin.PhaseOut {
			do(false, twin.PhaseOut).good()
		}
		outcome := ""
		if c.during == "" {
			c.strike()
		} else {
			from := guest.Host(b.home)
			if c.during == twin.PhaseBack {
				from = b.away
			}
			v := do(true, c.during)
			b.awaitCopy(from)
			c.strike()
			if c.during == twin.PhaseBack { // begun again at full speed by the next
				v.end()
			} else {
				outcome = v.report().Problem
			}
		}
		report := do(false, twin.PhaseBack, twin.PhaseFinish).good()
		b.isHome()
		t.Logf("%s: home again after %s: %s %v", c.name, time.Since(begin).Round(time.Millisecond), outcome, report.Notes)
	}
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

// A guest that writes faster than it is copied stays at home; and one that does
// so in the twin comes home with a longer blackout, if that is allowed.
func TestTwinBusyGuest(t *testing.T) {
	t.Parallel()
	longOnly(t)
	b := newTwinBed(t, lab.Config{Hosts: 1}, guest.Spec{})
	slow := twinRole{Method: maint.VMMBounce, Notebook: b.notebook(), Bandwidth: 2, Limit: 20 * time.Second, MaxPause: 50 * time.Millisecond}
	slow.Phases = []string{twin.PhasePreflight, twin.PhaseOut}
	begin := time.Now()
	report := b.visit(slow).report()
	if !strings.Contains(report.Problem, "faster than it is copied") || report.Stuck || report.Refused {
		t.Errorf("a copy that cannot converge: %+v", report)
	}
	t.Logf("given up after %s: %s", time.Since(begin).Round(time.Second), report.Problem)
	b.isWhole(b.home)
	if out, _ := b.away.Virsh(b.ctx(time.Minute), "list", "--all", "--name"); strings.Contains(out, "web-1") {
		t.Error("something of it is left in the twin")
	}
	fast := twinRole{Method: maint.VMMBounce, Notebook: slow.Notebook, Phases: []string{twin.PhaseOut}}
	b.visit(fast).good()
	b.isWhole(b.away)
	slow.Bandwidth, slow.Limit, slow.MaxPause = 12, 40*time.Second, 30*time.Second
	back := b.leg(slow, twin.PhaseBack)
	end := fast
	end.Phases = []string{twin.PhaseFinish}
	b.visit(end).good()
	b.isHome()
	t.Logf("brought home with a longer blackout: %s", back)
}

// What a visit costs a guest, beside a live migration between two hosts of the
// same guest in the same run.
func TestTwinBlackouts(t *testing.T) {
	t.Parallel()
	longOnly(t)
	b := newTwinBed(t, lab.Config{Hooks: twinHooks(t)}, guest.Spec{FileMemory: true})
	other := b.lab.Hosts[1]
	rounds := 3
	if longTwin() {
		rounds = 15
	}
	between := map[string][]measured{}
	add := func(what string, m measured) {
		t.Logf("%s: %s", what, m)
		between[what] = append(between[what], m)
	}
	move := func(from, to *lab.Host) {
		t.Helper()
		mark, begin := b.obs.Mark(), time.Now()
		b.virsh(from, "migrate", "--live", "--p2p", "--persistent", "--undefinesource", "web-1", to.PeerURI(false))
		took := time.Since(begin)
		o := b.outage(mark)
		add("live migration", measured{o.Pause(), o.Standstill, took})
	}
	for range rounds {
		move(b.home, other)
		move(other, b.home)
		for _, method := range []maint.VMMMethod{maint.VMMBounce, maint.VMMPrewarmed} {
			r := twinRole{Method: method, Notebook: b.notebook(), Phases: []string{twin.PhasePreflight}}
			b.visit(r).good()
			add(string(method), b.leg(r, twin.PhaseOut))
			add(string(method), b.leg(r, twin.PhaseBack))
			r.Phases = []string{twin.PhaseFinish}
			b.visit(r).good()
		}
	}
	b.virsh(b.home, "autostart", "web-1") // which a migration does not take along
	b.isHome()
	median := func(what string) measured {
		at := func(f func(measured) time.Duration) time.Duration {
			var all []time.Duration
			for _, m := range between[what] {
				all = append(all, f(m))
			}
			return measure.Median(all)
		}
		return measured{at(func(m measured) time.Duration { return m.Outage }), at(func(m measured) time.Duration { return m.Standstill }), at(func(m measured) time.Duration { return m.Took })}
	}
	live, bounce, warm := median("live migration"), median(string(maint.VMMBounce)), median(string(maint.VMMPrewarmed))
	ratio := func(a, b time.Duration) float64 { return float64(a) / float64(b) }
	t.Logf("medians of one way: live migration: %s", live)
	t.Logf("bounce: %s; %.2f of the outage, %.2f of the standstill", bounce, ratio(bounce.Outage, live.Outage), ratio(bounce.Standstill, live.Standstill))
	t.Logf("prewarmed: %s; %.2f of the outage, %.2f of the standstill", warm, ratio(warm.Outage, live.Outage), ratio(warm.Standstill, live.Standstill))
	// On a busy machine figures spread widely; these catch what is wrong in kind.
	if bounce.Outage > 3*live.Outage {
		t.Errorf("a bounce's outage of %s is far from a live migration's %s", bounce.Outage, live.Outage)
	}
	if warm.Standstill > live.Standstill {
		t.Errorf("a prewarmed crossing's standstill of %s is longer than a live migration's %s", warm.Standstill, live.Standstill)
	}
}
