package live

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// Scratch is where a phase writes down what people should read (Note) and what
// it must know after a crash (Save, Load).
type Scratch interface {
	Note(format string, args ...any) error
	Save(v any) error
	Load(phase string, v any) (bool, error)
}

// The names of the phases.
const (
	PhasePreflight = "preflight"
	PhaseLoad      = "load"
	PhaseSoak      = "soak"
	PhaseWithdraw  = "withdraw"
	PhaseMicrocode = "microcode"
	PhaseRestart   = "restart"
	PhaseProve     = "prove"
	PhaseFinish    = "finish"
)

// Job is one livepatch on its way in (Preflight, Load, Soak, Finish) or out
// (PreflightRevert, Withdraw, Finish).
type Job struct {
	Host
	Request maint.PatchRequest
	Boot    string // this boot's ID
	// Known is what the journal has of livepatches now, and Record puts something else
	// in its place, with what was done if that is over.
	Known  func() maint.Patches
	Record func(maint.Patches, *maint.PatchResult) error
	Guests func(context.Context) ([]maint.Guest, error)
	Health func(context.Context) error // nil: none is configured
}

// intent is what is on disk before the effect.
type intent struct {
	Patch  maint.KeptPatch  `json:"patch"`
	Before *maint.KeptPatch `json:"before,omitempty"` // loaded before, by Belay
	Known  maint.Patches    `json:"known"`            // as it was
	Taint  uint64           `json:"taint"`
	LogSeq uint64           `json:"log_seq"` // the kernel's log, up to here
	Guests []guest          `json:"guests"`  // that ran
}

type guest struct {
	Name string `json:"name"`
	UUID string `json:"uuid"`
	ID   int    `json:"id"`
	// Transient: libvirt forgets it when it ends, however it does.
	Transient bool `json:"transient,omitempty"`
}

// begun is what load has on disk before its effect, and when it has come to its end.
type begun struct {
	At   time.Time     `json:"at"`
	Took time.Duration `json:"took_ns,omitempty"` // until every task ran it
}

const whatLoad, whatRevert = "cannot load a livepatch", "cannot revert a livepatch"

// rebooted is an error if the host was booted since the operation was asked for.
func (j *Job) rebooted() error {
	if j.Request.Boot == j.Boot {
		return nil
	}
	return maint.Problemf(maint.CodeHostRebooted, "this host", "see why it went down (journalctl -k -b -1) before a livepatch is loaded again",
		"went down while this went on, and has booted since")
}

// Preflight judges the livepatch, keeps a copy, and writes the intent down.
func (j *Job) Preflight(ctx context.Context, s Scratch) error {
	if err := j.rebooted(); err != nil {
		return err
	}
	known := j.Known()
	plan := intent{Known: known}
	// belay-kernel, which may have to be started first, and libvirt answer while the files are judged.
	var unknown []maint.Problem
	var asked sync.WaitGroup
	asked.Go(func() { unknown = j.baseline(ctx, &plan) })
	defer asked.Wait()
	a, err := j.artifact(known)
	if err != nil {
		return maint.Refuse(whatLoad, []maint.Problem{*maint.AsProblem(err, maint.CodePatchFile, "livepatch "+j.Request.File)})
	}
	k, _, problems := j.judge(a, known)
	asked.Wait()
	if problems = append(problems, unknown...); len(problems) > 0 {
		return maint.Refuse(whatLoad, problems)
	}
	plan.Patch = k
	if known.Active != nil {
		if p, err := j.Tree.Patch(known.Active.Name); err == nil && p != nil && is(*p, known.Active) {
			plan.Before = known.Active
		}
	}
	if err := j.Store.Put(k.Name, a); err != nil {
		return maint.Refuse(whatLoad, []maint.Problem{*maint.Problemf(maint.CodePatchFile, "folder "+j.Store.Dir, "make it writable, and room in it", "no copy can be kept: %v", err)})
	}
	plan.Patch.Since = time.Now().Round(0)
	return s.Save(plan)
}

// artifact is what is to be loaded.
func (j *Job) artifact(known maint.Patches) (Artifact, error) {
	if j.Request.Action != maint.PatchReload {
		return ReadArtifact(j.Request.File)
	}
	if known.Active == nil {
		return Artifact{}, maint.Problemf(maint.CodeNothing, "this host", "", "no livepatch is kept")
	}
	return j.Store.Read(*known.Active)
}

