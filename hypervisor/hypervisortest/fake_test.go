package hypervisortest_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// inWorld runs f with two hosts and a guest on the first, in a bubble of its own
// time.
func inWorld(t *testing.T, f func(t *testing.T, w *hypervisortest.World, a, b *hypervisortest.Host, uuid string)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := hypervisortest.NewWorld()
		defer w.Close()
		a := w.AddHost("host-a", hypervisortest.HostOptions{MemoryBytes: 1 << 30})
		b := w.AddHost("host-b", hypervisortest.HostOptions{MemoryBytes: 1 << 30})
		f(t, w, a, b, a.PutGuest("web-1"))
	})
}

// where tells a guest's states on the hosts: "running (booted) | -".
func where(t *testing.T, uuid string, hosts ...*hypervisortest.Host) string {
	t.Helper()
	text := ""
	for i, h := range hosts {
		if i > 0 {
			text += " | "
		}
		g, err := h.Guest(t.Context(), uuid)
		switch {
		case errors.Is(err, maint.ErrNoGuest):
			text += "-"
		case err != nil:
			t.Fatal(err)
		default:
			text += fmt.Sprintf("%s (%s)", g.State, g.Reason)
		}
	}
	return text
}

func TestMigrationTakesItsTime(t *testing.T) {
	inWorld(t, func(t *testing.T, w *hypervisortest.World, a, b *hypervisortest.Host, uuid string) {
		w.SetCopy(hypervisortest.Copy{Passes: 4, Step: time.Second, Blackout: 250 * time.Millisecond})
		start := time.Now()
		result := make(chan error, 1)
		go func() {
			result <- a.Migrate(t.Context(), uuid, maint.MoveParams{DestURI: b.URI(), Persist: true})
		}()
		var iterations []uint64
		for range 4 {
			time.Sleep(999 * time.Millisecond)
			job, err := a.Job(t.Context(), uuid)
			if err != nil {
				t.Fatal(err)
			}
			iterations = append(iterations, job.Iteration)
			for _, h := range []*hypervisortest.Host{a, b} { // both sides need the memory
				if info, _ := h.Info(t.Context()); info.FreeMemoryBytes != 1<<30-64<<20 {
					t.Errorf("%s has %d bytes free", h.Name(), info.FreeMemoryBytes)
				}
			}
		}
		if err := <-result; err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 4250*time.Millisecond {
			t.Errorf("took %v", took)
		}
		if !slices.Equal(iterations, []uint64{1, 2, 3, 4}) {
			t.Errorf("iterations %d", iterations)
		}
		job, err := b.CompletedJob(t.Context(), uuid)
		if err != nil || job.Downtime != 250*time.Millisecond || job.Elapsed != 4250*time.Millisecond {
			t.Errorf("completed job %+v, %v", job, err)
		}
		if info, _ := a.Info(t.Context()); info.FreeMemoryBytes != 1<<30 {
			t.Errorf("the source has %d bytes free", info.FreeMemoryBytes)
		}
	})
}

// Every way to end a migration early, in every phase, leaves what the table in
// the package's documentation says.
func TestWhatIsLeft(t *testing.T) {
	const (
		back  = "running (booted) | -"
		again = "running (migration canceled) | -"
		done  = "- | running (migrated)"
	)
	for _, tt := range []struct {
		name   string
		strike func(a, b *hypervisortest.Host, uuid string)
		want   map[hypervisortest.Phase]string
	}{
		{
			"source libvirt killed",
			func(a, _ *hypervisortest.Host, _ string) { a.KillLibvirt(); a.RestartLibvirt() },
			map[hypervisortest.Phase]string{
				"copying": back, "suspended": again, "stopped": done,
				"resumed": "paused (migrating) | running (migrated)",
			},
		},
		{
			"destination libvirt killed",
			func(_, b *hypervisortest.Host, _ string) { b.KillLibvirt(); b.RestartLibvirt() },
			map[hypervisortest.Phase]string{
				"copying": back, "suspended": again, "stopped": done,
				"resumed": "running (migration canceled) | running (migrated)",
			},
		},
		{
			"destination QEMU killed",
			func(_, b *hypervisortest.Host, uuid string) { b.KillQEMU(t, uuid) },
			map[hypervisortest.Phase]string{
				"copying": back, "suspended": again,
				"resumed": "- | shut off (crashed)", "stopped": "- | shut off (crashed)",
			},
		},
		{
			"source QEMU killed",
			func(a, b *hypervisortest.Host, uuid string) {
				if _, err := a.Guest(context.Background(), uuid); err == nil {
					a.KillQEMU(t, uuid)
				}
			},
			map[hypervisortest.Phase]string{
				"copying": "shut off (crashed) | -", "suspended": "shut off (crashed) | -",
				"resumed": "shut off (crashed) | running (migrated)", "stopped": done,
			},
		},
		{
			"aborted",
			func(a, _ *hypervisortest.Host, uuid string) { _ = a.AbortJob(context.Background(), uuid) },
			map[hypervisortest.Phase]string{"copying": back, "suspended": again, "resumed": done, "stopped": done},
		},
		{
			"LAN cut for good",
			func(a, _ *hypervisortest.Host, _ string) { a.CutLAN() },
			map[hypervisortest.Phase]string{
				"copying": back, "suspended": again, "stopped": done,
				"resumed": "running (migration canceled) | running (migrated)",
			},
		},
		{
			"LAN cut for 10 s",
			func(a, _ *hypervisortest.Host, _ string) { a.CutLAN(); time.AfterFunc(10*time.Second, a.RestoreLAN) },
			map[hypervisortest.Phase]string{"copying": done, "suspended": done, "resumed": done, "stopped": done},
		},
	} {
		for phase, want := range tt.want {
			t.Run(fmt.Sprintf("%s/%s", tt.name, phase), func(t *testing.T) {
				inWorld(t, func(t *testing.T, w *hypervisortest.World, a, b *hypervisortest.Host, uuid string) {
					w.OnPhase(func(_ string, p hypervisortest.Phase) {
						if p == phase {
							tt.strike(a, b, uuid)
						}
					})
					err := a.Migrate(t.Context(), uuid, maint.MoveParams{DestURI: b.URI(), Persist: true})
					time.Sleep(time.Minute)
					if got := where(t, uuid, a, b); got != want {
						t.Errorf("%s; want %s (Migrate: %v)", got, want, err)
					}
					for _, h := range []*hypervisortest.Host{a, b} {
						if g, err := h.Guest(t.Context(), uuid); err == nil && g.Job != "" {
							t.Errorf("%s still has a job: %s", h.Name(), g.Job)
						}
					}
				})
			})
		}
	}
}

