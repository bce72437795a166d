package vmm_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/vmm"
	"belay/patch/vmm/vmmtest"
)

func TestSurvey(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	survey := func() vmm.Facts {
		t.Helper()
		f, err := vmm.Survey(t.Context(), b.Machine, b.Places(), b.uuid)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	f := survey()
	f.NoBounce = true
	for _, c := range vmm.Choices(f) {
		if len(c.Problems) > 0 {
			t.Errorf("%s: %+v", c.Method, c.Problems)
		}
	}
	if f.UID != os.Getuid() || f.Confined != "" || f.QEMU != "7.2.9" || len(f.Memory) != 1 || !f.Memory[0].Ours {
		t.Errorf("%+v", f)
	}

	b.SetXML(t, b.uuid, func(x string) string {
		return strings.Replace(x, "</devices>", `<emulator>/usr/bin/qemu</emulator>
			<disk type='file' device='disk'><source file='/t'/><target dev='vdb'/><transient/></disk>
			<disk type='nvme' device='disk'><target dev='vdc'/></disk>
			<filesystem type='mount'><driver type='virtiofs'/></filesystem>
			<vsock model='virtio'><cid auto='no' address='3'/></vsock>
			</devices><on_poweroff>restart</on_poweroff><launchSecurity type='sev'/>`, 1)
	})
	b.Edit(t, b.uuid, func(g *maint.Guest) {
		g.Devices = []maint.Device{{Kind: "hostdev", Source: "0000:03:00.0"}, {Kind: "shmem", Source: "s"},
			{Kind: "interface", Type: "vhostuser", MAC: "52:54:00:00:00:01"}, {Kind: "interface", Type: "bridge"},
			{Kind: "tpm", Type: "emulator"}, {Kind: "tpm", Type: "passthrough"}}
	})
	f = survey()
	got := strings.Join(f.Unfit, "; ")
	for _, want := range []string{"disk vdb, whose changes", "vdc of type nvme", "virtiofs", "0000:03:00.0", "memory device s", "52:54:00:00:00:01 of type vhostuser", "passthrough"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
	if len(f.Unfit) != 7 || len(f.OneWay) != 1 || !f.FixedCID || f.PowerOff != "restart" || f.Sealed != "sev" || f.Emulator != "/usr/bin/qemu" {
		t.Errorf("%+v", f)
	}
	if _, err := vmm.Survey(t.Context(), b.Machine, b.Places(), "10000000-0000-4000-8000-00000000ffff"); !errors.Is(err, maint.ErrNoGuest) {
		t.Error(err)
	}
	b.Fault("Guest", hypervisortest.Fault{Err: maint.ErrHypervisorDown})
	if _, err := vmm.Survey(t.Context(), b.Machine, b.Places(), b.uuid); !errors.Is(err, maint.ErrHypervisorDown) {
		t.Error(err)
	}
}

// What QEMU and the host's files say against it.
func TestSurveyFinds(t *testing.T) {
	t.Parallel()
	hook := func(b *bed) string { return filepath.Join(b.Root, vmmtest.HookFile) }
	for name, c := range map[string]struct {
		change func(t *testing.T, b *bed)
		code   maint.Code
		reason string
	}{
		"no hook":        {func(t *testing.T, b *bed) { must(t, os.Remove(hook(b))) }, maint.CodeHook, "is not there"},
		"hook not run":   {func(t *testing.T, b *bed) { must(t, os.Chmod(hook(b), 0o644)) }, maint.CodeHook, "not executable"},
		"another's hook": {func(t *testing.T, b *bed) { must(t, os.WriteFile(hook(b), []byte("#!/bin/sh\n"), 0o755)) }, maint.CodeHook, "not the hook"},
		"hook came later": {func(t *testing.T, b *bed) { must(t, os.RemoveAll(filepath.Join(b.Root, "run/belay/vmm/hooked"))) },
			maint.CodeHook, "was started before"},
		"another libvirtd": {func(t *testing.T, b *bed) {
			marks, _ := filepath.Glob(filepath.Join(b.Root, "run/belay/vmm/hooked/*"))
			if len(marks) != 1 {
				t.Fatal(marks)
			}
			must(t, os.WriteFile(marks[0], []byte("17\n"), 0o644))
		}, maint.CodeHook, "was started before"},
		"no libvirtd": {func(t *testing.T, b *bed) { must(t, os.Remove(filepath.Join(b.Root, "run/libvirtd.pid"))) }, maint.CodeHook, "no libvirt daemon"},
		"confined":    {func(t *testing.T, b *bed) { b.Confined = true }, maint.CodeConfined, "Permission denied"},
		"no folder": {func(t *testing.T, b *bed) {
			must(t, os.RemoveAll(filepath.Join(b.Root, "var/lib/libvirt/qemu/domain-1-web-1")))
		}, maint.CodeConfined, "has no folder"},
		"other memory": {func(t *testing.T, b *bed) {
			m := b.Memory()
			must(t, os.Remove(m[0]))
			must(t, os.WriteFile(m[0], nil, 0o600))
		}, maint.CodeMemory, "no longer, the file"},
		"left over": {func(t *testing.T, b *bed) { leave(t, b) }, maint.CodeKept, "rep-9"},
		"left, damaged": {func(t *testing.T, b *bed) {
			leave(t, b)
			must(t, os.WriteFile(filepath.Join(b.Root, "run/belay/vmm", b.uuid, "plan"), []byte("{"), 0o600))
		}, maint.CodeKept, "unreadable"},
		"hot migration": {func(t *testing.T, b *bed) { b.answer("query-migrate", map[string]any{"status": "active"}) }, maint.CodeQEMU, "under way"},
		"not migratable": {func(t *testing.T, b *bed) {
			b.answer("query-migrate", map[string]any{"blocked-reasons": []string{"no"}})
		}, maint.CodeQEMU, "hand it over: no"},
		"block job": {func(t *testing.T, b *bed) {
			b.answer("query-block-jobs", []any{map[string]any{"type": "mirror", "device": "vda"}})
		}, maint.CodeBusy, "mirror on vda"},
		"virtio-mem": {func(t *testing.T, b *bed) {
			b.answer("query-memory-devices", []any{map[string]any{"type": "dimm", "data": map[string]any{"memdev": "/objects/other"}},
				map[string]any{"type": "virtio-mem", "data": map[string]any{"memdev": "/objects/pc.ram"}}})
		}, maint.CodeMemory, "pc.ram is a virtio-mem device's"},
		"CPU":      {func(t *testing.T, b *bed) { b.Edit(t, b.uuid, func(g *maint.Guest) { g.CPUModel = "EPYC" }) }, maint.CodeCPU, "cannot run its CPU"},
		"old QEMU": {func(t *testing.T, b *bed) { b.answer("query-migrate-capabilities", []any{}) }, maint.CodeQEMU, "x-ignore-shared"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			pid := b.PID(b.uuid)
			c.change(t, b)
			err := run(t.Context(), b.replacement(maint.VMMInPlace), newNotebook())
			var r *maint.Refusal
			if !errors.As(err, &r) {
				if name == "left, damaged" && err != nil {
					return // cannot even be read
				}
				t.Fatalf("ended with %v", err)
			}
			if !slices.ContainsFunc(r.Problems, func(p maint.Problem) bool { return p.Code == c.code && strings.Contains(p.Reason, c.reason) }) {
				t.Errorf("refused with %v", err)
			}
			if b.state() != maint.GuestRunning || b.PID(b.uuid) != pid {
				t.Error("the guest felt it")
			}
		})
	}
}

// answer has QEMU answer a command in another way.
func (b *bed) answer(command string, value any) {
	b.Intercept(func(got string) (any, bool) { return value, got == command })
}

// leave leaves the guard of an operation that nobody knows any more.
func leave(t *testing.T, b *bed) {
	t.Helper()
	dir := filepath.Join(b.Root, "run/belay/vmm", b.uuid)
	must(t, os.MkdirAll(dir, 0o700))
	text, err := json.Marshal(map[string]any{"op": "rep-9", "uuid": b.uuid, "guest": "web-1"})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "plan"), text, 0o600))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
