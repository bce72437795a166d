package agent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/agent/run"
	"belay/migrate"
)

// maxTimeout bounds what an operator may ask for.
const maxTimeout = 24 * time.Hour

// Migrate admits a migration, writes it down and starts it. It refuses what
// can be refused on the spot: an unknown guest or peer, a guest that is busy.
func (a *Agent) Migrate(ctx context.Context, by string, r maint.MigrateRequest) (maint.Op, error) {
	what := fmt.Sprintf("cannot migrate guest %s to %s", r.Guest, r.To)
	if err := a.checkRequest(r); err != nil {
		return maint.Op{}, err
	}
	p := a.peers[r.To]
	if p == nil {
		return maint.Op{}, refuse(what, a.unknownPeer(r.To))
	}
	g, err := a.hyp.Guest(ctx, r.Guest)
	switch {
	case errors.Is(err, maint.ErrNoGuest):
		return maint.Op{}, refuse(what, maint.Problemf(maint.CodeUnknownGuest, "guest "+r.Guest,
			"see 'belay guests' for the names; if it has moved, ask the belayd of the host where it is", "is not on host %s", a.cfg.Host))
	case errors.Is(err, maint.ErrHypervisorDown):
		return maint.Op{}, refuse(what, maint.Problemf(maint.CodeHypervisorDown, "host "+a.cfg.Host,
			"see that libvirtd or virtqemud runs (systemctl status libvirtd virtqemud)", "%v", err))
	case err != nil:
		return maint.Op{}, fmt.Errorf("%s: %w", what, err)
	}

	if r.Timeout == 0 {
		r.Timeout = a.cfg.Migration.Timeout.Duration
	}
	if r.BandwidthMiBs == 0 {
		r.BandwidthMiBs = a.cfg.Migration.BandwidthMiBs
	}
	now := time.Now()
	op := maint.Op{ID: newOpID("mig", now), Kind: maint.OpMigrate, Guest: g.Name, GuestUUID: g.UUID,
		Peer: p.name, By: by, Reason: r.Reason, Deadline: now.Add(r.Timeout), Migrate: &r}
	var admitErr error
	if err := a.inLoop(ctx, func() { admitErr = a.admit(what, op) }); err != nil {
		return maint.Op{}, err
	}
	if admitErr != nil {
		return maint.Op{}, admitErr
	}
	admitted, _ := a.journal.Op(op.ID)
	return admitted, nil
}

func (a *Agent) checkRequest(r maint.MigrateRequest) error {
	bad := func(field, remedy, format string, args ...any) error {
		return maint.Problemf(maint.CodeBadRequest, field, remedy, format, args...)
	}
	switch {
	case r.Guest == "":
		return bad("guest", "name one", "is empty")
	case r.To == "":
		return bad("to", "name a peer", "is empty")
	case r.Timeout < 0 || r.Timeout > maxTimeout:
		return bad("timeout", fmt.Sprintf("choose one up to %s", maxTimeout), "%s is out of range", r.Timeout)
	case r.BandwidthMiBs > 1<<20:
		return bad("bandwidth", "it is in MiB/s; 0 means no limit", "%d MiB/s is out of range", r.BandwidthMiBs)
	case r.To == a.cfg.Host:
		return refuse(fmt.Sprintf("cannot migrate guest %s to %s", r.Guest, r.To),
			maint.Problemf(maint.CodeSameHost, "host "+r.To, "name a peer", "is this host"))
	}
	return nil
}

