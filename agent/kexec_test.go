package agent_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/hypervisor"
	"belay/hypervisor/hypervisortest"
	"belay/patch/kexec/kexectest"
)

// kexecBed is one host whose kernel can be changed, with four guests: one that runs, one
// that starts with the host, one that its owner has paused, and one, which starts with the host
// too, whose memory is in place.
type kexecBed struct {
	*agenttest.Node
	w     *agenttest.World
	t     *testing.T
	ctx   context.Context
	m     *kexectest.Machine
	uuids []string
	hook  func(string)

	power sync.Mutex // held while the host, or its agent, goes down and comes up
	boots int
	// onBoot may have the host come up otherwise than it should.
	onBoot func(boot int, release string) string
}

// longAgo tells a guest that has gone on from one that was booted afresh, by its clock.
const longAgo = -time.Hour

func newKexecBed(t *testing.T, edit func(*config.Config)) *kexecBed {
	t.Helper()
	w := agenttest.New(t, quiet(t), func(c *config.Config) {
		if c.Kexec.InPlace = true; edit != nil {
			edit(c)
		}
	}, "a")
	b := &kexecBed{Node: w.Nodes[0], w: w, t: t, ctx: ctxFor(t, 60*time.Second), onBoot: func(_ int, r string) string { return r }}
	b.Stop()
	b.m = kexectest.New(t, b.Host)
	b.m.OnKexec = b.reboot
	b.Node.Kexec = b.m
	for i, name := range []string{"app-1", "db-1", "old-1"} {
		uuid := b.Host.PutGuest(name, func(g *maint.Guest) { g.Autostart = i == 1; g.MemoryBytes = 1 << 20 })
		if i == 2 {
			b.Host.Pause(t, uuid)
		}
		b.Host.SetClock(t, uuid, longAgo)
		b.uuids = append(b.uuids, uuid)
	}
	b.uuids = append(b.uuids, b.m.PutGuest(t, "ram-1", func(g *maint.Guest) { g.Autostart = true; g.MemoryBytes = 1 << 20 }))
	b.Start(nil)
	return b
}

// reboot has the host come up with a kernel.
func (b *kexecBed) reboot(release string) {
	b.power.Lock()
	defer b.power.Unlock()
	b.boots++
	b.Kill()
	b.m.Boots(release)
	if now := b.onBoot(b.boots, release); now != release {
		b.m.Write("/proc/sys/kernel/osrelease", now+"\n")
	}
	b.Crash()
	b.RestartWith(b.hook)
}

// again starts an agent that was killed, unless the host has gone down since, and started one.
func (b *kexecBed) again() {
	b.power.Lock()
	defer b.power.Unlock()
	if !b.Alive() {
		b.Restart()
	}
}

func (b *kexecBed) request() maint.KexecRequest {
	return maint.KexecRequest{Kernel: "/boot/vmlinuz-" + kexectest.Next, Initrd: "/boot/initrd.img-" + kexectest.Next, All: true}
}

func (b *kexecBed) kexec() maint.Op {
	b.t.Helper()
	op, err := b.Client.Kexec(b.ctx, b.request())
	check(b.t, err)
	return await(b.t, b.ctx, b.Node, op.ID)
}

// whole checks that every guest is what it was, but for those that are lost.
func (b *kexecBed) whole(at string, lost ...string) {
	b.t.Helper()
	for i, uuid := range b.uuids {
		if slices.Contains(lost, uuid) {
			continue
		}
		g, err := b.Host.Guest(b.ctx, uuid)
		check(b.t, err)
		want := maint.GuestRunning
		if i == 2 {
			want = maint.GuestPaused
		}
		if g.State != want {
			b.t.Errorf("killed %s: guest %s is %s (%s), want %s", at, g.Name, g.State, g.Reason, want)
		} else if i < 2 && b.Host.ClockOffset(b.t, uuid) > longAgo/2 {
			b.t.Errorf("killed %s: guest %s was booted afresh", at, g.Name)
		}
		if g.Autostart != (i == 1 || i == 3) {
			b.t.Errorf("killed %s: guest %s: autostart is %v", at, g.Name, g.Autostart)
		}
	}
	if d := b.m.Damage(); len(d) > 0 {
		b.t.Errorf("killed %s: %v", at, d)
	}
	if ram := b.uuids[3]; !slices.Contains(lost, ram) && b.m.IgnoresShared(ram) {
		b.t.Errorf("killed %s: a migration of ram-1 would leave its memory behind", at)
	}
}

func fates(op maint.Op) (all string) {
	if op.Kexeced == nil {
		return "none"
	}
	for _, g := range op.Kexeced.Guests {
		all += fmt.Sprintf("%s %s;", g.Guest, g.Fate)
	}
	return all
}