// baseline notes how all is before, and says what of that cannot be told.
func (j *Job) baseline(ctx context.Context, plan *intent) (problems []maint.Problem) {
	add := func(what string, err error) {
		problems = append(problems, *maint.Problemf(maint.CodeUnwell, "this host", "see that belay-kernel runs, which reads it (systemctl status belay-kernel.socket)",
			"%s cannot be read, so nobody could tell whether the host is well after it: %v", what, err))
	}
	var guests []maint.Guest
	var noGuests error
	var libvirt sync.WaitGroup
	libvirt.Go(func() { guests, noGuests = j.Guests(ctx) })
	var err error
	if plan.Taint, err = j.Tree.Taint(); err != nil {
		add("the kernel's taint", err)
	}
	if plan.LogSeq, err = j.Witness.LogEnd(ctx); err != nil {
		add("the kernel's log", err)
	}
	if libvirt.Wait(); noGuests != nil {
		problems = append(problems, *maint.Problemf(maint.CodeHypervisorDown, "libvirt", "systemctl status libvirtd virtqemud", "does not answer: %v", noGuests))
	}
	for _, g := range guests {
		if g.State == maint.GuestRunning {
			plan.Guests = append(plan.Guests, guest{g.Name, g.UUID, g.ID, !g.Persistent})
		}
	}
	return problems
}

// Load has the kernel take the livepatch in, unless it has, and sees its transition through.
func (j *Job) Load(ctx context.Context, s Scratch) error {
	var plan intent
	if _, err := s.Load(PhasePreflight, &plan); err != nil {
		return err
	}
	if err := j.rebooted(); err != nil {
		return err
	}
	var since begun
	if found, err := s.Load(PhaseLoad, &since); err != nil {
		return err
	} else if !found {
		since.At = time.Now().Round(0)
		if err := s.Save(since); err != nil {
			return err
		}
	}
	if err := j.bringIn(ctx, s, plan.Patch, since.At, j.Timing.Limit); err != nil {
		return err
	}
	since.Took = time.Since(since.At)
	return s.Save(since)
}

// loadWithin is far more than a kernel takes to load a module.
const loadWithin = time.Minute

// bringIn has a kept livepatch loaded, and waits until every task runs it.
func (h Host) bringIn(ctx context.Context, s Scratch, k maint.KeptPatch, since time.Time, limit time.Duration) error {
	p, err := h.Tree.Patch(k.Name)
	if err != nil {
		return err
	}
	if p == nil {
		a, err := h.Store.Read(k)
		if err != nil {
			return err
		}
		if a.SHA256() != k.SHA256 {
			return maint.Problemf(maint.CodePatchHash, "livepatch "+k.Name, "apply it again from its own files", "the copy in %s is not what was judged", h.Store.Dir)
		}
		if err := h.unload(ctx, k.Name); err != nil { // replaced before, or withdrawn
			return err
		}
		// Not given up half way: what comes of it must be to be seen below.
		loading, cancel := context.WithTimeout(context.WithoutCancel(ctx), loadWithin)
		loadErr := h.Kernel.Load(loading, a)
		cancel()
		if p, err = h.Tree.Patch(k.Name); err != nil {
			return err
		}
		if p == nil {
			return refused(k.Name, loadErr)
		}
	}
	if !is(*p, &k) {
		return maint.Problemf(maint.CodePatchStack, "livepatch "+k.Name, "see 'belay patch list'", "another livepatch of that name is loaded")
	}
	return h.await(ctx, s, k, since, limit, func(p *maint.LivePatch) (bool, error) {
		switch {
		case p == nil:
			return false, maint.Problemf(maint.CodePatchStack, "livepatch "+k.Name, "see 'belay patch list', and who else loads livepatches here", "has gone: somebody has disabled it, or put another in its place")
		case !p.Enabled:
			return false, maint.Problemf(maint.CodePatchStack, "livepatch "+k.Name, "see who else has to do with livepatches here", "somebody has disabled it")
		}
		return p.Whole(), nil
	})
}

