package wholehost

import (
	"time"

	"belay/vmtests/machine"
)

// replaceVMM puts a new QEMU under the guest: what that takes of systemd (the leash, the second
// libvirtd) is done by systemd, and QEMU is libvirt-qemu's.
func (b *bed) replaceVMM(method string) {
	h := b.Hosts[0]
	pid := b.qemu(h)
	mark := b.obs.Mark()
	b.belay(h, "replace-vmm", "web-1", "--method", method)
	b.isWhole(h)
	if now := b.qemu(h); now == pid {
		b.t.Errorf("it is the same QEMU, process %s", now)
	}
	r := b.obs.Since(mark, "web-1")
	b.t.Logf("silent for %s at most", r.Pause().Round(time.Millisecond))
	if r.Restarts != 0 || r.Duplicated != 0 {
		b.t.Errorf("the guest was started anew, or ran twice: %+v", r)
	}
}

// qemu is the process of the guest's QEMU.
func (b *bed) qemu(h *machine.Host) string {
	b.t.Helper()
	return must(b.t, h, "cat", "/run/libvirt/qemu/"+b.guest.Spec.Name+".pid")
}
