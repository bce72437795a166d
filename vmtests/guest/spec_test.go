package guest

import (
	"encoding/xml"
	"net/netip"
	"strings"
	"testing"
)

func TestSpecXML(t *testing.T) {
	img := Image{Kernel: "/c/vmlinuz", Initrd: "/c/initrd"}
	s := Spec{
		Name: "a&b", MemoryMiB: 256, IP: netip.MustParsePrefix("10.77.1.5/16"), Disk: "/s/d.qcow2",
		Heartbeat: netip.MustParseAddrPort("10.77.255.254:9099"), IntervalUs: 500, Cmdline: "extra",
	}
	got, err := s.XML(img)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"<domain type='qemu'>", "<name>a&amp;b</name>", "<memory unit='MiB'>256</memory>", "<vcpu>1</vcpu>",
		"machine='pc-i440fx-", "<kernel>/c/vmlinuz</kernel>", "<model fallback='forbid'>qemu64</model>",
		"belay.hostname=a&amp;b belay.ip=10.77.1.5/16 belay.heartbeat=10.77.255.254:9099 belay.interval_us=500 extra</cmdline>",
		"<mac address='52:54:00:4d:01:05'/>", "<source bridge='br0'/>",
		"<disk type='file'", "type='qcow2' cache='none'/>", "<source file='/s/d.qcow2'/>",
		"name='org.qemu.guest_agent.0'", "name='belay.probe.0'",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
	for _, unwanted := range []string{"<uuid>", "belay.gw"} {
		if strings.Contains(got, unwanted) {
			t.Errorf("%s in\n%s", unwanted, got)
		}
	}
	if err := xml.Unmarshal([]byte(got), new(struct{})); err != nil {
		t.Error(err)
	}

	bare, err := Spec{Name: "x", Accel: KVM, Disk: "/dev/loop7"}.XML(img)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"<domain type='kvm'>", "<cpu mode='host-model'/>", "<disk type='block'", "type='raw'", "<source dev='/dev/loop7'/>"} {
		if !strings.Contains(bare, want) {
			t.Errorf("no %s in\n%s", want, bare)
		}
	}
	if strings.Contains(bare, "<interface") {
		t.Error("a guest without an address has a network")
	}
	if strings.Contains(bare, "<memoryBacking>") {
		t.Error("memory is in a file unasked")
	}

	rich, err := Spec{Name: "x", FileMemory: true, Devices: "<rng model='virtio'/>"}.XML(img)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>", "<rng model='virtio'/>"} {
		if !strings.Contains(rich, want) {
			t.Errorf("no %s in\n%s", want, rich)
		}
	}
}

func TestSpecRefuses(t *testing.T) {
	for name, s := range map[string]Spec{
		"no name":        {},
		"slash in name":  {Name: "a/b"},
		"space in name":  {Name: "a b"},
		"little memory":  {Name: "a", MemoryMiB: 64},
		"much memory":    {Name: "a", MemoryMiB: 1 << 20},
		"negative CPUs":  {Name: "a", VCPUs: -1},
		"IPv6":           {Name: "a", IP: netip.MustParsePrefix("fd00::1/64")},
		"IPv6 heartbeat": {Name: "a", Heartbeat: netip.MustParseAddrPort("[::1]:1")},
		"accelerator":    {Name: "a", Accel: "xen"},
	} {
		if _, err := s.XML(Image{}); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestChannelPath(t *testing.T) {
	const domain = `<domain><devices>
		<channel type='unix'><source mode='bind' path='/x/agent'/><target name='org.qemu.guest_agent.0'/></channel>
		<channel type='unix'><source mode='bind' path='/x/probe'/><target name='belay.probe.0'/></channel>
	</devices></domain>`
	if got, err := channelPath(domain, "belay.probe.0"); err != nil || got != "/x/probe" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := channelPath(strings.Replace(domain, " path='/x/probe'", "", 1), "belay.probe.0"); err == nil {
		t.Error("a domain that does not run has a socket")
	}
	if _, err := channelPath("<domain", "x"); err == nil {
		t.Error("broken XML was taken")
	}
}
