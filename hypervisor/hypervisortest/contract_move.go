package hypervisortest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
)

func testDryRun(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "dry-run")
	p := maint.MoveParams{DestURI: env.B.URI(), Persist: true, BandwidthMiBs: 5}
	for range 2 {
		must(t, h.DryRun(ctx, uuid, p))
		wantNoJob(t, env.A, uuid)
	}
	wantGone(t, env.B, uuid)
	env.A.DestroyGuest(t, uuid)
	if err := h.DryRun(ctx, uuid, p); err == nil {
		t.Error("no refusal for a guest that is shut off")
	}
}

func testMove(t *testing.T, env Env) {
	ctx := t.Context()
	uuid := newGuest(t, env, "move")
	w := watch(t, env, uuid)
	must(t, env.A.Hypervisor().SetNote(ctx, uuid, "goes along"))
	must(t, env.A.Hypervisor().SetPolicy(ctx, uuid, "goes along, too"))
	must(t, env.A.Hypervisor().Migrate(ctx, uuid, maint.MoveParams{DestURI: env.B.URI(), Persist: true}))

	wantState(t, env.B, uuid, maint.GuestRunning, "migrated")
	if text, err := env.B.Hypervisor().Note(ctx, uuid); err != nil || text != "goes along" {
		t.Errorf("note %q, %v", text, err)
	}
	if g := look(t, env.B, uuid); !g.Persistent || g.Job != "" || g.Policy != "goes along, too" {
		t.Errorf("guest on the destination: %+v", g)
	}
	wantGone(t, env.A, uuid)
	for range 2 { // reading does not clear it
		job, err := env.B.Hypervisor().CompletedJob(ctx, uuid)
		must(t, err)
		if job.Active || job.State != "completed" || job.Operation != "migration in" || job.Elapsed <= 0 ||
			job.Downtime <= 0 || job.MemorySent == 0 || job.MemoryTotal < 64<<20 || job.Iteration == 0 {
			t.Errorf("completed job: %+v", job)
		}
	}
	wantNoJob(t, env.B, uuid)
	w.want(t, "b started migrated", "a suspended migrated", "b resumed migrated", "a stopped migrated")

	// and back, over the definition's absence
	must(t, env.B.Hypervisor().Migrate(ctx, uuid, maint.MoveParams{DestURI: env.A.URI(), Persist: true, Parallel: 2, Slow: true}))
	wantState(t, env.A, uuid, maint.GuestRunning, "migrated")
	wantGone(t, env.B, uuid)
}

// testMidCopyTuned: a copy that a limit holds comes to its end when that is lifted.
func testMidCopyTuned(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "tuned")
	m := startMove(t, env, uuid)
	must(t, h.SetMaxDowntime(ctx, uuid, 200*time.Millisecond))
	must(t, h.LiftBandwidth(ctx, uuid))
	must(t, m.wait(t))
	wantState(t, env.B, uuid, maint.GuestRunning, "migrated")
	wantGone(t, env.A, uuid)
}

// testMoveWith: libvirt refuses what it does not know, and does nothing. What QEMU
// says that it can do works.
func testMoveWith(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "with")
	s, err := hypervisor.MoveSupport(ctx, h, uuid)
	must(t, err)
	_, err = h.QMP(ctx, uuid, "announce-self", map[string]int{"initial": 50, "max": 550, "rounds": 1, "step": 100})
	must(t, err)
	for _, c := range []string{"xbzrle", "multifd"} {
		if !slices.Contains(s.Capabilities, c) {
			t.Errorf("QEMU has no %q: %v", c, s.Capabilities)
		}
	}
	if !slices.Contains(s.Multifd, "zlib") {
		t.Errorf("compressions of several connections: %v", s.Multifd)
	}
	wantIs(t, "Migrate with an unknown compression", h.Migrate(ctx, uuid, maint.MoveParams{DestURI: env.B.URI(), Compression: "cabbage"}), maint.ErrParameter)
	wantState(t, env.A, uuid, maint.GuestRunning, "booted")
	wantNoJob(t, env.A, uuid)
	wantGone(t, env.B, uuid)

	must(t, h.Migrate(ctx, uuid, maint.MoveParams{DestURI: env.B.URI(), Persist: true, Compression: maint.CompressXBZRLE}))
	wantState(t, env.B, uuid, maint.GuestRunning, "migrated")
	if !slices.Contains(s.Capabilities, "zero-copy-send") {
		return
	}
	err = env.B.Hypervisor().Migrate(ctx, uuid, maint.MoveParams{DestURI: env.A.URI(), Persist: true, Parallel: 2, ZeroCopy: true})
	if e, ok := errors.AsType[*hypervisor.Error](err); ok && e.Code == codeSystem {
		t.Logf("the guest's memory cannot be locked here: %v", err) // a container's root may not raise limits
		wantState(t, env.B, uuid, maint.GuestRunning, "migrated")
		wantGone(t, env.A, uuid)
		return
	}
	must(t, err)
	wantState(t, env.A, uuid, maint.GuestRunning, "migrated")
}

