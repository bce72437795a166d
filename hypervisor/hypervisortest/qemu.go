package hypervisortest

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"testing"

	"belay/agent/maint"
	"belay/hypervisor"
)

// savedGuest is a file that Save wrote.
type savedGuest struct {
	guest guest
	xml   string
}

// SetQEMU is an upgrade of the host's QEMU: guests started from now on have it.
func (h *Host) SetQEMU(version string) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.info.QEMUVersion = version
}

// OnQMP has f answer commands to QEMUs. By itself a QEMU knows query-status,
// query-version, what a migration can have, how it is, and announce-self.
func (h *Host) OnQMP(f Answer) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.onQMP = f
}

// SendAway has a guest's QEMU be in "postmigrate", as after a migration that
// libvirt knows nothing of.
func (h *Host) SendAway(t testing.TB, uuid string) {
	t.Helper()
	h.change(t, uuid, func(g *guest) {
		if g.State != maint.GuestPaused {
			g.become(maint.GuestPaused, "user")
			h.lifecycle(g, "suspended", "paused")
		}
		g.postMigrate = true
	})
}

// QMP passes a command to a guest's QEMU: see OnQMP.
func (h *Host) QMP(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	refused := func(err error) error {
		return fmt.Errorf("cannot run %s in the QEMU of guest %s: %w", command, uuid, err)
	}
	if hypervisor.EndsGuest(command, args) {
		return nil, refused(hypervisor.ErrEndsGuest)
	}
	text, err := json.Marshal(args)
	if err != nil {
		return nil, refused(err)
	}
	value, err := do(ctx, h, "QMP", true, func(context.Context) (any, error) {
		h.w.mu.Lock()
		g, err := h.find(uuid)
		if err == nil && !g.State.Active() {
			err = h.notRunning("DomainQemuMonitorCommand")
		}
		answer := h.onQMP
		h.w.mu.Unlock()
		if err != nil {
			return nil, err
		}
		if answer != nil {
			if value, handled, err := answer(uuid, command, text); handled || err != nil {
				return value, err
			}
		}
		h.w.mu.Lock()
		defer h.w.mu.Unlock()
		switch command {
		case "query-status":
			return map[string]any{"status": g.runState(), "running": g.State == maint.GuestRunning, "singlestep": false}, nil
		case "query-version":
			return qemuVersion(g.qemu), nil
		case "query-migrate":
			return map[string]any{"status": g.migrationStatus()}, nil
		case "announce-self":
			return struct{}{}, nil
		case "query-migrate-capabilities":
			return []map[string]any{{"capability": "xbzrle", "state": false}, {"capability": "multifd", "state": false}, {"capability": "zero-copy-send", "state": false}}, nil
		case "query-qmp-schema":
			return []map[string]any{
				{"name": "migrate-set-parameters", "meta-type": "command", "arg-type": "7"},
				{"name": "7", "meta-type": "object", "members": []map[string]any{{"name": "multifd-compression", "type": "8"}}},
				{"name": "8", "meta-type": "enum", "values": []string{"none", "zlib", "zstd"}},
			}, nil
		}
		return nil, refused(&hypervisor.QMPError{Class: "CommandNotFound", Desc: "The command " + command + " has not been found"})
	})
	if err != nil {
		return nil, err
	}
	return json.Marshal(value)
}

// runState is QEMU's word for a guest's state.
func (g *guest) runState() string {
	switch {
	case g.postMigrate:
		return "postmigrate"
	case g.in != nil:
		return "inmigrate"
	case g.out != nil && g.out.phase == PhaseSuspended:
		return "finish-migrate"
	case g.State == maint.GuestSuspended:
		return "suspended"
	case g.State == maint.GuestCrashed:
		return "guest-panicked"
	case g.State == maint.GuestShutdown:
		return "shutdown"
	}
	return string(g.State)
}

// QuitMigrated ends a QEMU whose guest has left it.
func (h *Host) QuitMigrated(ctx context.Context, uuid string) error {
	_, err := onGuest(ctx, h, "QuitMigrated", uuid, func(g *guest) (struct{}, error) {
		switch {
		case !g.State.Active():
			return struct{}{}, h.notRunning("DomainQemuMonitorCommand")
		case !g.postMigrate:
			return struct{}{}, fmt.Errorf("cannot end the QEMU of guest %s, which is %s: %w", uuid, g.runState(), hypervisor.ErrRunsHere)
		}
		h.stopped(g, "shutdown")
		return struct{}{}, nil
	})
	return err
}

// QuitIncoming finds no QEMU here that waits for a guest: there are none in
// memory but those of libvirt's own migrations.
func (h *Host) QuitIncoming(ctx context.Context, uuid string) error {
	_, err := onGuest(ctx, h, "QuitIncoming", uuid, func(g *guest) (struct{}, error) {
		if !g.State.Active() {
			return struct{}{}, h.notRunning("DomainQemuMonitorCommand")
		}
		return struct{}{}, fmt.Errorf("cannot end the QEMU of guest %s, which is %s: %w", uuid, g.runState(), hypervisor.ErrRunsHere)
	})
	return err
}

