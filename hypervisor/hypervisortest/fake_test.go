package hypervisortest_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
	"belay/hypervisor"
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

// A guest that is held loses the time, whoever holds it and however it is
// released, and gets it back when its clock is set.
func TestClockStands(t *testing.T) {
	inWorld(t, func(t *testing.T, _ *hypervisortest.World, a, b *hypervisortest.Host, uuid string) {
		ctx := t.Context()
		a.SetAgent(t, uuid, maint.AgentConnected)
		offset := func(h *hypervisortest.Host) time.Duration {
			at, err := h.GuestTime(ctx, uuid)
			if err != nil {
				t.Fatal(err)
			}
			return time.Until(at)
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		want := func(what string, got, want time.Duration) {
			t.Helper()
			if got != want {
				t.Errorf("%s: the clock is off by %v, want %v", what, got, want)
			}
		}
		want("booted", offset(a), 0)
		must(a.Suspend(ctx, uuid))
		time.Sleep(3 * time.Second)
		must(a.Suspend(ctx, uuid))
		time.Sleep(2 * time.Second)
		a.KillLibvirt()
		a.Unpause(t, uuid) // past libvirt
		a.RestartLibvirt()
		want("held", offset(a), -5*time.Second)
		must(a.Migrate(ctx, uuid, maint.MoveParams{DestURI: b.URI(), Persist: true}))
		want("migrated", offset(b), -5050*time.Millisecond)
		must(b.Save(ctx, uuid, "/saved"))
		time.Sleep(time.Minute)
		must(b.Restore(ctx, "/saved", true))
		time.Sleep(time.Second)
		must(b.Resume(ctx, uuid))
		want("saved and restored", offset(b), -66050*time.Millisecond)

		b.SetAgentDelay(t, uuid, 10*time.Millisecond, 20*time.Millisecond)
		must(b.SetGuestTime(ctx, uuid, time.Now()))
		want("set, in its time", b.ClockOffset(t, uuid), -10*time.Millisecond)
		b.SetClock(t, uuid, time.Hour)
		want("asked, in its time", offset(b), time.Hour-20*time.Millisecond)
		b.Stop(t, uuid, "destroyed")
		time.Sleep(time.Minute)
		b.Start(t, uuid)
		b.SetAgentDelay(t, uuid, 0, 0)
		want("booted again", offset(b), 0)

		b.SetAgentDelay(t, uuid, time.Hour, 0)
		start := time.Now()
		_, err := b.GuestTime(ctx, uuid)
		if !errors.Is(err, maint.ErrNoAgent) || errors.Is(err, maint.ErrHypervisorDown) || time.Since(start) != 10*time.Second {
			t.Errorf("an agent that hangs: %v after %v", err, time.Since(start))
		}
	})
}

// A Suspend that was given up comes into effect all the same, and is taken back;
// what is asked or done after it comes after that.
func TestLateSuspend(t *testing.T) {
	inWorld(t, func(t *testing.T, _ *hypervisortest.World, a, _ *hypervisortest.Host, uuid string) {
		suspend := func(timeout time.Duration) error {
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			return a.Suspend(ctx, uuid)
		}
		for name, hang := range map[string]func(){
			"delayed": func() { a.Fault("Suspend", hypervisortest.Fault{Delay: time.Second, Times: 1}) },
			"frozen":  func() { a.Freeze(); time.AfterFunc(time.Second, a.Thaw) },
		} {
			hang()
			start := time.Now()
			if err := suspend(time.Millisecond); !errors.Is(err, maint.ErrHypervisorDown) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: %v", name, err)
			}
			short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			if err := a.Resume(short, uuid); !errors.Is(err, maint.ErrHypervisorDown) {
				t.Errorf("%s: Resume: %v", name, err)
			}
			cancel()
			if state, _, err := a.State(t.Context(), uuid); err != nil || state != maint.GuestRunning || time.Since(start) != time.Second {
				t.Errorf("%s: %s, %v after %v", name, state, err, time.Since(start))
			}
			if err := a.Resume(t.Context(), uuid); err != nil {
				t.Error(err)
			}
			time.Sleep(time.Minute)
			if got := where(t, uuid, a); got != "running (unpaused)" {
				t.Errorf("%s: guest is %s", name, got)
			}
		}

		// One that is never answered, since libvirt dies, holds nobody up.
		a.Fault("Suspend", hypervisortest.Fault{Hang: true, Times: 1})
		if err := suspend(time.Second); !errors.Is(err, maint.ErrHypervisorDown) {
			t.Errorf("Suspend: %v", err)
		}
		a.KillLibvirt()
		a.RestartLibvirt()
		if state, _, err := a.State(t.Context(), uuid); err != nil || state != maint.GuestRunning {
			t.Errorf("%s, %v", state, err)
		}
		a.Fault("Suspend", hypervisortest.Fault{Delay: time.Hour}) // closed with the World
		_ = suspend(time.Second)
	})
}

