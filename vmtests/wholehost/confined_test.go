package wholehost

import (
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/guest"
	"belay/vmtests/machine"
)

// TestConfined: AppArmor confines libvirtd and a guest, as Debian has it: whatever Belay has either of
// them open or run is allowed.
func TestConfined(t *testing.T) {
	inFull(t)
	b := newEmptyBed(t, machine.Config{})
	b.accel = guest.TCG // so that what goes wrong is no fault of an emulated KVM
	h := b.Hosts[0]
	e := &estate{Host: h, t: t, kernels: b.Image.Kernels, guests: []*tenant{{bed: b, name: "web-1"}}}
	e.keepInPlace()
	b.again(h, func() error {
		must(t, h, "sync")
		if err := h.Cut(); err != nil {
			return err
		}
		h.AppArmor = true
		return h.Start(b.ctx(time.Minute))
	})
	b.awaitBelayd(h)
	b.boot(guest.Spec{FileMemory: true})
	anyway := e.denials() // to a guest that Belay has not touched yet
	t.Logf("denied without Belay: %q", anyway)
	e.confined(anyway)

	e.step("hold", func(e *estate) {
		b.belay(h, "hold", "--guest", "web-1", "--", "true")
		e.are()
	})
	e.step("another QEMU, memory in place", func(e *estate) {
		e.guests[0].replaceVMM("in-place")
		e.confined(anyway)
	})
	e.step("no twin", func(e *estate) {
		r, err := h.Belay(e.ctx(time.Minute), "replace-vmm", "web-1", "--dry-run")
		if err != nil || !strings.Contains(r.Stdout, "no: is confined by apparmor") {
			e.t.Errorf("%v: %+v", err, r)
		}
	})
	e.step("another kernel, memory in place", func(e *estate) {
		e.stays(e.change(1))
		e.confined(anyway)
	})
	e.step("and back, memory copied", func(e *estate) {
		e.configure("[kexec]\nin_place = false")
		e.restart()
		for _, g := range e.change(0).Kexeced.Guests {
			if g.Memory != maint.KexecCopied {
				e.t.Errorf("memory of guest %s was %s", g.Guest, g.Memory)
			}
		}
		e.confined(anyway)
	})
}

// denials are what AppArmor has denied on this boot, without whom.
func (e *estate) denials() (all []string) {
	e.t.Helper()
	for _, m := range regexp.MustCompile(`apparmor="DENIED" (operation="\w+") .*(name="[^"]*")`).FindAllStringSubmatch(must(e.t, e.Host, "journalctl", "-k", "-b", "--no-pager"), -1) {
		all = append(all, m[1]+" "+m[2])
	}
	return all
}

// confined checks that AppArmor has a say in what the guest's QEMU and libvirtd do, and has denied
// nothing but what it denies any QEMU.
func (e *estate) confined(anyway []string) {
	e.t.Helper()
	for _, process := range []string{e.guests[0].qemu(e.Host), must(e.t, e.Host, "pidof", "libvirtd")} {
		if label := must(e.t, e.Host, "cat", "/proc/"+process+"/attr/current"); !strings.HasSuffix(label, "(enforce)") {
			e.t.Errorf("AppArmor does not confine process %s: %s", process, label)
		}
	}
	for _, d := range e.denials() {
		if !slices.Contains(anyway, d) {
			e.t.Errorf("AppArmor has denied %s", d)
		}
	}
}
