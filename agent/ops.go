package agent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/agent/run"
	"belay/migrate"
)

// maxTimeout bounds what an operator may ask for.
const maxTimeout = config.MaxTimeout

// guest looks a guest up by name or UUID for a request.
func (a *Agent) guest(ctx context.Context, what, name string) (maint.Guest, error) {
	g, err := a.hyp.Guest(ctx, name)
	switch {
	case errors.Is(err, maint.ErrNoGuest):
		return g, a.unknownGuest(what, name)
	case err != nil:
		return g, a.cannotAsk(what, err)
	}
	return g, a.unlessElsewhere(what, g)
}

func (a *Agent) unknownGuest(what, name string) error {
	if e, there := a.findElsewhere(maint.Guest{Name: name, UUID: name}); there {
		return refuse(what, e.problem())
	}
	return refuse(what, maint.Problemf(maint.CodeUnknownGuest, "guest "+name,
		"see 'belay guests' for the names; if it has moved, ask the belayd of the host where it is", "is not on host %s", a.cfg.Host))
}

// cannotAsk is the answer to a request that libvirt could not be asked about.
func (a *Agent) cannotAsk(what string, err error) error {
	if errors.Is(err, maint.ErrHypervisorDown) {
		return refuse(what, maint.Problemf(maint.CodeHypervisorDown, "host "+a.cfg.Host,
			"see that libvirtd or virtqemud runs (systemctl status libvirtd virtqemud)", "%v", err))
	}
	return fmt.Errorf("%s: %w", what, err)
}

// submit has an operation admitted, or says why not.
func (a *Agent) submit(ctx context.Context, what string, op maint.Op) (maint.Op, error) {
	return a.submitIf(ctx, what, op, func() error { return nil })
}

// submitIf is submit, unless refuse, which is called in the loop, has an error.
func (a *Agent) submitIf(ctx context.Context, what string, op maint.Op, refuse func() error) (maint.Op, error) {
	var refused error
	if err := a.inLoop(ctx, func() {
		if refused = refuse(); refused == nil {
			refused = a.admit(what, op)
		}
	}); err != nil {
		return maint.Op{}, err
	}
	if refused != nil {
		return maint.Op{}, refused
	}
	admitted, _ := a.journal.Op(op.ID)
	return admitted, nil
}

