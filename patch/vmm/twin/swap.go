package twin

import (
	"context"
	"errors"
	"time"

	"belay/agent/maint"
)

// swap takes the guest over by a prewarmed crossing (see the package's table) and
// returns nil when it runs on the other side and the first QEMU has gone. A
// *stayedError says that it runs where it was, and that nothing is left of the
// second QEMU; errOff that it is off; ErrStuck that a person is needed.
//
// It acts on what it sees, so that it goes on where a killed one has stopped.
// When ctx ends no crossing is begun, and one whose second QEMU only waits is
// called off.
func (v *Visit) swap(ctx, detach context.Context, l leg, s Scratch, c *crossing) error {
	x := &exchange{Visit: v, leg: l, s: s, c: c}
	for {
		from, to, err := x.look(detach)
		if err != nil {
			return err
		}
		done, err := x.step(ctx, detach, from, to)
		if done || err != nil {
			return err
		}
		if !wait(detach, x.pause) {
			return detach.Err()
		}
	}
}

// exchange is one call of swap.
type exchange struct {
	*Visit
	leg
	s Scratch
	c *crossing

	tried  bool  // a crossing was begun in this call
	failed error // why it came to nothing
	// since is when the present pair of stations was first seen.
	since time.Time
	pair  [2]station
	pause time.Duration // before the next look

	called bool          // PointOfNoReturn was
	sentAt time.Time     // when the first QEMU was seen to be done
	stood  time.Duration // QEMU's measure of the pause until then
}

// look asks both sides until both are known, or one of the patience's ends has
// come.
func (x *exchange) look(detach context.Context) (from, to station, err error) {
	p := x.paced()
	x.pause = 0
	for begun, pause := time.Now(), p.look; ; pause = min(2*pause, 2*time.Second) {
		from, fromErr := x.station(detach, x.from)
		to, toErr := x.station(detach, x.to)
		if x.pair != [2]station{from, to} {
			x.pair, x.since = [2]station{from, to}, time.Now()
		}
		switch {
		case from == strange:
			return from, to, x.lost("is %s neither running nor stopped: %v", x.fromAt, fromErr)
		case to == strange:
			return from, to, x.lost("is %s neither running nor stopped: %v", x.toAt, toErr)
		case from == unasked && to == loaded && x.tried && time.Since(x.since) > p.load/10:
			// The first has sent everything, or the second would not be
			// loaded, and it is this call that has them; a guest must not
			// stand for as long as a libvirtd is away.
			return sent, to, nil
		case from != unasked && to != unasked && from != starting && to != starting:
			return from, to, nil
		case time.Since(begun) > p.silent:
			return from, to, x.lost("is %s %s and %s %s (%v)", from, x.fromAt, to, x.toAt, errors.Join(fromErr, toErr))
		}
		if !wait(detach, pause) {
			return from, to, detach.Err()
		}
	}
}

// step does what the two stations ask for. done says that the crossing is over.
func (x *exchange) step(ctx, detach context.Context, from, to station) (done bool, err error) {
	p := x.paced()
	// The two are not looked at in the same instant: what cannot be is waited
	// out first.
	soon := func(d time.Duration, else_ func() (bool, error)) (bool, error) {
		if time.Since(x.since) > d {
			return else_()
		}
		x.pause = p.look
		return false, nil
	}
	alarm := func() (bool, error) {
		return true, x.lost("is %s %s and %s %s", from, x.fromAt, to, x.toAt)
	}
	switch to {
	case runs:
		switch from {
		case noQEMU:
			return true, x.crossed(detach)
		case sent:
			return false, x.quitFirst(detach)
		case waiting: // for nobody, see adopt
			if x.waits(detach, x.from, x.to) {
				return false, x.quit(detach, x.from.QuitIncoming, x.fromAt)
			}
		case runs:
			return soon(p.look, func() (bool, error) {
				return true, x.lost("runs at home and in the twin: stop one of them at once, before both write to the same disk")
			})
		}
		return soon(p.settle, alarm)
	case loaded:
		switch from {
		case sent, noQEMU:
			return false, x.forward(detach, from)
		case runs, loaded: // the way back was taken: the second's state is out of date
			return false, x.discardLoaded(detach)
		}
		return soon(p.settle, alarm)
	case waiting:
		switch {
		case from == runs && ctx.Err() == nil && x.failed == nil && x.tried: // else it was started long ago
			return false, x.hand(ctx, detach)
		case from == sending:
			return false, x.hurry(detach)
		case from == sent: // it is loading, or has failed to
			return soon(p.load, func() (bool, error) {
				x.fail("its second QEMU did not take its state")
				return false, x.discardWaiting(detach)
			})
		}
		return false, x.discardWaiting(detach)
	case sent, sending: // to nobody, see discardLoaded
		if from == runs || from == loaded {
			return false, x.discardLoaded(detach)
		}
		return soon(p.settle, alarm)
	case noQEMU:
		switch from {
		case runs, loaded:
			return x.begin(ctx, detach, from)
		case sent:
			x.fail("its second QEMU ended while it was loading its state; see its log")
			return false, x.back(detach)
		case sending:
			return false, x.hurry(detach)
		case noQEMU:
			return soon(p.look, func() (bool, error) { return true, x.off() })
		}
	}
	return alarm()
}

// fail notes why the crossing comes to nothing, the first reason.
func (x *exchange) fail(format string, args ...any) {
	if x.failed == nil {
		x.failed = x.stayed(x.leg, maint.CodeFailed, "see the logs of libvirtd and QEMU, then try again", format, args...)
	}
}

// begin is where nothing of a crossing is to be seen: it starts the second QEMU,
// or says why there is none to be.
func (x *exchange) begin(ctx, detach context.Context, from station) (done bool, err error) {
	stay := func(err error) (bool, error) { return true, errors.Join(x.tidy(detach, x.from), err) }
	switch {
	case x.failed != nil:
		return stay(x.failed)
	case ctx.Err() != nil:
		return stay(x.cancelled(ctx, x.leg))
	case from != runs:
		return stay(x.stayed(x.leg, maint.CodeGuestPaused, "resume it first (virsh resume)", "it was paused by somebody else"))
	case x.tried:
		return stay(x.stayed(x.leg, maint.CodeFailed, "see the logs of libvirtd and QEMU, then try again", "its second QEMU has ended before the guest was there"))
	}
	x.tried = true
	x.c.Begun++
	if err := x.s.Save(x.c); err != nil {
		return true, err
	}
	if err := x.warm(ctx); err != nil {
		x.fail("its second QEMU could not be started: %v", err)
	}
	return false, nil
}
