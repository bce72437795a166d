package hoststep_test

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"

	"belay/internal/bustest"
	"belay/patch/hoststep"
)

// busManager is what Bus uses of org.freedesktop.systemd1, with the
// signatures of org.freedesktop.systemd1(5), on a bus of its own.
type busManager struct {
	conn   *godbus.Conn
	result string // "": never any

	mu    sync.Mutex
	calls []string
	props map[string]godbus.Variant
	job   uint32
}

type property struct {
	Name  string
	Value godbus.Variant
}

type auxiliary struct {
	Name       string
	Properties []property
}

func (m *busManager) call(name string, args ...any) (godbus.ObjectPath, *godbus.Error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls = append(m.calls, strings.TrimSpace(name+" "+fmt.Sprintln(args...)))
	m.job++
	path := godbus.ObjectPath(fmt.Sprintf("/org/freedesktop/systemd1/job/%d", m.job))
	if strings.HasPrefix(fmt.Sprint(args...), "masked") {
		return "", godbus.NewError("org.freedesktop.systemd1.UnitMasked", []any{"Unit masked.service is masked."})
	}
	if m.result != "" {
		_ = m.conn.Emit("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager.JobRemoved", m.job, path, fmt.Sprint(args[0]), m.result)
	}
	return path, nil
}

func (m *busManager) StartTransientUnit(name, mode string, props []property, _ []auxiliary) (godbus.ObjectPath, *godbus.Error) {
	m.mu.Lock()
	m.props = map[string]godbus.Variant{}
	for _, p := range props {
		m.props[p.Name] = p.Value
	}
	m.mu.Unlock()
	return m.call("StartTransientUnit", name, mode)
}

func (m *busManager) RestartUnit(name, mode string) (godbus.ObjectPath, *godbus.Error) {
	return m.call("RestartUnit", name, mode)
}

func (m *busManager) StopUnit(name, mode string) (godbus.ObjectPath, *godbus.Error) {
	return m.call("StopUnit", name, mode)
}

func (m *busManager) StartUnit(name, mode string) (godbus.ObjectPath, *godbus.Error) {
	return m.call("StartUnit", name, mode)
}

func (m *busManager) ReloadUnit(name, mode string) (godbus.ObjectPath, *godbus.Error) {
	return m.call("ReloadUnit", name, mode)
}

func (m *busManager) KillUnit(name, who string, signal int32) *godbus.Error {
	if strings.HasPrefix(name, "gone") {
		return godbus.NewError("org.freedesktop.systemd1.NoSuchUnit", []any{"Unit gone.service not loaded."})
	}
	_, err := m.call("KillUnit", name, who, signal)
	return err
}

// unitProperties answers GetAll of org.freedesktop.DBus.Properties.
type unitProperties struct{}

func (unitProperties) GetAll(iface string) (map[string]godbus.Variant, *godbus.Error) {
	v := godbus.MakeVariant
	if iface == "org.freedesktop.systemd1.Service" {
		return map[string]godbus.Variant{"Type": v("notify"), "Result": v("exit-code")}, nil
	}
	type job struct {
		ID   uint32
		Path godbus.ObjectPath
	}
	type loadError struct{ Name, Text string }
	return map[string]godbus.Variant{
		"LoadState": v("loaded"), "LoadError": v(loadError{"", "why"}), "ActiveState": v("deactivating"), "SubState": v("stop-sigterm"),
		"CanStart": v(true), "CanStop": v(true), "CanReload": v(false),
		"Job": v(job{42, "/org/freedesktop/systemd1/job/42"}), "InvocationID": v([]byte{0xab, 0xcd}),
	}, nil
}

