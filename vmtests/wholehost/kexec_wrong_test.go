package wholehost

import (
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

// TestKexecGoesWrong: the new kernel does not come up, or is not well. The old one is there again,
// and no guest is gone without a word.
func TestKexecGoesWrong(t *testing.T) {
	inFull(t)
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

	// Without the reservation nothing of a guest would outlive the kernel: none is saved, and it is
	// told what to reserve. The host has RAM from 4 GiB to 5 GiB, above its hole.
	e.step("no memory is reserved", func(e *estate) {
		e.configure("")
		for _, g := range e.guests {
			if _, err := e.Virsh(e.ctx(time.Minute), "destroy", g.name); err != nil {
				e.t.Fatal(err)
			}
		}
		e.guests[0].again(e.Host, func() error {
			_, err := e.Script(e.ctx(time.Minute), `sed -i '/pmem0/d' /etc/fstab
kexec -l /boot/vmlinuz-`+e.kernels[0]+` --initrd=/boot/initrd.img-`+e.kernels[0]+` --command-line="$(sed 's/memmap=[^ ]*//' /proc/cmdline)"
systemctl --no-block kexec`)
			return err
		})
		e.guests[0].awaitBelayd(e.Host)
		if _, err := e.Virsh(e.ctx(2*time.Minute), "start", "web-1"); err != nil {
			e.t.Fatal(err)
		}
		const remedy = `GRUB_CMDLINE_LINUX="... memmap=1G!4G"`
		r := e.boots(1)
		got, err := e.Belay(e.ctx(time.Minute), "kexec", "--kernel", r.Kernel, "--initrd", r.Initrd, "--all", "--dry-run")
		if err != nil || got.Code != 3 || !strings.Contains(got.Stderr, "keeps no memory over a boot") || !strings.Contains(got.Stderr, remedy) {
			e.t.Errorf("exit code %d, want 3, and what to reserve: %v\n%s%s", got.Code, err, got.Stdout, got.Stderr)
		}
		got, err = e.Belay(e.ctx(time.Minute), "doctor")
		if err != nil || !strings.Contains(got.Stdout, remedy) {
			e.t.Errorf("doctor does not say what to reserve (exit code %d): %v\n%s%s", got.Code, err, got.Stdout, got.Stderr)
		}
	})
}
