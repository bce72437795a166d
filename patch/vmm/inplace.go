package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
// The memory stays in its files. Until QuitMigrated the guest can run on where
// it is (see Back), and nothing here removes what that needs.
func (r *Replacement) handOver(ctx context.Context, pl plan, t *timing) error {
	g := r.Places.guard(pl.UUID)
	ctx, cancel := context.WithTimeoutCause(ctx, r.paced().handOver, errors.New("QEMU does not hand its state over in time"))
	defer cancel()
	ln, path, err := r.Places.listen(pl.ID, outSocket, pl.UID, pl.GID)
	if err != nil {
		return err
	}
	defer ln.Close()
	stream := receive(ctx, ln)
	if err := setBandwidth(ctx, r.Host, pl.UUID, unlimited); err != nil {
		return err
	}
	defer r.Places.linger(pl.Old)()
	if err := r.beforePause(ctx); err != nil {
		return err
	}
	if err := g.stamp(guardPaused); err != nil {
		return err
	}

	t.begin()
	if err := r.Host.Suspend(ctx, pl.UUID); err != nil {
		return err
	}
	t.mark("suspend")
	if err := setIgnoreShared(ctx, r.Host, pl.UUID, true); err != nil {
		return err
	}
	if err := ask(ctx, r.Host, pl.UUID, "migrate", map[string]any{"uri": "unix:" + path}, nil); err != nil {
		return err
	}
	select {
	case <-stream.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if stream.err != nil {
		return fmt.Errorf("cannot receive the state: %w", stream.err)
	}
	if err := r.postMigrate(ctx, pl); err != nil {
		return err
	}
	if err := g.write(guardState, stream.state); err != nil {
		return err
	}
	t.mark("state out")
	if err := r.pointOfNoReturn(ctx); err != nil {
		return err
	}
	if err := g.stamp(guardQuit); err != nil {
		return err
	}
	if err := r.Host.QuitMigrated(ctx, pl.UUID); err != nil {
		return err // whether it ends nevertheless is looked up
	}
	if err := r.awaitOff(context.WithoutCancel(ctx), pl); err != nil {
		return err
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

// postMigrate waits until QEMU says that it has sent all.
func (r *Replacement) postMigrate(ctx context.Context, pl plan) error {
	for {
		state, err := runState(ctx, r.Host, pl.UUID)
		if err != nil {
			return err
		}
		if state == runPostMigrate {
			return nil
		}
		m, err := queryMigrate(ctx, r.Host, pl.UUID)
		if err != nil {
			return err
		}
		if m.Status == "failed" || m.Status == "cancelled" {
			return fmt.Errorf("QEMU could not hand its state over: %s %s", m.Status, m.Error)
		}
		if !wait(ctx, pollEvery) {
			return context.Cause(ctx)
		}
	}
}

// awaitOff waits until libvirt has taken the domain down. It answers when it
// has, mostly, as it is busy with it.
func (r *Replacement) awaitOff(ctx context.Context, pl plan) error {
	ctx, cancel := context.WithTimeout(ctx, r.paced().gone)
	defer cancel()
	for {
		state, _, err := r.Host.State(ctx, pl.UUID)
		if absent(err) || err == nil && !state.Active() {
			if !r.Places.alive(pl.Old) {
				return nil
			}
			err = errors.New("libvirt says that it is off, and its QEMU is there")
		}
		if err != nil {
			return err
		}
		if !wait(ctx, pollEvery) {
			return errors.New("libvirt does not take it down")
		}
	}
}

// resetOld takes back what handOver set in the old QEMU, and its socket, which
// a belayd that was killed has left.
func (r *Replacement) resetOld(ctx context.Context, pl plan) error {
	if path, err := r.Places.socket(pl.ID, outSocket); err == nil {
		_ = os.Remove(r.Places.at(path))
	}
	ctx, cancel := context.WithTimeout(ctx, r.paced().ask)
	defer cancel()
	return errors.Join(
		setIgnoreShared(ctx, r.Host, pl.UUID, false),
		setBandwidth(ctx, r.Host, pl.UUID, pl.Bandwidth))
}

// pour gives the new QEMU the state that was kept. A QEMU that cannot load it
// ends by itself; one that cannot be given it is ended, as nothing of the guest
// is in it yet.
func (r *Replacement) pour(ctx context.Context, pl plan) error {
	ctx, cancel := context.WithTimeout(ctx, r.paced().load)
	defer cancel()
	err := r.misses(pl)
	if err == nil {
		err = r.send(ctx, pl)
	}
	if err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.paced().ask)
		defer cancel()
		return errors.Join(err, r.Host.QuitIncoming(end, pl.UUID))
	}
	for {
		now, err := runState(ctx, r.Host, pl.UUID)
		if err != nil {
			return fmt.Errorf("the new QEMU did not take the state: %w", err)
		}
		if now != runIncoming {
			return nil
		}
		if !wait(ctx, pollEvery) {
			return errors.New("the new QEMU does not take the state")
		}
	}
}

// send has the new QEMU listen and sends it the state.
func (r *Replacement) send(ctx context.Context, pl plan) error {
	state, err := os.ReadFile(r.Places.guard(pl.UUID).file(guardState))
	if err != nil {
		return err
	}
	id, err := r.newID(ctx, pl)
	if err != nil {
		return err
	}
	path, err := r.Places.socket(id, inSocket)
	if err != nil {
		return err
	}
	if err := setIgnoreShared(ctx, r.Host, pl.UUID, true); err != nil {
		return err
	}
	// It is refused if a belayd that died has done it; then QEMU listens.
	refused := ask(ctx, r.Host, pl.UUID, "migrate-incoming", map[string]any{"uri": "unix:" + path}, nil)
	if err := send(ctx, r.Places.at(path), state); err != nil {
		return errors.Join(refused, err)
	}
	_ = os.Remove(r.Places.at(path)) // QEMU does not always
	return nil
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

// misses says which of the guest's memory the new QEMU has not got.
func (r *Replacement) misses(pl plan) error {
	now, err := r.Places.qemu(pl.Guest)
	if err != nil {
		return err
	}
	for _, path := range pl.Memory {
		kept := filepath.Join(r.Places.at(pl.Kept), filepath.Base(path))
		mapped, err := r.Places.maps(now.PID, kept)
		if err != nil {
			return err
		}
		if !mapped {
			return fmt.Errorf("the new QEMU has another file as its memory %s: libvirt did not run the hook", filepath.Base(path))
		}
	}
	return nil
}
