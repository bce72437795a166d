package hypervisortest

import (
	"context"
	"time"

	"belay/agent/maint"
)

// cpuTime is when a guest's vCPUs were stopped or started.
type cpuTime struct {
	uuid    string
	running bool
	at      time.Time
}

// CPUTimes tells when the guest's vCPUs are stopped and started.
func (h *Host) CPUTimes(ctx context.Context, uuid string, ready func(), f func(running bool, at time.Time)) error {
	told := make(chan cpuTime, 1000) // more than any guest here is stopped
	_, err := onGuest(ctx, h, "CPUTimes", uuid, func(*guest) (struct{}, error) {
		h.watchers[told] = true
		return struct{}{}, nil
	})
	if err != nil {
		return err
	}
	defer func() {
		h.w.mu.Lock()
		defer h.w.mu.Unlock()
		delete(h.watchers, told)
	}()
	if ready != nil {
		ready()
	}
	for {
		select {
		case e, ok := <-told:
			if !ok {
				return h.failed("QEMUConnectDomainMonitorEventRegister", 0, "connection lost", maint.ErrHypervisorDown)
			}
			if e.uuid == uuid {
				f(e.running, e.at)
			}
		case <-ctx.Done():
			return nil
		case <-h.closed:
			return nil
		}
	}
}

// tellCPUs tells those who listen. The caller holds the world.
func (h *Host) tellCPUs(uuid, change string, at time.Time) {
	if !h.up || change != "suspended" && change != "resumed" {
		return
	}
	for told := range h.watchers {
		select {
		case told <- cpuTime{uuid, change == "resumed", at}:
		default: // its reader has gone
		}
	}
}

// dropCPUs ends the connections of those who listen. The caller holds the world.
func (h *Host) dropCPUs() {
	for told := range h.watchers {
		delete(h.watchers, told)
		close(told)
	}
}