func TestKexec(t *testing.T) {
	t.Parallel()
	b := newKexecBed(t, nil)
	op := b.kexec()
	if op.Outcome != maint.OutcomeDone || fates(op) != "app-1 restored;db-1 restored;old-1 restored;ram-1 restored;" {
		t.Fatalf("%s %v: %s", op.Outcome, op.Problems, fates(op))
	}
	b.whole("never")
	r := op.Kexeced
	if r.Guests[0].Memory != maint.KexecCopied || r.Guests[3].Memory != maint.KexecInPlace {
		t.Errorf("%+v", r.Guests)
	}
	if r.Before != kexectest.Old || r.After != kexectest.Next || r.BootBefore == r.BootAfter || r.Guests[0].Pause <= 0 || r.Up < 10*time.Second || r.Up > 13*time.Second || r.Guests[0].Clock == nil {
		t.Errorf("%+v", r)
	}
	for _, what := range []string{"*.save", "*.paused", "*.memory"} {
		if left, _ := filepath.Glob(filepath.Join(b.m.Dir(), what)); len(left) > 0 {
			t.Errorf("what is out of date is left: %v", left)
		}
	}
	// Again, and back: what the first has left is no hindrance.
	b.m.Write("/proc/sys/kernel/osrelease", kexectest.Next+"\n")
	op, err := b.Client.Kexec(b.ctx, maint.KexecRequest{Kernel: "/boot/vmlinuz-" + kexectest.Old, Initrd: "/boot/initrd.img-" + kexectest.Old, All: true})
	check(t, err)
	if op = await(t, b.ctx, b.Node, op.ID); op.Outcome != maint.OutcomeDone || op.Kexeced.After != kexectest.Old {
		t.Errorf("%s %v", op.Outcome, op.Problems)
	}
	b.whole("never")
}

