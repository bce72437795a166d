package hypervisor

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"belay/agent/maint"
)

func TestParseNeeds(t *testing.T) {
	t.Parallel()
	addr := netip.MustParseAddr
	file := func(what, path string, kind maint.FileKind, same bool) maint.Needs {
		return maint.Needs{Files: []maint.FileNeed{{For: what, Path: path, Kind: kind, Same: same}}}
	}
	link := func(name string, bridge bool) maint.Needs {
		return maint.Needs{Links: []maint.LinkNeed{{For: "interface 52:54:00:11:22:33", Name: name, Bridge: bridge, Up: bridge}}}
	}
	bound := func(what, how string) Needs { return Needs{Bound: []maint.BoundDevice{{What: what, How: how}}} }
	const mac = "<mac address='52:54:00:11:22:33'/>"
	const detach = "virsh detach-device"
	sriov := "virsh detach-interface; or make it one of a pair, with <teaming type='transient'>, and libvirt detaches it by itself"
	for _, c := range []struct {
		name, devices string
		want          Needs
	}{
		{"nothing", `<emulator>/usr/bin/qemu</emulator><memballoon model='none'/>`, Needs{}},
		{"file", `<disk type='file' device='disk'><source file='/srv/a.qcow2' index='1'/><target dev='vda'/></disk>`,
			Needs{Needs: file("disk vda", "/srv/a.qcow2", maint.FileRegular, true)}},
		{"block device", `<disk type='block'><source dev='/dev/vg/a'/><target dev='vda'/></disk>`,
			Needs{Needs: file("disk vda", "/dev/vg/a", maint.FileBlock, true)}},
		{"medium", `<disk type='file' device='cdrom'><source file='/srv/a.iso'/><target dev='sda'/><readonly/></disk>`,
			Needs{Needs: file("cdrom sda", "/srv/a.iso", maint.FileRegular, false)}},
		{"medium that must be there", `<disk type='file' device='cdrom'><source file='/srv/a.iso' startupPolicy='mandatory'/><target dev='sda'/><readonly/></disk>`,
			Needs{Needs: file("cdrom sda", "/srv/a.iso", maint.FileRegular, false)}},
		{"medium that may be missing", `<disk type='file' device='cdrom'><source file='/srv/a.iso' startupPolicy='optional'/><target dev='sda'/><readonly/></disk>`, Needs{}},
		{"volumes of a pool", `<disk type='volume'><source pool='fast' volume='a'/><target dev='vda'/></disk><disk type='volume'><source pool='fast' volume='b'/><target dev='vdb'/></disk>`,
			Needs{Needs: maint.Needs{Pools: []string{"fast"}}}},
		{"empty drive", `<disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>`, Needs{}},
		{"network disk", `<disk type='network'><source protocol='rbd' name='p/a'/><target dev='vda'/></disk>`, Needs{}},
		{"secrets", `<disk type='network'><auth username='u'><secret type='ceph' uuid='U'/></auth><source protocol='rbd' name='p/a'><encryption format='luks'><secret type='passphrase' usage='key of a'/></encryption></source><target dev='vda'/></disk>`,
			Needs{Needs: maint.Needs{Secrets: []maint.SecretNeed{{For: "disk vda", UUID: "U"}, {For: "disk vda", Usage: "key of a"}}}}},
		{"overlay", `<disk type='file'><source file='/srv/a.qcow2'/><backingStore type='file'><source file='/srv/base.qcow2'/><backingStore type='block'><source dev='/dev/b'/><backingStore/></backingStore></backingStore><target dev='vda'/></disk>`,
			Needs{Needs: maint.Needs{Files: []maint.FileNeed{
				{For: "disk vda", Path: "/srv/a.qcow2", Kind: maint.FileRegular, Same: true},
				{For: "the image below disk vda", Path: "/srv/base.qcow2", Kind: maint.FileRegular},
				{For: "the image below disk vda", Path: "/dev/b", Kind: maint.FileBlock}}}}},
		{"unsafe cache", `<disk type='file'><driver cache='unsafe'/><source file='/srv/a'/><target dev='vda'/></disk>`,
			Needs{Needs: file("disk vda", "/srv/a", maint.FileRegular, true), Unsafe: file("disk vda", "/srv/a", maint.FileRegular, true).Files}},
		{"unsafe cache of a medium", `<disk type='file' device='cdrom'><driver cache='unsafe'/><source file='/srv/a'/><target dev='sda'/><readonly/></disk>`,
			Needs{Needs: file("cdrom sda", "/srv/a", maint.FileRegular, false)}},
		{"NVMe", `<disk type='nvme'><source><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source><target dev='vda'/></disk>`,
			bound("disk vda (nvme 0000:01:00.0)", "virsh detach-disk")},
		{"folder", `<filesystem type='mount'><source dir='/srv/share'/><target dir='share'/></filesystem>`,
			Needs{Needs: file("file system share", "/srv/share", maint.FileDir, true)}},
		{"bridge", `<interface type='bridge'>` + mac + `<source bridge='br0'/></interface>`, Needs{Needs: link("br0", true)}},
		{"Open vSwitch", `<interface type='bridge'>` + mac + `<source bridge='ovs0'/><virtualport type='openvswitch'/></interface>`, Needs{Needs: link("ovs0", false)}},
		{"macvtap", `<interface type='direct'>` + mac + `<source dev='eth1' mode='bridge'/></interface>`,
			Needs{Needs: maint.Needs{Links: []maint.LinkNeed{{For: "interface 52:54:00:11:22:33", Name: "eth1", Up: true}}}}},
		{"network, as it is on its host", `<interface type='bridge'><source network='n' portid='x' bridge='virbr0'/></interface><interface type='network'><source network='n'/></interface>`,
			Needs{Needs: maint.Needs{Networks: []string{"n"}}}},
		{"user network", `<interface type='user'/>`, Needs{}},
		{"SR-IOV", `<interface type='hostdev'>` + mac + `<source><address type='pci' domain='0x0000' bus='0x3b' slot='0x02' function='0x1'/></source></interface>`,
			bound("interface 52:54:00:11:22:33 (SR-IOV, 0000:3b:02.1)", sriov)},
		{"SR-IOV of a network", `<interface type='hostdev'>` + mac + `<source network='vfs'><address type='pci' domain='0x0000' bus='0x3b' slot='0x02' function='0x1'/></source></interface>`,
			Needs{Needs: maint.Needs{Networks: []string{"vfs"}}, Bound: bound("interface 52:54:00:11:22:33 (SR-IOV, 0000:3b:02.1)", sriov).Bound}},
		{"SR-IOV that goes by itself", `<interface type='hostdev'>` + mac + `<source><address type='pci' domain='0x0000' bus='0x3b' slot='0x02' function='0x1'/></source><teaming type='transient' persistent='ua-1'/></interface>`,
			Needs{Needs: maint.Needs{PCI: []string{"0000:3b:02.1"}}}},
		{"SR-IOV of a network that goes by itself", `<interface type='hostdev'><source network='vfs'/><teaming type='transient' persistent='ua-1'/></interface>`,
			Needs{Needs: maint.Needs{Networks: []string{"vfs"}}}},
		{"vDPA", `<interface type='vdpa'>` + mac + `<source dev='/dev/vhost-vdpa-0'/></interface>`,
			bound("interface 52:54:00:11:22:33 (vdpa /dev/vhost-vdpa-0)", "virsh detach-interface")},
		{"PCI", `<hostdev mode='subsystem' type='pci'><driver name='vfio'/><source><address domain='0x0000' bus='0x3b' slot='0x00' function='0x1'/></source></hostdev>`,
			bound("PCI device 0000:3b:00.1", detach)},
		{"PCI that goes by itself", `<hostdev mode='subsystem' type='pci'><source><address domain='0x0000' bus='0x3b' slot='0x00' function='0x1'/></source><teaming type='transient' persistent='ua-1'/></hostdev>`,
			Needs{Needs: maint.Needs{PCI: []string{"0000:3b:00.1"}}}},
		{"mediated", `<hostdev mode='subsystem' type='mdev'><source><address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source></hostdev>`,
			bound("mdev device c2177883-f1bb-47f0-914d-32a22e3a8804", detach)},
		{"USB", `<hostdev mode='subsystem' type='usb'><source><vendor id='0x1050'/><product id='0x0407'/></source></hostdev>`,
			bound("USB device 1050:0407", detach)},
		{"USB by its place", `<hostdev mode='subsystem' type='usb'><source><address bus='1' device='4'/></source></hostdev>`,
			bound("USB device 1-4", detach)},
		{"emulated TPM", `<tpm><backend type='emulator'><encryption secret='U'/></backend></tpm>`,
			Needs{Needs: maint.Needs{SwTPM: true, Secrets: []maint.SecretNeed{{For: "TPM", UUID: "U"}}}}},
		{"TPM of another process", `<tpm><backend type='external'><source type='unix' mode='connect' path='/run/tpm'/></backend></tpm>`,
			Needs{Needs: maint.Needs{Sockets: []maint.SocketNeed{{For: "TPM", Path: "/run/tpm"}}}}},
		{"TPM of the host", `<tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>`,
			bound("TPM of the host", "virsh detach-device, while it is off")},
		{"sockets", `<serial type='unix'><source mode='bind' path='/run/s'/></serial><console type='unix'><source mode='bind' path='/run/s'/></console><channel type='unix'><source mode='connect' path='/run/c'/><target name='org.x'/></channel><channel type='unix'><target name='org.y'/></channel>`,
			Needs{Needs: maint.Needs{Sockets: []maint.SocketNeed{{For: "serial", Path: "/run/s", Listen: true}, {For: "channel org.x", Path: "/run/c"}}}}},
		{"ports", `<serial type='tcp'><source mode='bind' host='127.0.0.1' service='4555'/></serial><console type='tcp'><source mode='bind' host='127.0.0.1' service='4555'/></console><serial type='tcp'><source mode='connect' host='10.0.0.1' service='7'/></serial><serial type='tcp'><source mode='bind' host='a.example' service='7'/></serial>`,
			Needs{Needs: maint.Needs{Ports: []maint.PortNeed{{For: "serial", Address: addr("127.0.0.1"), Port: 4555}}}}},
		{"device of the host", `<serial type='dev'><source path='/dev/ttyS0'/></serial>`, bound("serial (/dev/ttyS0)", detach)},
		{"VNC, as libvirt likes", `<graphics type='vnc' port='5900' autoport='yes' listen='127.0.0.1'><listen type='address' address='127.0.0.1'/></graphics>`,
			Needs{Needs: maint.Needs{Ports: []maint.PortNeed{{For: "graphics vnc", Address: addr("127.0.0.1")}}}}},
		{"VNC on a fixed port", `<graphics type='vnc' port='5907' autoport='no' websocket='5707'><listen type='address' address='0.0.0.0'/></graphics>`,
			Needs{Needs: maint.Needs{Ports: []maint.PortNeed{{For: "graphics vnc", Address: addr("0.0.0.0"), Port: 5907}, {For: "graphics vnc", Address: addr("0.0.0.0"), Port: 5707}}}}},
		{"SPICE", `<graphics type='spice' port='5901' tlsPort='5902'><listen type='address' address='::'/></graphics>`,
			Needs{Needs: maint.Needs{Ports: []maint.PortNeed{{For: "graphics spice", Address: addr("::"), Port: 5901}, {For: "graphics spice", Address: addr("::"), Port: 5902}}}}},
		{"VNC on a network's address", `<graphics type='vnc' port='-1' autoport='yes'><listen type='network' network='n'/></graphics>`, Needs{}},
		{"VNC on a socket", `<graphics type='vnc'><listen type='socket' socket='/run/v'/></graphics>`,
			Needs{Needs: maint.Needs{Sockets: []maint.SocketNeed{{For: "graphics vnc", Path: "/run/v", Listen: true}}}}},
	} {
		text := "<domain><memory>1024</memory><devices>" + c.devices + "</devices></domain>"
		got, err := ParseNeeds(text, text)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if d := cmp.Diff(c.want, got, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
		a := maint.Arrival{Op: "o", Guest: "g", GuestUUID: strings.Repeat("u", 36), MemoryBytes: 1, DomainType: "kvm", Needs: &got.Needs}
		if err := a.Validate(); err != nil {
			t.Errorf("%s: what was read is not taken: %v", c.name, err)
		}
	}
}

// What libvirt has made up for this host is in the live XML only.
func TestParseNeedsOfEitherForm(t *testing.T) {
	t.Parallel()
	live := `<domain><memory>1</memory><devices><channel type='unix'><source mode='bind' path='/var/lib/libvirt/x'/></channel><graphics type='vnc' port='5900'><listen type='address' address='::1'/></graphics>` +
		`<disk type='file'><source file='/a'/><target dev='vda'/></disk></devices></domain>`
	got, err := ParseNeeds(live, "<domain><memory>1</memory></domain>")
	if err != nil || len(got.Sockets)+len(got.Ports) != 0 || len(got.Files) != 1 {
		t.Errorf("%+v, %v", got, err)
	}
	// Nor is what it has made in its own folders anything that a guest needs.
	live = `<domain><memory>1</memory><os><loader type='pflash'>/usr/share/OVMF/a.fd</loader><kernel>/boot/k</kernel><initrd>/boot/i</initrd></os><devices>` +
		`<channel type='unix'><source mode='bind' path='/var/lib/libvirt/qemu/channel/target/domain-1-a/x'/></channel><channel type='unix'><source mode='connect' path='/run/libvirt/x'/></channel></devices></domain>`
	got, err = ParseNeeds(live, live)
	var files []string
	for _, f := range got.Files {
		files = append(files, f.For+" "+f.Path)
		if f.Same {
			t.Errorf("%+v is not written to", f)
		}
	}
	if d := cmp.Diff([]string{"the firmware /usr/share/OVMF/a.fd", "the kernel /boot/k", "the initial ramdisk /boot/i"}, files); d != "" || err != nil {
		t.Error(d, err)
	}
	if len(got.Sockets) != 1 || got.Sockets[0].Listen {
		t.Errorf("sockets %+v", got.Sockets)
	}
	if got, err = ParseNeeds("<domain><memory>1</memory><os><loader>hvmloader</loader></os></domain>", "<domain/>"); err != nil || len(got.Files) > 0 {
		t.Errorf("a loader that is a word: %+v, %v", got.Files, err)
	}
	for _, bad := range []string{"<domain", "<domain><memory unit='xxx'>1</memory><memoryBacking><hugepages/></memoryBacking></domain>",
		"<domain><memory>1</memory><memoryBacking><hugepages/></memoryBacking><numatune><memory nodeset='1-'/></numatune></domain>"} {
		if _, err := ParseNeeds(bad, "<domain/>"); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}

func TestParsePages(t *testing.T) {
	t.Parallel()
	const mib, gib = 1 << 20, 1 << 30
	cells := `<cpu><numa><cell id='0' memory='1' unit='GiB'/><cell id='1' memory='3' unit='GiB'/></numa></cpu>`
	for _, c := range []struct {
		name, xml string
		want      []maint.PageNeed
	}{
		{"ordinary memory", `<numatune><memory mode='strict' nodeset='0'/></numatune>`, nil},
		{"the default size", `<memoryBacking><hugepages/></memoryBacking>`, []maint.PageNeed{{Bytes: 4 * gib}}},
		{"a size", `<memoryBacking><hugepages><page size='2048' unit='KiB'/></hugepages></memoryBacking>`, []maint.PageNeed{{PageBytes: 2 * mib, Bytes: 4 * gib}}},
		{"strictly in cells", `<memoryBacking><hugepages><page size='1' unit='G'/></hugepages></memoryBacking><numatune><memory mode='strict' nodeset='1-3,^2'/></numatune>`,
			[]maint.PageNeed{{PageBytes: gib, Bytes: 4 * gib, Cells: []int{1, 3}}}},
		{"preferably in a cell", `<memoryBacking><hugepages/></memoryBacking><numatune><memory mode='preferred' nodeset='1'/></numatune>`, []maint.PageNeed{{Bytes: 4 * gib}}},
		{"cells of its own", `<memoryBacking><hugepages><page size='2' unit='M'/><page size='1' unit='G' nodeset='1'/></hugepages></memoryBacking>` + cells + `<numatune><memory nodeset='0-1'/><memnode cellid='1' mode='strict' nodeset='1'/></numatune>`,
			[]maint.PageNeed{{PageBytes: 2 * mib, Bytes: gib, Cells: []int{0, 1}}, {PageBytes: gib, Bytes: 3 * gib, Cells: []int{1}}}},
		{"a memory module", `<memoryBacking><hugepages/></memoryBacking><cpu><numa><cell id='0' memory='3' unit='GiB'/></numa></cpu>`, []maint.PageNeed{{Bytes: 3 * gib}, {Bytes: gib}}},
	} {
		got, err := ParseNeeds(`<domain><memory unit='GiB'>4</memory>`+c.xml+`</domain>`, "<domain/>")
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if d := cmp.Diff(c.want, got.Pages); d != "" {
			t.Errorf("%s: %s", c.name, d)
		}
	}
}

func TestHugePools(t *testing.T) {
	t.Parallel()
	got, err := hugePools(`<capabilities><host><topology><cells num='2'>` +
		`<cell id='1'><pages unit='KiB' size='4'>999</pages><pages unit='KiB' size='1048576'>2</pages><pages unit='KiB' size='2048'>7</pages></cell>` +
		`<cell id='0'><pages unit='KiB' size='4'>999</pages><pages unit='KiB' size='2048'>0</pages></cell>` +
		`</cells></topology></host></capabilities>`)
	if d := cmp.Diff([]maint.PagePool{{Cell: 1, PageBytes: 2 << 20}, {Cell: 1, PageBytes: 1 << 30}}, got); d != "" || err != nil {
		t.Error(d, err)
	}
	if _, err := hugePools("<capabilities"); err == nil {
		t.Error("what is no XML is taken")
	}
}