// admit decides and starts; it runs in the loop, so two requests for one
// guest cannot both pass.
func (a *Agent) admit(what string, op maint.Op) error {
	if a.life.Err() != nil {
		return maint.Problemf(maint.CodeShuttingDown, "belayd on "+a.cfg.Host, "try again in a moment", "is shutting down")
	}
	open := 0
	for id, l := range a.live {
		running, _ := a.journal.Op(id)
		if running.State == maint.OpEnded { // whoever watched it knows before the loop does
			continue
		}
		open++
		if l.guest == op.GuestUUID {
			return refuse(what, maint.Problemf(maint.CodeBusy, "guest "+op.Guest,
				fmt.Sprintf("wait for it (belay ops watch %s) or abort it (belay ops abort %s)", id, id),
				"operation %s, begun by %s at %s, is at work on it", id, running.By, running.Started.Format(time.TimeOnly)))
		}
	}
	for _, r := range a.journal.Reservations(time.Now()) {
		if r.GuestUUID == op.GuestUUID && !a.view.has(op.GuestUUID, maint.GuestRunning) {
			return refuse(what, maint.Problemf(maint.CodeBusy, "guest "+op.Guest, "wait until it has arrived",
				"is arriving from %s (operation %s)", r.From, r.Op))
		}
	}
	if open >= a.cfg.Limits.MigrationsOut {
		return refuse(what, maint.Problemf(maint.CodeHostBusy, "host "+a.cfg.Host,
			"wait for one to end (belay ops list), or raise limits.migrations_out",
			"already runs %d operations, as many as limits.migrations_out allows", open))
	}
	data, err := json.Marshal(op)
	if err != nil {
		return err
	}
	if err := a.journal.Append(maint.Record{Op: op.ID, Kind: maint.RecAccepted, By: op.By, Data: data}); err != nil {
		return refuse(what, maint.Problemf(maint.CodeJournal, "host "+a.cfg.Host,
			fmt.Sprintf("make room in, and writable, the state folder %s", a.cfg.StateDir), "%v; nothing was begun", err))
	}
	a.log.Info("operation accepted", "op", op.ID, "guest", op.Guest, "peer", op.Peer, "by", op.By)
	op, _ = a.journal.Op(op.ID)
	a.start(op)
	return nil
}

// Abort asks a running operation to stop and go back.
func (a *Agent) Abort(ctx context.Context, by string, id maint.OpID) (maint.Op, error) {
	op, err := a.Op(ctx, id)
	if err != nil {
		return op, err
	}
	err2 := a.inLoop(ctx, func() {
		l := a.live[id]
		if now, _ := a.journal.Op(id); l == nil || now.State == maint.OpEnded {
			err = maint.Problemf(maint.CodeEnded, "operation "+string(id), "", "has already ended")
			return
		}
		// The wish is carried out even when it cannot be written down.
		if jerr := a.journal.Append(maint.Record{Op: id, Kind: maint.RecAbort, By: by}); jerr != nil {
			a.log.Error("cannot journal an abort", "op", id, "err", jerr)
		}
		l.abort(run.ErrAborted)
	})
	if err = errors.Join(err2, err); err != nil {
		return op, err
	}
	return a.Op(ctx, id)
}

// Ops lists all operations, oldest first.
func (a *Agent) Ops(context.Context) ([]maint.Op, error) {
	ops := a.journal.Ops()
	for i := range ops {
		a.addProgress(&ops[i])
	}
	return ops, nil
}

// Op returns one operation.
func (a *Agent) Op(_ context.Context, id maint.OpID) (maint.Op, error) {
	op, ok := a.journal.Op(id)
	if !ok {
		return op, maint.Problemf(maint.CodeUnknownOp, "operation "+string(id), "see 'belay ops list' for the IDs", "is not in the journal of %s", a.cfg.Host)
	}
	a.addProgress(&op)
	return op, nil
}

func (a *Agent) addProgress(op *maint.Op) {
	if j, ok := a.progress.Load(op.ID); ok && op.State != maint.OpEnded {
		job := j.(maint.Job)
		op.Progress = &job
	}
}

// Records returns the journal of one operation.
func (a *Agent) Records(ctx context.Context, id maint.OpID) ([]maint.Record, error) {
	if _, err := a.Op(ctx, id); err != nil {
		return nil, err
	}
	return a.journal.Records(id)
}

// progressEvery is how often a watcher is told of a running copy's progress.
const progressEvery = 500 * time.Millisecond

// Watch calls f with the operation now and after every change until it ends.
func (a *Agent) Watch(ctx context.Context, id maint.OpID, f func(maint.Op) error) error {
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	for {
		changed := a.journal.Changed()
		op, err := a.Op(ctx, id)
		if err != nil {
			return err
		}
		if err := f(op); err != nil || op.State == maint.OpEnded {
			return err
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-a.life.Done():
			return errors.New("belayd is shutting down")
		}
	}
}