// newBus runs a bus daemon with a systemd1 on it.
func newBus(t *testing.T, result string) (*busManager, hoststep.Bus, *exec.Cmd) {
	t.Helper()
	address, c := bustest.Start(t)
	dial := func(ctx context.Context) (*godbus.Conn, error) {
		return godbus.Connect(address, godbus.WithContext(ctx))
	}
	conn, err := dial(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	m := &busManager{conn: conn, result: result}
	if err := conn.Export(m, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"); err != nil {
		t.Fatal(err)
	}
	if err := conn.Export(unitProperties{}, "/org/freedesktop/systemd1/unit/x_2eservice", "org.freedesktop.DBus.Properties"); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName("org.freedesktop.systemd1", 0); err != nil {
		t.Fatal(err)
	}
	return m, hoststep.Bus{Dial: func(ctx context.Context) (*dbus.Conn, error) {
		return dbus.NewConnection(func() (*godbus.Conn, error) { return dial(ctx) })
	}}, c
}

func TestBus(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	m, bus, _ := newBus(t, "done")
	for _, job := range []string{"restart", "stop", "start", "reload"} {
		if result, err := bus.Job(ctx, "x.service", job); result != "done" || err != nil {
			t.Errorf("%s: %q, %v", job, result, err)
		}
	}
	if _, err := bus.Job(ctx, "x.service", "isolate"); err == nil {
		t.Error("it isolates")
	}
	if _, err := bus.Job(ctx, "masked.service", "restart"); err == nil || errors.Is(err, hoststep.ErrJobLost) || !strings.Contains(err.Error(), "is masked") {
		t.Errorf("masked: %v", err)
	}
	u, err := bus.Unit(ctx, "x.service")
	want := hoststep.UnitState{Load: "loaded", LoadError: "why", Active: "deactivating", Sub: "stop-sigterm", Type: "notify", Result: "exit-code",
		CanStart: true, CanStop: true, Job: 42, Invocation: "abcd"}
	if err != nil || u != want {
		t.Errorf("got %+v, %v, want %+v", u, err, want)
	}
	if err := bus.Start(ctx, hoststep.Transient{Unit: "belay-step-x.service", Program: "/usr/sbin/belayd", Args: []string{"belay-step", "run-step", "/run/x"}, StopTimeout: 3 * time.Second}); err != nil {
		t.Error(err)
	}
	for _, unit := range []string{"x.service", "gone.service"} {
		if err := bus.Kill(ctx, unit); err != nil {
			t.Errorf("%s: %v", unit, err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, want := range map[string]string{
		"ExecStart":        `[["/usr/sbin/belayd", ["belay-step", "run-step", "/run/x"], false]]`,
		"Type":             `"notify"`,
		"KillMode":         `"process"`,
		"KillSignal":       `10`,
		"TimeoutStartUSec": `@t 10000000`,
		"TimeoutStopUSec":  `@t 3000000`,
		"OOMPolicy":        `"continue"`,
	} {
		if got := m.props[name].String(); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	if got := m.props["ExecStart"].Signature().String(); got != "a(sasb)" {
		t.Errorf("ExecStart has the signature %s", got)
	}
	got := strings.Join(m.calls, "\n")
	if want := "RestartUnit x.service replace\nStopUnit x.service replace\nStartUnit x.service replace\nReloadUnit x.service replace\n" +
		"RestartUnit masked.service replace\nStartTransientUnit belay-step-x.service fail\nKillUnit x.service all 9"; got != want {
		t.Errorf("got the calls\n%s\nwant\n%s", got, want)
	}
}

func TestBusFails(t *testing.T) {
	t.Parallel()
	m, bus, _ := newBus(t, "failed")
	if result, err := bus.Job(t.Context(), "x.service", "restart"); result != "failed" || err != nil {
		t.Errorf("%q, %v", result, err)
	}
	if err := bus.Start(t.Context(), hoststep.Transient{Unit: "y.service"}); err == nil || !strings.Contains(err.Error(), "failed") {
		t.Errorf("Start: %v", err)
	}
	m.mu.Lock()
	m.result = ""
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := bus.Job(ctx, "x.service", "restart"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a job without end: %v", err)
	}
}

// TestBusIsLost while a job runs, as when systemd executes itself anew.
func TestBusIsLost(t *testing.T) {
	t.Parallel()
	m, bus, daemon := newBus(t, "")
	lost := make(chan error)
	go func() {
		_, err := bus.Job(t.Context(), "x.service", "restart")
		lost <- err
	}()
	eventually(t, "the job is asked for", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return len(m.calls) == 1
	})
	if err := daemon.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-lost; !errors.Is(err, hoststep.ErrJobLost) {
		t.Errorf("got %v", err)
	}
	if _, err := bus.Unit(t.Context(), "x.service"); err == nil {
		t.Error("it answers")
	}
}
