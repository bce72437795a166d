package vmmtest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
)

// discard is a testing.TB for calls that cannot fail.
type discard struct{ testing.TB }

func (discard) Helper()                   {}
func (discard) Fatalf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }
func (discard) Fatal(a ...any)            { panic(fmt.Sprint(a...)) }

func (m *Machine) mkdir(paths ...string) {
	for _, p := range paths {
		if err := os.MkdirAll(m.at(p), 0o755); err != nil {
			panic(err)
		}
	}
}

func (m *Machine) write(path, text string) {
	if err := os.WriteFile(m.at(path), []byte(text), 0o644); err != nil {
		panic(err)
	}
}

// HookFile is where the hook is, inside the machine.
const HookFile = "/etc/libvirt/hooks/qemu.d/belay"

// installHook installs the real hook, which is told where the machine's root
// is, and has this process be libvirtd, whose child it is.
func (m *Machine) installHook(t testing.TB) {
	t.Helper()
	_, here, _, _ := runtime.Caller(0)
	text, err := os.ReadFile(filepath.Join(filepath.Dir(here), "../../../dist/hooks/qemu.d/belay"))
	if err != nil {
		t.Fatal(err)
	}
	script := string(text)
	for old, new := range map[string]string{
		"guard=/run/belay/vmm":       "guard=" + m.at("/run/belay/vmm"),
		"kept=/var/lib/belay/memory": "kept=" + m.at("/var/lib/belay/memory"),
		`} <"$keep/order"`:           `} <"$keep/order"; memory=` + m.Root + `$memory rams=` + m.Root + `$rams`,
		`} <"$image"`:                `} <"$image"; memory=` + m.Root + `$memory rams=` + m.Root + `$rams`,
	} {
		if strings.Count(script, old) != 1 {
			t.Fatalf("the hook has not one %q", old)
		}
		script = strings.Replace(script, old, new, 1)
	}
	m.mkdir(filepath.Dir(HookFile))
	if err := os.WriteFile(m.at(HookFile), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	self := strconv.Itoa(os.Getpid())
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	m.mkdir("/proc/" + self)
	m.write("/proc/"+self+"/stat", string(stat))
	m.write("/run/libvirtd.pid", self+"\n")
}

// hook runs it, as libvirt does.
func (m *Machine) hook(name, operation, xml string) error {
	if m.NoHook {
		return nil
	}
	// By sh: a file that was just written cannot always be executed, while
	// another test forks.
	cmd := exec.Command("sh", m.at(HookFile), name, operation, "begin", "-")
	cmd.Stdin = strings.NewReader(xml)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("libvirt: Hook script execution failed: %w: %s", err, &stderr)
	}
	return nil
}
