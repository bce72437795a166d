package wholehost

import (
	"testing"
	"time"

	"belay/vmtests/guest"
	"belay/vmtests/machine"
)

// TestReplaceVMM puts a new QEMU under a guest by every method: what that takes of systemd (the
// leash, the second libvirtd) is done by systemd, and QEMU is libvirt-qemu's.
func TestReplaceVMM(t *testing.T) {
	b := newEmptyBed(t, machine.Config{})
	h := b.Hosts[0]
	must(t, h, "sh", "-c", `echo 'memory_backing_dir = "/dev/shm"' >>/etc/libvirt/qemu.conf && systemctl restart libvirtd.service`)
	b.boot(guest.Spec{FileMemory: true})
	for _, method := range []string{"in-place", "prewarmed", "copy", "bounce"} {
		t.Run(method, func(t *testing.T) {
			b := b.within(t)
			pid := b.qemu(h)
			mark := b.obs.Mark()
			b.belay(h, "replace-vmm", "web-1", "--method", method)
			b.isWhole(h)
			if now := b.qemu(h); now == pid {
				t.Errorf("it is the same QEMU, process %s", now)
			}
			r := b.obs.Since(mark, "web-1")
			t.Logf("silent for %s at most", r.Pause().Round(time.Millisecond))
			if r.Restarts != 0 || r.Duplicated != 0 {
				t.Errorf("the guest was started anew, or ran twice: %+v", r)
			}
		})
		if t.Failed() {
			return // the guest may be anywhere
		}
	}
}

// qemu is the process of the guest's QEMU.
func (b *bed) qemu(h *machine.Host) string {
	b.t.Helper()
	return must(b.t, h, "cat", "/run/libvirt/qemu/"+b.guest.Spec.Name+".pid")
}
