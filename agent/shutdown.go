package agent

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"belay/agent/maint"
)

// Shutdown is what the host's shutdown waits for; see package logind.
type Shutdown interface {
	// Delay has a shutdown wait until what it returns is closed, up to Limit.
	Delay(ctx context.Context, why string) (io.Closer, error)
	Limit(ctx context.Context) (time.Duration, error)
}

// delayShutdown has the host's shutdown wait while anything is done to guests here. It
// gives operations time to end by themselves, no more: what makes an end safe is the
// journal, the leash and the unit's TimeoutStopSec.
func (a *Agent) delayShutdown(ctx context.Context) {
	if a.preserve.Shutdown == nil {
		return
	}
	var lock io.Closer
	release := func() {
		if lock != nil {
			lock.Close()
			lock = nil
		}
	}
	defer release()
	failed := false
	for {
		changed := a.journal.Changed()
		why, lapses := a.inProgress(time.Now())
		switch {
		case why == "":
			release()
		case lock == nil:
			var err error
			if lock, err = a.preserve.Shutdown.Delay(ctx, why); err != nil && !failed && ctx.Err() == nil {
				a.log.Warn("operations go on, and a shutdown does not wait for them", "err", err)
			}
			failed = err != nil
		}
		select {
		case <-changed:
		case <-lapses:
		case <-ctx.Done():
			return
		}
	}
}

// inProgress names what is done to guests here: operations that have had their notice, and
// guests on their way here. "" is nothing. lapses tells when time alone may change that.
func (a *Agent) inProgress(now time.Time) (why string, lapses <-chan time.Time) {
	var all []string
	for _, op := range a.journal.Ops() {
		if op.State != maint.OpEnded && !(op.Told && op.Step == phaseAnnounce) {
			all = append(all, string(op.ID))
		}
	}
	var next time.Time
	for _, r := range a.journal.Reservations(now) {
		all = append(all, fmt.Sprintf("%s (guest %s, from %s)", r.Op, r.Guest, r.From))
		if next.IsZero() || r.Expires.Before(next) {
			next = r.Expires
		}
	}
	if !next.IsZero() {
		lapses = time.After(next.Sub(now))
	}
	return strings.Join(all, ", "), lapses
}

// checkShutdown says how long a shutdown waits for operations.
func (a *Agent) checkShutdown(ctx context.Context) maint.Check {
	c := maint.Check{Rung: "host", Name: "shutdown", Result: maint.CheckNA, Text: "is not known to this belayd"}
	if a.preserve.Shutdown == nil {
		return c
	}
	limit, err := a.preserve.Shutdown.Limit(ctx)
	longest := a.cfg.Hold.MaxPause.Duration
	switch {
	case err != nil:
		c.Result, c.Text = maint.CheckWarn, "does not wait for operations: "+err.Error()
		c.Remedy = "systemctl status systemd-logind dbus"
	case limit < longest:
		c.Result, c.Text = maint.CheckWarn, fmt.Sprintf("waits %s for operations (logind's InhibitDelayMaxSec), and a hold may take %s (hold.max_pause)", limit, longest)
		c.Remedy = fmt.Sprintf("set InhibitDelayMaxSec=%d or more in /etc/systemd/logind.conf.d/belay.conf, then: systemctl kill -s HUP systemd-logind", int(longest.Seconds()+1))
	default:
		c.Result, c.Text = maint.CheckOK, fmt.Sprintf("waits %s for operations (logind's InhibitDelayMaxSec)", limit)
	}
	return c
}
