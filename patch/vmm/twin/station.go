package twin

import (
	"context"
	"encoding/json"
	"errors"

	"belay/agent/maint"
)

// station is what a prewarmed crossing knows of one side's QEMU.
type station string

const (
	noQEMU   station = "absent"
	runs     station = "running"
	sending  station = "sending the guest" // its vCPUs may run or not
	sent     station = "left behind"       // all of the guest has been sent
	waiting  station = "waiting for the guest"
	loaded   station = "loaded" // or paused by somebody; which, the other side tells
	strange  station = "in another state"
	unasked  station = "not to be asked"
	starting station = "starting"
)

// station looks at one side. err is why it is unasked or strange.
func (v *Visit) station(ctx context.Context, side Side) (station, error) {
	ctx, cancel := context.WithTimeout(ctx, v.paced().ask)
	defer cancel()
	g, err := side.Guest(ctx, v.UUID)
	switch {
	case errors.Is(err, maint.ErrNoGuest):
		return noQEMU, nil
	case err != nil:
		return unasked, err
	case !g.State.Active():
		return noQEMU, nil
	}
	status, err := runState(ctx, side, v.UUID)
	if err != nil {
		return unasked, err // it may be ending, too
	}
	switch status {
	case "running":
		m, err := migration(ctx, side, v.UUID)
		switch {
		case err != nil:
			return unasked, err
		case m.active():
			return sending, nil
		}
		// It may have been sent between the two questions.
		if again, err := runState(ctx, side, v.UUID); err != nil || again != status {
			return unasked, err
		}
		return runs, nil
	case "finish-migrate":
		return sending, nil
	case "postmigrate":
		return sent, nil
	case "inmigrate":
		return waiting, nil
	case "paused":
		return loaded, nil
	case "prelaunch":
		return starting, nil
	}
	return strange, errors.New("its QEMU is " + status)
}

// runState is a QEMU's own (QAPI's RunState).
func runState(ctx context.Context, q QEMU, uuid string) (string, error) {
	text, err := q.QMP(ctx, uuid, "query-status", nil)
	if err != nil {
		return "", err
	}
	var r struct {
		Status string `json:"status"`
	}
	return r.Status, json.Unmarshal(text, &r)
}

// migrationInfo is part of QAPI's MigrationInfo.
type migrationInfo struct {
	Status   string `json:"status"` // "" when there was none
	Downtime int64  `json:"downtime"`
	Error    string `json:"error-desc"`
}

// active reports whether an outgoing migration is on its way; the words are
// QAPI's MigrationStatus.
func (m migrationInfo) active() bool {
	switch m.Status {
	case "setup", "cancelling", "active", "device", "pre-switchover", "wait-unplug":
		return true
	}
	return false
}

func migration(ctx context.Context, q QEMU, uuid string) (m migrationInfo, err error) {
	text, err := q.QMP(ctx, uuid, "query-migrate", nil)
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(text, &m)
}

// capability is QEMU's for leaving shared memory out of a migration.
const capability = "x-ignore-shared"

// ignoreShared sets it. A QEMU that does not know it has it off.
func ignoreShared(ctx context.Context, q QEMU, uuid string, on bool) error {
	if !on {
		known, set, err := ignoresShared(ctx, q, uuid)
		if err != nil || !known || !set {
			return err
		}
	}
	_, err := q.QMP(ctx, uuid, "migrate-set-capabilities", map[string]any{
		"capabilities": []map[string]any{{"capability": capability, "state": on}}})
	return err
}

// ignoresShared tells whether a QEMU knows the capability, and has it on.
func ignoresShared(ctx context.Context, q QEMU, uuid string) (known, on bool, err error) {
	text, err := q.QMP(ctx, uuid, "query-migrate-capabilities", nil)
	if err != nil {
		return false, false, err
	}
	var all []struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	if err := json.Unmarshal(text, &all); err != nil {
		return false, false, err
	}
	for _, c := range all {
		if c.Capability == capability {
			return true, c.State, nil
		}
	}
	return false, false, nil
}