// migrateSteps wires the phases of a migration to the runner.
func (a *Agent) migrateSteps(op maint.Op) []run.Step {
	p := a.peers[op.Peer]
	if p == nil { // taken out of the configuration while the operation was open
		p = &peer{name: op.Peer, to: lostPeer{a.unknownPeer(op.Peer)}}
	}
	m := &migrate.Migration{
		Op: op.ID, Guest: op.Guest, UUID: op.GuestUUID, From: a.cfg.Host, To: p.name,
		Source: source{a.hyp}, Destination: p.to, Log: a.log.With("op", op.ID),
		Params: maint.MoveParams{DestURI: p.cfg.LibvirtURI, MigrateURI: p.cfg.MigrateURI,
			TLS: a.cfg.Migration.TLS, BandwidthMiBs: op.Migrate.BandwidthMiBs},
		Deadline: op.Deadline,
		Progress: func(j maint.Job) { a.progress.Store(op.ID, j) },
	}
	return []run.Step{
		{Name: migrate.PhasePreflight,
			Do: func(ctx context.Context, s *run.Scratch) error { return m.Preflight(ctx, s) }},
		{Name: migrate.PhaseReserve,
			Do:   func(ctx context.Context, s *run.Scratch) error { return m.Reserve(ctx, s) },
			Undo: func(ctx context.Context, s *run.Scratch) error { return m.Release(ctx, s) }},
		{Name: migrate.PhasePerform, Commit: true,
			Do: func(ctx context.Context, s *run.Scratch) error {
				return unlessUnsettled(op, m.Perform(ctx, a.life, s))
			},
			Undo: func(ctx context.Context, s *run.Scratch) error { return m.Cancel(ctx, s) }},
		{Name: migrate.PhaseVerify,
			Do: func(ctx context.Context, s *run.Scratch) error { return unlessUnsettled(op, m.Verify(ctx, s)) }},
		{Name: migrate.PhaseFinish,
			Do: func(ctx context.Context, s *run.Scratch) error { return a.finish(ctx, m, op, s) }},
	}
}

// unlessUnsettled gives err, as one that ends the operation without any undo
// where the guest's place is not settled.
func unlessUnsettled(op maint.Op, err error) error {
	if errors.Is(err, migrate.ErrUnsettled) {
		return &run.Stuck{Problem: maint.AsProblem(err, maint.CodeUnverified, "guest "+op.Guest)}
	}
	return err
}

// finish writes down what was measured and gives the reservation up. Neither
// can fail the operation: the guest has moved and is verified.
func (a *Agent) finish(ctx context.Context, m *migrate.Migration, op maint.Op, s *run.Scratch) error {
	result, err := m.Measure(ctx)
	if err != nil {
		if err := s.Note("what the migration measured could not be read: %v", err); err != nil {
			return err
		}
	}
	result.Total = time.Since(op.Started)
	if err := s.Record(maint.RecMoved, result); err != nil {
		return err
	}
	a.metrics.moved(result)
	return m.Release(ctx, s)
}

func (a *Agent) unknownPeer(name string) *maint.Problem {
	names := a.peerNames()
	remedy := "add it to belayd's configuration as [peers." + name + "]"
	if len(names) > 0 {
		remedy = "the peers of this host are " + strings.Join(names, ", ") + "; or " + remedy
	}
	return maint.Problemf(maint.CodeUnknownPeer, "peer "+name, remedy, "is not configured on %s", a.cfg.Host)
}

func refuse(what string, p *maint.Problem) error {
	return &maint.Refusal{What: what, Problems: []maint.Problem{*p}}
}

// newOpID makes an ID that sorts by time and can be typed.
func newOpID(kind string, now time.Time) maint.OpID {
	suffix := strings.ToLower(rand.Text()[:5])
	return maint.OpID(fmt.Sprintf("%s-%s-%s", kind, now.UTC().Format("20060102-150405"), suffix))
}