func testMoveTransient(t *testing.T, env Env) {
	uuid := newGuest(t, env, "transient")
	must(t, env.A.Hypervisor().Migrate(t.Context(), uuid, maint.MoveParams{DestURI: env.B.URI()}))
	if g := look(t, env.B, uuid); g.State != maint.GuestRunning || g.Persistent {
		t.Errorf("guest on the destination: %+v", g)
	}
	wantState(t, env.A, uuid, maint.GuestShutoff, "migrated") // still defined

	wantIs(t, "SetAutostart of a transient guest", asInvalid(env.B.Hypervisor().SetAutostart(t.Context(), uuid, true)), errInvalid)
	x, err := env.B.Hypervisor().GuestXML(t.Context(), uuid)
	must(t, err)
	if x.Inactive != "" {
		t.Error("a transient guest has a definition")
	}
}

// errInvalid stands for libvirt error 55, operation invalid.
var errInvalid = errors.New("operation invalid")

func asInvalid(err error) error {
	if e, ok := errors.AsType[*hypervisor.Error](err); ok && e.Code == codeOperationInvalid {
		return errInvalid
	}
	return err
}

func testMovePaused(t *testing.T, env Env) {
	uuid := newGuest(t, env, "paused")
	env.A.PauseGuest(t, uuid)
	must(t, env.A.Hypervisor().Migrate(t.Context(), uuid, maint.MoveParams{DestURI: env.B.URI(), Persist: true}))
	wantState(t, env.B, uuid, maint.GuestPaused, "user")
	wantGone(t, env.A, uuid)
}

func testMoveNowhere(t *testing.T, env Env) {
	uuid := newGuest(t, env, "nowhere")
	nowhere := strings.Replace(env.B.URI(), "/system", ":1/system", 1) // a port where nobody listens
	err := env.A.Hypervisor().Migrate(t.Context(), uuid, maint.MoveParams{DestURI: nowhere, Persist: true})
	if e, ok := errors.AsType[*hypervisor.Error](err); !ok || e.Code == 0 || errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("error %v, want libvirt's account of a destination that it cannot reach", err)
	}
	wantState(t, env.A, uuid, maint.GuestRunning, "booted")
	wantNoJob(t, env.A, uuid)
}

func testMoveNameTaken(t *testing.T, env Env) {
	uuid := newGuest(t, env, "taken")
	other := env.B.NewGuest(t, "taken")
	t.Cleanup(func() { env.B.RemoveGuest(t, other) })
	err := env.A.Hypervisor().Migrate(t.Context(), uuid, maint.MoveParams{DestURI: env.B.URI(), Persist: true})
	if _, ok := errors.AsType[*hypervisor.Error](err); !ok {
		t.Errorf("error %v, want libvirt's", err)
	}
	wantState(t, env.A, uuid, maint.GuestRunning, "booted")
	wantNoJob(t, env.A, uuid)
	wantState(t, env.B, other, maint.GuestRunning, "booted")
}

func testMidCopyAbort(t *testing.T, env Env) {
	ctx := t.Context()
	uuid := newGuest(t, env, "abort")
	m := startMove(t, env, uuid)

	job, err := env.A.Hypervisor().Job(ctx, uuid)
	must(t, err)
	if job.Operation != "migration out" || job.State != "unbounded" || job.MemoryTotal < 64<<20 || job.Elapsed <= 0 {
		t.Errorf("job on the source: %+v", job)
	}
	job, err = env.B.Hypervisor().Job(ctx, uuid)
	must(t, err)
	if !job.Active || job.Operation != "migration in" {
		t.Errorf("job on the destination: %+v", job)
	}
	if g := look(t, env.A, uuid); g.State != maint.GuestRunning || g.Job != "migration out" {
		t.Errorf("guest on the source: %+v", g)
	}
	if g := look(t, env.B, uuid); g.State != maint.GuestPaused || g.Reason != "migrating" || g.Job != "migration in" || g.Persistent {
		t.Errorf("guest on the destination: %+v", g)
	}
	wantIs(t, "AbortJob on the destination", env.B.Hypervisor().AbortJob(ctx, uuid), hypervisor.ErrIncoming)
	p := maint.MoveParams{DestURI: env.B.URI()}
	for _, s := range []Site{env.A, env.B} {
		wantIs(t, "DryRun of a guest on its way", s.Hypervisor().DryRun(ctx, uuid, p), hypervisor.ErrBusy)
		wantIs(t, "SetAutostart of a guest on its way", s.Hypervisor().SetAutostart(ctx, uuid, true), hypervisor.ErrBusy)
	}
	wantIs(t, "a second Migrate", asInvalid(env.A.Hypervisor().Migrate(ctx, uuid, p)), errInvalid)

	must(t, env.A.Hypervisor().AbortJob(ctx, uuid))
	if err := m.wait(t); err == nil || errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("Migrate returns %v after an abort", err)
	}
	wantNoJob(t, env.A, uuid)
	wantState(t, env.A, uuid, maint.GuestRunning, "booted")
	wantGone(t, env.B, uuid)
	wantIs(t, "AbortJob", env.A.Hypervisor().AbortJob(ctx, uuid), maint.ErrNoJob)
	_, err = env.A.Hypervisor().CompletedJob(ctx, uuid)
	wantIs(t, "CompletedJob after an abort", err, maint.ErrNoJob)
}

