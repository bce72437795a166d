package launch

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"

	"belay/agent/maint"
)

const (
	// restartAfter is how soon a leash that died is started again.
	restartAfter = 100 * time.Millisecond
	// stopWithin is how long a leash may take to release its guests when
	// the host shuts down.
	stopWithin = 90 * time.Second
)

// manager is systemd.
type manager interface {
	StartTransientUnitContext(ctx context.Context, name, mode string, properties []dbus.Property, ch chan<- string) (int, error)
	ListUnitsByNamesContext(ctx context.Context, units []string) ([]dbus.UnitStatus, error)
	Close()
}

// units starts leashes as transient units.
type units struct {
	Config
	connect func(context.Context) (manager, error)
}

func newUnits(c Config) *units { return &units{c, connect} }

// connect speaks to systemd itself: D-Bus may be what is being serviced. What
// lets only D-Bus in is tried after that.
func connect(ctx context.Context) (manager, error) {
	direct, err := dbus.NewSystemdConnectionContext(ctx)
	if err == nil {
		return direct, nil
	}
	bus, busErr := dbus.NewSystemConnectionContext(ctx)
	if busErr != nil {
		return nil, errors.Join(err, busErr)
	}
	return bus, nil
}

// Launch implements leash.Launcher.
//
// Source: org.freedesktop.systemd1.Manager.StartTransientUnit.
func (u *units) Launch(ctx context.Context, op maint.OpID) (warnings []string, err error) {
	unit := name(op) + ".service"
	fail := func(err error) ([]string, error) { return nil, fmt.Errorf("cannot start unit %s: %w", unit, err) }
	systemd, err := u.connect(ctx)
	if err != nil {
		return fail(fmt.Errorf("cannot speak to systemd: %w", err))
	}
	defer systemd.Close()
	ended := make(chan string, 1)
	if _, err := systemd.StartTransientUnitContext(ctx, unit, "fail", u.properties(op), ended); err != nil {
		// It may be there already: one that died is started again by systemd.
		found, listErr := systemd.ListUnitsByNamesContext(ctx, []string{unit})
		if listErr == nil && len(found) == 1 && (found[0].ActiveState == "active" || found[0].ActiveState == "activating") {
			return nil, nil
		}
		return fail(errors.Join(err, listErr))
	}
	select {
	case result := <-ended:
		if result != "done" {
			return fail(fmt.Errorf("its job ended as %q (see journalctl -u %s)", result, unit))
		}
		return nil, nil
	case <-ctx.Done():
		return fail(fmt.Errorf("systemd has not done it in time: %w", context.Cause(ctx)))
	}
}

// properties of the unit. There is no ordering to libvirt's units, though that
// would be handy at shutdown: it would also have systemd hold back the restart
// of a leash that died while libvirt's start is stuck. Default dependencies have
// it told (SIGTERM) when the host shuts down, upon which it releases its guests.
func (u *units) properties(op maint.OpID) []dbus.Property {
	return []dbus.Property{
		dbus.PropDescription("Belay's leash of " + string(op) + ": releases the guests that it holds"),
		dbus.PropExecStart(append([]string{u.Program}, u.Args(op)...), false),
		dbus.PropType("exec"),
		dbus.PropSlice("belay.slice"), // belayd is in system.slice
		property("DefaultDependencies", true),
		property("CollectMode", "inactive-or-failed"),
		property("Restart", "on-failure"),
		property("RestartUSec", microseconds(restartAfter)),
		property("StartLimitIntervalUSec", uint64(0)), // no limit
		property("TimeoutStopUSec", microseconds(stopWithin)),
		property("OOMScoreAdjust", int32(-1000)),
		property("Nice", int32(-20)),
		property("LimitMEMLOCK", uint64(math.MaxUint64)),
		property("WorkingDirectory", "/"),
		property("UMask", uint32(0o077)),
		property("SyslogIdentifier", ProgramName),
	}
}

func property(name string, value any) dbus.Property {
	return dbus.Property{Name: name, Value: godbus.MakeVariant(value)}
}

func microseconds(d time.Duration) uint64 { return uint64(d.Microseconds()) }
