package hypervisor

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

var (
	// ErrRunsHere refuses to end a QEMU whose guest has not left it.
	ErrRunsHere = errors.New("the guest has not left this QEMU")
	// ErrEndsGuest refuses a command to a QEMU or an agent that ends or
	// restarts the guest, or can have it do anything.
	ErrEndsGuest = errors.New("this command could end the guest")
)

// QMPError is QEMU's own refusal of a command.
type QMPError struct {
	Class string // QAPI's: "GenericError", "CommandNotFound", …
	Desc  string
}

// Error implements error.
func (e *QMPError) Error() string { return "QEMU: " + e.Desc }

// QMP passes a command to a guest's QEMU and gives the content of "return".
// args is marshalled to "arguments"; nil is none. QEMU's own refusal is a
// *QMPError. It wraps maint.ErrNoGuest; for a guest that is off it is an *Error.
// libvirt marks the guest as tainted, which has no consequence but a line in
// its log, and does not know of what the command changes.
//
// Commands that could end a guest are refused with ErrEndsGuest; for "quit" there
// is QuitMigrated. That includes a migration to "exec:": libvirt's sandbox kills
// a QEMU that starts a program.
//
// Source: virDomainQemuMonitorCommand.
func (h *Host) QMP(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	if EndsGuest(command, args) {
		return nil, fmt.Errorf("cannot run %s in the QEMU of guest %s: %w", command, uuid, ErrEndsGuest)
	}
	return h.qmp(ctx, uuid, command, args)
}

func (h *Host) qmp(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	text, err := request(command, args)
	if err != nil {
		return nil, err
	}
	reply, err := direct(ctx, h, h.pool, uuid, "DomainQemuMonitorCommand", func(l *libvirt.Libvirt, d libvirt.Domain) (string, error) {
		return l.QEMUDomainMonitorCommand(d, text, 0)
	})
	if err != nil {
		return nil, err
	}
	value, class, desc, err := response(reply)
	if class != "" {
		return nil, fmt.Errorf("cannot run %s in the QEMU of guest %s: %w", command, uuid, &QMPError{class, desc})
	}
	return value, err
}

// postMigrate is the run state (QAPI's RunState) of a QEMU that has sent its
// guest away completely.
const postMigrate = "postmigrate"

// inMigrate is the run state of a QEMU that waits for a guest.
const inMigrate = "inmigrate"

// QuitMigrated ends a QEMU process whose guest has left it. With QuitIncoming it
// is the one call in this package that ends a process, and it cannot end a guest: QEMU itself
// must say that it is in "postmigrate", where all of the guest has been sent
// away and the vCPUs are stopped. In any other state it refuses with
// ErrRunsHere. Whoever calls it must know that the guest was received, and that
// nobody will take it back (by Resume) in this moment.
//
// It returns when QEMU has taken the command; libvirt then reports the domain
// as stopped: as shut down, or, where it did not hear QEMU's farewell, as crashed.
// It wraps maint.ErrNoGuest.
//
// Source: QMP query-status and quit, by virDomainQemuMonitorCommand.
func (h *Host) QuitMigrated(ctx context.Context, uuid string) error {
	return h.quitIn(ctx, uuid, postMigrate)
}

// QuitIncoming ends a QEMU process that waits for a guest: QEMU itself must say
// that it is in "inmigrate", where no vCPU has ever run. In any other state it
// refuses with ErrRunsHere. All else is as with QuitMigrated.
//
// Source: QMP query-status and quit, by virDomainQemuMonitorCommand.
func (h *Host) QuitIncoming(ctx context.Context, uuid string) error {
	return h.quitIn(ctx, uuid, inMigrate)
}

// quitIn ends a QEMU that is in a state in which it has no guest.
func (h *Host) quitIn(ctx context.Context, uuid, state string) error {
	value, err := h.qmp(ctx, uuid, "query-status", nil)
	if err != nil {
		return err
	}
	var is struct {
		Status  string `json:"status"`
		Running bool   `json:"running"`
	}
	if err := json.Unmarshal(value, &is); err != nil {
		return fmt.Errorf("cannot read the run state of guest %s: %w", uuid, err)
	}
	if is.Status != state || is.Running {
		return fmt.Errorf("cannot end the QEMU of guest %s, which is %s: %w", uuid, is.Status, ErrRunsHere)
	}
	_, err = h.qmp(ctx, uuid, quit, nil)
	if e, ok := errors.AsType[*Error](err); ok && e.Code != 0 && h.ends(ctx, uuid) {
		return nil // the answer was lost in the end of who gave it
	}
	return err
}

// ends waits for libvirt to find that a guest's QEMU has ended. false: it has not
// by the end of the context.
func (h *Host) ends(ctx context.Context, uuid string) bool {
	ctx, cancel := h.bounded(ctx)
	defer cancel()
	for {
		state, _, err := h.State(ctx, uuid)
		if errors.Is(err, maint.ErrNoGuest) || err == nil && !state.Active() {
			return true
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return false
		}
	}
}

// quit ends QEMU. quitIn alone sends it.
const quit = "quit"

// EndsGuest reports whether QMP or AgentCommand refuse a command: what ends or
// suspends the guest by itself, what can do anything, and programs started by
// a QEMU that is not allowed to start any.
func EndsGuest(command string, args any) bool {
	switch command {
	case quit, "system_powerdown", "system_reset", "inject-nmi", "human-monitor-command",
		"guest-shutdown", "guest-suspend-disk", "guest-suspend-ram", "guest-suspend-hybrid":
		return true
	case "migrate", "migrate-incoming":
		text, err := json.Marshal(args)
		return err == nil && bytes.Contains(text, []byte(`"exec`)) // the URI, or a channel's transport
	}
	return false
}

// request is a command in QMP's form, which is the agent's too.
func request(command string, args any) (string, error) {
	text, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return "", fmt.Errorf("cannot write the arguments of %s: %w", command, err)
	}
	return string(text), nil
}

// response reads the answer to a request. class is set when it is a refusal.
func response(text string) (value json.RawMessage, class, desc string, err error) {
	var r struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return nil, "", "", fmt.Errorf("cannot read an answer: %w", err)
	}
	if r.Error != nil {
		return nil, cmp.Or(r.Error.Class, "GenericError"), r.Error.Desc, nil
	}
	if len(bytes.TrimSpace(r.Return)) == 0 {
		return nil, "", "", errors.New("cannot read an answer: it is neither a return nor an error")
	}
	return r.Return, "", "", nil
}
