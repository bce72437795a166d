package wholehost

import (
	"testing"
	"time"

	"belay/agent/maint"
)

// TestKexecGoesWrong: the new kernel does not come up, or is not well. The old one is there again,
// and no guest is gone without a word.
func TestKexecGoesWrong(t *testing.T) {
	e := newEstate(t)

	// The boot loader brings the old kernel after a panic. What the memory still holds is
	// restored, by its checksums; what it does not is told, and booted afresh as configured.
	e.step("the new kernel panics", func(e *estate) {
		e.configure("[kexec]\ncold_start = true\n")
		e.restart()
		r := e.boots(1)
		r.Append = must(e.t, e.Host, "cat", "/proc/cmdline") + " rdinit=/nonexistent"
		panics := e.said("Kernel panic - not syncing")
		op, boot := e.begin(r)
		e.await(op.ID, "step load", func(op maint.Op) bool { return op.Step != "preflight" })
		must(e.t, e.Host, "systemctl", "disable", "belayd.service") // so that there is time to damage something
		if _, err := e.AwaitUp(e.ctx(5*time.Minute), boot); err != nil {
			e.t.Fatal(err)
		}
		if e.said("Kernel panic - not syncing") == panics {
			e.t.Fatal("the new kernel has not panicked")
		}
		e.damage("db-1")
		must(e.t, e.Host, "systemctl", "enable", "--now", "belayd.service")
		op = e.ends(op.ID)
		if op.Outcome != maint.OutcomeFailed || fates(op) != "db-1 lost, web-1 restored" || !has(op, maint.CodeKernelOld) || !has(op, maint.CodeLostGuest) {
			e.t.Fatalf("%s: %s, %+v", op.Outcome, fates(op), op.Problems)
		}
		for _, g := range op.Kexeced.Guests {
			if g.Started != (g.Guest == "db-1") {
				e.t.Errorf("guest %s: booted afresh is %v: %+v", g.Guest, g.Started, g)
			}
		}
		e.runs(e.kernels[0])
		e.are("web-1")
		e.meet("db-1")
	})

	e.step("the new kernel is not well", func(e *estate) {
		e.configure("[patch]\nhealth = [\"/bin/sh\", \"-c\", \"test $(uname -r) = " + e.kernels[0] + "\"]\n")
		e.restart()
		op, _ := e.begin(e.boots(1))
		op = e.ends(op.ID)
		if op.Outcome != maint.OutcomeFailed || fates(op) != "db-1 restored, web-1 restored" || !has(op, maint.CodeKernelSick) {
			e.t.Fatalf("%s: %s, %+v", op.Outcome, fates(op), op.Problems)
		}
		e.runs(e.kernels[0])
		e.are()
	})
}