// What goes wrong after the guests are saved, and what becomes of them.
func TestKexecGoesWrong(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		edit   func(*config.Config)
		before func(b *kexecBed)
		onBoot func(b *kexecBed, boot int, release string) string
		want   maint.Outcome
		fates  string
		lost   []int
		code   maint.Code
	}{
		"the new kernel finds no memory": {
			onBoot: func(b *kexecBed, boot int, release string) string {
				b.m.Mount(release == kexectest.Old)
				return release
			},
			want: maint.OutcomeFailed, fates: "app-1 restored;db-1 restored;old-1 restored;ram-1 restored;", code: maint.CodeKernelSick},
		"the new kernel has no memory for QEMU": {
			onBoot: func(b *kexecBed, _ int, release string) string {
				if release != kexectest.Old {
					b.m.MountNotForQEMU()
				}
				return release
			},
			want: maint.OutcomeFailed, fates: "app-1 restored;db-1 restored;old-1 restored;ram-1 restored;", code: maint.CodeKernelSick},
		"the new kernel cannot run the guests' CPUs": {
			onBoot: func(b *kexecBed, _ int, release string) string {
				if b.Host.Heal("CompareCPU"); release != kexectest.Old {
					b.Host.Fault("CompareCPU", hypervisortest.Fault{Err: &hypervisor.IncompatibleCPU{Reason: "no TSX"}})
				}
				return release
			},
			want: maint.OutcomeFailed, fates: "app-1 restored;db-1 restored;old-1 restored;ram-1 restored;", code: maint.CodeKernelSick},
		"the new kernel panics": {
			onBoot: func(_ *kexecBed, _ int, _ string) string { return kexectest.Old },
			want:   maint.OutcomeFailed, fates: "app-1 restored;db-1 restored;old-1 restored;ram-1 restored;", code: maint.CodeKernelOld},
		"power is cut": {
			onBoot: func(b *kexecBed, _ int, _ string) string { b.m.PowerCut(); return kexectest.Old },
			want:   maint.OutcomeFailed, fates: "app-1 lost;db-1 lost;old-1 lost;ram-1 lost;", lost: []int{0, 1, 2, 3}, code: maint.CodeLostGuest},
		"the memory does not come back": {
			onBoot: func(b *kexecBed, _ int, _ string) string { b.m.Mount(false); return kexectest.Old },
			edit:   func(c *config.Config) { c.Kexec.ColdStart = true },
			want:   maint.OutcomeStuck, fates: "app-1 kept;db-1 kept;old-1 kept;ram-1 kept;", lost: []int{0, 1, 2, 3}, code: maint.CodeKernelOld},
		"memory is damaged": {
			onBoot: func(b *kexecBed, _ int, r string) string { b.m.Spoil(b.uuids[0]); return r },
			want:   maint.OutcomePartly, fates: "app-1 lost;db-1 restored;old-1 restored;ram-1 restored;", lost: []int{0}, code: maint.CodeLostGuest},
		"memory is damaged, and the guest is to start": {
			edit:   func(c *config.Config) { c.Kexec.ColdStart = true },
			onBoot: func(b *kexecBed, _ int, r string) string { b.m.Spoil(b.uuids[1]); return r },
			want:   maint.OutcomePartly, fates: "app-1 restored;db-1 lost;old-1 restored;ram-1 restored;", lost: []int{1}, code: maint.CodeLostGuest},
		"memory in place is damaged": {
			onBoot: func(b *kexecBed, _ int, r string) string { b.m.SpoilMemory(b.uuids[3]); return r },
			want:   maint.OutcomePartly, fates: "app-1 restored;db-1 restored;old-1 restored;ram-1 lost;", lost: []int{3}, code: maint.CodeLostGuest},
		"the state of memory in place is damaged": {
			onBoot: func(b *kexecBed, _ int, r string) string { b.m.Spoil(b.uuids[3]); return r },
			want:   maint.OutcomePartly, fates: "app-1 restored;db-1 restored;old-1 restored;ram-1 lost;", lost: []int{3}, code: maint.CodeLostGuest},
		"a guest with its memory in place does not leave its QEMU": {
			before: func(b *kexecBed) { b.m.FailMigrate = true },
			want:   maint.OutcomeFailed, fates: "app-1 restored;db-1 restored;old-1 restored;ram-1 ran on;", code: maint.CodeFailed},
		"systemd does not go down": {
			before: func(b *kexecBed) { b.m.NoKexec = true },
			want:   maint.OutcomeFailed, fates: "app-1 restored;db-1 restored;old-1 restored;ram-1 restored;", code: maint.CodeKexec},
		"a guest cannot be saved": {
			before: func(b *kexecBed) { b.m.FailSave = b.uuids[1] },
			want:   maint.OutcomeFailed, fates: "app-1 restored;db-1 ran on;old-1 restored;ram-1 restored;", code: maint.CodeFailed},
		"somebody starts a guest meanwhile": {
			onBoot: func(b *kexecBed, _ int, r string) string {
				check(b.t, b.Host.Launch(b.ctx, b.uuids[0]))
				check(b.t, b.Host.SetAutostart(b.ctx, b.uuids[0], true)) // or the fake's boot ends it
				return r
			},
			want: maint.OutcomePartly, fates: "app-1 kept;db-1 restored;old-1 restored;ram-1 restored;", lost: []int{0}, code: maint.CodeStarted},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newKexecBed(t, c.edit)
			if c.onBoot != nil {
				b.onBoot = func(boot int, r string) string { return c.onBoot(b, boot, r) }
			}
			if c.before != nil {
				c.before(b)
			}
			op := b.kexec()
			if op.Outcome != c.want || fates(op) != c.fates ||
				!slices.ContainsFunc(op.Problems, func(p maint.Problem) bool { return p.Code == c.code }) {
				t.Errorf("%s, %s, %v", op.Outcome, fates(op), op.Problems)
			}
			var lost []string
			for _, i := range c.lost {
				lost = append(lost, b.uuids[i])
				g, err := b.Host.Guest(b.ctx, b.uuids[i])
				check(t, err)
				if started := op.Kexeced.Guests[i].Started || c.code == maint.CodeStarted; g.State.Active() != started {
					t.Errorf("guest %s is %s: %+v", g.Name, g.State, op.Kexeced.Guests[i])
				}
			}
			b.whole("never", lost...)
			// As long as a guest waits there, the host's status says so.
			s, err := b.Client.Status(b.ctx)
			check(t, err)
			waits := slices.ContainsFunc(s.Conditions, func(c maint.Condition) bool {
				return c.Code == maint.CodeKeptGuest && strings.Contains(c.Text, "app-1") && strings.Contains(c.Remedy, string(op.ID))
			})
			if waits != strings.Contains(c.fates, "app-1 kept") {
				t.Errorf("%+v", s.Conditions)
			}
			if b.m.Loaded() {
				t.Error("a kernel is loaded still")
			}
		})
	}
}

