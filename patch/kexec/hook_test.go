package kexec_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"belay/patch/vmm"
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
	token := ""
	hook := func(uuid, operation string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", script, "belay", "web-1", operation, "begin", "-")
		cmd.Stdin = strings.NewReader("<domain type='kvm' id='7'>\n  <name>web-1</name>\n  <uuid>" + uuid + "</uuid>\n" +
			"  <qemu:env name='BELAY_REPLACE' value='" + token + "'/>\n</domain>\n")
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
	// Memory in place: its QEMU is Belay's or nobody's, and has the memory that is kept.
	memory, rams := filepath.Join(kept, uuid+".memory"), filepath.Join(dir, "rams")
	order := vmm.Seat{Memory: []string{rams + "/1-web-1/pc.ram"}, Kept: memory}.Order("BelayMemoryInPlace", "kexec-1") + "{}"
	if err := errors.Join(os.WriteFile(image, []byte(order), 0o600), os.Mkdir(memory, 0o700), os.MkdirAll(rams+"/7-web-1", 0o700),
		os.WriteFile(memory+"/pc.ram", []byte("kept"), 0o600), os.WriteFile(rams+"/7-web-1/pc.ram", []byte("of a boot before"), 0o600),
		os.Mkdir(rams+"/7-ended-with-the-host", 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, operation := range []string{"prepare", "restore"} {
		if starts(uuid, operation) {
			t.Errorf("anybody can %s it", operation)
		}
	}
	token = "kexec-1"
	if !starts(uuid, "prepare", "start") {
		t.Error("it cannot be started")
	}
	if got, err := os.ReadFile(rams + "/7-web-1/pc.ram"); err != nil || string(got) != "kept" {
		t.Errorf("its memory is %q, %v", got, err)
	}
	// A name that libvirt has cut off, and none at all.
	if err := errors.Join(os.Remove(rams+"/7-ended-with-the-host"), os.Rename(rams+"/7-web-1", rams+"/7-we")); err != nil {
		t.Fatal(err)
	}
	if !starts(uuid, "prepare", "start") {
		t.Error("it cannot be started")
	}
	if err := errors.Join(os.RemoveAll(rams+"/7-we"), os.Mkdir(rams+"/1-other", 0o700)); err != nil {
		t.Fatal(err)
	}
	if out, err := hook(uuid, "start"); err == nil || !strings.Contains(out, "libvirt keeps memory elsewhere") {
		t.Errorf("%s, %v", out, err)
	}
	if err := os.Remove(image); err != nil {
		t.Fatal(err)
	}
	if !starts(uuid, "prepare", "start") {
		t.Error("it was given up, and cannot be started")
	}
}
