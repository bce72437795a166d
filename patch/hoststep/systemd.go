package hoststep

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	"github.com/coreos/go-systemd/v22/util"
	godbus "github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// ThisSystemd is the systemd that runs this host, nil where none does
// (sd_booted(3)).
func ThisSystemd() Systemd {
	if !util.IsRunningSystemd() {
		return nil
	}
	return Bus{Dial: dialSystemd}
}

// dialSystemd prefers systemd's own socket, which works also while the bus is
// being restarted.
func dialSystemd(ctx context.Context) (*dbus.Conn, error) {
	c, err := dbus.NewSystemdConnectionContext(ctx)
	if err == nil {
		return c, nil
	}
	c, err2 := dbus.NewSystemConnectionContext(ctx)
	if err2 != nil {
		return nil, fmt.Errorf("cannot reach systemd: %w", errors.Join(err, err2))
	}
	return c, nil
}

// Bus is a Systemd on D-Bus (org.freedesktop.systemd1.Manager). Each call has
// a connection of its own: a step may well restart what is at the other end.
type Bus struct {
	Dial func(context.Context) (*dbus.Conn, error)
}

// connectedEvery is how often a connection is looked at that is waited on.
const connectedEvery = 200 * time.Millisecond

// Start implements Transients.
func (b Bus) Start(ctx context.Context, t Transient) error {
	c, err := b.Dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	result := make(chan string, 1)
	if _, err := c.StartTransientUnitContext(ctx, t.Unit, "fail", t.properties(), result); err != nil {
		return fmt.Errorf("cannot start unit %s: %w", t.Unit, err)
	}
	got, err := waitResult(ctx, c, result)
	if err != nil {
		return fmt.Errorf("cannot start unit %s: %w", t.Unit, err)
	}
	if got != "done" {
		return fmt.Errorf("cannot start unit %s: %s; see journalctl -u %s", t.Unit, got, t.Unit)
	}
	return nil
}

// waitResult waits for JobRemoved.
func waitResult(ctx context.Context, c *dbus.Conn, result <-chan string) (string, error) {
	look := time.NewTicker(connectedEvery)
	defer look.Stop()
	for {
		select {
		case r := <-result:
			return r, nil
		case <-ctx.Done():
			return "", ctx.Err()
		case <-look.C:
			if !c.Connected() {
				return "", ErrJobLost
			}
		}
	}
}

// properties are those of a unit whose main process is a supervisor. It ends
// the step's processes by itself, so systemd is to kill no other process
// (KillMode): one that a successful step leaves behind lives on.
func (t Transient) properties() []dbus.Property {
	type execStart struct {
		Path             string
		Args             []string
		UncleanIsFailure bool
	}
	p := func(name string, value any) dbus.Property {
		return dbus.Property{Name: name, Value: godbus.MakeVariant(value)}
	}
	return []dbus.Property{
		p("Description", t.Description),
		p("Type", "notify"),
		p("NotifyAccess", "main"),
		p("ExecStart", []execStart{{t.Program, t.Args, false}}),
		p("KillMode", "process"),
		p("KillSignal", int32(unix.SIGUSR1)), // the one that Supervise heeds
		p("TimeoutStartUSec", uint64(startLimit.Microseconds())),
		p("TimeoutStopUSec", uint64(t.StopTimeout.Microseconds())),
		p("CollectMode", "inactive-or-failed"),
		p("OOMPolicy", "continue"), // else one killed process would stop the unit
		p("StandardInput", "null"),
		p("StandardOutput", "null"),
		p("StandardError", "journal"), // the supervisor's own, which says nothing unless it cannot begin
		p("WorkingDirectory", "/"),
	}
}

// Kill implements Transients. A unit that is gone, or has no process, is dead.
func (b Bus) Kill(ctx context.Context, unit string) error {
	c, err := b.Dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	err = c.KillUnitWithTarget(ctx, unit, dbus.All, int32(unix.SIGKILL))
	var said godbus.Error
	if errors.As(err, &said) && (said.Name == "org.freedesktop.systemd1.NoSuchUnit" || said.Name == "org.freedesktop.systemd1.NoSuchProcess") {
		return nil
	}
	return err
}

// Job implements Jobs.
func (b Bus) Job(ctx context.Context, unit, job string) (string, error) {
	c, err := b.Dial(ctx)
	if err != nil {
		return "", err
	}
	defer c.Close()
	ask := map[string]func(context.Context, string, string, chan<- string) (int, error){
		"restart": c.RestartUnitContext, "reload": c.ReloadUnitContext, "start": c.StartUnitContext, "stop": c.StopUnitContext,
	}[job]
	if ask == nil {
		return "", fmt.Errorf("%q is no job of a unit", job)
	}
	result := make(chan string, 1)
	if _, err := ask(ctx, unit, "replace", result); err != nil {
		var said godbus.Error
		if !errors.As(err, &said) { // systemd may have heard the question
			return "", errors.Join(ErrJobLost, err)
		}
		return "", err
	}
	return waitResult(ctx, c, result)
}

// Unit implements Jobs.
func (b Bus) Unit(ctx context.Context, unit string) (UnitState, error) {
	c, err := b.Dial(ctx)
	if err != nil {
		return UnitState{}, err
	}
	defer c.Close()
	all, err := c.GetUnitPropertiesContext(ctx, unit)
	if err != nil {
		return UnitState{}, fmt.Errorf("cannot look at unit %s: %w", unit, err)
	}
	u := UnitState{Load: text(all["LoadState"]), Active: text(all["ActiveState"]), Sub: text(all["SubState"])}
	u.CanStart, _ = all["CanStart"].(bool)
	u.CanStop, _ = all["CanStop"].(bool)
	u.CanReload, _ = all["CanReload"].(bool)
	if loadError, ok := all["LoadError"].([]any); ok && len(loadError) == 2 {
		u.LoadError = text(loadError[1])
	}
	if job, ok := all["Job"].([]any); ok && len(job) == 2 {
		u.Job, _ = job[0].(uint32)
	}
	if id, ok := all["InvocationID"].([]byte); ok {
		u.Invocation = fmt.Sprintf("%x", id)
	}
	if strings.HasSuffix(unit, ".service") && u.Load == "loaded" {
		of, err := c.GetUnitTypePropertiesContext(ctx, unit, "Service")
		if err != nil {
			return UnitState{}, fmt.Errorf("cannot look at unit %s: %w", unit, err)
		}
		u.Type, u.Result = text(of["Type"]), text(of["Result"])
	}
	return u, nil
}

func text(v any) string {
	s, _ := v.(string)
	return s
}
