package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// qmpTimeout bounds a command to a host's QEMU.
const qmpTimeout = time.Minute

// qmp gives one command to the QEMU whose monitor the socket is, and returns its answer.
func qmp(ctx context.Context, socket, command string, args map[string]any) (json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	fail := func(err error) (json.RawMessage, error) {
		return nil, fmt.Errorf("QEMU: %s: %w", command, err)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return fail(err)
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return fail(err)
	}
	from, to := json.NewDecoder(conn), json.NewEncoder(conn)
	var answer struct {
		QMP    json.RawMessage
		Event  string
		Return json.RawMessage
		Error  *struct{ Desc string }
	}
	if err := from.Decode(&answer); err != nil || answer.QMP == nil {
		return fail(errors.Join(err, errors.New("no greeting")))
	}
	for _, c := range []map[string]any{{"execute": "qmp_capabilities"}, {"execute": command, "arguments": args}} {
		if args == nil {
			delete(c, "arguments")
		}
		if err := to.Encode(c); err != nil {
			return fail(err)
		}
		for {
			answer.Event, answer.Return, answer.Error = "", nil, nil
			if err := from.Decode(&answer); err != nil {
				return fail(err)
			}
			if answer.Event == "" {
				break
			}
		}
		if answer.Error != nil {
			return fail(errors.New(answer.Error.Desc))
		}
	}
	return answer.Return, nil
}
