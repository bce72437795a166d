package migrate

import (
	"context"
	"fmt"

	"belay/agent/maint"
)

// A host that goes down when the guest has just started on the other one, and before libvirt
// has removed what is left of it here, would start it a second time when it boots. So the
// guest's autostart is off on the source while there is a copy:
//
//	journal: attempt.KeptOff --> off --> copy --> moved:     on, on the destination (Settle)
//	                                         '--> not moved: on, on the source (TurnOn)
//	                                         '--> nobody knows: it stays off, and is told
//
// Whoever dies on the way leaves the journal, by which the next belayd does the rest. libvirt
// refuses to change it while a migration is at work.

// turnOff turns off the autostart of a guest that is about to be copied. That it is to be
// so is in the journal.
func (m *Migration) turnOff(ctx context.Context, g *maint.Guest) error {
	if !g.Autostart {
		return nil
	}
	err := m.retry(ctx, settleGrace, func(ctx context.Context) error { return m.Source.SetAutostart(ctx, m.UUID, false) })
	if err != nil {
		return fmt.Errorf("cannot turn off the autostart of guest %s on %s, which would start it a second time if it went down in the move: %w", m.Guest, m.From, err)
	}
	return nil
}

// TurnOn turns on again what the operation has turned off, where the guest has stayed on
// the source. It is for after Cancel.
func (m *Migration) TurnOn(ctx context.Context, s Scratch) error {
	var a attempt
	if _, err := s.Load(PhasePerform, &a); err != nil || !a.KeptOff {
		return err
	}
	err := m.retry(ctx, settleGrace, func(ctx context.Context) error { return m.Source.SetAutostart(ctx, m.UUID, true) })
	if err != nil {
		return maint.Problemf(maint.CodeAutostart, "guest "+m.Guest, fmt.Sprintf("on the host that has it in the end: virsh autostart %s", m.word()),
			"does not start with its host any more: its autostart on %s was turned off for the copy, and cannot be turned on again: %v", m.From, err)
	}
	return nil
}

// keptOff notes with an operation that ends without anybody's knowing where the guest is, or
// that ends otherwise than it should, that its autostart stays off. It gives err back.
func (m *Migration) keptOff(s Scratch, a attempt, err error) error {
	if !a.KeptOff {
		return err
	}
	if noteErr := s.Note("the guest's autostart on %s was turned off for the copy, and stays off, since a second one might start with that host; on the host that has the guest in the end: virsh autostart %s", m.From, m.word()); noteErr != nil {
		return noteErr
	}
	return err
}

// keepOff keeps what the source has of a guest, and is out of date, from starting when that
// host reboots. What it cannot do it tells.
func (m *Migration) keepOff(ctx context.Context, s Scratch, now situation) error {
	if now.here == nil || now.here.Guest == nil || !now.here.Guest.Autostart {
		return nil
	}
	off := func(ctx context.Context) error { return m.Source.SetAutostart(ctx, m.UUID, false) }
	if err := m.retry(ctx, settleGrace, off); err != nil {
		return s.Note("the guest's autostart on %s could not be turned off, and it would be a second one when that host reboots: %v", m.From, err)
	}
	return s.Note("the guest's autostart on %s is turned off: it would be a second one when that host reboots", m.From)
}
