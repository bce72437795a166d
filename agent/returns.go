package agent

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"unicode"

	"belay/agent/maint"
)

// What a host asks of its peer that has a guest of it.

// byPeer is who asks for a migration that a peer wants.
const byPeer = "peer:"

func decode(r maint.Record, v any) error { return json.Unmarshal(r.Data, v) }

// Return begins the migration of a guest to the host that it came from, which asks for
// it. It must have come from there by an operation that this host has recorded, and
// not have left since; and the host must be a peer in the configuration. The same
// token again gives the same migration.
func (a *Agent) Return(ctx context.Context, from string, r maint.ReturnRequest) (maint.Op, error) {
	if len(r.Token) < 16 || len(r.Token) > maxName || strings.ContainsFunc(r.Token, func(c rune) bool { return !unicode.IsPrint(c) }) {
		return maint.Op{}, badRequest("token", "send 16 to 255 characters that nobody else has", "%.60q cannot be one", r.Token)
	}
	home := a.peerNamed(from)
	what := "cannot send guest " + r.GuestUUID + " back to " + from
	if home == "" {
		return maint.Op{}, refuse(what, maint.Problemf(maint.CodeForbidden, "host "+from, "add it to belayd's configuration on "+a.cfg.Host, "is no peer of %s", a.cfg.Host))
	}
	for _, op := range a.journal.Ops() {
		if op.Return != nil && op.Return.Token == r.Token && op.By == byPeer+from {
			return op, nil
		}
	}
	if !a.cameBy(from, r) {
		return maint.Op{}, refuse(what, maint.Problemf(maint.CodeForbidden, "guest "+r.GuestUUID, "ask an operator of "+a.cfg.Host+" to migrate it",
			"has not come to %s from %s by operation %s, or has left since", a.cfg.Host, from, r.Arrived))
	}
	if c := a.journal.Cordon(); c != nil && a.draining() {
		return maint.Op{}, refuse(what, maint.Problemf(maint.CodeHostBusy, "host "+a.cfg.Host, "wait for that to end", "is being drained itself%s", c.Why()))
	}
	a.rooms(ctx, a.destinations(ctx, []string{home})) // how many it takes in at once, see crowded
	return a.migrate(ctx, byPeer+from, maint.MigrateRequest{Guest: r.GuestUUID, To: home, MaxPause: r.MaxPause, Reason: r.Reason},
		func(op *maint.Op) { op.Return = &r })
}

// peerNamed is the peer that has a certificate's name, "" for none.
func (a *Agent) peerNamed(cert string) string {
	for name, p := range a.peers {
		if p.cfg.CertName == cert {
			return name
		}
	}
	return ""
}

// cameBy reports whether a guest is here because it has come from that host by that
// operation.
func (a *Agent) cameBy(from string, r maint.ReturnRequest) bool {
	came, known := a.journal.Arrival(r.Arrived)
	if !known || came.From != from || came.GuestUUID != r.GuestUUID {
		return false
	}
	for _, later := range a.journal.Arrivals() {
		if later.GuestUUID == r.GuestUUID && later.At.After(came.At) {
			return false
		}
	}
	return !slices.ContainsFunc(a.journal.Ops(), func(op maint.Op) bool {
		return op.Kind == maint.OpMigrate && op.GuestUUID == r.GuestUUID && op.Ended.After(came.At) && op.Outcome.TookEffect()
	})
}

func (a *Agent) draining() bool {
	return slices.ContainsFunc(a.journal.Ops(), func(op maint.Op) bool { return op.Kind == maint.OpDrain && op.State != maint.OpEnded })
}

// returning finds a migration that a peer has asked for.
func (a *Agent) returning(from string, id maint.OpID) (maint.Op, error) {
	op, known := a.journal.Op(id)
	if !known || op.Return == nil || op.By != byPeer+from {
		return op, maint.Problemf(maint.CodeUnknownOp, "operation "+string(id), "", "is none that %s has asked %s for", from, a.cfg.Host)
	}
	return op, nil
}

// WatchReturn is Watch of a migration that a peer has asked for.
func (a *Agent) WatchReturn(ctx context.Context, from string, id maint.OpID, f func(maint.Op) error) error {
	if _, err := a.returning(from, id); err != nil {
		return err
	}
	return a.Watch(ctx, id, f)
}

// AbortReturn is Abort of one.
func (a *Agent) AbortReturn(ctx context.Context, from string, id maint.OpID) (maint.Op, error) {
	if op, err := a.returning(from, id); err != nil {
		return op, err
	}
	return a.Abort(ctx, byPeer+from, id)
}
