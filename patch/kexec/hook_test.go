package kexec_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// libvirt starts no guest afresh whose memory waits; from its file it does, as often as that
// is asked for. Other guests are left alone.
func TestHook(t *testing.T) {
	t.Parallel()
	const uuid, other = "c1f8a1de-0000-4000-8000-000000000001", "c1f8a1de-0000-4000-8000-000000000002"
	text, err := os.ReadFile("../../dist/hooks/qemu.d/belay")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	kept := filepath.Join(dir, "memory")
	script := strings.NewReplacer("guard=/run/belay/vmm", "guard="+filepath.Join(dir, "vmm"), "kept=/var/lib/belay/memory", "kept="+kept).Replace(string(text))
	hook := func(uuid, operation string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", script, "belay", "web-1", operation, "begin", "-")
		cmd.Stdin = strings.NewReader("<domain type='kvm'>\n  <name>web-1</name>\n  <uuid>" + uuid + "</uuid>\n</domain>\n")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	starts := func(uuid string, operations ...string) bool {
		t.Helper()
		for _, o := range operations {
			if out, err := hook(uuid, o); err != nil {
				if !strings.Contains(out, filepath.Join(kept, uuid+".save")) || !strings.Contains(out, "belayd -restore") {
					t.Errorf("%s: %s", o, out)
				}
				return false
			}
		}
		return true
	}
	if !starts(uuid, "prepare", "start") {
		t.Error("no memory is reserved, and it cannot be started")
	}
	if err := os.Mkdir(kept, 0o700); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(kept, uuid+".save")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if starts(uuid, "prepare") {
			t.Error("it is booted afresh")
		}
		if !starts(uuid, "restore", "prepare", "start") {
			t.Error("it cannot be restored")
		}
	}
	if !starts(other, "prepare", "start") {
		t.Error("another guest cannot be started")
	}
	if err := os.Remove(image); err != nil {
		t.Fatal(err)
	}
	if !starts(uuid, "prepare", "start") {
		t.Error("it was given up, and cannot be started")
	}
}
