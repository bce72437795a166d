package agent

import (
	"context"
	"fmt"

	"github.com/coreos/go-systemd/v22/dbus"
	"github.com/coreos/go-systemd/v22/util"
	godbus "github.com/godbus/dbus/v5"

	"belay/patch/vmm/twin"
)

// twinLauncher starts the twin's supervisor outside belayd's cgroup and sandbox
// where systemd runs.
func twinLauncher(output string) twin.Launcher {
	if util.IsRunningSystemd() {
		return units{}
	}
	return twin.Detached{Output: output}
}

// units starts programs as transient units.
type units struct{}

// Launch implements twin.Launcher.
//
// Source: org.freedesktop.systemd1.Manager.StartTransientUnit.
func (units) Launch(ctx context.Context, unit, description string, argv []string) error {
	systemd, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("cannot start unit %s: cannot speak to systemd: %w", unit, err)
	}
	defer systemd.Close()
	result := make(chan string, 1)
	properties := []dbus.Property{
		dbus.PropDescription(description),
		dbus.PropExecStart(argv, true),
		{Name: "KillMode", Value: godbus.MakeVariant("process")}, // guests outlive the supervisor
		{Name: "Restart", Value: godbus.MakeVariant("on-failure")},
		{Name: "CollectMode", Value: godbus.MakeVariant("inactive-or-failed")},
	}
	if _, err := systemd.StartTransientUnitContext(ctx, unit, "fail", properties, result); err != nil {
		return fmt.Errorf("cannot start unit %s: %w", unit, err)
	}
	select {
	case r := <-result:
		if r != "done" {
			return fmt.Errorf("cannot start unit %s: its job ended as %q (see journalctl -u %s)", unit, r, unit)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("cannot start unit %s: %w", unit, context.Cause(ctx))
	}
}
