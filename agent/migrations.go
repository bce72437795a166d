package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/agent/run"
	"belay/migrate"
)

// Migrate admits a migration, writes it down and starts it. It refuses what
// can be refused on the spot: an unknown guest or peer, a guest that is busy.
func (a *Agent) Migrate(ctx context.Context, by string, r maint.MigrateRequest) (maint.Op, error) {
	return a.migrate(ctx, by, r, asAsked)
}

// migrate is Migrate of an operation that edit says more of.
func (a *Agent) migrate(ctx context.Context, by string, r maint.MigrateRequest, edit func(*maint.Op)) (maint.Op, error) {
	what := fmt.Sprintf("cannot migrate guest %s to %s", r.Guest, r.To)
	if err := a.checkRequest(r); err != nil {
		return maint.Op{}, err
	}
	p := a.peers[r.To]
	if p == nil {
		return maint.Op{}, refuse(what, a.unknownPeer(r.To))
	}
	g, err := a.guest(ctx, what, r.Guest)
	if err != nil {
		return maint.Op{}, err
	}
	if err := a.unlessHeld(what, g); err != nil {
		return maint.Op{}, err
	}

	if r.Timeout == 0 {
		r.Timeout = a.cfg.Migration.Timeout.Duration
	}
	if r.BandwidthMiBs == 0 {
		r.BandwidthMiBs = a.cfg.Migration.BandwidthMiBs
	}
	if r.MaxPause == 0 {
		r.MaxPause = a.cfg.Migration.MaxPause.Duration
	}
	if r.Allow == nil {
		r.Allow = a.cfg.Migration.Allow
	}
	if r.CopyDisks == nil {
		r.CopyDisks = []string{a.cfg.Migration.CopyDisks}
	}
	now := time.Now()
	op := maint.Op{ID: newOpID("mig", now), Kind: maint.OpMigrate, Guest: g.Name, GuestUUID: g.UUID,
		Peer: p.name, By: by, Reason: r.Reason, Deadline: now.Add(r.Timeout), Migrate: &r}
	edit(&op)
	a.tell(&op)
	return a.submit(ctx, what, op)
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
	case r.MaxPause < 0 || r.MaxPause > config.MaxMigrationPause:
		return bad("max_pause", fmt.Sprintf("choose one up to %s", config.MaxMigrationPause), "%s is out of range", r.MaxPause)
	case r.BandwidthMiBs > 1<<20:
		return bad("bandwidth", "it is in MiB/s; 0 means no limit", "%d MiB/s is out of range", r.BandwidthMiBs)
	case r.To == a.cfg.Host:
		return refuse(fmt.Sprintf("cannot migrate guest %s to %s", r.Guest, r.To),
			maint.Problemf(maint.CodeSameHost, "host "+r.To, "name a peer", "is this host"))
	}
	for _, m := range r.Allow {
		if !slices.Contains(maint.AllMeans, m) {
			return bad("allow", fmt.Sprintf("choose of %v", maint.AllMeans), "%q is none of the means", m)
		}
	}
	if why := maint.CheckCopyDisks(r.CopyDisks); why != "" {
		return bad("copy_disks", "name disks as virsh domblklist does, or \"all\", or \"none\"", "%s", why)
	}
	return cmp.Or(checkReason(r.Reason), checkEmergency(r.Emergency))
}

// migrateSteps wires the phases of a migration to the runner.
func (a *Agent) migrateSteps(op maint.Op) []run.Step {
	p := a.peers[op.Peer]
	if p == nil { // taken out of the configuration while the operation was open
		p = &peer{name: op.Peer, to: lostPeer{a.unknownPeer(op.Peer)}}
	}
	m := a.migration(op, p, carrying{p.to, a})
	steps := []run.Step{
		{Name: migrate.PhasePreflight,
			Do: func(ctx context.Context, s *run.Scratch) error {
				if err := m.Preflight(ctx, s); err != nil {
					return err
				}
				return a.healthBefore(ctx, op, s)
			}},
		{Name: migrate.PhaseReserve,
			Do:   func(ctx context.Context, s *run.Scratch) error { return m.Reserve(ctx, s) },
			Undo: func(ctx context.Context, s *run.Scratch) error { return m.Release(ctx, s) }},
		{Name: migrate.PhasePerform, Commit: true,
			Do: a.noted(op, func(ctx context.Context, s *run.Scratch) error {
				a.answerPolls(ctx, op.GuestUUID)
				defer a.watchCPUs(op.GuestUUID)()
				ctx, cancel := a.copyTime(ctx, op)
				defer cancel()
				return unlessUnsettled(op, m.Perform(ctx, a.life, s))
			}),
			Undo: func(ctx context.Context, s *run.Scratch) error {
				if err := m.Cancel(ctx, s); err != nil {
					return err
				}
				off := m.TurnOn(ctx, s)
				if err := m.RemoveDisks(ctx, s); err != nil || off == nil {
					return errors.Join(off, err)
				}
				return beside(op, off)
			}},
		{Name: migrate.PhaseVerify,
			Do: func(ctx context.Context, s *run.Scratch) error { return unlessUnsettled(op, m.Verify(ctx, s)) }},
		{Name: migrate.PhaseFinish,
			Do: func(ctx context.Context, s *run.Scratch) error { return a.finish(ctx, m, op, s) }},
	}
	return a.told(op, migrate.PhasePerform, steps)
}

