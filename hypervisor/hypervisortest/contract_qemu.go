package hypervisortest

import (
	"encoding/json"
	"errors"
	"testing"

	"belay/agent/maint"
	"belay/hypervisor"
)

// runState asks a guest's QEMU.
func runState(t *testing.T, s Site, uuid string) string {
	t.Helper()
	value, err := s.Hypervisor().QMP(t.Context(), uuid, "query-status", nil)
	must(t, err)
	var is struct {
		Status string `json:"status"`
	}
	must(t, json.Unmarshal(value, &is))
	return is.Status
}

func testQMP(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "qmp")
	if state := runState(t, env.A, uuid); state != "running" {
		t.Errorf("QEMU is %q", state)
	}
	must(t, h.Suspend(ctx, uuid))
	if state := runState(t, env.A, uuid); state != "paused" {
		t.Errorf("QEMU is %q", state)
	}
	must(t, h.Resume(ctx, uuid))
	_, err := h.QMP(ctx, uuid, "no-such-command", map[string]int{"n": 1})
	if e, ok := errors.AsType[*hypervisor.QMPError](err); !ok || e.Class != "CommandNotFound" || e.Desc == "" {
		t.Errorf("error %v, want QEMU's own", err)
	}
	for command, args := range map[string]any{
		"quit":             nil,
		"system_powerdown": nil,
		"system_reset":     nil,
		"migrate":          map[string]string{"uri": "exec:cat >/dev/null"},
	} {
		_, err := h.QMP(ctx, uuid, command, args)
		wantIs(t, command, err, hypervisor.ErrEndsGuest)
	}
	wantQuick(t, env.A, uuid, maint.GuestRunning, "unpaused")
	env.A.DestroyGuest(t, uuid)
	_, err = h.QMP(ctx, uuid, "query-status", nil)
	wantIs(t, "QMP to a guest that is off", asInvalid(err), errInvalid)
}

func testQuitMigrated(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "quit")
	w := watch(t, env, uuid)
	wantIs(t, "QuitMigrated of a running guest", h.QuitMigrated(ctx, uuid), hypervisor.ErrRunsHere)
	must(t, h.Suspend(ctx, uuid))
	wantIs(t, "QuitMigrated of a paused guest", h.QuitMigrated(ctx, uuid), hypervisor.ErrRunsHere)
	wantIs(t, "QuitIncoming of a paused guest", h.QuitIncoming(ctx, uuid), hypervisor.ErrRunsHere)
	wantQuick(t, env.A, uuid, maint.GuestPaused, "user")

	// A guest that was sent away can be taken back, and is here again then.
	env.A.SendAway(t, uuid)
	if state := runState(t, env.A, uuid); state != "postmigrate" {
		t.Fatalf("QEMU is %q", state)
	}
	wantQuick(t, env.A, uuid, maint.GuestPaused, "user")
	must(t, h.Resume(ctx, uuid))
	wantIs(t, "QuitMigrated of a guest taken back", h.QuitMigrated(ctx, uuid), hypervisor.ErrRunsHere)
	wantQuick(t, env.A, uuid, maint.GuestRunning, "unpaused")

	env.A.SendAway(t, uuid)
	must(t, h.QuitMigrated(ctx, uuid))
	eventually(t, "its QEMU gone", func() bool {
		state, _, err := h.State(ctx, uuid)
		must(t, err)
		return state == maint.GuestShutoff
	})
	// libvirt can hear QEMU's farewell, or find it gone.
	g := look(t, env.A, uuid)
	detail := map[string]string{"shutdown": "shutdown", "crashed": "failed"}[g.Reason]
	if g.State != maint.GuestShutoff || detail == "" {
		t.Errorf("guest is %s (%s)", g.State, g.Reason)
	}
	w.want(t, "a suspended paused", "a resumed unpaused", "a suspended paused", "a stopped "+detail)
	wantIs(t, "QuitMigrated of a guest that is off", asInvalid(h.QuitMigrated(ctx, uuid)), errInvalid)
}

func testCreatePaused(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "create")
	x, err := h.GuestXML(ctx, uuid)
	must(t, err)
	was := look(t, env.A, uuid)
	wantIs(t, "CreatePaused of an active guest", h.CreatePaused(ctx, x.Portable), hypervisor.ErrActive)
	wantState(t, env.A, uuid, maint.GuestRunning, "booted")

	env.A.DestroyGuest(t, uuid)
	w := watch(t, env, uuid)
	must(t, h.CreatePaused(ctx, x.Portable))
	wantQuick(t, env.A, uuid, maint.GuestPaused, "user")
	g := look(t, env.A, uuid)
	if g.Name != "create" || !g.Persistent || g.ID <= was.ID || g.MachineType != was.MachineType || g.CPUModel != was.CPUModel {
		t.Errorf("guest %+v, was %+v", g, was)
	}
	must(t, h.Resume(ctx, uuid))
	wantQuick(t, env.A, uuid, maint.GuestRunning, "unpaused")
	w.want(t, "a started booted", "a suspended paused", "a resumed unpaused")

	env.A.DestroyGuest(t, uuid)
	must(t, h.UndefineInactive(ctx, uuid))
	must(t, h.CreatePaused(ctx, x.Portable))
	if g := look(t, env.A, uuid); g.Persistent || g.State != maint.GuestPaused {
		t.Errorf("a guest without a definition: %+v", g)
	}
	env.A.DestroyGuest(t, uuid)
	wantGone(t, env.A, uuid)
	if err := h.CreatePaused(ctx, "<domain"); err == nil {
		t.Error("CreatePaused takes what is no XML")
	}
}

func testSaveRestore(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "save")
	for _, tt := range []struct {
		pause  bool // before it is saved
		paused bool // restored so
	}{{}, {paused: true}, {pause: true}, {pause: true, paused: true}} {
		file := env.A.NewFile(t)
		if tt.pause {
			must(t, h.Suspend(ctx, uuid))
		}
		w := watch(t, env, uuid)
		must(t, h.Save(ctx, uuid, file))
		wantQuick(t, env.A, uuid, maint.GuestShutoff, "saved")
		text, err := h.SavedXML(ctx, file)
		must(t, err)
		if g, err := hypervisor.ParseGuest(text); err != nil || g.UUID != uuid || g.Name != "save" {
			t.Errorf("saved is %+v, %v", g, err)
		}
		wantIs(t, "Save of a guest that is off", asInvalid(h.Save(ctx, uuid, env.A.NewFile(t))), errInvalid)
		must(t, h.Restore(ctx, file, tt.paused))
		if tt.paused {
			wantQuick(t, env.A, uuid, maint.GuestPaused, "migrating")
			w.want(t, "a stopped saved", "a started restored", "a suspended restored")
		} else {
			wantQuick(t, env.A, uuid, maint.GuestRunning, "restored")
			w.want(t, "a stopped saved", "a started restored", "a resumed snapshot")
		}
		wantNoJob(t, env.A, uuid)
		wantIs(t, "Restore of an active guest", h.Restore(ctx, file, tt.paused), hypervisor.ErrActive)
		must(t, h.Resume(ctx, uuid))
		if g := look(t, env.A, uuid); g.State != maint.GuestRunning || !g.Persistent {
			t.Errorf("guest %+v", g)
		}
	}
	none := env.A.NewFile(t)
	if err := h.Restore(ctx, none, true); err == nil || errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("Restore of a file that is not there: %v", err)
	}
	if _, err := h.SavedXML(ctx, none); err == nil || errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("SavedXML of a file that is not there: %v", err)
	}
}