// CreatePaused starts a guest from XML, with its vCPUs stopped.
func (h *Host) CreatePaused(ctx context.Context, xml string) error {
	_, err := do(ctx, h, "CreatePaused", false, func(context.Context) (struct{}, error) {
		h.w.mu.Lock()
		defer h.w.mu.Unlock()
		const op = "DomainCreateXML"
		parsed, err := hypervisor.ParseGuest(xml)
		if err != nil {
			return struct{}{}, h.failed(op, 27, "XML error: "+err.Error())
		}
		g, err := h.create(op, parsed)
		if err != nil {
			return struct{}{}, err
		}
		g.become(maint.GuestPaused, "user")
		h.lifecycle(g, "started", "booted")
		h.lifecycle(g, "suspended", "paused")
		return struct{}{}, nil
	})
	return err
}

// create gives a guest a QEMU, with what is known of it here.
func (h *Host) create(op string, as maint.Guest) (*guest, error) {
	for _, other := range h.guests {
		switch {
		case other.UUID == as.UUID && other.State.Active():
			return nil, h.failed(op, codeOperationInvalid,
				fmt.Sprintf("Requested operation is not valid: domain '%s' is already active", other.Name), hypervisor.ErrActive)
		case other.Name == as.Name && other.UUID != as.UUID:
			return nil, h.failed(op, codeOperationFailed,
				fmt.Sprintf("operation failed: domain '%s' already exists with uuid %s", other.Name, other.UUID))
		}
	}
	h.w.serial++
	as.UUID = cmp.Or(as.UUID, madeUUID(h.w.serial))
	g := &guest{Guest: as}
	if known, ok := h.guests[as.UUID]; ok {
		g.Persistent, g.Autostart, g.definition = known.Persistent, known.Autostart, known.definition
		g.rival, g.there, g.back = known.rival, known.there, known.back
	}
	h.guests[g.UUID] = g
	h.start(g)
	return g, nil
}

// Save writes a guest to a file and ends its QEMU.
func (h *Host) Save(ctx context.Context, uuid, path string) error {
	_, err := do(ctx, h, "Save", false, func(context.Context) (struct{}, error) {
		h.w.mu.Lock()
		defer h.w.mu.Unlock()
		g, err := h.find(uuid)
		if err != nil {
			return struct{}{}, err
		}
		if !g.State.Active() {
			return struct{}{}, h.notRunning("DomainSaveFlags")
		}
		if g.out != nil || g.in != nil {
			return struct{}{}, h.failed("DomainSaveFlags", 68, "Timed out during operation: cannot acquire state change lock")
		}
		if g.State != maint.GuestPaused {
			g.become(maint.GuestPaused, "saving")
			h.lifecycle(g, "suspended", "paused")
		}
		text, _ := g.xml(0)
		h.saved[path] = savedGuest{guest: guest{Guest: g.view(), clock: g.clock}, xml: text}
		h.stopped(g, "saved")
		return struct{}{}, nil
	})
	return err
}

// Restore starts a guest from a file that Save wrote.
func (h *Host) Restore(ctx context.Context, path string, paused bool) error {
	_, err := do(ctx, h, "Restore", false, func(context.Context) (struct{}, error) {
		h.w.mu.Lock()
		defer h.w.mu.Unlock()
		const op = "DomainRestoreFlags"
		from, err := h.open(op, path)
		if err != nil {
			return struct{}{}, err
		}
		g, err := h.create(op, from.guest.Guest)
		if err != nil {
			return struct{}{}, err
		}
		g.clock = from.guest.clock
		h.lifecycle(g, "started", "restored")
		if paused {
			g.become(maint.GuestPaused, "migrating") // libvirt's word for it
			h.lifecycle(g, "suspended", "restored")
			return struct{}{}, nil
		}
		if g.rival {
			h.stopped(g, "failed")
			return struct{}{}, h.leaseTaken(op, g)
		}
		g.become(maint.GuestRunning, "restored")
		h.lifecycle(g, "resumed", "snapshot")
		return struct{}{}, nil
	})
	return err
}

// SavedXML gives the XML in a file that Save wrote.
func (h *Host) SavedXML(ctx context.Context, path string) (string, error) {
	xml, err := locked(ctx, h, "SavedXML", func() (string, error) {
		from, err := h.open("DomainSaveImageGetXMLDesc", path)
		return from.xml, err
	})
	if err != nil {
		return "", fmt.Errorf("cannot read the saved guest in %s: %w", path, err)
	}
	return xml, nil
}

func (h *Host) open(op, path string) (savedGuest, error) {
	from, ok := h.saved[path]
	if !ok {
		return from, h.failed(op, codeSystem, fmt.Sprintf("Failed to open file '%s': No such file or directory", path))
	}
	return from, nil
}
