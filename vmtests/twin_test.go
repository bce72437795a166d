package vmtests

import (
	"math/rand/v2"
	"os"
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
)

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
