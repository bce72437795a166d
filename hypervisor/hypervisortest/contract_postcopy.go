package hypervisortest

import (
	"context"
	"errors"
	"testing"

	"belay/agent/maint"
	"belay/hypervisor"
)

// startPostCopy begins a migration from A to B that is held, and has it go on as
// post-copy.
func startPostCopy(t *testing.T, env Env, uuid string) *move {
	t.Helper()
	h, ctx := env.A.Hypervisor(), t.Context()
	m := startMoveWith(t, env, uuid, maint.MoveParams{PostCopy: true})
	for range 2 { // to ask twice does no harm
		must(t, h.StartPostCopy(ctx, uuid))
	}
	wantPostCopy(t, env, uuid, maint.PostCopyRunning)
	return m
}

// wantPostCopy waits until both hosts show a guest in post-copy, which goes on or not.
func wantPostCopy(t *testing.T, env Env, uuid string, how maint.PostCopy) {
	t.Helper()
	reason := map[maint.PostCopy]string{maint.PostCopyRunning: reasonPost, maint.PostCopyBroken: reasonPostFailed}[how]
	var job maint.Job
	var a, b maint.Guest
	eventually(t, "both in post-copy, "+string(how), func() bool {
		var err error
		if job, err = env.A.Hypervisor().Job(t.Context(), uuid); err != nil {
			t.Fatal(err)
		}
		a, b = look(t, env.A, uuid), look(t, env.B, uuid)
		return job.PostCopy == how && a.Reason == reason && b.Reason == reason
	})
	if !job.Active || job.Operation != "migration out" || a.State != maint.GuestPaused || a.Job != "migration out" ||
		b.State != maint.GuestRunning || b.Job != "migration in" || !b.Persistent {
		t.Errorf("job %+v; on the source %s, job %q; on the destination %s, job %q", job, a.State, a.Job, b.State, b.Job)
	}
}

// testMidCopyPostCopy: in post-copy the guest runs on the destination, and nothing ends
// the migration but its own end.
func testMidCopyPostCopy(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "postcopy")
	wantIs(t, "StartPostCopy without a migration", h.StartPostCopy(ctx, uuid), maint.ErrNoJob)
	m := startPostCopy(t, env, uuid)
	if err := h.AbortJob(ctx, uuid); err == nil || errors.Is(err, maint.ErrNoJob) {
		t.Errorf("AbortJob in post-copy: %v", err)
	}
	if err := h.ResumePostCopy(ctx, uuid, maint.MoveParams{DestURI: env.B.URI(), Persist: true}); err == nil || errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("ResumePostCopy of one that runs: %v", err)
	}
	env.A.Release(t, uuid)
	must(t, m.wait(t))
	wantState(t, env.B, uuid, maint.GuestRunning, "migrated")
	wantGone(t, env.A, uuid)
	wantNoJob(t, env.B, uuid)
	_, err := env.B.Hypervisor().CompletedJob(ctx, uuid)
	wantIs(t, "CompletedJob on the destination", err, maint.ErrNoJob)
}

// holdPostCopy has the connection of a post-copy outlive a cut network, on both hosts.
func holdPostCopy(t *testing.T, env Env, uuid string) []maint.Connection {
	t.Helper()
	all, err := env.A.Hypervisor().HoldOut(t.Context(), uuid, 49152, 49215)
	if err != nil || len(all) != 1 {
		t.Fatalf("HoldOut: %v, %v", all, err)
	}
	if n, err := env.B.Hypervisor().HoldIn(t.Context(), uuid, all); n != 1 || err != nil {
		t.Fatalf("HoldIn: %d, %v", n, err)
	}
	if severed, err := hypervisor.Severed(t.Context(), env.A.Hypervisor(), uuid); severed || err != nil {
		t.Errorf("Severed: %v, %v", severed, err)
	}
	return all
}

// testMidCopyPostCopyBroken: a broken one is resumed, and both halves stay until then,
// whichever QEMU gives the connection up.
func testMidCopyPostCopyBroken(t *testing.T, env Env) {
	for name, sever := range map[string]func(t *testing.T, uuid string, all []maint.Connection){
		"source": func(t *testing.T, uuid string, _ []maint.Connection) { env.A.BreakPostCopy(t, uuid) },
		"destination": func(t *testing.T, uuid string, all []maint.Connection) {
			other := []maint.Connection{{From: all[0].To, To: all[0].From}}
			if n, err := env.B.Hypervisor().Sever(t.Context(), uuid, other); n != 0 || err != nil {
				t.Errorf("Sever of another connection: %d, %v", n, err)
			}
			if n, err := env.B.Hypervisor().Sever(t.Context(), uuid, all); n != 1 || err != nil {
				t.Fatalf("Sever: %d, %v", n, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			uuid := newGuest(t, env, "broken")
			m := startPostCopy(t, env, uuid)
			sever(t, uuid, holdPostCopy(t, env, uuid))
			if e, ok := errors.AsType[*hypervisor.Error](m.wait(t)); !ok || e.Code == 0 {
				t.Errorf("Migrate returns %v, want libvirt's account of the failure", e)
			}
			wantPostCopy(t, env, uuid, maint.PostCopyBroken)
			eventually(t, "severed", func() bool {
				severed, err := hypervisor.Severed(t.Context(), env.A.Hypervisor(), uuid)
				must(t, err)
				return severed
			})
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			env.A.Release(t, uuid)
			eventually(t, "resumed", func() bool { // libvirt knows that it is broken a moment before QEMU is ready to be resumed
				err := env.A.Hypervisor().ResumePostCopy(ctx, uuid, maint.MoveParams{DestURI: env.B.URI(), Persist: true, BandwidthMiBs: 10})
				if e, refused := errors.AsType[*hypervisor.Error](err); err != nil && (!refused || e.Code == 0) {
					t.Fatal(err)
				}
				return err == nil
			})
			wantState(t, env.B, uuid, maint.GuestRunning, "migrated")
			wantGone(t, env.A, uuid)
		})
	}
}

// testMidCopyNoPostCopy: a migration that was not begun for it does not go on as one.
func testMidCopyNoPostCopy(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "no-postcopy")
	m := startMove(t, env, uuid)
	wantIs(t, "StartPostCopy", h.StartPostCopy(ctx, uuid), maint.ErrNoJob)
	if err := h.ResumePostCopy(ctx, uuid, maint.MoveParams{DestURI: env.B.URI(), Persist: true}); err == nil {
		t.Error("a migration was resumed that was never in post-copy")
	}
	must(t, h.AbortJob(ctx, uuid))
	if m.wait(t) == nil {
		t.Error("Migrate returns no error after an abort")
	}
	wantState(t, env.A, uuid, maint.GuestRunning, "booted")
}
