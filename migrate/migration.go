package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"belay/agent/maint"
)

// Looker sees one host's guests.
type Looker interface {
	Guest(ctx context.Context, nameOrUUID string) (maint.Guest, error)
}

// Engine moves a guest (see package hypervisor for the libvirt calls).
type Engine interface {
	DryRun(ctx context.Context, uuid string, p maint.MoveParams) error
	// Migrate blocks until libvirt is done. When ctx ends it returns, and
	// the migration goes on.
	Migrate(ctx context.Context, uuid string, p maint.MoveParams) error
	AbortJob(ctx context.Context, uuid string) error
	// SetMaxDowntime and LiftBandwidth change the migration that runs.
	SetMaxDowntime(ctx context.Context, uuid string, d time.Duration) error
	LiftBandwidth(ctx context.Context, uuid string) error
	PostCopier
}

// PostCopier has a guest run on the destination before all of its memory is there.
type PostCopier interface {
	// StartPostCopy is for a migration begun with PostCopy; it may be asked again. It
	// wraps maint.ErrNoJob where it is refused.
	StartPostCopy(ctx context.Context, uuid string) error
	// ResumePostCopy takes up one that is broken, and blocks as Migrate does. It is
	// refused until both QEMUs have given the connection up.
	ResumePostCopy(ctx context.Context, uuid string, p maint.MoveParams) error
}

// Supporter tells of a guest's QEMU: what it can do for its migration, and what it does in
// it.
type Supporter interface {
	MoveSupport(ctx context.Context, uuid string) (maint.MoveSupport, error)
	// State is the guest's as libvirt knows it; no QEMU is asked.
	State(ctx context.Context, uuid string) (maint.GuestState, string, error)
	// Suspended reports whether somebody has paused it in the copy.
	Suspended(ctx context.Context, uuid string) (bool, error)
}

// Parter knows of the connections of a post-copy.
type Parter interface {
	// HoldConnections has them outlive a cut network, and returns them. port is the
	// destination's, 0 where its libvirt has picked it.
	HoldConnections(ctx context.Context, uuid string, port uint16) ([]maint.Connection, error)
	// Severed reports whether the guest's QEMU has given them up.
	Severed(ctx context.Context, uuid string) (bool, error)
}

// Describer tells what a guest is made of and how its copy gets on.
type Describer interface {
	Job(ctx context.Context, uuid string) (maint.Job, error)
	Info(ctx context.Context) (maint.Host, error)
	Describe(ctx context.Context, uuid string) (Description, error)
}

// Description is what a guest's XML tells of what a migration needs.
type Description struct {
	CPUXML   string // <cpu> of the migratable XML
	Inactive string // the definition, "" for a transient guest
	Needs    maint.Needs
	Pages    []maint.PageNeed
	Bound    []maint.BoundDevice
	// Unsafe are files that it writes to with flushes left out.
	Unsafe []maint.FileNeed
}

// Marker has the host's storage be told from other storage at the same path.
type Marker interface {
	// Mark completes what a peer is told of files, and leaves marks beside them
	// until done is called.
	Mark(ctx context.Context, files []maint.FileNeed) (marked []maint.FileNeed, done func())
}

// Keeper deals with a definition that was left behind: it removes it, which is
// refused while the guest is active, or keeps it from starting with the host. Launch starts
// a guest that is off, as that would.
type Keeper interface {
	UndefineInactive(ctx context.Context, uuid string) error
	SetAutostart(ctx context.Context, uuid string, on bool) error
	Launch(ctx context.Context, uuid string) error
}

// Resumer starts a guest's vCPUs. It wraps maint.ErrLocked where somebody else has its
// disks.
type Resumer interface {
	Resume(ctx context.Context, uuid string) error
}

// Source is the host the guest leaves.
type Source interface {
	Looker
	Resumer
	Engine
	Describer
	Keeper
	Marker
	Pathfinder
	Supporter
	Parter
}

// Admission is the destination's say before a guest comes.
type Admission interface {
	Check(ctx context.Context, a maint.Arrival) ([]maint.Problem, error)
	// Reserve keeps room, or renews it, and says where memory is taken in; a
	// *maint.Refusal says why not.
	Reserve(ctx context.Context, a maint.Arrival) (maint.Landing, error)
	Release(ctx context.Context, op maint.OpID) error
}

// Arrived is the destination's part once the guest may be there.
type Arrived interface {
	View(ctx context.Context, uuid string) (maint.View, error)
	Settle(ctx context.Context, s maint.Settlement) error
	CompletedJob(ctx context.Context, uuid string) (maint.Job, error)
}

// Holder has the destination's ends of the connections by which a guest comes in post-copy
// outlive a cut network, or ends them. Either does no harm where it was done.
type Holder interface {
	Connections(ctx context.Context, op maint.OpID, c maint.Connections) error
}

// Destination is the host the guest goes to, as its belayd speaks for it.
type Destination interface {
	Admission
	Arrived
	Holder
}

// Scratch is where a phase writes down what people should read (Note) and
// what it must know after a crash (Save, Load).
type Scratch interface {
	Note(format string, args ...any) error
	Save(v any) error
	Load(phase string, v any) (bool, error)
}

