package lab_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"belay/vmtests/lab"
)

// childLab, in the environment of this test binary, makes it bring up the lab
// of that name, start a guest in it, and wait to be killed.
const childLab = "BELAY_TEST_CHILD_LAB"

func TestMain(m *testing.M) {
	name := os.Getenv(childLab)
	if name == "" {
		os.Exit(m.Run())
	}
	if err := child(context.Background(), name); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("up")
	select {}
}

func child(ctx context.Context, name string) error {
	l, err := lab.Up(ctx, lab.Config{Name: name})
	if err != nil {
		return err
	}
	file := filepath.Join(l.Dir, "guest.xml")
	if err := os.WriteFile(file, []byte(guestXML("g1", "")), 0o600); err != nil {
		return err
	}
	_, err = l.Hosts[0].Virsh(ctx, "create", file)
	return err
}

// needLab skips a test that makes labs without [lab.ForTest] where that would.
func needLab(t *testing.T) {
	t.Helper()
	if os.Getenv("BELAY_LAB") == "skip" {
		t.Skip("BELAY_LAB=skip: tests that need a lab are left out")
	}
}

// up brings up a lab that tells the test's log how long it took.
func up(t *testing.T, c lab.Config) *lab.Lab {
	t.Helper()
	c.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	return lab.ForTest(t, c)
}

// guestXML is a guest that never gets beyond its BIOS; more goes among its devices.
func guestXML(name, more string) string {
	return `<domain type='qemu'>
  <name>` + name + `</name>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <interface type='bridge'><source bridge='` + lab.Bridge + `'/><model type='virtio'/></interface>
    ` + more + `
  </devices>
</domain>`
}

func start(t *testing.T, h *lab.Host, name, more string) error {
	t.Helper()
	file := filepath.Join(t.TempDir(), name+".xml")
	if err := os.WriteFile(file, []byte(guestXML(name, more)), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := h.Virsh(t.Context(), "create", file)
	return err
}

func mustStart(t *testing.T, h *lab.Host, name, more string) {
	t.Helper()
	if err := start(t, h, name, more); err != nil {
		t.Fatal(err)
	}
}

func virsh(t *testing.T, h *lab.Host, args ...string) string {
	t.Helper()
	out, err := h.Virsh(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func wantRunning(t *testing.T, h *lab.Host, guest string) {
	t.Helper()
	if state := virsh(t, h, "domstate", guest); state != "running" {
		t.Errorf("guest %s on %s is %q, want running", guest, h.Name, state)
	}
}

func wantGuests(t *testing.T, h *lab.Host, want string) {
	t.Helper()
	if got := virsh(t, h, "list", "--all", "--name"); got != want {
		t.Errorf("guests on %s: %q, want %q", h.Name, got, want)
	}
}

func inside(t *testing.T, h *lab.Host, name string, args ...string) string {
	t.Helper()
	out, err := h.Command(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s on %s: %v: %s", name, h.Name, err, out)
	}
	return strings.TrimSpace(string(out))
}

// within waits until check returns nil.
func within(t *testing.T, d time.Duration, check func() error) {
	t.Helper()
	deadline := time.Now().Add(d)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", d, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
