package vmm

import (
	"context"
	"encoding/json"
	"fmt"
)

// ask runs a QMP command and reads its answer into v, unless that is nil.
func ask(ctx context.Context, q QEMU, uuid, command string, args, v any) error {
	b, err := q.QMP(ctx, uuid, command, args)
	if err != nil || v == nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("cannot read QEMU's answer to %s: %w", command, err)
	}
	return nil
}

// QAPI's words for what a QEMU does (RunState).
const (
	runRunning     = "running"
	runIncoming    = "inmigrate"
	runPostMigrate = "postmigrate"
)

// runState is QEMU's own word for what it does (query-status).
func runState(ctx context.Context, q QEMU, uuid string) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	return s.Status, ask(ctx, q, uuid, "query-status", nil, &s)
}

// version is the version of a guest's QEMU (query-version).
func version(ctx context.Context, q QEMU, uuid string) (string, error) {
	var v struct {
		QEMU struct {
			Major, Minor, Micro int
		} `json:"qemu"`
	}
	err := ask(ctx, q, uuid, "query-version", nil, &v)
	return fmt.Sprintf("%d.%d.%d", v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro), err
}

// ignoreShared is the migration capability by which memory that is shared is
// not part of the stream.
const ignoreShared = "x-ignore-shared"

type capability struct {
	Name string `json:"capability"`
	On   bool   `json:"state"`
}

// setIgnoreShared switches the capability. libvirt does not know it, and would
// save or migrate the guest without its memory while it is on.
func setIgnoreShared(ctx context.Context, q QEMU, uuid string, on bool) error {
	return ask(ctx, q, uuid, "migrate-set-capabilities",
		map[string]any{"capabilities": []capability{{ignoreShared, on}}}, nil)
}

// hasIgnoreShared tells whether QEMU knows the capability and whether it is on.
func hasIgnoreShared(ctx context.Context, q QEMU, uuid string) (known, on bool, err error) {
	var all []capability
	err = ask(ctx, q, uuid, "query-migrate-capabilities", nil, &all)
	for _, c := range all {
		if c.Name == ignoreShared {
			known, on = true, c.On
		}
	}
	return known, on, err
}

// migration is QEMU's account of its last migration (query-migrate).
type migration struct {
	Status  string   `json:"status"` // "", active, completed, failed, …
	Error   string   `json:"error-desc"`
	Blocked []string `json:"blocked-reasons"`
}

// underway reports whether it has neither ended nor failed (QAPI's
// MigrationStatus).
func (m migration) underway() bool {
	switch m.Status {
	case "", "none", "completed", "failed", "cancelled":
		return false
	}
	return true
}

func queryMigrate(ctx context.Context, q QEMU, uuid string) (m migration, err error) {
	return m, ask(ctx, q, uuid, "query-migrate", nil, &m)
}

// bandwidth gives the limit of a migration's stream, in bytes per second
// (query-migrate-parameters). libvirt sets it for each migration of its own.
func bandwidth(ctx context.Context, q QEMU, uuid string) (uint64, error) {
	var p struct {
		Max uint64 `json:"max-bandwidth"`
	}
	return p.Max, ask(ctx, q, uuid, "query-migrate-parameters", nil, &p)
}

func setBandwidth(ctx context.Context, q QEMU, uuid string, bytesPerSecond uint64) error {
	return ask(ctx, q, uuid, "migrate-set-parameters", map[string]any{"max-bandwidth": bytesPerSecond}, nil)
}
