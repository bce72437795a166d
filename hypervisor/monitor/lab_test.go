package monitor_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/hypervisor/monitor"
	"belay/vmtests/lab"
)

// held starts a guest on a host of its own and pauses it. path is its monitor.
func held(t *testing.T) (host *lab.Host, h *hypervisor.Host, uuid, path string) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a libvirtd")
	}
	host = lab.ForTest(t, lab.Config{Hosts: 1}).Hosts[0]
	h = hypervisor.New(hypervisor.Config{Socket: host.LibvirtSocket()})
	t.Cleanup(func() { _ = h.Close() })
	file := filepath.Join(t.TempDir(), "guest.xml")
	must(t, os.WriteFile(file, []byte(`<domain type='qemu'><name>held</name><memory unit='MiB'>64</memory>`+
		`<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>`), 0o600))
	_, err := host.Virsh(t.Context(), "create", file)
	must(t, err)
	t.Cleanup(func() { _, _ = host.Virsh(context.Background(), "destroy", "held") })
	g, err := h.Guest(t.Context(), "held")
	must(t, err)
	must(t, h.Suspend(t.Context(), g.UUID))
	path, err = monitor.Find(host.Path(monitor.DefaultLibDir), g.ID)
	must(t, err)
	return host, h, g.UUID, path
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The whole of it with a real QEMU: a guest that is held when libvirtd dies runs
// again, and the next libvirtd knows it.
func TestPastDeadLibvirtd(t *testing.T) {
	host, h, uuid, path := held(t)
	ctx := t.Context()

	// libvirtd lives: it has the monitor, and keeps it whoever knocks.
	for range 3 {
		short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		_, err := monitor.Dial(short, path)
		cancel()
		if !errors.Is(err, monitor.ErrTaken) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Dial beside libvirtd: %v", err)
		}
	}

	must(t, host.Kill(ctx, lab.Libvirtd, syscall.SIGKILL))
	m, err := monitor.Dial(ctx, path)
	must(t, err)
	if got, err := m.UUID(ctx); err != nil || got != uuid {
		t.Errorf("UUID %s, %v; want %s", got, err, uuid)
	}
	if state, err := m.Status(ctx); err != nil || state != monitor.Paused {
		t.Errorf("state %q, %v", state, err)
	}
	if err := m.TakeBack(ctx); !errors.Is(err, monitor.ErrNotPaused) {
		t.Errorf("TakeBack of a guest that was not sent away: %v", err)
	}
	for range 2 {
		must(t, m.Cont(ctx))
		if state, err := m.Status(ctx); err != nil || state != monitor.Running {
			t.Errorf("state %q, %v", state, err)
		}
	}
	must(t, m.Close())

	must(t, host.StartDaemon(ctx, lab.Libvirtd))
	if state, reason, err := h.State(ctx, uuid); err != nil || state != maint.GuestRunning {
		t.Errorf("libvirtd says %s (%s), %v", state, reason, err)
	}
	// and has it in hand
	must(t, h.Suspend(ctx, uuid))
	must(t, h.Resume(ctx, uuid))
}

// A libvirtd that starts while somebody has the monitor waits, does the guest no
// harm, and claims to know nothing.
func TestLibvirtdWaitsForTheMonitor(t *testing.T) {
	host, h, uuid, path := held(t)
	ctx := t.Context()
	must(t, host.Kill(ctx, lab.Libvirtd, syscall.SIGKILL))
	m, err := monitor.Dial(ctx, path)
	must(t, err)
	must(t, m.Cont(ctx))
	must(t, host.StartDaemon(ctx, lab.Libvirtd))
	// Its predecessor's word is "paused".
	if state, _, err := h.State(ctx, uuid); !errors.Is(err, hypervisor.ErrBusy) {
		t.Errorf("State says %q, %v", state, err)
	}
	if g, err := h.Guest(ctx, uuid); err != nil || g.Job != "catching up" {
		t.Errorf("guest %+v, %v", g, err)
	}
	must(t, m.Close())
	if state, _, err := h.State(ctx, uuid); err != nil || state != maint.GuestRunning {
		t.Errorf("State says %q, %v", state, err)
	}
}
