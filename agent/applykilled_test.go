package agent_test

import (
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/patch/kexec/kexectest"
	"belay/patch/vmm/vmmtest"
)

// TestApplyKilledAnywhere kills the agent at every single thing that it does for an apply, also
// while it takes it back, starts it again, and looks: the apply has ended, well or taken back,
// every guest runs once, the host is what the record says, and nothing is left.
func TestApplyKilledAnywhere(t *testing.T) {
	t.Parallel()
	either, done, failed := []maint.Outcome{maint.OutcomeDone, maint.OutcomeFailed}, []maint.Outcome{maint.OutcomeDone}, []maint.Outcome{maint.OutcomeFailed}
	for _, c := range []struct {
		name string
		bed  func(*testing.T) (*doomed, string) // and the manifest
		more string                             // of it
		back bool
		want []maint.Outcome
		few  int // every so many points, unless all are wanted
	}{
		{"B1", pausing, "", false, either, 7},
		{"B1, going bad", pausing, goesBad, false, failed, 11},
		{"B1, told", toldPausing, "", false, either, 13},
		{"A, a command", untouching, "", false, done, 5},
		{"A, a command, going bad", untouching, goesBad, false, failed, 5},
		{"A, livepatch", livepatching, "", false, done, 9},
		{"A, livepatch, going bad", livepatching, goesBad, false, failed, 9},
		{"A, microcode", microcoding, "", false, done, 7},
		{"A, component", restarting, "", false, done, 7},
		{"A, component, going bad", restarting, goesBad, false, failed, 7},
		{"A, QEMU", patchingQEMU, "", false, done, 17},
		{"A, QEMU, going bad", patchingQEMU, goesBad, false, failed, 23},
		{"B2", replacing, "", false, either, 41},
		{"B2, going bad", replacing, goesBad, false, failed, 83},
		{"B3", kexecing, "", false, done, 41},
		{"B3, going bad", kexecing, goesBad, false, failed, 61},
		{"D, and back", moving, "", true, done, 61},
		{"D, going bad", moving, goesBad, false, failed, 61},
		{"D, told, for good", leaving, "", false, done, 61},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			everywhere(t, stride(c.few), func(n int) string {
				d, manifest := c.bed(t)
				return d.killedAt(maint.PlanRequest{Manifest: manifest + c.more, Options: maint.PlanOptions{Return: c.back}}, n, c.want...)
			})
		})
	}
}

// inFleet is a bed of three guests on the first of two hosts.
func inFleet(t *testing.T, edit func(*config.Config)) (d *doomed, at func(string) string) {
	f := newFleet(t, 3, edit, "a", "b")
	return newDoomed(t, f.World), func(place string) string {
		if n := f.count(); n[place] != 3 {
			return fmt.Sprintf("guests are at %v, and not on %s", f.at(), place)
		}
		return ""
	}
}

// onHost has its commands tell whether the host is changed, which must be as its record says.
func (d *doomed) onHost(where func(string) string) {
	d.whole = func(_ maint.Op, done bool) string {
		if d.isChanged() != done {
			return fmt.Sprintf("the host is changed: %t", d.isChanged())
		}
		return where("a")
	}
}

func pausing(t *testing.T) (*doomed, string) {
	d, at := inFleet(t, nil)
	d.onHost(at)
	return d, byPause
}

func toldPausing(t *testing.T) (*doomed, string) {
	d, at := inFleet(t, func(c *config.Config) { c.Events = config.Events{Enabled: true, Policy: "all"} })
	d.onHost(at)
	d.approves = true
	return d, byPause
}

func untouching(t *testing.T) (*doomed, string) {
	d, at := inFleet(t, nil)
	d.onHost(at)
	return d, untouched
}

func moving(t *testing.T) (*doomed, string) {
	d, at := inFleet(t, nil)
	d.onHost(at)
	return d, byMove
}

func leaving(t *testing.T) (*doomed, string) {
	d, at := inFleet(t, func(c *config.Config) { c.Events = config.Events{Enabled: true, Policy: "all"} })
	d.approves = true
	d.whole = func(_ maint.Op, done bool) string { return at(map[bool]string{true: "b", false: "a"}[done]) }
	return d, leaves
}

// livepatching has a livepatch loaded in the place of another.
func livepatching(t *testing.T) (*doomed, string) {
	b := newPatchBed(t, nil)
	b.must(b.apply("fix_0"), maint.OutcomeDone)
	d := newDoomed(t, b.w)
	d.whole = func(_ maint.Op, done bool) string {
		v, loaded := b.settled()
		if want := map[bool]string{true: "fix_1", false: "fix_0"}[done]; loaded != want || v.Active == nil || v.Active.Name != want || v.NoReload != "" {
			return fmt.Sprintf("loaded is %q, kept %+v, not reloaded %q", loaded, v.Active, v.NoReload)
		}
		if left, _ := filepath.Glob(filepath.Join(b.Config.StateDir, "live-before", "*")); len(left) > 0 {
			return fmt.Sprintf("copies are left: %v", left)
		}
		return ""
	}
	return d, fmt.Sprintf("id = \"u\"\n[[changes]]\nname = \"fix\"\nkind = \"livepatch\"\nfile = %q\n", b.file("fix_1"))
}