func TestDelayedCalls(t *testing.T) {
	inWorld(t, func(t *testing.T, _ *hypervisortest.World, a, _ *hypervisortest.Host, uuid string) {
		a.Fault("SetAutostart", hypervisortest.Fault{Delay: time.Second})
		start := time.Now()
		if err := a.SetAutostart(t.Context(), uuid, true); err != nil || time.Since(start) != time.Second {
			t.Errorf("SetAutostart: %v after %v", err, time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := a.SetAutostart(ctx, uuid, false); !errors.Is(err, maint.ErrHypervisorDown) {
			t.Errorf("SetAutostart: %v", err)
		}
		if g, _ := a.Guest(t.Context(), uuid); !g.Autostart {
			t.Error("a call that was given up has an effect")
		}
	})
}

func TestAnswers(t *testing.T) {
	inWorld(t, func(t *testing.T, _ *hypervisortest.World, a, b *hypervisortest.Host, uuid string) {
		ctx := t.Context()
		a.SetAgent(t, uuid, maint.AgentConnected)
		answer := func(got, command string, args json.RawMessage) (any, bool, error) {
			switch {
			case got != uuid:
				t.Errorf("asked of %s", got)
			case command == "give":
				return map[string]any{"given": args}, true, nil
			case command == "refuse":
				return nil, true, &hypervisor.QMPError{Class: "GenericError", Desc: "no"}
			case command == "crash":
				runtime.Goexit()
			}
			return nil, false, nil
		}
		a.OnQMP(answer)
		a.OnAgent(answer)
		for name, call := range map[string]func(context.Context, string, string, any) (json.RawMessage, error){"QMP": a.QMP, "AgentCommand": a.AgentCommand} {
			value, err := call(ctx, uuid, "give", []int{1, 2})
			if err != nil || string(value) != `{"given":[1,2]}` {
				t.Errorf("%s: %s, %v", name, value, err)
			}
			if _, err := call(ctx, uuid, "refuse", nil); !errors.As(err, new(*hypervisor.QMPError)) {
				t.Errorf("%s: %v", name, err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = call(ctx, uuid, "crash", nil)
			}()
			<-done
			if _, err := call(ctx, uuid, "no-such", nil); err == nil { // the host's own answer, and the host is alive
				t.Errorf("%s: no error", name)
			}
		}
		a.SetQEMU("10.0.2")
		value, err := a.QMP(ctx, uuid, "query-version", nil)
		if err != nil || !strings.Contains(string(value), `"major":7`) {
			t.Errorf("version %s, %v: the guest was started before the upgrade", value, err)
		}
	})
}

func TestLag(t *testing.T) {
	inWorld(t, func(t *testing.T, _ *hypervisortest.World, a, _ *hypervisortest.Host, uuid string) {
		a.Lag(t, uuid, true)
		_, _, err := a.State(t.Context(), uuid)
		if g, guestErr := a.Guest(t.Context(), uuid); !errors.Is(err, hypervisor.ErrBusy) || guestErr != nil || g.Job != "catching up" {
			t.Errorf("State: %v; guest %+v, %v", err, g, guestErr)
		}
		a.Lag(t, uuid, false)
		if state, _, err := a.State(t.Context(), uuid); err != nil || state != maint.GuestRunning {
			t.Errorf("%s, %v", state, err)
		}
	})
}
