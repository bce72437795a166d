package agent

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"belay/agent/api"
	"belay/agent/config"
	"belay/agent/journal"
	"belay/agent/maint"
	"belay/agent/run"
	"belay/hypervisor"
	"belay/migrate"
	"belay/migrate/local"
	"belay/notify/board"
	"belay/patch/preserve"
	"belay/patch/vmm"
)

// Hypervisor is this host's libvirt. The fake in hypervisortest has the same
// methods.
type Hypervisor interface {
	migrate.Looker
	migrate.Engine
	migrate.CPUComparer
	Inspector
	Supplier
	Definer
	Follower
	Noter
	AgentCommand(ctx context.Context, uuid, command string, args any) (json.RawMessage, error)
	preserve.Host
	vmm.QEMU
	vmm.Starter
	QuitIncoming(ctx context.Context, uuid string) error
	Holder
}

// Holder keeps connections by which guests come and go in post-copy through a cut network,
// or ends them (see package hypervisor).
type Holder interface {
	HoldOut(ctx context.Context, uuid string, first, last uint16) ([]maint.Connection, error)
	HoldIn(ctx context.Context, uuid string, all []maint.Connection) (int, error)
	Sever(ctx context.Context, uuid string, all []maint.Connection) (int, error)
}

// Inspector reads the host and what its guests are made of.
type Inspector interface {
	Info(ctx context.Context) (maint.Host, error)
	DiskSize(ctx context.Context, uuid, disk string) (bytes, allocated uint64, err error)
	GuestXML(ctx context.Context, uuid string) (hypervisor.GuestXML, error)
}

// Supplier tells what this host's libvirt has of what guests need.
type Supplier interface {
	Supplies(ctx context.Context) (maint.Supplies, error)
	HugePages(ctx context.Context) ([]maint.PagePool, error)
}

// Definer keeps definitions, and starts what is defined. None of its calls touches a running
// guest.
type Definer interface {
	Define(ctx context.Context, xml string) error
	UndefineInactive(ctx context.Context, uuid string) error
	SetAutostart(ctx context.Context, uuid string, on bool) error
	Launch(ctx context.Context, uuid string) error
}

// Noter keeps a text with a guest, wherever it goes.
type Noter interface {
	SetNote(ctx context.Context, uuid, text string) error
	Note(ctx context.Context, uuid string) (string, error)
	SetPolicy(ctx context.Context, uuid, text string) error
}

// Follower follows jobs and events.
type Follower interface {
	Job(ctx context.Context, uuid string) (maint.Job, error)
	CompletedJob(ctx context.Context, uuid string) (maint.Job, error)
	Subscribe() (events <-chan maint.Event, cancel func())
	CPUTimes(ctx context.Context, uuid string, ready func(), f func(running bool, at time.Time)) error
}

// Journal is what the agent needs of its journal; see package journal.
type Journal interface {
	run.Log
	Ops() []maint.Op
	Reservations(now time.Time) []maint.Reservation
	Reservation(id maint.OpID) (maint.Reservation, bool)
	Arrivals() []maint.Arrived
	Arrival(id maint.OpID) (maint.Arrived, bool)
	Records(id maint.OpID) ([]maint.Record, error)
	Scheduled() maint.Scheduled
	Patches() maint.Patches
	Cordon() *maint.Cordon
	Disks() []maint.MadeDisks
	Changed() <-chan struct{}
	Health() error
	Prune(before time.Time) (int, error)
}

var _ Journal = (*journal.Journal)(nil)