// Migration is one guest on its way to one peer. The phases are its methods.
type Migration struct {
	Op          maint.OpID
	Guest       string // name, for messages
	UUID        string
	From, To    string // host names
	Source      Source
	Destination Destination
	Params      maint.MoveParams // Persist is set from the guest itself
	// MaxPause is the longest pause that the copy may end with, and Allow what else may
	// be done for it to end.
	MaxPause time.Duration
	Allow    []maint.Means
	Log      *slog.Logger
	// Deadline is when the operation was to be over. An agent that comes back
	// after it sees a copy through, but begins none. Zero is none.
	Deadline time.Time
	// Boot tells this boot of the source from others, "" where that is not known.
	Boot string
	// Progress is told the statistics of the running copy.
	Progress func(maint.Job)
	// Disks, unless empty, says which disks are copied along.
	Disks DiskCopying
	// Trouble, unless nil, is told what is wrong with a migration that goes on all the
	// same, and nil when it is not any more.
	Trouble func(*maint.Problem)
	// Third, unless nil, names a host beside From and To that is known to have a process
	// for the guest, "" where there is none.
	Third func(ctx context.Context) (host string)

	landing  maint.Landing    // as the destination has said last
	copies   []maint.DiskCopy // the disks that are copied along
	seen     maint.Job        // of the copy, as it was seen last
	resigned bool             // it was told that there is no way back
	holding  time.Time        // when it was last tried to hold the connections; see hold
	refused  time.Time        // since when libvirt refuses to begin post-copy, each time
}

// The names of the phases.
const (
	PhasePreflight = "preflight"
	PhaseReserve   = "reserve"
	PhasePerform   = "perform"
	PhaseVerify    = "verify"
	PhaseFinish    = "finish"
)

// before is what preflight writes down: how the guest was kept on the source,
// which is gone from there after the move.
type before struct {
	Arrival    maint.Arrival `json:"arrival"`
	Persistent bool          `json:"persistent"`
	Autostart  bool          `json:"autostart"`
	XML        string        `json:"xml,omitempty"`
}

func (m *Migration) params(persist bool) maint.MoveParams {
	p := m.Params
	p.Persist = persist
	m.copyParams(&p)
	return p
}

func (m *Migration) refuse(ps []maint.Problem) error {
	return maint.Refuse(fmt.Sprintf("cannot migrate guest %s to %s", m.Guest, m.To), ps)
}

// Reserve has the peer keep room, so that two guests cannot be promised the
// same memory.
func (m *Migration) Reserve(ctx context.Context, s Scratch) error {
	var b before
	if _, err := s.Load(PhasePreflight, &b); err != nil {
		return err
	}
	return m.notBegun(ctx, m.makeRoom(ctx, b.Arrival))
}

// makeRoom has the peer keep room, or go on to.
func (m *Migration) makeRoom(ctx context.Context, a maint.Arrival) error {
	return m.retry(ctx, restartGrace, func(ctx context.Context) error { return m.reserve(ctx, a) })
}

// notBegun has the error of a phase before the copy say that the guest is as before.
func (m *Migration) notBegun(ctx context.Context, err error) error {
	return m.asBefore(ctx, err, fmt.Sprintf("nothing was begun, and the guest is on %s as before", m.From))
}

// asBefore adds to an error, unless it is a refusal, how the guest is. What an abort cuts
// short tells nothing else.
func (m *Migration) asBefore(ctx context.Context, err error, how string) error {
	var refusal *maint.Refusal
	var p *maint.Problem
	switch {
	case err == nil || errors.As(err, &refusal):
		return err
	case ctx.Err() != nil && !errors.Is(context.Cause(ctx), context.DeadlineExceeded):
		return m.cancelled(ctx, nil)
	case errors.As(err, &p):
		return &maint.Problem{Code: p.Code, Subject: p.Subject, Reason: p.Reason + "; " + how, Remedy: p.Remedy}
	}
	return fmt.Errorf("%w; %s", err, how)
}

// Release gives the room up. An unreachable peer is no failure: the
// reservation lapses by itself.
func (m *Migration) Release(ctx context.Context, s Scratch) error {
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := m.Destination.Release(ask, m.Op); err != nil {
		return s.Note("peer %s could not be told to give up the reservation, it will lapse: %v", m.To, err)
	}
	return nil
}