func TestFaults(t *testing.T) {
	boom := errors.New("boom")
	inWorld(t, func(t *testing.T, _ *hypervisortest.World, a, _ *hypervisortest.Host, uuid string) {
		ctx := t.Context()
		set := func(on bool) error { return a.SetAutostart(ctx, uuid, on) }
		autostart := func() bool { g, _ := a.Guest(ctx, uuid); return g.Autostart }

		a.Fault("SetAutostart", hypervisortest.Fault{Err: boom, Times: 1})
		a.Fault("SetAutostart", hypervisortest.Fault{Err: boom, After: true, Times: 1})
		if err := set(true); !errors.Is(err, boom) || autostart() {
			t.Errorf("before: %v, autostart %t", err, autostart())
		}
		if err := set(true); !errors.Is(err, boom) || !autostart() {
			t.Errorf("after: %v, autostart %t", err, autostart())
		}
		if err := set(false); err != nil || autostart() {
			t.Errorf("used up: %v, autostart %t", err, autostart())
		}

		a.Fault("SetAutostart", hypervisortest.Fault{Hang: true})
		start := time.Now()
		if err := set(true); !errors.Is(err, maint.ErrHypervisorDown) || time.Since(start) != 10*time.Second {
			t.Errorf("hang: %v after %v", err, time.Since(start))
		}
		time.AfterFunc(time.Second, a.KillLibvirt)
		start = time.Now()
		if err := set(true); !errors.Is(err, maint.ErrHypervisorDown) || time.Since(start) != time.Second {
			t.Errorf("killed while hanging: %v after %v", err, time.Since(start))
		}
		a.RestartLibvirt()
		a.Heal("SetAutostart")
		if err := set(true); err != nil {
			t.Errorf("healed: %v", err)
		}
	})
}

func TestDroppedConnectionsLeaveTheMigration(t *testing.T) {
	inWorld(t, func(t *testing.T, _ *hypervisortest.World, a, b *hypervisortest.Host, uuid string) {
		time.AfterFunc(150*time.Millisecond, a.DropConnections)
		err := a.Migrate(t.Context(), uuid, maint.MoveParams{DestURI: b.URI(), Persist: true})
		if !errors.Is(err, maint.ErrHypervisorDown) {
			t.Errorf("Migrate: %v", err)
		}
		time.Sleep(time.Second)
		if got := where(t, uuid, a, b); got != "- | running (migrated)" {
			t.Error(got)
		}
	})
}

func TestOnCall(t *testing.T) {
	inWorld(t, func(t *testing.T, w *hypervisortest.World, a, b *hypervisortest.Host, uuid string) {
		var calls []hypervisortest.Call
		w.OnCall(func(c hypervisortest.Call) {
			calls = append(calls, c)
			if c.Op == "Migrate" && c.Done {
				runtime.Goexit() // the caller's crash
			}
		})
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = a.Ping(t.Context())
			_ = a.Migrate(t.Context(), uuid, maint.MoveParams{DestURI: b.URI(), Persist: true})
			t.Error("goes on after its crash")
		}()
		<-done
		w.OnCall(nil)
		want := []hypervisortest.Call{
			{Host: "host-a", Op: "Ping"}, {Host: "host-a", Op: "Ping", Done: true},
			{Host: "host-a", Op: "Migrate"}, {Host: "host-a", Op: "Migrate", Done: true},
		}
		if diff := cmp.Diff(want, calls); diff != "" {
			t.Errorf("calls (-want +got):\n%s", diff)
		}
		if got := where(t, uuid, a, b); got != "- | running (migrated)" {
			t.Error(got)
		}
	})
}

func TestWorldClosesInAnyState(t *testing.T) {
	inWorld(t, func(t *testing.T, _ *hypervisortest.World, a, b *hypervisortest.Host, uuid string) {
		a.HoldCopies()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := a.Migrate(ctx, uuid, maint.MoveParams{DestURI: b.URI()})
		if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, maint.ErrHypervisorDown) {
			t.Errorf("Migrate: %v", err)
		}
		_, _ = b.Subscribe()
	})
}
