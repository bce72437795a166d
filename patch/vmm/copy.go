package vmm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"belay/agent/maint"
)

// savedMagic is how a file begins in which libvirt has saved a guest completely;
// until it has, the file begins otherwise (libvirt, qemu_saveimage.h).
const savedMagic = "LibvirtQemudSave"

// saved is when a guest was saved in a file, completely.
func saved(path string) (time.Time, error) {
	f, err := os.Open(path)
	if err != nil {
		return time.Time{}, fmt.Errorf("the guest is not saved: %w", err)
	}
	defer f.Close()
	magic := make([]byte, len(savedMagic))
	if _, err := io.ReadFull(f, magic); err != nil || !bytes.Equal(magic, []byte(savedMagic)) {
		return time.Time{}, fmt.Errorf("the guest is not completely saved in %s", path)
	}
	info, err := f.Stat()
	if err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), nil
}

// save has libvirt save the guest to a file in RAM, which ends its QEMU. What
// fails, fails whole: the guest runs on.
//
// A save goes on when belayd dies, and when its own call's context has ended.
func (r *Replacement) save(ctx context.Context, pl plan, t *timing) error {
	g := r.Places.guard(pl.UUID)
	image := r.Places.at(pl.image())
	if err := os.Remove(image); err != nil && !missing(err) {
		return err
	}
	// QEMU fills no more than there is room for, but the guest stands still
	// meanwhile: look once more.
	free, _, err := room(r.Places.at(pl.Kept))
	if err != nil {
		return err
	}
	now, err := r.Host.Guest(ctx, pl.UUID)
	if err != nil {
		return err
	}
	if need := now.MemoryBytes + stateRoom; free < need {
		return maint.Problemf(maint.CodeNoRoom, "guest "+r.Guest, "make that tmpfs larger", "needs %d MiB in %s, which has %d MiB", need>>20, pl.Kept, free>>20)
	}
	if err := r.beforePause(ctx); err != nil {
		return err
	}
	if err := r.mover().TakesMemory(ctx, now); err != nil {
		return err
	}
	if err := r.pointOfNoReturn(ctx); err != nil {
		return err
	}
	if err := errors.Join(g.stamp(guardPaused), g.stamp(guardQuit)); err != nil {
		return err
	}
	t.begin()
	err = r.Host.Save(context.WithoutCancel(ctx), pl.UUID, pl.image())
	if err == nil {
		err = r.mover().awaitOff(context.WithoutCancel(ctx), pl.Seat)
	}
	t.mark("save")
	return err
}

// restore has libvirt start the guest from the file. It runs then.
func (r *Replacement) restore(ctx context.Context, pl plan) error {
	return r.Host.Restore(ctx, pl.image(), true)
}