func microcoding(t *testing.T) (*doomed, string) {
	b := newPatchBed(t, nil)
	b.Stop()
	b.Kernel.Late = true
	b.Kernel.Boot()
	b.Start(nil)
	d := newDoomed(t, b.w)
	before, err := b.Kernel.Tree.Microcode()
	check(t, err)
	d.whole = func(_ maint.Op, done bool) string {
		if now, err := b.Kernel.Tree.Microcode(); err != nil || (now[0].Revision != before[0].Revision) != done {
			return fmt.Sprintf("microcode is %v, was %v, %v", now, before, err)
		}
		return ""
	}
	return d, "id = \"u\"\n[[changes]]\nname = \"ucode\"\nkind = \"microcode\"\n"
}

func restarting(t *testing.T) (*doomed, string) {
	b := newPatchBed(t, nil)
	d := newDoomed(t, b.w)
	d.whole = func(op maint.Op, done bool) string {
		jobs := 0
		for _, name := range b.Steps.Ran() {
			if strings.HasSuffix(name, "-unit") {
				jobs++
			}
		}
		if jobs > 1 || done && jobs == 0 || d.isChanged() {
			return fmt.Sprintf("the unit was restarted %d times, and not undone: %t", jobs, d.isChanged())
		}
		return ""
	}
	return d, "id = \"u\"\n[[changes]]\nname = \"virtlogd\"\nkind = \"service\"\nrungs = [\"A\"]\napply = { unit = \"virtlogd.service\", job = \"reload\" }\nundo = { command = [\"true\"] }\n"
}

// patchingQEMU has three QEMUs patched, of which one is before.
func patchingQEMU(t *testing.T) (*doomed, string) {
	b := newQEMUBed(t)
	b.must(b.set(false, "web-2"), maint.OutcomeDone)
	d := newDoomed(t, b.w)
	d.whole = func(_ maint.Op, done bool) string {
		if got, want := b.QEMUs.Patched(), map[bool]string{true: strings.Join(all, " "), false: "web-2"}[done]; got != want {
			return fmt.Sprintf("patched are %q, want %q", got, want)
		}
		return ""
	}
	return d, fmt.Sprintf("id = \"u\"\n[[changes]]\nname = \"slirp\"\nkind = \"qemu\"\nrungs = [\"A\"]\nfile = %q\n", b.container())
}

func replacing(t *testing.T) (*doomed, string) {
	w := agenttest.New(t, quiet(t), nil, "a")
	a := w.Nodes[0]
	a.Stop()
	a.Machine = vmmtest.New(t, a.Host)
	pids := make(map[string]int)
	for _, name := range []string{"web-1", "web-2"} {
		uuid := a.Machine.PutGuest(t, name)
		pids[uuid] = a.Machine.PID(uuid)
	}
	a.Start(nil)
	d := newDoomed(t, w)
	d.whole = func(op maint.Op, done bool) string {
		if damage := a.Machine.Damage(); len(damage) > 0 {
			return strings.Join(damage, "; ")
		}
		for uuid := range maps.Keys(pids) {
			if running, defined := places(t, w, uuid); running != "a" || defined != "a" {
				return fmt.Sprintf("%s runs on %q, and is defined on %q", uuid, running, defined)
			}
			if done && a.Machine.PID(uuid) == pids[uuid] {
				return uuid + " is in its old QEMU"
			}
		}
		if d.isChanged() != done {
			return fmt.Sprintf("the host is changed: %t", d.isChanged())
		}
		return ""
	}
	return d, "id = \"u\"\n[[changes]]\nname = \"qemu\"\nkind = \"qemu\"\n[changes.prepare]\ncommand = [\"true\"]\n[changes.undo]\ncommand = [\"true\"]\n"
}

func kexecing(t *testing.T) (*doomed, string) {
	b := newKexecBed(t, nil)
	d := newDoomed(t, b.w)
	d.ctx = b.ctx
	d.begin = func(hook func(string)) {
		b.hook = func(what string) {
			if !strings.Contains(what, " Sweep") {
				hook(what)
			}
		}
		b.Stop()
		b.Start(b.hook)
	}
	d.again = b.again
	d.whole = func(_ maint.Op, done bool) string {
		b.power.Lock()
		defer b.power.Unlock()
		b.whole("")
		want := map[bool]string{true: kexectest.Next, false: kexectest.Old}[done]
		if now, err := b.m.Tree().Release(); err != nil || now != want || b.m.Loaded() {
			return fmt.Sprintf("the kernel is %s, want %s; one is loaded: %t; %v", now, want, b.m.Loaded(), err)
		}
		return ""
	}
	return d, fmt.Sprintf("id = \"u\"\n[[changes]]\nname = \"kernel\"\nkind = \"kernel\"\nkernel = \"/boot/vmlinuz-%[1]s\"\ninitrd = \"/boot/initrd.img-%[1]s\"\n", kexectest.Next)
}
