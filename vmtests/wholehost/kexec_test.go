package wholehost

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

// clockTolerance is how far off a guest's clock may be on a busy, emulated host, of the minute
// that it stood still.
const clockTolerance = 500 * time.Millisecond

// TestKexec: a host's kernel is replaced under two guests, which go on where they were; in the
// long form also when all of Belay is killed at each stage of it.
func TestKexec(t *testing.T) {
	e := newEstate(t)

	e.step("refused", func(e *estate) {
		plan := func(want int, texts ...string) {
			e.t.Helper()
			r := e.boots(1)
			got, err := e.Belay(e.ctx(time.Minute), "kexec", "--kernel", r.Kernel, "--initrd", r.Initrd, "--all", "--dry-run")
			if err != nil || got.Code != want {
				e.t.Fatalf("exit code %d, want %d: %v\n%s%s", got.Code, want, err, got.Stdout, got.Stderr)
			}
			for _, text := range texts {
				if !strings.Contains(got.Stdout+got.Stderr, text) {
					e.t.Errorf("the plan does not say %q:\n%s%s", text, got.Stdout, got.Stderr)
				}
			}
		}
		plan(0, e.kernels[0]+" → "+e.kernels[1], "memmap=512M!4G", "web-1", "db-1")
		must(e.t, e.Host, "systemctl", "stop", "var-lib-belay-memory.mount")
		plan(3, "no file system is mounted on /var/lib/belay/memory", "/dev/pmem0 /var/lib/belay/memory ext4 dax")
		must(e.t, e.Host, "systemctl", "start", "var-lib-belay-memory.mount")
		plan(0)
	})

	e.step("another version", func(e *estate) { e.change(1) })
	e.longStep("and back", func(e *estate) { e.change(0) })
	e.longStep("Belay is killed", (*estate).killed)
	e.longStep("belayd does not come back", (*estate).rescued)
}

// change has the host run the i-th kernel, and tells how long guests stood still for it.
func (e *estate) change(i int) maint.Op {
	marks := e.guests[0].obs.Mark()
	op, boot := e.begin(e.boots(i))
	op = e.ends(op.ID)
	e.done(op, i)
	r := op.Kexeced
	if now, err := e.BootID(e.ctx(time.Minute)); err != nil || now == boot || r.BootBefore != boot || r.BootAfter != now {
		e.t.Fatalf("the host's boot ID is %s (%v), was %s: %+v", now, err, boot, r)
	}
	e.t.Logf("the host went down in %s and came up in %s", r.Down, r.Up)
	for _, g := range r.Guests {
		heard := e.guests[0].obs.Since(marks, g.Guest)
		if heard.Restarts != 0 || heard.Duplicated != 0 {
			e.t.Errorf("guest %s was started anew, or ran twice: %+v", g.Guest, heard)
		}
		copying := g.Save + g.Restore
		limit := r.Up + 5*time.Second + copying*3/2
		e.t.Logf("guest %s: stood still for %s (silent for %s on the LAN), %s is asked for; %d MiB %s, saved in %s, checked in %s, restored in %s",
			g.Guest, g.Pause, heard.Pause(), limit, g.Bytes>>20, g.Memory, g.Save, g.Check, g.Restore)
		if g.Pause > limit {
			e.t.Errorf("guest %s stood still for %s, more than %s", g.Guest, g.Pause, limit)
		}
	}
	return op
}

// done checks that an operation is, and that its guests go on where they were under the i-th
// kernel, with their clocks put right, unless they are behind (see [bed.late]).
func (e *estate) done(op maint.Op, i int) {
	e.t.Helper()
	var all []string
	for _, g := range e.guests {
		all = append(all, g.name+" restored")
	}
	slices.Sort(all)
	if op.Outcome != maint.OutcomeDone && !e.guests[0].late(op) || fates(op) != strings.Join(all, ", ") {
		e.t.Fatalf("%s: %s, %+v", op.Outcome, fates(op), op.Problems)
	}
	e.runs(e.kernels[i])
	e.are()
	if e.guests[0].behind {
		return
	}
	for _, g := range op.Kexeced.Guests {
		if g.SameBoot == nil || !*g.SameBoot {
			e.t.Errorf("guest %s is not known to have the boot ID of before: %+v", g.Guest, g)
		}
		if off, known := offset(g.Clock); !known || off.Abs() > clockTolerance {
			e.t.Errorf("the clock of guest %s was not put right: %+v", g.Guest, g.Clock)
		}
	}
}

// offset is how far off a clock was at last.
func offset(c *maint.ClockReport) (time.Duration, bool) {
	switch {
	case c == nil || c.State == maint.ClockUnsynchronised:
		return 0, false
	case c.After != nil:
		return c.After.Offset, true
	case c.Before != nil:
		return c.Before.Offset, true
	}
	return 0, false
}

// killed has every process of Belay killed at each stage: all goes on.
func (e *estate) killed() {
	op, boot := e.begin(e.boots(1))
	for _, step := range []string{"load", "save"} {
		e.await(op.ID, "step "+step, func(op maint.Op) bool { return op.Step == step })
		e.kill(step)
	}
	e.await(op.ID, "step boot", func(op maint.Op) bool { return op.Step == "boot" })
	e.kill("boot")
	if _, err := e.AwaitUp(e.ctx(5*time.Minute), boot); err != nil {
		e.t.Fatal(err)
	}
	e.await(op.ID, "step restore", func(op maint.Op) bool { return op.Step == "restore" || op.State == maint.OpEnded })
	e.kill("restore")
	op = e.ends(op.ID)
	if e.done(op, 1); op.Resumed < 4 {
		e.t.Errorf("taken up again %d times", op.Resumed)
	}
}

// kill ends all that runs of Belay.
func (e *estate) kill(when string) {
	e.t.Helper()
	out, err := e.Run(e.ctx(time.Minute), "pkill", "-KILL", "-e", "-x", "belayd|belay-kernel|belay-leash")
	e.t.Logf("%s: %s (%v)", when, strings.TrimSpace(out), err)
	if err != nil && when != "boot" { // it may be that the host goes down already
		e.t.Fatal(err)
	}
}

// rescued has a belayd that cannot start in the new kernel: systemd has guests restored
// without it. When that is killed too, one command does it.
func (e *estate) rescued() {
	op, boot := e.begin(e.boots(0))
	e.await(op.ID, "step load", func(op maint.Op) bool { return op.Step == "load" })
	e.configure("this is no setting")
	if _, err := e.AwaitUp(e.ctx(5*time.Minute), boot); err != nil {
		e.t.Fatal(err)
	}
	e.awaitShell("a rescue by systemd", "systemctl is-active belay-restore.service | grep -q activating && ls /var/lib/belay/memory/*.mark")
	must(e.t, e.Host, "pkill", "-KILL", "-e", "-x", "belayd")
	e.t.Logf("belayd -restore:\n%s", must(e.t, e.Host, "sh", "-c", "belayd -restore 2>&1"))
	e.are()
	e.configure("")
	e.restart()
	e.done(e.ends(op.ID), 0)
}

// awaitShell waits until a shell's command ends with 0 in the host.
func (e *estate) awaitShell(what, command string) {
	e.t.Helper()
	_, err := e.Script(e.ctx(3*time.Minute), fmt.Sprintf("until %s; do sleep .1; done", command))
	if err != nil {
		units, _ := e.Script(e.ctx(time.Minute), "systemctl status --no-pager belayd belay-restore libvirtd; ls -l /var/lib/belay/memory; true")
		e.t.Fatalf("no %s: %v\n%s", what, err, units)
	}
}
