package logind_test

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/prop"
	"golang.org/x/sys/unix"

	"belay/agent/logind"
	"belay/internal/bustest"
)

// manager is what is used of org.freedesktop.login1, with the signatures of
// org.freedesktop.login1(5), on a bus of its own.
type manager struct {
	asked chan [4]string
	locks chan pipe
	hangs chan struct{} // if set, it answers only when this is closed
}

// pipe has the file descriptors of one: logind knows by the end that it reads that nobody
// has the other any more.
type pipe struct{ read, write int }

// taken reports whether anybody but logind has the lock.
func (p pipe) taken(t *testing.T) bool {
	t.Helper()
	switch n, err := unix.Read(p.read, make([]byte, 1)); {
	case err == unix.EAGAIN:
		return true
	case err != nil || n != 0:
		t.Fatalf("read %d, %v", n, err)
	}
	return false
}

func (m *manager) Inhibit(what, who, why, mode string) (dbus.UnixFD, *dbus.Error) {
	m.asked <- [4]string{what, who, why, mode}
	if m.hangs != nil {
		<-m.hangs
	}
	if why == "no" {
		return 0, dbus.NewError("org.freedesktop.login1.OperationInProgress", []any{"The operation inhibition has been requested for is already running"})
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return 0, dbus.MakeFailedError(err)
	}
	m.locks <- pipe{fds[0], fds[1]}
	return dbus.UnixFD(fds[1]), nil
}

// newBus runs a bus daemon with a logind on it, as the system bus of this process.
func newBus(t *testing.T, m *manager) {
	t.Helper()
	address, _ := bustest.Start(t)
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	m.asked, m.locks = make(chan [4]string, 4), make(chan pipe, 4)
	const path = "/org/freedesktop/login1"
	if err := conn.Export(m, path, "org.freedesktop.login1.Manager"); err != nil {
		t.Fatal(err)
	}
	if _, err := prop.Export(conn, path, prop.Map{"org.freedesktop.login1.Manager": {
		"InhibitDelayMaxUSec": {Value: uint64(60_000_000)}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName("org.freedesktop.login1", 0); err != nil {
		t.Fatal(err)
	}
}

func TestDelay(t *testing.T) { // not parallel: it sets the environment
	var m manager
	newBus(t, &m)
	lock, err := logind.Host{}.Delay(t.Context(), "hold-1")
	if err != nil {
		t.Fatal(err)
	}
	if got := <-m.asked; got != [4]string{"shutdown", "belayd", "hold-1", "delay"} {
		t.Errorf("asked for %q", got)
	}
	given := <-m.locks
	unix.Close(given.write) // the bus has handed out a copy
	if !given.taken(t) {
		t.Error("nobody has the lock")
	}
	if err := lock.Close(); err != nil {
		t.Error(err)
	}
	if given.taken(t) {
		t.Error("the lock was given up, and somebody has it")
	}

	if lock, err := (logind.Host{}).Delay(t.Context(), "no"); lock != nil || err == nil || !strings.Contains(err.Error(), "already running") {
		t.Errorf("while the host shuts down: %v, %v", lock, err)
	}
}

func TestLimit(t *testing.T) {
	newBus(t, &manager{})
	if d, err := (logind.Host{}).Limit(t.Context()); d != time.Minute || err != nil {
		t.Errorf("%v, %v", d, err)
	}
}

// A logind that hangs keeps nobody, and its late answer is no lock that nobody gives up.
func TestHangs(t *testing.T) {
	m := manager{hangs: make(chan struct{})}
	newBus(t, &m)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if lock, err := (logind.Host{}).Delay(ctx, "hold-1"); lock != nil || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, %v", lock, err)
	}
	close(m.hangs)
	given := <-m.locks
	// Nobody is told when the answer has been sent. Were this too early, the copy could
	// not be made, and there would be no lock to give up.
	time.AfterFunc(500*time.Millisecond, func() { unix.Close(given.write) })
	f := os.NewFile(uintptr(given.read), "lock")
	defer f.Close()
	_ = f.SetReadDeadline(time.Now().Add(20 * time.Second)) // pipes have deadlines
	if _, err := f.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the lock that came too late: %v", err)
	}
}

func TestNoBus(t *testing.T) {
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+t.TempDir()+"/bus")
	if lock, err := (logind.Host{}).Delay(t.Context(), "x"); lock != nil || err == nil {
		t.Errorf("%v, %v", lock, err)
	}
	if d, err := (logind.Host{}).Limit(t.Context()); d != 0 || err == nil {
		t.Errorf("%v, %v", d, err)
	}
}