// await looks at a livepatch until it is as wanted. It names those who may be waited for, as
// soon as that is known, then those who are, and gives up in time.
func (h Host) await(ctx context.Context, s Scratch, k maint.KeptPatch, since time.Time, limit time.Duration, over func(*maint.LivePatch) (bool, error)) error {
	tick := time.NewTicker(h.Timing.Poll)
	defer tick.Stop()
	asking, stop := context.WithCancel(ctx)
	defer stop()
	var sleepers chan []maint.KernelTask
	named := false
	for {
		p, err := h.Tree.Patch(k.Name)
		if err != nil {
			return err
		}
		if done, err := over(p); done || err != nil {
			return err
		}
		if sleepers == nil {
			sleepers = make(chan []maint.KernelTask, 1)
			go func() { sleepers <- h.forecast(asking, k) }()
		}
		waited := time.Since(since)
		if waited >= h.Timing.Name && !named || waited >= limit {
			tasks, err := h.Witness.Tasks(ctx, nil)
			who := names(tasks)
			if err != nil {
				who = "tasks that cannot be told: " + err.Error()
			}
			if waited >= limit {
				return maint.Problemf(maint.CodeStalled, "livepatch "+k.Name, "try again when they do something else, or use rung B3 or D; it is never forced",
					"its transition has not come to its end in %s; it waits for %s", limit, who)
			}
			named = true
			if err := s.Note("after %s the transition still waits for %s", waited.Round(time.Second), who); err != nil {
				return err
			}
		}
		select {
		case <-tick.C:
		case who := <-sleepers:
			if len(who) > 0 {
				if err := s.Note("these may hold up the transition: %s", names(who)); err != nil {
					return err
				}
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// unload removes the module of a livepatch that the kernel has no more; none is fine. The
// kernel lets go of it some time after the livepatch has gone.
func (h Host) unload(ctx context.Context, name string) error {
	tick := time.NewTicker(h.Timing.Poll)
	defer tick.Stop()
	deadline := time.Now().Add(h.Timing.Back)
	for {
		loaded, _, livepatch := h.Tree.Module(name)
		if !loaded {
			return nil
		}
		if !livepatch {
			return maint.Problemf(maint.CodePatchLoaded, "module "+name, "see lsmod", "is no livepatch, and is in the way")
		}
		err := h.Kernel.Unload(ctx, name)
		if again := err == nil || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOENT); !again || time.Now().After(deadline) {
			if loaded, _, _ := h.Tree.Module(name); !loaded {
				return nil
			}
			return maint.Problemf(maint.CodeKernelRefused, "module "+name, "rmmod "+name, "cannot be unloaded: %v", err)
		}
		if loaded, _, _ := h.Tree.Module(name); !loaded {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// takeOut disables a livepatch, or turns its transition round, and waits until it has gone.
func (h Host) takeOut(ctx context.Context, s Scratch, k maint.KeptPatch, limit time.Duration) error {
	var said error
	err := h.await(ctx, s, k, time.Now(), limit, func(p *maint.LivePatch) (bool, error) {
		switch {
		case p == nil:
			return true, nil
		case !is(*p, &k): // not ours
			return true, nil
		case p.Enabled: // EBUSY while another is in transition: again
			said = h.Kernel.Enable(ctx, k.Name, false)
		}
		return false, nil
	})
	if p := new(maint.Problem); said != nil && errors.As(err, &p) && p.Code == maint.CodeStalled {
		return maint.Problemf(maint.CodeStalled, p.Subject, p.Remedy, "%s; to disable it: %v", p.Reason, said)
	}
	return err
}

// Undo takes back what Load may have done: the host is as it was. A livepatch whose loading has
// ended with the host's, or failed by itself at boot, is not loaded by itself again.
func (j *Job) Undo(ctx context.Context, s Scratch) error {
	var plan intent
	if found, err := s.Load(PhasePreflight, &plan); err != nil || !found {
		return err
	}
	known := plan.Known
	if gone := j.rebooted(); gone != nil {
		known.NoReload = "the host went down while livepatch " + plan.Patch.Name + " was being loaded"
	} else {
		if err := j.takeOut(ctx, s, plan.Patch, j.Timing.Back); err != nil {
			return err
		}
		if err := j.unload(ctx, plan.Patch.Name); err != nil {
			return err
		}
		if plan.Before != nil {
			if err := j.bringIn(ctx, s, *plan.Before, time.Now(), j.Timing.Back); err != nil {
				return maint.Problemf(maint.CodePatchStack, "livepatch "+plan.Before.Name, "load it again (belay patch reload)", "was active before, and cannot be brought back: %v", err)
			}
		}
		if j.Request.Action == maint.PatchReload {
			known.NoReload = "livepatch " + plan.Patch.Name + " could not be loaded again"
		}
	}
	if err := j.Record(known, nil); err != nil {
		return err
	}
	return j.Store.Keep(known.Active)
}

// Finish unloads what was replaced or withdrawn, and forgets copies that are of no more use.
func (j *Job) Finish(ctx context.Context, s Scratch) error {
	var plan intent
	if _, err := s.Load(PhasePreflight, &plan); err != nil {
		return err
	}
	known := j.Known()
	for _, k := range []*maint.KeptPatch{plan.Before, &plan.Patch} {
		if k == nil || known.Active != nil && known.Active.Name == k.Name {
			continue
		}
		if err := j.unload(ctx, k.Name); err != nil {
			return err
		}
	}
	return j.Store.Keep(known.Active)
}
