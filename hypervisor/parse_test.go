package hypervisor

import (
	"errors"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"belay/agent/maint"
)

func TestParseGuest(t *testing.T) {
	text, err := os.ReadFile("testdata/guest.xml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseGuest(string(text))
	if err != nil {
		t.Fatal(err)
	}
	want := maint.Guest{
		UUID: "2f6f2b51-0b5c-4a0c-9d0e-0d9d3a1b7c11", Name: "web-1", ID: 7,
		MemoryBytes: 8 << 30, VCPUs: 4,
		DomainType: "kvm", MachineType: "pc-q35-7.2", CPUModel: "EPYC",
		Agent: maint.AgentConnected,
		Disks: []maint.Disk{
			{Target: "vda", Kind: "disk", Type: "file", Source: "/srv/web-1.qcow2", Format: "qcow2", Cache: "none"},
			{Target: "vdb", Kind: "disk", Type: "network", Source: "pool/web-1", Format: "raw", Shared: true},
			{Target: "vdc", Kind: "disk", Type: "volume", Source: "fast/data"},
			{Target: "sda", Kind: "cdrom", Type: "file", ReadOnly: true},
		},
		Devices: []maint.Device{
			{Kind: "interface", Type: "bridge", Source: "br0", Target: "vnet4", MAC: "52:54:00:11:22:33"},
			{Kind: "hostdev", Type: "pci", Source: "0000:3b:00.1"},
			{Kind: "hostdev", Type: "mdev", Source: "c2177883-f1bb-47f0-914d-32a22e3a8804"},
			{Kind: "channel", Type: "unix", Source: "/run/libvirt/qemu/channel/7-web-1/org.qemu.guest_agent.0", Target: "org.qemu.guest_agent.0"},
			{Kind: "filesystem", Type: "mount", Source: "/srv/share", Target: "share"},
			{Kind: "tpm", Type: "emulator"},
			{Kind: "watchdog", Type: "itco"},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ParseGuest (-want +got):\n%s", diff)
	}

	cpu, err := cpuElement(string(text))
	if err != nil || !strings.HasPrefix(cpu, "<cpu mode='custom'") || !strings.HasSuffix(cpu, "</cpu>") ||
		!strings.Contains(cpu, "x2apic") {
		t.Errorf("cpuElement: %q, %v", cpu, err)
	}
}

func TestCPUElement(t *testing.T) {
	for text, want := range map[string]string{
		"<domain/>": "",
		"<domain><devices><cpu/></devices></domain>":  "",
		"<domain><a/><cpu mode='x'/><b/></domain>":    "<cpu mode='x'/>",
		"<domain><cpu><cpu/>é</cpu><cpu/></domain>":   "<cpu><cpu/>é</cpu>",
		"<domain><!-- <cpu/> --><cpu></cpu></domain>": "<cpu></cpu>",
	} {
		if got, err := cpuElement(text); err != nil || got != want {
			t.Errorf("cpuElement(%s) = %q, %v; want %q", text, got, err, want)
		}
	}
	if _, err := cpuElement("<domain><cpu>"); err == nil {
		t.Error("no error for XML that is cut off")
	}
}

func TestMemoryBacking(t *testing.T) {
	for text, want := range map[string]struct {
		source string
		shared bool
	}{
		"": {},
		"<memoryBacking><locked/></memoryBacking>":                                                                                          {},
		"<memoryBacking><source type='anonymous'/></memoryBacking>":                                                                         {},
		"<memoryBacking><source type='file'/><access mode='private'/></memoryBacking>":                                                      {source: "file"},
		"<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>":                                                      {"memfd", true},
		"<memoryBacking><hugepages/></memoryBacking>":                                                                                       {source: "hugepages"},
		"<memoryBacking><hugepages><page size='2048' unit='KiB'/></hugepages><source type='memfd'/><access mode='shared'/></memoryBacking>": {"hugepages", true},
	} {
		g, err := ParseGuest("<domain>" + text + "</domain>")
		if err != nil || g.MemorySource != want.source || g.MemoryShared != want.shared {
			t.Errorf("%s: %q, shared %t, %v", text, g.MemorySource, g.MemoryShared, err)
		}
	}
}

// TestParseAntiAffinity: as libvirt keeps what virsh metadata is given.
func TestParseAntiAffinity(t *testing.T) {
	for text, want := range map[string][]string{
		"": nil,
		"<metadata><x:placement xmlns:x='urn:belay:placement:1' anti-affinity='db'/></metadata>":                        {"db"},
		"<metadata><placement xmlns='urn:belay:placement:1' anti-affinity=' web  db web'/></metadata>":                  {"db", "web"},
		"<metadata><placement xmlns='urn:belay:placement:1' anti-affinity=''/></metadata>":                              nil,
		"<metadata><placement xmlns='urn:other:1' anti-affinity='db'/></metadata>":                                      nil,
		"<metadata><o xmlns='urn:o'/><p:placement xmlns:p='urn:belay:placement:1' anti-affinity='db'/></metadata>":      {"db"},
		"<description><placement xmlns='urn:belay:placement:1' anti-affinity='db'/></description><metadata></metadata>": nil,
	} {
		g, err := ParseGuest("<domain>" + text + "</domain>")
		if err != nil || !slices.Equal(g.AntiAffinity, want) {
			t.Errorf("%s: %q, %v, want %q", text, g.AntiAffinity, err, want)
		}
	}
}

func TestParseGuestRefuses(t *testing.T) {
	for _, text := range []string{"", "<domain", "<domain><memory unit='bushel'>1</memory></domain>", "<domain><vcpu>many</vcpu></domain>"} {
		if _, err := ParseGuest(text); err == nil {
			t.Errorf("ParseGuest(%q) takes it", text)
		}
	}
}

func TestUUIDs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		u := libvirt.UUID(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "uuid"))
		text := formatUUID(u)
		for _, form := range []string{text, strings.ToUpper(text), strings.ReplaceAll(text, "-", "")} {
			if got, ok := parseUUID(form); !ok || got != u {
				t.Fatalf("parseUUID(%s) = %v, %t", form, got, ok)
			}
		}
	})
	for _, text := range []string{"", "web-1", "2f6f2b51-0b5c-4a0c-9d0e-0d9d3a1b7c1", "zf6f2b51-0b5c-4a0c-9d0e-0d9d3a1b7c11"} {
		if _, ok := parseUUID(text); ok {
			t.Errorf("%q is taken for a UUID", text)
		}
	}
}

