package guest

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"text/template"

	"belay/vmtests/probe"
	"belay/vmtests/program"
)

const (
	// Machine is versioned: libvirt resolves "pc" anew on each host, and a
	// guest can only move to the very same machine. It boots as fast as q35
	// and has fewer controllers to migrate.
	Machine = "pc-i440fx-7.2"

	// agentChannel is where libvirt looks for the guest agent.
	agentChannel = "org.qemu.guest_agent.0"

	// baseCmdline: a panic reboots nothing, as the console then has its
	// reason; mitigations only cost time under emulation.
	baseCmdline = "console=ttyS0 loglevel=4 mitigations=off no_timer_check"

	// SteadyClock has the kernel keep time by the ACPI timer. The TSC, which it
	// prefers, it measures as it boots, and on a busy machine an emulated guest
	// measures it wrongly: its clock then runs fast for good.
	SteadyClock = "clocksource=acpi_pm"

	minMemoryMiB, maxMemoryMiB = 128, 4096
)

// Spec describes a guest. Zero values of optional fields are replaced.
type Spec struct {
	Name      string
	UUID      string       // optional: libvirt's choice
	MemoryMiB int          // 128 to 4096, default 128
	VCPUs     int          // default 1
	MAC       string       // default 52:54:00 and the end of IP
	IP        netip.Prefix // IPv4, optional: no network without
	Gateway   netip.Addr   // optional
	Bridge    string       // default br0
	Accel     Accel        // default TCG

	// Disk is the path of a block device (below /dev) or of an image,
	// *.qcow2 or else raw, the same on every host; optional. It is opened
	// with cache=none, as libvirt demands of disks that migrate. It also
	// demands that an image be on a file system which it knows to be shared;
	// a block device it trusts to be the same everywhere.
	Disk string

	Heartbeat  netip.AddrPort // where to send heartbeats, optional
	IntervalUs int            // between heartbeats, default 1000
	Transient  bool           // created, not defined: gone when it stops
	// FileMemory keeps its memory in a file below libvirt's memory_backing_dir,
	// shared, so that another QEMU can map it.
	FileMemory bool
	Devices    string // more devices, as XML, optional; then with libvirt's balloon too
	Cmdline    string // more for the kernel, optional
}

// withDefaults fills in what is left open and checks the rest.
func (s Spec) withDefaults() (Spec, error) {
	bad := func(format string, args ...any) (Spec, error) {
		return s, fmt.Errorf("guest %q: %s", s.Name, fmt.Sprintf(format, args...))
	}
	if s.Name == "" || strings.ContainsAny(s.Name, " \t\n/") {
		return bad("the name must be without spaces and slashes")
	}
	if s.MemoryMiB == 0 {
		s.MemoryMiB = minMemoryMiB
	}
	if s.MemoryMiB < minMemoryMiB || s.MemoryMiB > maxMemoryMiB {
		return bad("memory of %d MiB is outside %d to %d", s.MemoryMiB, minMemoryMiB, maxMemoryMiB)
	}
	if s.VCPUs == 0 {
		s.VCPUs = 1
	}
	if s.VCPUs < 0 {
		return bad("%d CPUs", s.VCPUs)
	}
	if s.Bridge == "" {
		s.Bridge = "br0"
	}
	if s.Accel == "" {
		s.Accel = TCG
	}
	if s.Accel != TCG && s.Accel != KVM {
		return bad("unknown accelerator %q", s.Accel)
	}
	if s.IP.IsValid() && !s.IP.Addr().Is4() {
		return bad("address %s is not IPv4", s.IP)
	}
	if s.MAC == "" && s.IP.IsValid() {
		a := s.IP.Addr().As4()
		s.MAC = net.HardwareAddr{0x52, 0x54, 0, a[1], a[2], a[3]}.String()
	}
	if s.Heartbeat.IsValid() && !s.Heartbeat.Addr().Is4() {
		return bad("heartbeat address %s is not IPv4", s.Heartbeat)
	}
	return s, nil
}

func (s Spec) diskFormat() string {
	if strings.HasSuffix(s.Disk, ".qcow2") {
		return "qcow2"
	}
	return "raw"
}