// Agent is one host's agent.
type Agent struct {
	cfg     config.Config
	version string
	log     *slog.Logger
	hyp     Hypervisor
	journal Journal
	turns   turns
	still   *semaphore.Weighted // a place for each operation that keeps guests still, see Calm
	peers   map[string]*peer
	since   time.Time
	metrics *metrics
	view    *inventory
	cpus    cpuTimes
	vigil   vigil
	pace    pace

	local    *local.Host
	preserve Preserve
	keeper   *board.Keeper // of scheduled events
	guests   atomic.Pointer[guestServer]

	requests chan func()
	life     context.Context
	endLife  context.CancelFunc
	workers  sync.WaitGroup // the operations' goroutines

	// arrivals serialises admission of arriving guests, so that two cannot
	// be promised the same room.
	arrivals sync.Mutex
	// storage serialises what is made and removed for one operation's disks. Those of two
	// operations cannot be at one path: see local.PlaceDisk.
	storage locks

	// live is owned by the loop.
	live map[maint.OpID]*liveOp
	// progress has the statistics of running copies, for readers.
	progress   sync.Map // maint.OpID -> maint.Job
	progressed herald   // of progress and troubles
	// troubles has what is wrong with operations that go on all the same.
	troubles sync.Map // maint.OpID -> maint.Problem
}

// liveOp is an operation that a goroutine is running.
type liveOp struct{ abort context.CancelCauseFunc }

// New puts an agent together; Run makes it live. tlsConfig is for speaking
// to peers, nil when there are none.
func New(cfg config.Config, version string, hyp Hypervisor, j Journal, b Preserve, tlsConfig *tls.Config, log *slog.Logger) *Agent {
	a := &Agent{cfg: cfg, version: version, log: log, hyp: hyp, journal: j, preserve: b,
		since: time.Now(), requests: make(chan func()),
		peers: make(map[string]*peer), live: make(map[maint.OpID]*liveOp), turns: turns{taken: make(map[maint.OpID]bool)}, still: semaphore.NewWeighted(allStill)}
	a.local = local.New(b.Places.Root, filepath.Join(cfg.StateDir, "marks"))
	a.life, a.endLife = context.WithCancel(context.Background())
	a.keeper = newKeeper(a)
	a.view = newInventory(hyp, log)
	a.metrics = newMetrics(a)
	for name, p := range cfg.Peers {
		c := tlsConfig.Clone()
		c.ServerName = p.CertName
		a.peers[name] = newPeer(name, p, api.NewTLS(name, p.Address, c))
	}
	return a
}

// Run makes the agent live until ctx ends. Operations that run then are left
// in the journal, to be taken up again by the next Run; their copies go on.
func (a *Agent) Run(ctx context.Context) error {
	var helpers sync.WaitGroup
	helpers.Go(func() { a.view.follow(a.life) })
	helpers.Go(func() { a.meetArrivals(a.life) })
	helpers.Go(func() { a.vigil.follow(a.life, a.hyp) })
	for _, p := range a.peers {
		helpers.Go(func() { p.greet(a.life, a.log) })
	}
	helpers.Go(func() { a.pruneHourly(a.life) })
	helpers.Go(func() { a.delayShutdown(a.life) })

	a.sweepLeashes()
	marks := a.local.Leftovers()
	a.resume()
	helpers.Go(func() { a.local.Sweep(a.life, marks) })
	helpers.Go(func() { a.reloadPatch(a.life) })
	helpers.Go(func() { a.bringHome(a.life) })
	helpers.Go(func() { a.followArrivals(a.life) })
	helpers.Go(func() { a.followEvents(a.life) })
	helpers.Go(func() { a.followCampaigns(a.life) })
	helpers.Go(func() { a.followDisks(a.life) })
	for ctx.Err() == nil {
		select {
		case f := <-a.requests:
			f()
		case <-ctx.Done():
		}
	}
	a.endLife()
	a.drainRequests(func() { a.workers.Wait() })
	helpers.Wait()
	return nil
}

// drainRequests goes on answering the loop's requests while f waits for those
// who make them.
func (a *Agent) drainRequests(f func()) {
	done := make(chan struct{})
	go func() { f(); close(done) }()
	for {
		select {
		case r := <-a.requests:
			r()
		case <-done:
			return
		}
	}
}

