package twin

import (
	"context"
	"errors"
	"fmt"

	"belay/agent/maint"
)

// adopt plans the way home of a guest that is in the twin, and refuses one that
// is not to be moved. Nobody knows any more what the visit was that left it
// there, so it takes nothing for granted:
//
//	in the twin            at home
//	runs                   not there          brought home by live migration, if that has room
//	runs                   waits (inmigrate)  what waits is ended; then the same
//	job out                any                on its way home: so be it
//	sent away, gone        runs               at home: what is left in the twin is ended
//	waits (inmigrate)      runs               at home: what waits is ended
//	runs                   runs               an alarm, nothing is touched
//	else                                      refused, nothing is touched
//
// A guest that is paused in the twin is among the last: whether it was paused by
// its owner or in the middle of a crossing cannot be told.
func (v *Visit) adopt(ctx context.Context, s Scratch) error {
	what := "cannot bring guest " + v.Guest + " home from the twin"
	if err := v.Twin.Start(ctx); err != nil {
		return err
	}
	l := v.leg(false)
	now, err := v.found(ctx, l)
	if err != nil {
		return err
	}
	b := before{Adopted: true}
	switch now {
	case there, copying:
	case leftover:
		if st, _ := v.station(ctx, l.from); st == loaded || st == runs || st == strange {
			return v.lost("runs at home, and its QEMU in the twin is stopped (%s), which may have been the guest: look at both, and end the one in the twin by hand", st)
		}
	case here:
		problems, err := v.stay(ctx, &b, l)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if err := maint.Refuse(what, problems); err != nil {
			return err
		}
	default:
		return v.unsettled(l, now)
	}
	if b.XML, b.Autostart, err = v.definition(ctx); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := s.Note("it is in the twin already, and is brought home"); err != nil {
		return err
	}
	return s.Save(b)
}

// found is where the guest is. A QEMU that waits for it is nothing of it.
func (v *Visit) found(ctx context.Context, l leg) (situation, error) {
	switch {
	case v.waits(ctx, l.to, l.from):
		return here, nil
	case v.waits(ctx, l.from, l.to):
		return leftover, nil
	}
	return v.settle(ctx, l)
}

// waits reports whether a QEMU waits for the guest on one side, which runs on the
// other and is not being sent by anybody: a warm-up of which nobody knows.
func (v *Visit) waits(ctx context.Context, side, other Side) bool {
	for _, at := range []struct {
		side Side
		want station
	}{{side, waiting}, {other, runs}} {
		if st, err := v.station(ctx, at.side); err != nil || st != at.want {
			return false
		}
		if at := v.view(ctx, at.side); at == nil || at.Guest == nil || at.Guest.Job != "" {
			return false
		}
	}
	return true
}

// stay lists why a guest that is in the twin, and nowhere else, is to stay there
// for now.
func (v *Visit) stay(ctx context.Context, b *before, l leg) ([]maint.Problem, error) {
	g, err := v.Away.Guest(ctx, v.UUID)
	if err != nil {
		return nil, err
	}
	b.Memory = g.MemoryBytes
	problems := v.unfit(g)
	rooms, err := v.Twin.Room(v.Guest, g.MemoryBytes+overhead, g.MemorySource == "file")
	if err != nil {
		return nil, err
	}
	if problems = append(problems, rooms...); len(problems) > 0 {
		return problems, nil
	}
	if b.QEMU, err = version(ctx, v.Away, v.UUID); err != nil {
		return nil, err
	}
	if err := v.Away.DryRun(ctx, v.UUID, l.params); err != nil {
		if errors.Is(err, maint.ErrHypervisorDown) {
			return nil, err
		}
		problems = append(problems, *maint.Problemf(maint.CodeSourceRefuses, "guest "+v.Guest, "change what libvirt names", "libvirt refuses to migrate it: %v", err))
	}
	return problems, nil
}

// definition is the guest's at home, "" without one.
func (v *Visit) definition(ctx context.Context) (xml string, autostart bool, err error) {
	g, err := v.Home.Guest(ctx, v.UUID)
	if errors.Is(err, maint.ErrNoGuest) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	d, err := v.Home.Describe(ctx, v.UUID)
	return d.Inactive, g.Autostart, err
}

// adopted reports whether preflight has found the guest in the twin.
func (v *Visit) adopted(s Scratch) (bool, error) {
	var b before
	_, err := s.Load(PhasePreflight, &b)
	return b.Adopted, err
}

// Fetch brings home, by live migration, a guest that a visit of which nothing is
// known any more has left in the twin (see [Twin.Guests]). Like Back it may give
// ErrStuck.
func (v *Visit) Fetch(detach context.Context, s Scratch) error {
	if err := v.Twin.Start(detach); err != nil {
		return err
	}
	c := crossing{Begun: 1} // nobody else moves what is in the twin
	l := v.leg(false)
	if now, err := v.found(detach, l); err == nil && now != copying {
		gone, cancel := context.WithCancel(detach)
		cancel()
		err := v.swap(gone, detach, l, s, &c) // which ends a QEMU that waits for it at home
		var stayed *stayedError
		if !errors.As(err, &stayed) {
			return err
		}
	}
	return v.bring(detach, s, &c, true)
}
