package vmm

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	outSocket = "belay-out.sock" // the old QEMU connects to it
	inSocket  = "belay-in.sock"  // the new one listens on it

	// unlimited is a bandwidth, in bytes per second.
	unlimited = 1 << 40

	// pollEvery is how often QEMU is asked for the end of what takes it
	// milliseconds, and for which libvirt passes on no event.
	pollEvery = time.Millisecond
)

// handOver pauses the guest, takes the state of its devices, and ends its QEMU.
// The memory stays in its files. Until it is stamped that its QEMU is to quit the guest
// can run on where it is (see Back), and nothing here removes what that needs.
func (r *Replacement) handOver(ctx context.Context, pl plan, t *timing) error {
	g, m := r.Places.guard(pl.UUID), r.mover()
	defer m.Linger(pl.Seat)()
	state, err := m.leave(ctx, pl.Seat, func(ctx context.Context) error {
		if err := r.beforePause(ctx); err != nil {
			return err
		}
		return g.stamp(guardPaused)
	}, t)
	if err != nil {
		return err
	}
	if err := g.write(guardState, state); err != nil {
		return err
	}
	t.mark("state out")
	if err := r.pointOfNoReturn(ctx); err != nil {
		return err
	}
	if err := g.stamp(guardQuit); err != nil {
		return err
	}
	if err := m.End(context.WithoutCancel(ctx), pl.Seat); err != nil {
		return err // whether it ends nevertheless is looked up
	}
	t.mark("quit")
	return nil
}

func (r *Replacement) beforePause(ctx context.Context) error {
	if r.BeforePause == nil {
		return ctx.Err()
	}
	if err := r.BeforePause(ctx); err != nil {
		return fmt.Errorf("called off before the pause: %w", err)
	}
	return ctx.Err()
}

func (r *Replacement) pointOfNoReturn(ctx context.Context) error {
	if err := ctx.Err(); err != nil || r.PointOfNoReturn == nil {
		return err
	}
	if err := r.PointOfNoReturn(ctx); err != nil {
		return fmt.Errorf("called off before the old QEMU's end: %w", err)
	}
	return nil
}

// pour gives the new QEMU the state that was kept.
func (r *Replacement) pour(ctx context.Context, pl plan) error {
	state, err := os.ReadFile(r.Places.guard(pl.UUID).file(guardState))
	if err != nil {
		return r.mover().vacate(ctx, pl.Seat, err)
	}
	id, err := r.newID(ctx, pl)
	if err != nil {
		return r.mover().vacate(ctx, pl.Seat, err)
	}
	return r.mover().pour(ctx, pl.Seat, id, state)
}

// newID is libvirt's number of the new domain: the hook has seen it.
func (r *Replacement) newID(ctx context.Context, pl plan) (int, error) {
	b, err := os.ReadFile(r.Places.guard(pl.UUID).file(guardID))
	if err == nil {
		return strconv.Atoi(strings.TrimSpace(string(b)))
	}
	g, err := r.Host.Guest(ctx, pl.UUID)
	return g.ID, err
}