// inLoop runs f in the loop, which owns the operations, and waits for it.
func (a *Agent) inLoop(ctx context.Context, f func()) error {
	done := make(chan struct{})
	select {
	case a.requests <- func() { f(); close(done) }:
		<-done
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-a.life.Done():
		return maint.Problemf(maint.CodeShuttingDown, "belayd on "+a.cfg.Host, "try again in a moment", "is shutting down")
	}
}

// Alive returns nil when the loop answers within ctx: what the systemd
// watchdog is fed on.
func (a *Agent) Alive(ctx context.Context) error { return a.inLoop(ctx, func() {}) }

// resume takes up every operation that the journal has open.
func (a *Agent) resume() {
	for _, op := range a.journal.Ops() {
		if unheard(op) {
			a.workers.Go(func() { a.hear(a.life, op) })
		}
		if op.State == maint.OpEnded {
			continue
		}
		a.log.Info("taking up an operation again", "op", op.ID, "guest", op.Guest, "step", op.Step)
		if err := a.journal.Append(maint.Record{Op: op.ID, Kind: maint.RecResumed}); err != nil {
			a.log.Error("cannot journal that an operation is resumed", "op", op.ID, "err", err)
		}
		op.Resumed++ // however the journal is
		a.start(op)
	}
}

// resumeGrace is the least time a resumed operation gets, however long the
// agent was away.
const resumeGrace = 2 * time.Minute

// start runs an admitted operation in a goroutine of its own. It is called in
// the loop.
func (a *Agent) start(op maint.Op) {
	aborted, abort := context.WithCancelCause(a.life)
	deadline := op.Deadline
	if least := time.Now().Add(resumeGrace); op.Resumed > 0 && deadline.Before(least) {
		deadline = least
	}
	ctx, cancel := context.WithDeadline(aborted, deadline)
	a.live[op.ID] = &liveOp{abort: abort}
	if op.AbortBy != "" {
		abort(run.ErrAborted)
	}
	a.workers.Go(func() {
		defer cancel()
		defer abort(nil)
		a.runToEnd(ctx, op)
		a.progress.Delete(op.ID)
		a.troubles.Delete(op.ID)
		// The loop answers as long as workers run.
		done := make(chan struct{})
		a.requests <- func() { delete(a.live, op.ID); close(done) }
		<-done
		if ended, _ := a.journal.Op(op.ID); unheard(ended) {
			a.hear(a.life, ended)
		}
	})
}

// journalRetry is how long an operation waits when the journal cannot be
// written.
const journalRetry = 2 * time.Second

// runToEnd runs op until it has ended or the agent's life has.
func (a *Agent) runToEnd(ctx context.Context, op maint.Op) {
	steps := a.steps(op)
	for {
		_, err := run.Run(a.life, ctx, a.journal, op.ID, steps, a.log)
		switch {
		case err == nil:
			ended, _ := a.journal.Op(op.ID)
			a.metrics.ended(ended)
			a.endEvents(ended)
			a.giveRoomUp(ended)
			return
		case a.life.Err() != nil:
			a.log.Info("operation left open for the next start", "op", op.ID)
			return
		case !errors.Is(err, run.ErrLeftOpen):
			a.log.Error("operation cannot go on", "op", op.ID, "err", err)
			return
		}
		a.log.Error("the journal cannot be written, the operation waits", "op", op.ID, "err", err)
		pause(a.life, journalRetry)
	}
}

func (a *Agent) pruneHourly(ctx context.Context) {
	t := time.NewTicker(time.Hour)
	defer t.Stop()
	for {
		before := time.Now().Add(-a.cfg.Journal.Keep.Duration)
		n, err := a.journal.Prune(before)
		if err != nil {
			a.log.Warn("cannot prune the journal", "err", err)
		} else if n > 0 {
			a.log.Info("journal pruned", "records", n)
		}
		a.keeper.Forget(before)
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}