// Numbers that this version does not know are words, not panics.
func TestWordsAreTotal(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := rapid.Int32().Draw(t, "a"), rapid.Int32().Draw(t, "b")
		state, reason := domainState(a, b)
		change, detail := lifecycleWords(a, b)
		for _, w := range []string{string(state), reason, change, detail, agentChange(a), agentReason(a), jobState(a), jobOperation(a)} {
			if w == "" {
				t.Fatalf("no word for %d, %d", a, b)
			}
		}
	})
}

// FuzzJobOf: whatever libvirt counts, no time is negative and no share above all.
func FuzzJobOf(f *testing.F) {
	f.Add(int32(2), uint64(0), uint64(0), uint64(0))
	f.Add(int32(2), uint64(1500), uint64(10), uint64(4096))
	f.Add(int32(-1), uint64(math.MaxUint64), uint64(math.MaxUint64), uint64(math.MaxUint64))
	f.Add(int32(3), uint64(math.MaxInt64), uint64(1<<52+1), uint64(4096))
	f.Fuzz(func(t *testing.T, kind int32, n, pages, size uint64) {
		var params []libvirt.TypedParam
		for _, field := range []string{"operation", "time_elapsed", "downtime", "setup_time", "memory_total", "memory_processed", "memory_remaining", "memory_bps",
			"memory_iteration", "disk_total", "disk_remaining", "disk_bps", "auto_converge_throttle"} {
			params = append(params, libvirt.TypedParam{Field: field, Value: *libvirt.NewTypedParamValueUllong(n)})
		}
		params = append(params, libvirt.TypedParam{Field: "memory_dirty_rate", Value: *libvirt.NewTypedParamValueUllong(pages)},
			libvirt.TypedParam{Field: "memory_page_size", Value: *libvirt.NewTypedParamValueUllong(size)})
		j := jobOf(kind, params)
		if j.Elapsed < 0 || j.Downtime < 0 || j.Setup < 0 || j.SlowedPercent < 0 || j.SlowedPercent > 100 {
			t.Errorf("%+v", j)
		}
		if pages > 0 && size > 0 && j.DirtyPerSecond < max(pages, size) {
			t.Errorf("%d pages of %d bytes are %d", pages, size, j.DirtyPerSecond)
		}
	})
}

