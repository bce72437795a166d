package agent

import (
	"context"
	"sync"
	"time"

	"belay/agent/maint"
)

// The blackout of a guest that moves is from its vCPUs being stopped here to their being
// started on the peer. QEMU says when, by the clock of its host, to the microsecond; what
// libvirt measures has its own delays in it, which on a busy host are tens of milliseconds.

// cpuTimes are when guests' vCPUs were stopped and started last, by UUID. The zero
// value is ready.
type cpuTimes struct {
	mu               sync.Mutex
	stopped, started map[string]time.Time
}

func (c *cpuTimes) note(uuid string, running bool, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped == nil {
		c.stopped, c.started = make(map[string]time.Time), make(map[string]time.Time)
	}
	if running {
		c.started[uuid] = at
	} else {
		c.stopped[uuid] = at
	}
}

// of gives them, zero where they were not seen.
func (c *cpuTimes) of(uuid string) (stopped, started time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped[uuid], c.started[uuid]
}

func (c *cpuTimes) forget(uuid string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.stopped, uuid)
	delete(c.started, uuid)
}

// watchCPUs notes when the vCPUs of a guest that is to leave are stopped, until the
// function that it returns is called. What it does not see libvirt has measured.
func (a *Agent) watchCPUs(uuid string) (stop func()) {
	a.cpus.forget(uuid)
	ctx, cancel := context.WithCancel(a.life)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		err := a.hyp.CPUTimes(ctx, uuid, nil, func(running bool, at time.Time) { a.cpus.note(uuid, running, at) })
		if err != nil {
			a.log.Debug("cannot see when vCPUs are stopped", "guest", uuid, "err", err)
		}
	}()
	return func() { cancel(); <-ended }
}

// meetArrivals notes when the vCPUs of guests are started that come from peers, until ctx
// ends. A guest's process is there from the beginning of its copy.
func (a *Agent) meetArrivals(ctx context.Context) {
	events, cancel := a.hyp.Subscribe()
	defer cancel()
	coming := make(map[string]context.CancelFunc)
	var watches sync.WaitGroup
	defer watches.Wait()
	defer func() {
		for _, stop := range coming {
			stop()
		}
	}()
	for {
		select {
		case e, open := <-events:
			if !open {
				return
			}
			if e.Change != "stopped" && e.Change != "started" {
				continue
			}
			if stop := coming[e.UUID]; stop != nil {
				stop()
				delete(coming, e.UUID)
			}
			if e.Change == "started" && e.Detail == "migrated" {
				a.cpus.forget(e.UUID)
				watch, stop := context.WithCancel(ctx)
				coming[e.UUID] = stop
				watches.Go(func() { a.meet(watch, stop, e.UUID) })
			}
		case <-ctx.Done():
			return
		}
	}
}

// meet notes when the vCPUs of a guest that comes are started, and stops then.
func (a *Agent) meet(ctx context.Context, stop func(), uuid string) {
	defer stop()
	err := a.hyp.CPUTimes(ctx, uuid, nil, func(running bool, at time.Time) {
		if running { // what comes after it is not the move's
			a.cpus.note(uuid, true, at)
			stop()
		}
	})
	if err != nil {
		a.log.Debug("cannot see when vCPUs are started", "guest", uuid, "err", err)
	}
}

// seen has the blackout be from the one moment that QEMU has told of to the other, where
// both were seen.
func seen(r *maint.MoveResult, peer maint.PeerStatus) {
	if r.Stopped.IsZero() || r.Started.IsZero() {
		return
	}
	if d := byOneClock(r.Started.Sub(r.Stopped), peer); d > 0 {
		r.Downtime = d
	}
}

// byOneClock corrects a time that libvirt has taken from the source's clock at its beginning
// and the destination's at its end, as it does with the blackout: by what the clocks differ,
// as far as that is known, which is to half a round trip. Where the destination's clock is
// so far behind that its end may seem to be before its beginning, libvirt has taken
// another end, on the source, and d stays as it is.
//
// Source: libvirt, qemuMigrationDstFinish, qemuDomainJobDataUpdateDowntime.
func byOneClock(d time.Duration, peer maint.PeerStatus) time.Duration {
	off := peer.ClockOffset
	if !peer.OK || off.Abs() <= peer.Latency/2 || d <= -off || d <= off {
		return d
	}
	return d - off
}
