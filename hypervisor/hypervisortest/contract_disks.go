package hypervisortest

import (
	"bytes"
	"testing"

	"belay/agent/maint"
)

func testMoveWithDisk(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid, path := env.A.NewDiskGuest(t, "disk")
	t.Cleanup(func() {
		env.A.RemoveGuest(t, uuid)
		env.B.RemoveGuest(t, uuid)
	})
	image := env.A.ReadFile(t, path)
	for _, disk := range []string{"vda", path} {
		size, allocated, err := h.DiskSize(ctx, uuid, disk)
		must(t, err)
		if size != uint64(len(image)) || allocated == 0 || allocated > size {
			t.Errorf("%s has %d bytes and takes %d, its image has %d", disk, size, allocated, len(image))
		}
	}
	if _, _, err := h.DiskSize(ctx, uuid, "vdz"); err == nil {
		t.Error("a disk that is not there has a size")
	}

	p := maint.MoveParams{DestURI: env.B.URI(), Persist: true, CopyDisks: []string{"vdz"}}
	if err := h.DryRun(ctx, uuid, p); err == nil {
		t.Error("no refusal for a disk that is not there")
	}
	p.CopyDisks = []string{"vda"}
	must(t, h.DryRun(ctx, uuid, p))
	if err := h.Migrate(ctx, uuid, p); err == nil {
		t.Error("a disk was copied to no file")
	}
	wantState(t, env.A, uuid, maint.GuestRunning, look(t, env.A, uuid).Reason)
	wantGone(t, env.B, uuid)

	env.B.WriteFile(t, path, make([]byte, len(image)))
	must(t, h.Migrate(ctx, uuid, p))
	wantState(t, env.B, uuid, maint.GuestRunning, "migrated")
	wantGone(t, env.A, uuid)
	if !bytes.Equal(env.B.ReadFile(t, path), image) {
		t.Error("the copy is not what was copied")
	}
	if !bytes.Equal(env.A.ReadFile(t, path), image) {
		t.Error("the source's image was not left as it was")
	}

	// Back, where the image still is, with another way to copy it.
	p.DestURI, p.CopyOverlays, p.SyncWrites = env.A.URI(), true, true
	env.A.WriteFile(t, path, make([]byte, len(image)))
	must(t, env.B.Hypervisor().Migrate(ctx, uuid, p))
	wantState(t, env.A, uuid, maint.GuestRunning, "migrated")
	if !bytes.Equal(env.A.ReadFile(t, path), image) {
		t.Error("the copy is not what was copied")
	}
}