func TestJobOf(t *testing.T) {
	param := func(field string, v *libvirt.TypedParamValue) libvirt.TypedParam {
		return libvirt.TypedParam{Field: field, Value: *v}
	}
	got := jobOf(2, []libvirt.TypedParam{
		param("operation", libvirt.NewTypedParamValueInt(5)),
		param("time_elapsed", libvirt.NewTypedParamValueUllong(1500)),
		param("downtime", libvirt.NewTypedParamValueUllong(300)),
		param("setup_time", libvirt.NewTypedParamValueUllong(2)),
		param("memory_total", libvirt.NewTypedParamValueUllong(1000)),
		param("memory_processed", libvirt.NewTypedParamValueUllong(600)),
		param("memory_remaining", libvirt.NewTypedParamValueUllong(400)),
		param("memory_bps", libvirt.NewTypedParamValueUllong(77)),
		param("memory_dirty_rate", libvirt.NewTypedParamValueUllong(10)),
		param("memory_page_size", libvirt.NewTypedParamValueUllong(4096)),
		param("memory_iteration", libvirt.NewTypedParamValueUllong(3)),
		param("errmsg", libvirt.NewTypedParamValueString("not a number")),
	})
	want := maint.Job{
		Active: true, Operation: "migration out", State: "unbounded",
		Elapsed: 1500 * time.Millisecond, Downtime: 300 * time.Millisecond, Setup: 2 * time.Millisecond,
		MemoryTotal: 1000, MemorySent: 600, MemoryLeft: 400,
		BytesPerSecond: 77, DirtyPerSecond: 40960, Iteration: 3,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("jobOf (-want +got):\n%s", diff)
	}
}

func TestMoveFlags(t *testing.T) {
	const base = libvirt.MigrateLive | libvirt.MigratePeer2peer | libvirt.MigrateChangeProtection
	for _, tt := range []struct {
		p      maint.MoveParams
		flags  libvirt.DomainMigrateFlags
		params map[string]any
	}{
		{maint.MoveParams{DestURI: "qemu+tls://b/system"}, base, map[string]any{}},
		{maint.MoveParams{Persist: true}, base | libvirt.MigratePersistDest | libvirt.MigrateUndefineSource, map[string]any{}},
		{
			maint.MoveParams{TLS: true, TLSName: "b", BandwidthMiBs: 5, MigrateURI: "tcp://10.0.0.2"},
			base | libvirt.MigrateTLS,
			map[string]any{"migrate_uri": "tcp://10.0.0.2", "tls.destination": "b", "bandwidth": uint64(5)},
		},
		{
			maint.MoveParams{Compression: "zstd", Parallel: 4, Listen: "10.0.0.2"}, base | libvirt.MigrateCompressed | libvirt.MigrateParallel,
			map[string]any{"compression": "zstd", "parallel.connections": int32(4), "listen_address": "10.0.0.2"},
		},
		{maint.MoveParams{ZeroCopy: true}, base | 1<<20, map[string]any{}},
	} {
		if got := moveFlags(tt.p); got != tt.flags {
			t.Errorf("flags of %+v: %b, want %b", tt.p, got, tt.flags)
		}
		params := map[string]any{}
		for _, p := range moveParams(tt.p) {
			params[p.Field] = p.Value.I
		}
		if diff := cmp.Diff(tt.params, params); diff != "" {
			t.Errorf("parameters of %+v (-want +got):\n%s", tt.p, diff)
		}
	}
}

func TestRefusedMove(t *testing.T) {
	for _, tt := range []struct {
		code    int
		message string
		want    error
	}{
		{38, "authentication failed: Failed to verify peer's certificate", maint.ErrCertificate},
		{1, "internal error: unable to execute QEMU command 'migrate': Certificate does not match the hostname host-b", maint.ErrCertificate},
		{9, "operation failed: job 'migration out' failed: TLS handshake failed: A TLS fatal alert has been received.", maint.ErrCertificate},
		{8, "invalid argument: Unsupported compression method 'zstd'", maint.ErrParameter},
		{8, "unsupported flags (0x100000) in function qemuDomainMigratePerform3Params", maint.ErrParameter},
		{38, "unable to connect to server at 'host-b:16514': Connection refused", nil},
		{0, "given up: about a certificate", nil},
	} {
		err := refusedMove(NewError("x", "sock", tt.code, tt.message))
		for _, is := range []error{maint.ErrCertificate, maint.ErrParameter} {
			if errors.Is(err, is) != (is == tt.want) {
				t.Errorf("%q: is %v: %t", tt.message, is, errors.Is(err, is))
			}
		}
	}
}