// testMidCopySuspended: who pauses a guest in the copy takes part in its migration. libvirt
// starts it where it is in the end.
func testMidCopySuspended(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	for _, fails := range []bool{false, true} {
		uuid := newGuest(t, env, fmt.Sprintf("suspended-%t", fails))
		m := startMove(t, env, uuid)
		inCopy := func(want bool) {
			t.Helper()
			if is, err := hypervisor.SuspendedInCopy(ctx, h, uuid); err != nil || is != want {
				t.Errorf("suspended in the copy: %t, %v; want %t", is, err, want)
			}
		}
		inCopy(false)
		env.A.PauseGuest(t, uuid)
		wantState(t, env.A, uuid, maint.GuestPaused, "migrating")
		inCopy(true)
		if g := look(t, env.A, uuid); g.Job != "migration out" {
			t.Errorf("the copy does not go on: %+v", g)
		}
		if fails {
			must(t, h.AbortJob(ctx, uuid))
			if err := m.wait(t); err == nil {
				t.Error("Migrate succeeds after an abort")
			}
			wantNoJob(t, env.A, uuid)
			wantState(t, env.A, uuid, maint.GuestRunning, "migration canceled")
			continue
		}
		env.A.Release(t, uuid)
		must(t, m.wait(t))
		wantGone(t, env.A, uuid)
		wantState(t, env.B, uuid, maint.GuestRunning, "migrated")
	}
}

func testMidCopyCallerLeaves(t *testing.T, env Env) {
	ctx := t.Context()
	uuid := newGuest(t, env, "leaves")
	m := startMove(t, env, uuid)
	m.cancel()
	err := m.wait(t)
	wantIs(t, "Migrate", err, context.Canceled)
	if errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("a caller's leaving is taken for libvirt's being down: %v", err)
	}
	job, err := env.A.Hypervisor().Job(ctx, uuid)
	must(t, err)
	if !job.Active {
		t.Errorf("the migration did not go on: %+v", job)
	}
	env.A.Release(t, uuid)
	wantGone(t, env.A, uuid)
	wantState(t, env.B, uuid, maint.GuestRunning, "migrated")
}

func testMidCopyDestinationQEMUKilled(t *testing.T, env Env) {
	uuid := newGuest(t, env, "dst-qemu")
	m := startMove(t, env, uuid)
	env.B.KillQEMU(t, uuid)
	wantFailed(t, env, m, uuid)
}

func testMidCopyDestinationLibvirtKilled(t *testing.T, env Env) {
	uuid := newGuest(t, env, "dst-libvirt")
	events := subscribe(t, env.B)
	m := startMove(t, env, uuid)
	env.B.KillLibvirt(t)
	wantKind(t, events, maint.EventDown)
	err := m.wait(t)
	env.B.RestartLibvirt(t)
	wantKind(t, events, maint.EventResync)
	m.result <- err
	wantFailed(t, env, m, uuid)
}

// wantFailed checks that a migration has failed and left the guest running on
// the source.
func wantFailed(t *testing.T, env Env, m *move, uuid string) {
	t.Helper()
	err := m.wait(t)
	if e, ok := errors.AsType[*hypervisor.Error](err); !ok || e.Code == 0 || errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("Migrate returns %v, want libvirt's account of the failure", err)
	}
	wantNoJob(t, env.A, uuid)
	wantState(t, env.A, uuid, maint.GuestRunning, "booted")
	wantGone(t, env.B, uuid)
}

func testMidCopySourceLibvirtKilled(t *testing.T, env Env) {
	uuid := newGuest(t, env, "src-libvirt")
	events := subscribe(t, env.A)
	m := startMove(t, env, uuid)
	env.A.KillLibvirt(t)
	wantIs(t, "Migrate", m.wait(t), maint.ErrHypervisorDown)
	wantKind(t, events, maint.EventDown)
	env.A.RestartLibvirt(t)
	wantKind(t, events, maint.EventResync)
	wantNoJob(t, env.A, uuid)
	if g := look(t, env.A, uuid); g.State != maint.GuestRunning {
		t.Errorf("guest on the source: %+v", g)
	}
	wantGone(t, env.B, uuid)
}
