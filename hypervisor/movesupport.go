package hypervisor

import (
	"context"
	"encoding/json"
	"fmt"

	"belay/agent/maint"
)

// Commander passes commands to guests' QEMUs; see Host.QMP.
type Commander interface {
	QMP(ctx context.Context, uuid, command string, args any) (json.RawMessage, error)
}

// MoveSupport asks a guest's QEMU what it can do for the guest's migration. Its errors
// are QMP's.
//
// Source: QMP query-migrate-capabilities, and of query-qmp-schema what
// migrate-set-parameters takes as "multifd-compression".
func MoveSupport(ctx context.Context, q Commander, uuid string) (s maint.MoveSupport, err error) {
	value, err := q.QMP(ctx, uuid, "query-migrate-capabilities", nil)
	if err != nil {
		return s, err
	}
	var caps []struct {
		Capability string `json:"capability"`
	}
	if err := json.Unmarshal(value, &caps); err != nil {
		return s, fmt.Errorf("cannot read what the QEMU of guest %s can do: %w", uuid, err)
	}
	for _, c := range caps {
		s.Capabilities = append(s.Capabilities, c.Capability)
	}
	if value, err = q.QMP(ctx, uuid, "query-qmp-schema", nil); err != nil {
		return s, err
	}
	if s.Multifd, err = schemaValues(value, "migrate-set-parameters", "multifd-compression"); err != nil {
		return s, fmt.Errorf("cannot read the QMP schema of guest %s: %w", uuid, err)
	}
	return s, nil
}

// SuspendedInCopy reports whether a guest that is being copied is paused by somebody, and
// not by its migration's switch-over: libvirt says "migrating" of both. It puts a question to
// QEMU, which is not to be done in a switch-over as a rule.
//
// Source: QMP query-status.
func SuspendedInCopy(ctx context.Context, q Commander, uuid string) (bool, error) {
	value, err := q.QMP(ctx, uuid, "query-status", nil)
	if err != nil {
		return false, err
	}
	var is struct {
		Status string `json:"status"`
	}
	if err := json.Unmarshal(value, &is); err != nil {
		return false, fmt.Errorf("cannot read the run state of guest %s: %w", uuid, err)
	}
	return is.Status == "paused", nil
}

// schemaValues are what a command takes as one of its arguments, none for a command or
// an argument that there is not. In QEMU's schema types have numbers for names.
func schemaValues(schema []byte, command, argument string) ([]string, error) {
	type entity struct {
		Name    string   `json:"name"`
		Meta    string   `json:"meta-type"`
		ArgType string   `json:"arg-type"`
		Values  []string `json:"values"` // of an enum
		Members []struct {
			Name string `json:"name"`
			Type string `json:"type"`
		} `json:"members"` // of an object
	}
	var all []entity
	if err := json.Unmarshal(schema, &all); err != nil {
		return nil, err
	}
	find := func(meta, name string) (e entity) {
		for _, e := range all {
			if e.Meta == meta && e.Name == name {
				return e
			}
		}
		return e
	}
	for _, m := range find("object", find("command", command).ArgType).Members {
		if m.Name == argument {
			return find("enum", m.Type).Values, nil
		}
	}
	return nil, nil
}