// cmdline is the kernel command line; init.sh and the probe read it.
func (s Spec) cmdline() string {
	words := []string{baseCmdline, "belay.hostname=" + s.Name}
	if s.IP.IsValid() {
		words = append(words, "belay.ip="+s.IP.String())
	}
	if s.Gateway.IsValid() {
		words = append(words, "belay.gw="+s.Gateway.String())
	}
	if s.Heartbeat.IsValid() {
		words = append(words, "belay.heartbeat="+s.Heartbeat.String())
	}
	if s.IntervalUs != 0 {
		words = append(words, "belay.interval_us="+strconv.Itoa(s.IntervalUs))
	}
	if s.Cmdline != "" {
		words = append(words, s.Cmdline)
	}
	return strings.Join(words, " ")
}

// ConsolePath is the guest's console log inside its host; virtlogd writes it.
func ConsolePath(name string) string {
	return "/var/log/libvirt/qemu/" + name + "-console.log"
}

// domainXML leaves out what a server does not need: each device is one more to
// boot with, to migrate and to go wrong. A HPET, for one, wakes an emulated
// guest's QEMU 250 times a second.
const domainXML = `<domain type='{{if eq .Accel "kvm"}}kvm{{else}}qemu{{end}}'>
  <name>{{x .Name}}</name>
{{- if .UUID}}
  <uuid>{{x .UUID}}</uuid>
{{- end}}
  <memory unit='MiB'>{{.MemoryMiB}}</memory>
{{- if .FileMemory}}
  <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>
{{- end}}
  <vcpu>{{.VCPUs}}</vcpu>
  <os>
    <type arch='x86_64' machine='{{.Machine}}'>hvm</type>
    <kernel>{{x .Image.Kernel}}</kernel>
    <initrd>{{x .Image.Initrd}}</initrd>
    <cmdline>{{x .Append}}</cmdline>
  </os>
  <features><acpi/><apic/></features>
{{- if eq .Accel "kvm"}}
  <cpu mode='host-model'/>
{{- else}}
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
{{- end}}
  <clock offset='utc'><timer name='hpet' present='no'/></clock>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <controller type='virtio-serial' index='0'/>
    <serial type='file'>
      <source path='{{x .Console}}' append='on'/>
      <target port='0'/>
    </serial>
    <channel type='unix'>
      <target type='virtio' name='{{.Agent}}'/>
    </channel>
    <channel type='unix'>
      <source mode='bind'/>
      <target type='virtio' name='{{.Port}}'/>
    </channel>
{{- if .MAC}}
    <interface type='bridge'>
      <mac address='{{x .MAC}}'/>
      <source bridge='{{x .Bridge}}'/>
      <model type='virtio'/>
      <rom enabled='no'/>
    </interface>
{{- end}}
{{- if .Disk}}
    <disk type='{{if .Block}}block{{else}}file{{end}}' device='disk'>
      <driver name='qemu' type='{{.Format}}' cache='none'/>
      <source {{if .Block}}dev{{else}}file{{end}}='{{x .Disk}}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
{{- end}}
{{- with .Devices}}
    {{.}}
{{- else}}
    <memballoon model='none'/>
{{- end}}
  </devices>
</domain>
`

// XML is the guest's domain XML. The error says what in the spec is wrong.
func (s Spec) XML(img Image) (string, error) {
	s, err := s.withDefaults()
	if err != nil {
		return "", err
	}
	escape := func(text string) (string, error) {
		var b bytes.Buffer
		err := xml.EscapeText(&b, []byte(text))
		return b.String(), err
	}
	t, err := template.New("domain").Funcs(template.FuncMap{"x": escape}).Parse(domainXML)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	err = t.Execute(&b, struct {
		Spec
		Image                                         Image
		Machine, Append, Console, Agent, Port, Format string
		Block                                         bool
	}{s, img, Machine, s.cmdline(), ConsolePath(s.Name), agentChannel, probe.PortName, s.diskFormat(), strings.HasPrefix(s.Disk, "/dev/")})
	if err != nil {
		return "", fmt.Errorf("guest %q: %w", s.Name, err)
	}
	return b.String(), nil
}

// CreateDisk makes an empty image of sizeMiB MiB, qcow2 or raw by its name as
// in Spec.Disk. An existing file is an error.
func CreateDisk(ctx context.Context, path string, sizeMiB int) error {
	if sizeMiB <= 0 {
		return errors.New("create disk: size must be positive")
	}
	if _, err := filepath.EvalSymlinks(path); err == nil {
		return fmt.Errorf("create disk: %s exists", path)
	}
	format := Spec{Disk: path}.diskFormat()
	if _, err := program.Output(ctx, "", "qemu-img", "create", "-q", "-f", format, path, strconv.Itoa(sizeMiB)+"M"); err != nil {
		return fmt.Errorf("create disk: %w", err)
	}
	return nil
}