// migration is an operation as package migrate has it.
func (a *Agent) migration(op maint.Op, p *peer, to migrate.Destination) *migrate.Migration {
	return &migrate.Migration{
		Op: op.ID, Guest: op.Guest, UUID: op.GuestUUID, From: a.cfg.Host, To: p.name,
		Source: source{a.hyp, a.local}, Destination: to, Log: a.log.With("op", op.ID),
		Params: maint.MoveParams{DestURI: p.cfg.LibvirtURI, MigrateURI: p.cfg.MigrateURI,
			TLS: a.cfg.Migration.TLS, TLSName: p.cfg.TLSName, BandwidthMiBs: op.Migrate.BandwidthMiBs,
			Compression: a.cfg.Migration.Compression, ZeroCopy: a.cfg.Migration.ZeroCopy},
		MaxPause: op.Migrate.MaxPause, Allow: op.Migrate.Allow,
		Disks:    migrate.DiskCopying{Which: op.Migrate.CopyDisks, From: source{a.hyp, a.local}, To: disksOf(p, to)},
		Deadline: op.Deadline, Boot: a.preserve.Boot.ID,
		Progress: func(j maint.Job) {
			a.progress.Store(op.ID, j)
			a.progressed.tell()
			a.answerPolls(a.life, op.GuestUUID)
		},
		Trouble: func(p *maint.Problem) {
			defer a.progressed.tell()
			if p == nil {
				a.troubles.Delete(op.ID)
				return
			}
			a.troubles.Store(op.ID, *p)
		},
		Third: func(ctx context.Context) string { return a.hasProcess(ctx, op.GuestUUID, p.name) },
	}
}

// hasProcess names a peer, other than but, that has a process for a guest, "" where none says
// so.
func (a *Agent) hasProcess(ctx context.Context, uuid, but string) (host string) {
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	var mu sync.Mutex
	var asked sync.WaitGroup
	for name, p := range a.peers {
		if name == but {
			continue
		}
		asked.Go(func() {
			v, err := p.client.View(ctx, uuid)
			if err != nil || v.Guest == nil || !v.Guest.State.Active() {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			host = name
		})
	}
	asked.Wait()
	return host
}

// copyTime bounds a migration from the beginning of its copy, where its guest was
// waited for before.
func (a *Agent) copyTime(ctx context.Context, op maint.Op) (context.Context, context.CancelFunc) {
	if !op.Told {
		return context.WithCancel(ctx)
	}
	began := time.Now()
	now, _ := a.journal.Op(op.ID)
	for _, s := range now.Steps {
		if s.Name == migrate.PhasePerform {
			began = s.Started
		}
	}
	end := began.Add(op.Migrate.Timeout)
	if least := time.Now().Add(resumeGrace); now.Resumed > 0 && end.Before(least) {
		end = least
	}
	return context.WithDeadline(ctx, end)
}

// unlessUnsettled gives err, as one that ends the operation without any undo
// where the guest's place is not settled.
func unlessUnsettled(op maint.Op, err error) error {
	if errors.Is(err, migrate.ErrUnsettled) {
		return &run.Stuck{Problem: maint.AsProblem(err, maint.CodeUnverified, "guest "+op.Guest)}
	}
	return err
}

// beside gives err as one of an undo that has done what matters.
func beside(op maint.Op, err error) error {
	if errors.Is(err, run.ErrLeftOpen) {
		return err
	}
	return &run.Beside{Problems: []maint.Problem{*maint.AsProblem(err, maint.CodeFailed, "guest "+op.Guest)}}
}

// finish writes down what was measured and gives the reservation up. Neither
// can fail the operation: the guest has moved and is verified.
func (a *Agent) finish(ctx context.Context, m *migrate.Migration, op maint.Op, s *run.Scratch) error {
	if err := a.leave(op.GuestUUID); err != nil {
		if err := s.Note("the guest's events could not be given up here: %v", err); err != nil {
			return err
		}
	}
	result, err := m.Measure(ctx)
	if err != nil {
		if err := s.Note("what the migration measured could not be read: %v", err); err != nil {
			return err
		}
	}
	if p := a.peers[op.Peer]; err == nil && p != nil {
		now := p.ask(ctx)
		result.Downtime, result.Copy = byOneClock(result.Downtime, now), byOneClock(result.Copy, now)
		result.Stopped, _ = a.cpus.of(op.GuestUUID)
		seen(&result, now)
	}
	result.Total = time.Since(op.Started)
	if result.Disks, err = m.Left(s); err != nil {
		return err
	}
	for _, d := range result.Disks {
		if err := s.Note("disk %s was copied; %s is left on %s as it was, for you to remove", d.Target, d.Path, m.From); err != nil {
			return err
		}
	}
	if err := s.Record(maint.RecMoved, result); err != nil {
		return err
	}
	a.metrics.moved(result)
	return m.Release(ctx, s)
}

// roomTimeout is how long a peer is asked to give up room that would lapse anyway.
const roomTimeout = 10 * time.Second

// giveRoomUp ends the reservation of a migration that was done partly: nothing comes
// after that, and as long as a guest is expected it cannot be moved on. It is done when the
// end is on record, since until then the reservation is what lets the guest be settled.
func (a *Agent) giveRoomUp(op maint.Op) {
	p := a.peers[op.Peer]
	if op.Kind != maint.OpMigrate || op.Outcome != maint.OutcomePartly || p == nil {
		return
	}
	ctx, cancel := context.WithTimeout(a.life, roomTimeout)
	defer cancel()
	if err := p.to.Release(ctx, op.ID); err != nil {
		a.log.Warn("the reservation could not be given up, it will lapse", "op", op.ID, "peer", op.Peer, "err", err)
	}
}

func (a *Agent) unknownPeer(name string) *maint.Problem {
	names := a.peerNames()
	remedy := "add it to belayd's configuration as [peers." + name + "]"
	if len(names) > 0 {
		remedy = "the peers of this host are " + strings.Join(names, ", ") + "; or " + remedy
	}
	return maint.Problemf(maint.CodeUnknownPeer, "peer "+name, remedy, "is not configured on %s", a.cfg.Host)
}