// Killed at each thing that an agent does (each fifth in the short form), and started again;
// also where the new kernel is not well.
func TestKexecKilledAnywhere(t *testing.T) {
	t.Parallel()
	for name, sick := range map[string]bool{"well": false, "sick": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			points, every := 0, 5
			if os.Getenv("BELAY_LONG") != "" {
				every = 1
			}
			for n := 0; ; n += every {
				at := kexecKilledAt(t, n, sick)
				if at == "" {
					break
				}
				points++
				if t.Failed() {
					return
				}
			}
			if points < 80/every {
				t.Fatalf("only %d points were met", points)
			}
			t.Logf("killed at %d points", points)
		})
	}
}

func kexecKilledAt(t *testing.T, n int, sick bool) (at string) {
	t.Helper()
	b := newKexecBed(t, nil)
	want := maint.OutcomeDone
	if sick {
		want = maint.OutcomeFailed
		b.onBoot = func(_ int, r string) string { b.m.Mount(r == kexectest.Old); return r }
	}
	op, err := maint.Op{}, error(nil)
	k := &killer{node: b.Node, left: n, dead: make(chan struct{})}
	b.hook = func(what string) {
		if strings.Contains(what, " Sweep") {
			return
		}
		k.hook(what)
	}
	b.Stop()
	b.Start(b.hook)
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-k.dead:
			b.again()
		case <-b.ctx.Done():
		}
	}()
	op, err = b.Client.Kexec(b.ctx, b.request())
	if err != nil { // killed while it was being admitted
		k.cut(t, err)
		<-done
		b.power.Lock() // what was admitted all the same goes on, down to the next boot
		ops, err := b.Client.Ops(b.ctx)
		b.power.Unlock()
		check(t, err)
		if len(ops) > 0 {
			op = ops[0]
		}
	}
	if op.ID != "" {
		if op = await(t, b.ctx, b.Node, op.ID); op.Outcome != want {
			t.Errorf("killed %s: %s %v, %s", k.at, op.Outcome, op.Problems, fates(op))
		}
	}
	k.mu.Lock()
	at, k.off = k.at, true
	k.mu.Unlock()
	if at != "" {
		<-done
	}
	b.power.Lock()
	defer b.power.Unlock()
	b.whole(at)
	b.Stop()
	return at
}

// Nothing is begun where something is missing, and all of it is told.
func TestKexecRefused(t *testing.T) {
	t.Parallel()
	b := newKexecBed(t, nil)
	r := b.request()
	r.All, r.Guests = false, []string{"app-1"}
	v, err := b.Client.PlanKexec(b.ctx, r)
	check(t, err)
	if len(v.Problems) != 3 || v.Problems[0].Code != maint.CodeUncovered || v.New.Release != kexectest.Next {
		t.Errorf("%+v", v)
	}
	if _, err := b.Client.Kexec(b.ctx, r); err == nil || !strings.Contains(err.Error(), "guest db-1") {
		t.Errorf("%v", err)
	}
	b.m.Remove("/etc/libvirt/qemu.conf")
	checks, err := b.Client.Doctor(b.ctx)
	check(t, err)
	if !slices.ContainsFunc(checks, func(c maint.Check) bool {
		return c.Name == "kexec in place" && strings.Contains(c.Remedy, "memory_backing_dir")
	}) {
		t.Errorf("%+v", checks)
	}
	// One that is between two QEMUs is off, and would lose its memory with this kernel.
	stuck := b.Host.PutGuest("stuck-1", func(g *maint.Guest) { g.State = maint.GuestShutoff })
	guard := filepath.Join(b.m.Root, "run/belay/vmm", stuck)
	check(t, os.MkdirAll(guard, 0o700))
	check(t, os.WriteFile(filepath.Join(guard, "plan"), []byte(`{"op":"vmm-1","guest":"stuck-1","uuid":"`+stuck+`"}`), 0o600))
	v, err = b.Client.PlanKexec(b.ctx, b.request())
	check(t, err)
	if len(v.Problems) != 1 || v.Problems[0].Code != maint.CodeBetween {
		t.Errorf("%+v", v.Problems)
	}
	if _, err := b.Client.Kexec(b.ctx, b.request()); err == nil || !strings.Contains(err.Error(), "belay replace-vmm stuck-1") {
		t.Errorf("%v", err)
	}
	check(t, os.RemoveAll(guard))
	check(t, os.WriteFile(filepath.Join(b.m.Root, "sys/kernel/security/lockdown"), []byte("none [integrity] confidentiality\n"), 0o600))
	checks, err = b.Client.Doctor(b.ctx)
	check(t, err)
	if !slices.ContainsFunc(checks, func(c maint.Check) bool { return c.Name == "kexec" && strings.Contains(c.Text, "locked down") }) {
		t.Errorf("%+v", checks)
	}
	if ops, _ := b.Client.Ops(b.ctx); len(ops) > 0 {
		t.Errorf("%+v", ops)
	}
}
