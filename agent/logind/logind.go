// Package logind has systemd-logind hold a host's shutdown back for a while.
package logind

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/login1"
	"github.com/godbus/dbus/v5"
)

const (
	name     = "org.freedesktop.login1"
	path     = "/org/freedesktop/login1"
	limit    = name + ".Manager.InhibitDelayMaxUSec"
	patience = 5 * time.Second // of a call
)

// Host is this host's logind, on the system bus.
type Host struct{}

// Delay has a shutdown wait until what it returns is closed, or the limit has passed. why
// is what systemd-inhibit(1) shows.
//
// Source: org.freedesktop.login1.Manager.Inhibit, a delay lock for "shutdown".
func (Host) Delay(ctx context.Context, why string) (io.Closer, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	type answer struct {
		lock *os.File
		err  error
	}
	answered := make(chan answer, 1)
	go func() { // login1's calls take no context
		lock, err := inhibit(why)
		answered <- answer{lock, err}
	}()
	select {
	case a := <-answered:
		if a.err != nil {
			return nil, fmt.Errorf("cannot have a shutdown wait: %w", a.err)
		}
		return a.lock, nil
	case <-ctx.Done():
		go func() { // a lock that comes too late is nobody's
			if a := <-answered; a.err == nil {
				a.lock.Close()
			}
		}()
		return nil, fmt.Errorf("cannot have a shutdown wait: logind does not answer: %w", ctx.Err())
	}
}

func inhibit(why string) (*os.File, error) {
	c, err := login1.New()
	if err != nil {
		return nil, err
	}
	defer c.Close() // the lock is the file, whatever becomes of the connection
	return c.Inhibit("shutdown", "belayd", why, "delay")
}

// Limit is the longest that a shutdown waits.
//
// Source: org.freedesktop.login1.Manager.InhibitDelayMaxUSec, which logind.conf(5) sets
// as InhibitDelayMaxSec.
func (Host) Limit(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	fail := func(err error) (time.Duration, error) {
		return 0, fmt.Errorf("cannot ask logind how long a shutdown waits: %w", err)
	}
	c, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	v, err := c.Object(name, path).GetProperty(limit)
	if err != nil {
		return fail(err)
	}
	µs, ok := v.Value().(uint64)
	if !ok {
		return fail(fmt.Errorf("%s is %s", limit, v))
	}
	return time.Duration(µs) * time.Microsecond, nil
}
