package agent

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"belay/agent/maint"
)

const (
	// learnWait is how long a bridge has to learn where a guest is that has come: QEMU
	// announces it five times within the first second. announceMost is how often it is
	// told to do so again.
	learnWait, announceMost = 1500 * time.Millisecond, 3
	// learnEvery is the pause before the bridge is looked at again.
	learnEvery = 100 * time.Millisecond
	// pingWait is how long a guest's agent has to answer.
	pingWait = 5 * time.Second
)

// announcement has QEMU send five announcements (RARP) within a second, as it does after
// each migration, and have the guest announce itself where its driver can.
//
// Source: QMP announce-self, AnnounceParameters, in milliseconds.
var announcement = map[string]int{"initial": 50, "max": 550, "rounds": 5, "step": 100}

// portsOfArrival sees to it that frames for a guest that has come find it: that this
// host's bridges have learned that it is behind its taps. Interfaces that are on no Linux
// bridge are left to whoever has them.
func (a *Agent) portsOfArrival(ctx context.Context, g maint.Guest) []maint.ArrivedPort {
	var ports []maint.ArrivedPort
	for _, d := range g.Devices {
		if p, ok := port(g, d); d.Kind == "interface" && ok {
			ports = append(ports, maint.ArrivedPort{MAC: p.MAC.String(), Tap: p.Tap})
		}
	}
	announce := func() error {
		_, err := a.hyp.QMP(ctx, g.UUID, "announce-self", announcement)
		return err
	}
	var each sync.WaitGroup
	for i := range ports {
		each.Go(func() {
			if err := follow(ctx, &ports[i], a.local.SeenBy, announce); err != nil {
				a.log.Warn("it cannot be seen to that a guest's frames find it", "guest", g.Name, "tap", ports[i].Tap, "err", err)
			}
		})
	}
	each.Wait()
	return ports
}

// follow waits until the bridge has learned that a guest is behind its tap, and has it
// announced again where it has not.
func follow(ctx context.Context, p *maint.ArrivedPort, seenBy func(net.HardwareAddr) ([]string, error), announce func() error) error {
	mac, err := net.ParseMAC(p.MAC)
	if err != nil {
		return err
	}
	for {
		for begun := time.Now(); time.Since(begun) < learnWait; {
			at, err := seenBy(mac)
			if err != nil {
				return err
			}
			if p.Learned = slices.Contains(at, p.Tap); p.Learned {
				return nil
			}
			if !pause(ctx, learnEvery) {
				return ctx.Err()
			}
		}
		if p.Announced == announceMost {
			return nil
		}
		if err := announce(); err != nil {
			return err
		}
		p.Announced++
	}
}

// agentOfArrival asks the agent of a guest that has come whether it is there.
func (a *Agent) agentOfArrival(ctx context.Context, g maint.Guest) string {
	if g.Agent == maint.AgentNone {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, pingWait)
	defer cancel()
	for {
		if _, err := a.hyp.AgentCommand(ctx, g.UUID, "guest-ping", nil); err == nil {
			return maint.AgentAnswers
		}
		if !pause(ctx, learnEvery) {
			return maint.AgentSilent
		}
	}
}

// seenFromHere adds by which port the bridges of this host, which the guest has left, see
// it now: whether the LAN has followed.
func (a *Agent) seenFromHere(ctx context.Context, ports []maint.ArrivedPort) {
	ctx, cancel := context.WithTimeout(ctx, learnWait)
	defer cancel()
	for i := range ports { // the peer's word, of any length
		if ctx.Err() != nil {
			return
		}
		for {
			mac, err := net.ParseMAC(ports[i].MAC)
			if err != nil {
				break // it is the peer's word
			}
			at, err := a.local.SeenBy(mac)
			if len(at) > 0 {
				ports[i].SeenAt = at[0]
			}
			if err != nil || len(at) > 0 || !pause(ctx, learnEvery) {
				break
			}
		}
	}
}
