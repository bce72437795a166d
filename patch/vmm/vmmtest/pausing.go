package vmmtest

import (
	"context"
	"encoding/json"
)

// Pausing is a host on which a guest's owner pauses it when Belay is about to.
type Pausing struct{ *Machine }

func (p Pausing) QMP(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	if command == "migrate-set-parameters" { // the last before the pause
		if err := p.Suspend(ctx, uuid); err != nil {
			return nil, err
		}
	}
	return p.Machine.QMP(ctx, uuid, command, args)
}
