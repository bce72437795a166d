package vmm_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Nobody starts a guest whose order says nothing; one that has none yet, or no
// more, is left alone.
func TestHookOrder(t *testing.T) {
	t.Parallel()
	const uuid, other = "c1f8a1de-0000-4000-8000-000000000001", "c1f8a1de-0000-4000-8000-000000000002"
	text, err := os.ReadFile("../../dist/hooks/qemu.d/belay")
	if err != nil {
		t.Fatal(err)
	}
	write := func(content string) func(file string) error {
		return func(file string) error { return os.WriteFile(file, []byte(content), 0o600) }
	}
	for name, c := range map[string]struct {
		make    func(file string) error
		refused bool
	}{
		"none":         {func(string) error { return nil }, false},
		"empty":        {write(""), true},
		"zeros":        {write(strings.Repeat("\x00", 100)), true},
		"no method":    {write(" vmm-1\n/kept\n/rams\n"), true},
		"other method": {write("teleport vmm-1\n/kept\n/rams\n"), true},
		"half of one":  {write("in-pl"), true},
		"method alone": {write("in-place"), true},
		"folder":       {func(file string) error { return os.Mkdir(file, 0o700) }, true},
		"pipe":         {func(file string) error { return unix.Mkfifo(file, 0o600) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			guard := t.TempDir()
			keep := filepath.Join(guard, uuid)
			if err := os.Mkdir(keep, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := c.make(filepath.Join(keep, "order")); err != nil {
				t.Fatal(err)
			}
			script := strings.Replace(string(text), "guard=/run/belay/vmm", "guard="+guard, 1)
			run := func(uuid, operation string) (string, error) {
				cmd := exec.CommandContext(t.Context(), "sh", "-c", script, "belay", "web-1", operation, "begin", "-")
				cmd.Stdin = strings.NewReader("<domain type='kvm'>\n  <name>web-1</name>\n  <uuid>" + uuid + "</uuid>\n</domain>\n")
				out, err := cmd.CombinedOutput()
				return string(out), err
			}
			if out, err := run(uuid, "prepare"); c.refused != (err != nil) || c.refused && !strings.Contains(out, keep) {
				t.Errorf("its start: %q, %v", out, err)
			}
			for _, harmless := range [][2]string{{other, "prepare"}, {uuid, "release"}} {
				if out, err := run(harmless[0], harmless[1]); err != nil {
					t.Errorf("%s: %q, %v", harmless, out, err)
				}
			}
		})
	}
}
