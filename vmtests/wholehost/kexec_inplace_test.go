package wholehost

import (
	"testing"

	"belay/agent/maint"
	"belay/vmtests/guest"
	"belay/vmtests/machine"
)

// TestKexecInPlace: a host's kernel is replaced, twice, and a guest's memory stays where it is. An
// emulated host emulates KVM not well enough to rely on what a guest under it does; one that QEMU
// emulates there, again, is slow, but what becomes of it is Belay's doing.
func TestKexecInPlace(t *testing.T) {
	inFull(t)
	for _, accel := range []guest.Accel{guest.TCG, guest.KVM} {
		t.Run(string(accel), func(t *testing.T) {
			b := newEmptyBed(t, machine.Config{})
			b.accel = accel
			e := &estate{Host: b.Hosts[0], t: t, kernels: b.Image.Kernels, guests: []*tenant{{bed: b, name: "web-1"}}}
			e.keepInPlace()
			b.boot(guest.Spec{FileMemory: true})
			e.step("another version", func(e *estate) { e.stays(e.change(1)) })
			e.step("and back", func(e *estate) { e.stays(e.change(0)) })
		})
	}
}

// keepInPlace has the host make memory of guests that is a file in the reserved memory, as
// docs/rung-b-kexec.md has it.
func (e *estate) keepInPlace() {
	e.t.Helper()
	must(e.t, e.Host, "sh", "-ec", `mkdir -p -m 711 /var/lib/libvirt/belay
echo '/dev/pmem0 /var/lib/libvirt/belay ext4 dax,nofail,x-systemd.after=var-lib-belay-memory.mount,x-systemd.before=libvirtd.service,x-systemd.before=virtqemud.service,x-systemd.device-timeout=90s 0 0' >>/etc/fstab
systemctl daemon-reload
systemctl start var-lib-libvirt-belay.mount
echo 'memory_backing_dir = "/var/lib/libvirt/belay"' >>/etc/libvirt/qemu.conf
systemctl restart libvirtd.service`)
}

// stays checks that no guest's memory was copied.
func (e *estate) stays(op maint.Op) {
	e.t.Helper()
	for _, g := range op.Kexeced.Guests {
		if g.Memory != maint.KexecInPlace {
			e.t.Errorf("the memory of guest %s was %s: %+v", g.Guest, g.Memory, g)
		}
	}
}
