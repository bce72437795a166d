package migrate

import (
	"context"
	"fmt"

	"belay/agent/maint"
)

// Who pauses a guest while it is copied (virsh suspend) takes part in its migration, as
// libvirt has it: it says that the guest is paused for migrating, starts it on the destination
// when the copy is done, and on the source if that fails. (virDomainSuspend is what 'virsh
// migrate --timeout-suspend' uses to bring a copy to its end.) Belay can neither keep it paused
// nor calls the guest left paused: it says what will be.

// stateTimeout bounds a look at a guest's state within a copy.
const stateTimeout = pollEvery

// pauses follows whether the guest is paused while it is copied.
type pauses struct {
	seen int // looks, one after the other, that found it paused
	told bool
}

// look is made at each reading of the copy's statistics. QEMU is asked only of a guest that
// is paused for longer than one: a switch-over is mostly over by then.
func (p *pauses) look(ctx context.Context, m *Migration, s Scratch) error {
	ctx, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	state, _, err := m.Source.State(ctx, m.UUID)
	switch {
	case err != nil:
		return nil
	case state != maint.GuestPaused:
		p.over(m)
		*p = pauses{}
		return nil
	}
	p.seen++
	if p.seen < 2 || p.told {
		return nil
	}
	if is, err := m.Source.Suspended(ctx, m.UUID); err != nil || !is {
		return nil
	}
	p.told = true
	m.report(maint.Problemf(maint.CodeGuestPaused, "guest "+m.Guest,
		fmt.Sprintf("to have it stay paused: virsh suspend %s, on %s, when it has come there; or abort the migration, and then here", m.word(), m.To),
		"was paused by somebody in the copy; libvirt starts it on %s when it has come there, or on %s if it does not", m.To, m.From))
	return s.Note("somebody has paused the guest in the copy, which libvirt takes for a part of the migration: it starts the guest on %s when it has come there, or on %s if it does not; its blackout is from that pause on", m.To, m.From)
}

// over is the end of the pause, or of the copy.
func (p *pauses) over(m *Migration) {
	if p.told {
		m.report(nil)
	}
}