// admit decides and starts; it runs in the loop, so two requests for one
// guest cannot both pass.
func (a *Agent) admit(what string, op maint.Op) error {
	if a.life.Err() != nil {
		return maint.Problemf(maint.CodeShuttingDown, "belayd on "+a.cfg.Host, "try again in a moment", "is shutting down")
	}
	for id := range a.live {
		running, _ := a.journal.Op(id)
		if running.State == maint.OpEnded { // whoever watched it knows before the loop does
			continue
		}
		if recovers(op) && running.Step == phaseAnnounce {
			continue // that waits for it, see awaitRecoveries
		}
		if about := inCommon(op, running); about != "" {
			return refuse(what, maint.Problemf(maint.CodeBusy, about,
				fmt.Sprintf("wait for it (belay ops watch %s) or abort it (belay ops abort %s)", id, id),
				"operation %s (%s), begun by %s at %s, is at work on it", id, running.Kind, running.By, running.Started.Format(time.DateTime)))
		}
	}
	for _, r := range a.journal.Reservations(time.Now()) {
		arrives := r.GuestUUID == op.GuestUUID && !a.view.has(op.GuestUUID, maint.GuestRunning)
		if arrives || ofAll(op) {
			return refuse(what, maint.Problemf(maint.CodeBusy, "guest "+r.Guest, "wait until it has arrived",
				"is arriving from %s (operation %s)", r.From, r.Op))
		}
	}
	if ofAll(op) { // it would run while all others are held
		all, _ := a.elsewhere()
		for _, e := range all {
			if e.Where == inTwin || op.Kind == maint.OpKexec && a.endsWithKernel(e) {
				return refuse(what, e.problem())
			}
		}
	}
	a.turns.mu.Lock()
	same := a.atWork(op.Kind)
	a.turns.mu.Unlock()
	switch most := a.most(op.Kind); {
	case same < most, op.Told: // it waits for its turn, see turn
	case op.Kind == maint.OpMigrate:
		return refuse(what, maint.Problemf(maint.CodeHostBusy, "host "+a.cfg.Host,
			"wait for one to end (belay ops list), or raise limits.migrations_out",
			"already runs %d operations, as many as limits.migrations_out allows", same))
	default:
		return refuse(what, maint.Problemf(maint.CodeHostBusy, "host "+a.cfg.Host, "wait for it to end (belay ops list)",
			"already runs an operation of this kind (%s)", op.Kind))
	}
	if err := a.arrivedBefore(op); err != nil {
		return err
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

// recovers reports whether an operation goes on with a guest that an earlier one has
// left between two QEMUs or in the twin: that waits for nobody's notice.
func recovers(op maint.Op) bool { return op.Kind == maint.OpReplace && !op.Told }

// most is how many operations of a kind may run at once.
func (a *Agent) most(k maint.OpKind) int {
	if k == maint.OpMigrate {
		return a.cfg.Limits.MigrationsOut
	}
	return 1 // of drains and restores together, see inCommon
}

// ofAll says that an operation is about every guest of the host.
func ofAll(op maint.Op) bool { return op.Hold != nil && op.Hold.All || op.Kind == maint.OpKexec }

// moveMany says that an operation has others move guests, each for itself.
func moveMany(op maint.Op) bool { return op.Kind == maint.OpDrain || op.Kind == maint.OpRestore }

// inCommon names what two operations are both about, "" for nothing.
func inCommon(op, running maint.Op) string {
	if op.Part != "" && op.Part == running.ID || running.Part != "" && running.Part == op.ID {
		return "" // the one is a step of the other
	}
	if op.Kind == maint.OpApply && (running.Kind == maint.OpApply || moveMany(running)) || running.Kind == maint.OpApply && moveMany(op) {
		return "this host"
	}
	if op.Kind == maint.OpPatch || running.Kind == maint.OpPatch {
		return "this host"
	}
	if ofAll(op) || ofAll(running) || moveMany(op) && moveMany(running) {
		return "this host's guests"
	}
	theirs := append([]string{running.GuestUUID}, running.Guests...)
	for _, uuid := range append([]string{op.GuestUUID}, op.Guests...) {
		if uuid != "" && slices.Contains(theirs, uuid) {
			if op.Guest != "" {
				return "guest " + op.Guest
			}
			return "guest " + uuid
		}
	}
	return ""
}

// steps are what an operation does.
func (a *Agent) steps(op maint.Op) []run.Step {
	switch op.Kind {
	case maint.OpHold:
		return a.holdSteps(op)
	case maint.OpReplace:
		return a.replaceSteps(op)
	case maint.OpDrain:
		return a.drainSteps(op)
	case maint.OpRestore:
		return a.restoreSteps(op)
	case maint.OpPatch:
		return a.patchSteps(op)
	case maint.OpKexec:
		return a.kexecSteps(op)
	case maint.OpApply:
		return a.applySteps(op)
	}
	return a.migrateSteps(op)
}

// Abort asks a running operation to stop and go back.
func (a *Agent) Abort(ctx context.Context, by string, id maint.OpID) (maint.Op, error) {
	return a.abort(ctx, maint.Record{Op: id, Kind: maint.RecAbort, By: by})
}

// AbortNow is Abort, also of what runs of a drain or a restore.
func (a *Agent) AbortNow(ctx context.Context, by string, id maint.OpID) (maint.Op, error) {
	return a.abort(ctx, maint.Record{Op: id, Kind: maint.RecAbort, By: by, Text: maint.AbortNow})
}

func (a *Agent) abort(ctx context.Context, wish maint.Record) (maint.Op, error) {
	id := wish.Op
	op, err := a.Op(ctx, id)
	if err != nil {
		return op, err
	}
	err2 := a.inLoop(ctx, func() {
		l := a.live[id]
		op, _ := a.journal.Op(id)
		switch {
		case l == nil || op.State == maint.OpEnded:
			err = maint.Problemf(maint.CodeEnded, "operation "+string(id), "", "has already ended")
			return
		case inPostCopy(op):
			err = maint.Problemf(maint.CodePostCopy, "operation "+string(id), "wait for its end (belay ops watch "+string(id)+")",
				"is in post-copy: guest %s runs on %s, part of its memory is still on %s, and there is no way back; it goes on", op.Guest, op.Peer, a.cfg.Host)
			return
		}
		// The wish is carried out even when it cannot be written down.
		if jerr := a.journal.Append(wish); jerr != nil {
			a.log.Error("cannot journal an abort", "op", id, "err", jerr)
		}
		l.abort(run.ErrAborted)
	})
	if err = errors.Join(err2, err); err != nil {
		return op, err
	}
	return a.Op(ctx, id)
}

// inPostCopy reports whether a migration has been told to go on as post-copy.
func inPostCopy(op maint.Op) bool {
	for _, s := range op.Steps {
		if s.Name == migrate.PhasePerform {
			return op.Kind == maint.OpMigrate && migrate.StoryOf(s.Data).Begun == migrate.PostCopyBegun
		}
	}
	return false
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
	if p, ok := a.troubles.Load(op.ID); ok && op.State != maint.OpEnded {
		problem := p.(maint.Problem)
		op.Trouble = &problem
	}
}

// Records returns the journal of one operation.
func (a *Agent) Records(ctx context.Context, id maint.OpID) ([]maint.Record, error) {
	if _, err := a.Op(ctx, id); err != nil {
		return nil, err
	}
	return a.journal.Records(id)
}

const (
	// progressEvery is how often a watcher is told of a running copy's progress, at most.
	progressEvery = 500 * time.Millisecond
	// watchAlive is how often a watcher is told at least, so that it knows that there is
	// somebody who would tell it.
	watchAlive = 10 * time.Second
)

// Watch calls f with the operation now and after every change until it ends.
func (a *Agent) Watch(ctx context.Context, id maint.OpID, f func(maint.Op) error) error {
	alive := time.NewTicker(watchAlive)
	defer alive.Stop()
	for {
		changed, progressed := a.journal.Changed(), a.progressed.next()
		op, err := a.Op(ctx, id)
		if err != nil {
			return err
		}
		if err := f(op); err != nil || op.State == maint.OpEnded {
			return err
		}
		told := time.Now()
		for news := false; !news; {
			select {
			case <-changed:
				news = true
			case <-alive.C:
				news = true
			case <-progressed:
				progressed = a.progressed.next()
				if news = a.progressedSince(op); news && !pause(ctx, progressEvery-time.Since(told)) {
					return ctx.Err()
				}
			case <-ctx.Done():
				return ctx.Err()
			case <-a.life.Done():
				return errors.New("belayd is shutting down")
			}
		}
	}
}

// progressedSince reports whether it is this operation that has progressed since it was read.
func (a *Agent) progressedSince(op maint.Op) bool {
	now := op
	a.addProgress(&now)
	return !reflect.DeepEqual(now.Progress, op.Progress) || !reflect.DeepEqual(now.Trouble, op.Trouble)
}

func refuse(what string, p *maint.Problem) error {
	return &maint.Refusal{What: what, Problems: []maint.Problem{*p}}
}

// newOpID makes an ID that sorts by time and can be typed.
func newOpID(kind string, now time.Time) maint.OpID {
	suffix := strings.ToLower(rand.Text()[:5])
	return maint.OpID(fmt.Sprintf("%s-%s-%s", kind, now.UTC().Format("20060102-150405"), suffix))
}