// Verify makes sure that exactly one copy runs and that the destination keeps
// the guest as the source did. The guest has moved when it is called.
func (m *Migration) Verify(ctx context.Context, s Scratch) error {
	var b before
	if _, err := s.Load(PhasePreflight, &b); err != nil {
		return err
	}
	var a attempt
	if _, err := s.Load(PhasePerform, &a); err != nil {
		return err
	}
	moved := Story{Begun: MoveSeen, Persistent: b.Persistent, Paused: a.Paused}
	settle := maint.Settlement{Op: m.Op, GuestUUID: m.UUID, Persistent: b.Persistent, Autostart: b.Autostart || a.KeptOff, XML: b.XML}
	if err := m.retry(ctx, settleGrace, func(ctx context.Context) error { return m.Destination.Settle(ctx, settle) }); err != nil {
		if p := new(maint.Problem); errors.As(err, &p) && p.Code == maint.CodeJournal {
			return maint.Problemf(maint.CodeJournal, "guest "+m.Guest, p.Remedy, "runs on %s, whose belayd cannot write down that it has come: %s", m.To, p.Reason)
		}
		return maint.Problemf(maint.CodeUnverified, "guest "+m.Guest,
			fmt.Sprintf("on %s: virsh dominfo %s; then set persistence and autostart as wanted (were: persistent %t, autostart %t)", m.To, m.word(), settle.Persistent, settle.Autostart),
			"runs on %s, but its definition there could not be settled: %v", m.To, err)
	}
	now, err := m.settle(ctx, moved)
	switch {
	case err != nil:
		return err
	case now.State == MovedLeftover:
		return m.leftover(ctx, b)
	case !now.Moved():
		return m.unsettled(now)
	}
	if err := m.noteArrival(ctx, s, a.Paused); err != nil || now.Action != RemoveDefinition {
		return err
	}
	// libvirt was interrupted before it undefined it. It refuses this of a guest that was
	// started there at this very moment.
	if err := m.Source.UndefineInactive(ctx, m.UUID); err != nil && !errors.Is(err, maint.ErrNoGuest) {
		if now, lookErr := m.settle(ctx, moved); lookErr == nil && !now.Moved() {
			return m.unsettled(now)
		}
		return maint.Problemf(maint.CodeLeftover, "guest "+m.Guest, fmt.Sprintf("on %s: virsh undefine %s", m.From, m.word()),
			"runs on %s, but its old definition on %s could not be removed: %v", m.To, m.From, err)
	}
	return s.Note("removed the definition that was left on %s", m.From)
}

// noteArrival writes down what the guest does on the destination where that is not to
// run: its owner may have paused it, before (paused) or on the way, or its disk failed.
func (m *Migration) noteArrival(ctx context.Context, s Scratch, paused bool) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	v, err := m.Destination.View(ctx, m.UUID)
	if err != nil || v.Guest == nil || v.Running() {
		return nil // how it was moments ago has been verified
	}
	if paused && v.Guest.State == maint.GuestPaused {
		return s.Note("the guest was paused on %s, and is so on %s; its clock is behind by as long when it is resumed", m.From, m.To)
	}
	return s.Note("on %s the guest is %s (%s), which is not Belay's doing", m.To, v.Guest.State, v.Guest.Reason)
}

// leftover keeps the definition that is still on the source from starting a
// second copy when that host reboots, and tells what a person has to do.
func (m *Migration) leftover(ctx context.Context, b before) error {
	p := maint.Problemf(maint.CodeLeftover, "guest "+m.Guest,
		fmt.Sprintf("make sure that it runs on %s, then on %s: virsh destroy %s", m.To, m.From, m.word()),
		"runs on %s, and %s still holds its stopped process", m.To, m.From)
	if !b.Persistent {
		return p
	}
	p.Remedy += "; virsh undefine --keep-nvram " + m.word()
	if b.Autostart {
		off := func(ctx context.Context) error { return m.Source.SetAutostart(ctx, m.UUID, false) }
		if err := m.retry(ctx, settleGrace, off); err != nil {
			p.Reason += fmt.Sprintf(", which would start again with the host: its autostart could not be turned off: %v", err)
		}
	}
	return p
}

// Measure returns what libvirt measured of the finished copy, from the
// destination: the source keeps nothing of a guest that has left. Of post-copy the
// destination has nothing, and the source's last statistics are given, as long as the agent
// lives that has read them.
func (m *Migration) Measure(ctx context.Context) (maint.MoveResult, error) {
	r := maint.MoveResult{From: m.From, To: m.To}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	job, err := m.Destination.CompletedJob(ctx, m.UUID)
	if m.seen.PostCopy != "" && err != nil {
		job, err = m.seen, nil
	}
	if err != nil {
		return r, err
	}
	r.Downtime, r.Copy, r.MemorySent, r.Iterations = job.Downtime, job.Elapsed, job.MemorySent, job.Iteration
	r.Started = job.Started
	return r, nil
}

// retry calls f until it works, fails for good, ctx ends or d has passed. Each
// call is bounded: a host that hangs must not hold the operation for ever.
func (m *Migration) retry(outer context.Context, d time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(outer, d)
	defer cancel()
	pause := 100 * time.Millisecond
	for {
		ask, cancel := context.WithTimeout(outer, askTimeout)
		err := f(ask)
		cancel()
		if err == nil || !transient(err) {
			return err
		}
		if !wait(ctx, pause) {
			return err
		}
		pause = min(2*pause, 2*time.Second)
	}
}

// transient reports whether asking again may help.
func transient(err error) bool {
	if p := new(maint.Problem); errors.As(err, &p) && p.Code == maint.CodeShuttingDown {
		return true // it is back in a moment
	}
	return errors.Is(err, maint.ErrPeerDown) || errors.Is(err, maint.ErrHypervisorDown)
}

// wait waits for d and reports whether ctx is still alive.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
