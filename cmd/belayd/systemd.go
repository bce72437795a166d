package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"belay/agent"
)

// statusEvery is how often systemd is told what belayd is doing.
const statusEvery = 10 * time.Second

// notifySystemd speaks sd_notify(3): READY, STATUS, and WATCHDOG for as long
// as the agent's loop answers. It does nothing without systemd.
func notifySystemd(ctx context.Context, a *agent.Agent, log *slog.Logger) {
	ready, err := daemon.SdNotify(false, daemon.SdNotifyReady)
	if err != nil {
		log.Warn("cannot notify systemd", "err", err)
	}
	if !ready {
		return
	}
	every := statusEvery
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("cannot read the watchdog's setting", "err", err)
	}
	if watchdog > 0 {
		every = min(every, watchdog/3)
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		alive, cancel := context.WithTimeout(ctx, every)
		if err := a.Alive(alive); err == nil && watchdog > 0 {
			_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog) // a lost one is made up for by the next
		}
		cancel()
		s, _ := a.Status(ctx) // from memory, cannot fail
		_, _ = daemon.SdNotify(false, fmt.Sprintf("STATUS=%d operations, %d conditions", len(s.Operations), len(s.Conditions)))
		select {
		case <-tick.C:
		case <-ctx.Done():
			_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
			return
		}
	}
}
