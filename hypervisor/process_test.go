package hypervisor_test

import (
	"os"
	"path/filepath"
	"testing"

	"belay/hypervisor"
)

// A guest's process is told by the daemon that Belay is configured for, wherever its socket is.
func TestQEMUProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "qemu"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"web-1": "4711\n", "odd-1": "x"} {
		if err := os.WriteFile(filepath.Join(dir, "qemu", name+".pid"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h := hypervisor.New(hypervisor.Config{Socket: filepath.Join(dir, "libvirt-sock")})
	defer h.Close()
	for name, want := range map[string]int{"web-1": 4711, "odd-1": 0, "off-1": 0, "../qemu/web-1": 4711} {
		if got := h.QEMUProcess(name); got != want {
			t.Errorf("%s: %d, want %d", name, got, want)
		}
	}
}
