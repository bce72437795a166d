package vmm

import (
	"cmp"
	"context"
	"errors"
	"time"

	"belay/agent/maint"
)

// place is where a guest is on its way.
//
//	old ──► leaving ──► off ──► new
//	 └──────────┘ Back           └── foreign: neither of ours
type place string

const (
	atOld   place = "in its old QEMU"
	leaving place = "in its old QEMU, which is ending"
	atOff   place = "off"
	atNew   place = "in its new QEMU"
	foreign place = "in a QEMU that somebody else has started"
)

// where is the guest of a seat, which libvirt says is like g: what is not there has no state. A QEMU
// that is not the old one is foreign here.
func (m Mover) where(s Seat, g maint.Guest) place {
	alive := m.Places.alive(s.Old)
	if !g.State.Active() {
		if alive {
			return leaving // libvirt has let go of a process that is still there
		}
		return atOff
	}
	now, err := m.Places.qemu(s.Guest)
	switch {
	case alive && (err != nil || now == s.Old):
		if g.State == maint.GuestShutdown || g.Job == "save" || g.State == maint.GuestPaused && g.Reason == "saving" {
			return leaving
		}
		return atOld
	case err != nil: // it has ended, or the new one has not written its number yet
		return leaving
	}
	return foreign
}

// Ending reports whether the guest, which libvirt says is like g, is still to get out of the QEMU of its
// seat, and into none that runs on: the process ends, or has, and libvirt takes the domain down.
func (m Mover) Ending(s Seat, g maint.Guest) bool { return m.where(s, g) == leaving }

// ErrResumed: somebody has had the guest run on in the QEMU that it was to leave.
var ErrResumed = errors.New("somebody has resumed it in its old QEMU")

// End ends the QEMU that the guest has left, and returns nil when that is gone, and libvirt has taken the
// domain down. It may be done over.
//
// From the first call on there is no way back: after an error the QEMU may end nevertheless, by what it was
// told or because it had begun to. Only what wraps ErrResumed says that the guest runs on in it, by QEMU's own
// word; ErrForeign, that it is in another.
func (m Mover) End(ctx context.Context, s Seat) error {
	ctx, cancel := context.WithTimeout(ctx, m.paced().gone)
	defer cancel()
	err := m.quit(ctx, s)
	for step := pollEvery; ; {
		now, looked := m.look(ctx, s)
		switch {
		case looked != nil:
		case now == atOff:
			return nil
		case now == foreign:
			return errors.Join(ErrForeign, err)
		case now == atOld && err != nil: // it was not told, or has not answered
			if state, asked := m.doing(ctx, s); asked == nil && state != runPostMigrate {
				return errors.Join(ErrResumed, err)
			}
			err = m.quit(ctx, s)
			step = min(2*step, time.Second)
		}
		if !wait(ctx, step) {
			return errors.Join(errors.New("its old QEMU does not end, or libvirt does not take it down"), cmp.Or(looked, err))
		}
	}
}

func (m Mover) quit(ctx context.Context, s Seat) error {
	ctx, cancel := context.WithTimeout(ctx, m.paced().ask)
	defer cancel()
	return m.Host.QuitMigrated(ctx, s.UUID)
}

// doing is QEMU's own word for what it does.
func (m Mover) doing(ctx context.Context, s Seat) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, m.paced().ask)
	defer cancel()
	return runState(ctx, m.Host, s.UUID)
}

// look finds out where the guest of a seat is.
func (m Mover) look(ctx context.Context, s Seat) (place, error) {
	ctx, cancel := context.WithTimeout(ctx, m.paced().ask)
	defer cancel()
	state, reason, err := m.Host.State(ctx, s.UUID)
	if err != nil && !absent(err) {
		return "", err
	}
	return m.where(s, maint.Guest{State: state, Reason: reason}), nil
}

// awaitOff waits until a guest's QEMU is gone, and libvirt has taken the domain down. It answers when it
// has, mostly, as it is busy with it.
func (m Mover) awaitOff(ctx context.Context, s Seat) error {
	ctx, cancel := context.WithTimeout(ctx, m.paced().gone)
	defer cancel()
	for {
		now, err := m.look(ctx, s)
		if err == nil && now == atOff {
			return nil
		}
		if !wait(ctx, pollEvery) {
			return cmp.Or(err, errors.New("libvirt does not take it down"))
		}
	}
}
