package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"belay/agent/boottime"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/agent/run"
	"belay/hypervisor"
	"belay/patch/live"
	"belay/patch/live/remote"
)

// Live is what rung A needs of the host: its kernel, and which boot this is.
type Live struct {
	Host      live.Host
	Microcode live.Microcode
	BootID    string
	// QEMU gives the process of a guest, 0 if it cannot be told; Process tells it from
	// another of that number.
	QEMU    func(guest string) int
	Process func(guest string) (live.QEMU, error)
	// UserSpace patches QEMUs, and Containers keeps copies of what with.
	UserSpace  live.UserSpace
	Containers live.Store
}

// newHelper is belay-kernel; nil: belayd does by itself what that would.
func newHelper(cfg config.Config) *remote.Client {
	if cfg.Patch.Helper == "" {
		return nil
	}
	return &remote.Client{Socket: cfg.Patch.Helper}
}

// newLive is the real host's.
func newLive(cfg config.Config, hyp *hypervisor.Host, helper *remote.Client) Live {
	timing := live.DefaultTiming
	timing.Soak = cfg.Patch.Soak.Duration
	l := Live{QEMU: hyp.QEMUProcess, Process: live.Tree{}.Process, Containers: live.Store{Dir: filepath.Join(cfg.StateDir, "qemu-live"), Ext: ".so"},
		UserSpace: live.Libpulp{Keys: cfg.Patch.Keys, Dir: live.DefaultContainers}, Host: live.Host{Store: live.Store{Dir: filepath.Join(cfg.StateDir, "live")}, Keys: cfg.Patch.Keys, Timing: timing}}
	if l.BootID, _ = boottime.ID(); l.BootID == "" {
		l.BootID = "unknown" // no boot is told from another
	}
	var kernel remote.Host = live.Direct{Keys: cfg.Patch.Keys}
	if helper != nil {
		kernel, l.UserSpace = helper, helper
	}
	l.Host.Kernel, l.Host.Witness, l.Microcode = kernel, kernel, kernel
	return l
}

// patchGrace is what a change of the running host has beside its soak and the transition.
const patchGrace = 5 * time.Minute

// qemuGrace is what there is for patching all QEMUs.
const qemuGrace = time.Hour

// Patches says what is changed of the running host.
func (a *Agent) Patches(ctx context.Context) (maint.PatchView, error) {
	v, err := a.preserve.Live.Host.View(ctx, a.journal.Patches())
	if err == nil && v.AutoOff == "" && !a.cfg.Patch.AutoLoad {
		v.AutoOff = "patch.auto_load is off"
	}
	return v, err
}

// Coverage says whether the running kernel is mended of a change.
func (a *Agent) Coverage(ctx context.Context, change string) (maint.Coverage, error) {
	if change == "" {
		return maint.Coverage{}, badRequest("change", "name one, such as CVE-2024-1086", "is not named")
	}
	v, err := a.Patches(ctx)
	if err != nil {
		return maint.Coverage{}, err
	}
	return maint.CoverByUpdates(maint.Cover(v, change), v, a.journal.Ops()), nil
}

// InspectPatch judges a livepatch's files.
func (a *Agent) InspectPatch(ctx context.Context, file string) (maint.PatchFile, error) {
	return a.preserve.Live.Host.Inspect(ctx, file, a.journal.Patches())
}

// Patch admits a change of the running host, writes it down and starts it.
func (a *Agent) Patch(ctx context.Context, by string, r maint.PatchRequest) (maint.Op, error) {
	return a.patch(ctx, by, r, asAsked)
}

// patch is Patch of an operation that edit says more of.
func (a *Agent) patch(ctx context.Context, by string, r maint.PatchRequest, edit func(*maint.Op)) (maint.Op, error) {
	what := "cannot " + string(r.Action)
	if r.Boot != "" {
		return maint.Op{}, badRequest("boot", "leave it out", "is not yours to say")
	}
	switch r.Action {
	case maint.PatchApply:
		if !filepath.IsAbs(r.File) {
			return maint.Op{}, badRequest("file", "give the absolute path of a module on this host", "%q is no such path", r.File)
		}
		r.Name = strings.TrimSuffix(filepath.Base(r.File), ".ko")
	case maint.PatchRevert:
		if !live.IsModuleName(r.Name) {
			return maint.Op{}, badRequest("name", "see 'belay patch list'", "%q is no name of a livepatch", r.Name)
		}
	case maint.PatchReload:
		active := a.journal.Patches().Active
		if active == nil {
			return maint.Op{}, refuse(what, maint.Problemf(maint.CodeNothing, "this host", "", "no livepatch is kept"))
		}
		r.Name = active.Name
	case maint.PatchMicrocode:
		r.Name = "microcode"
	case maint.PatchRestart:
		if r.Name == "" {
			return maint.Op{}, badRequest("name", "name a unit, such as libvirtd.service", "is not given")
		}
	case maint.PatchQEMU:
		switch {
		case !filepath.IsAbs(r.File):
			return maint.Op{}, badRequest("file", "give the absolute path of a container on this host", "%q is no such path", r.File)
		case r.All == (len(r.Guests) > 0):
			return maint.Op{}, badRequest("guests", "name guests, or ask for all", "it is not clear which are meant")
		}
		r.Name = strings.TrimSuffix(filepath.Base(r.File), ".so")
	default:
		return maint.Op{}, badRequest("action", fmt.Sprintf("choose one of %v", maint.PatchActions), "%q is none", r.Action)
	}
	if err := checkReason(r.Reason); err != nil {
		return maint.Op{}, err
	}
	r.Boot = a.preserve.Live.BootID
	now := time.Now()
	t := a.preserve.Live.Host.Timing
	op := maint.Op{ID: newOpID("patch", now), Kind: maint.OpPatch, By: by, Reason: r.Reason, Patch: &r,
		Deadline: now.Add(patchGrace + t.Limit + t.Soak)}
	if r.Action == maint.PatchQEMU { // one after the other, of which each takes well below a second
		op.Deadline = now.Add(qemuGrace)
	}
	edit(&op)
	return a.submit(ctx, what, op)
}

// patchSteps wires the phases of rung A to the runner.
func (a *Agent) patchSteps(op maint.Op) []run.Step {
	result := patched
	switch op.Patch.Action {
	case maint.PatchMicrocode:
		u := &live.MicrocodeUpdate{Host: a.preserve.Live.Host, Microcode: a.preserve.Live.Microcode}
		return []run.Step{
			{Name: live.PhasePreflight, Do: func(ctx context.Context, s *run.Scratch) error { return u.Preflight(ctx, s) }},
			{Name: live.PhaseMicrocode, Do: func(ctx context.Context, s *run.Scratch) error { u.Record = result(s); return u.Load(ctx, s) }},
		}
	case maint.PatchRestart:
		c := &live.Component{Op: op.ID, Unit: op.Patch.Name, Job: op.Patch.Job, Allowed: a.cfg.Patch.Components, Steps: a.preserve.Steps,
			Guests: a.hyp.Guests, QEMU: a.preserve.Live.QEMU, Subscribe: a.hyp.Subscribe, Wait: time.Minute}
		return []run.Step{
			{Name: live.PhasePreflight, Do: func(ctx context.Context, s *run.Scratch) error { return c.Preflight(ctx, s) }},
			{Name: live.PhaseRestart, Commit: true, Do: func(ctx context.Context, s *run.Scratch) error { return c.Restart(ctx, s) }},
			{Name: live.PhaseProve, Do: func(ctx context.Context, s *run.Scratch) error { c.Record = result(s); return c.Prove(ctx, s) }},
		}
	}
	if op.Patch.Action == maint.PatchQEMU {
		return a.qemuSteps(op)
	}
	// with has a phase of a livepatch's job, which records through the step's scratch.
	with := func(phase func(*live.Job, context.Context, live.Scratch) error) func(context.Context, *run.Scratch) error {
		return func(ctx context.Context, s *run.Scratch) error {
			return phase(&live.Job{Host: a.preserve.Live.Host, Request: *op.Patch, Boot: a.preserve.Live.BootID, Known: a.journal.Patches,
				Record: func(p maint.Patches, r *maint.PatchResult) error { return recordPatches(s, p, r) },
				Guests: a.hyp.Guests, Health: a.health(op.ID)}, ctx, s)
		}
	}
	if op.Patch.Action == maint.PatchRevert {
		return []run.Step{
			{Name: live.PhasePreflight, Do: with((*live.Job).PreflightRevert)},
			{Name: live.PhaseWithdraw, Do: with((*live.Job).Withdraw), Undo: with((*live.Job).UndoWithdraw), Commit: true},
			{Name: live.PhaseFinish, Do: with((*live.Job).Finish)},
		}
	}
	return []run.Step{
		{Name: live.PhasePreflight, Do: with((*live.Job).Preflight)},
		{Name: live.PhaseLoad, Do: with((*live.Job).Load), Undo: with((*live.Job).Undo)},
		{Name: live.PhaseSoak, Do: with((*live.Job).Soak), Commit: true},
		{Name: live.PhaseFinish, Do: with((*live.Job).Finish)},
	}
}

// patched journals what was done.
func patched(s *run.Scratch) func(maint.PatchResult) error {
	return func(r maint.PatchResult) error { return s.Record(maint.RecPatched, r) }
}

// qemuSteps are those of a livepatch of QEMUs. A QEMU that may be inconsistent ends it as it
// is: nothing more is touched.
func (a *Agent) qemuSteps(op maint.Op) []run.Step {
	with := func(phase func(*live.QEMUPatch, context.Context, live.Scratch) error) func(context.Context, *run.Scratch) error {
		return func(ctx context.Context, s *run.Scratch) error {
			j := a.qemuPatch(*op.Patch)
			j.Record = patched(s)
			err := phase(j, ctx, s)
			if live.Unsure(err) {
				return &run.Stuck{Problem: maint.AsProblem(err, maint.CodeQEMUUnsure, "QEMU")}
			}
			return err
		}
	}
	return []run.Step{
		{Name: live.PhasePreflight, Do: with((*live.QEMUPatch).Preflight)},
		{Name: live.PhaseQEMU, Do: with((*live.QEMUPatch).Perform), Undo: with((*live.QEMUPatch).Undo)},
	}
}

// qemuPatch is a livepatch of QEMUs as it is asked for.
func (a *Agent) qemuPatch(r maint.PatchRequest) *live.QEMUPatch {
	l := a.preserve.Live
	return &live.QEMUPatch{UserSpace: l.UserSpace, Store: l.Containers, Keys: l.Host.Keys, Request: r, Guests: a.hyp.Guests, Process: l.Process, Answers: a.qemuAnswers}
}

// qemuAnswers asks a guest's QEMU for its state: its main loop runs.
func (a *Agent) qemuAnswers(ctx context.Context, uuid string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	_, err := a.hyp.QMP(ctx, uuid, "query-status", nil)
	return err
}

// recordPatches journals what is kept from now on, and what was done for it, all or nothing.
func recordPatches(s *run.Scratch, p maint.Patches, r *maint.PatchResult) error {
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	recs := []maint.Record{{Kind: maint.RecPatches, Data: data}}
	if r != nil {
		data, err := json.Marshal(r)
		if err != nil {
			return err
		}
		recs = append(recs, maint.Record{Kind: maint.RecPatched, Data: data})
	}
	return s.Append(recs...)
}

// health runs the configured command; nil: there is none.
func (a *Agent) health(op maint.OpID) func(context.Context) error {
	if len(a.cfg.Patch.Health) == 0 {
		return nil
	}
	return func(ctx context.Context) error {
		name := string(op) + "-health"
		if _, err := a.preserve.Steps.End(ctx, name); err != nil { // of an earlier belayd
			return err
		}
		a.preserve.Steps.Forget(name)
		defer a.preserve.Steps.Forget(name)
		r := a.preserve.Steps.Run(ctx, name, maint.HostStep{Command: a.cfg.Patch.Health, Timeout: a.cfg.Patch.HealthTimeout.Duration}, nil)
		if r.OK() {
			return nil
		}
		return fmt.Errorf("%s ends with %d: %s%s", strings.Join(a.cfg.Patch.Health, " "), r.ExitCode, r.Error, r.Output)
	}
}

// byBoot is who asks for what is loaded again after a boot.
const byBoot = "boot"

// reloadPatch loads the livepatch again that was active, if the host has booted its kernel
// since. It waits for operations that stand in the way; one that the host went down in ends
// first, and has the last word on whether anything is loaded by itself.
func (a *Agent) reloadPatch(ctx context.Context) {
	for ctx.Err() == nil {
		changed := a.journal.Changed()
		open := false
		for _, op := range a.journal.Ops() {
			open = open || op.State != maint.OpEnded
		}
		if !open {
			wanted, err := a.wantsReload(ctx)
			if err == nil && !wanted {
				// belay-kernel is there, then, when it is needed; that it cannot be had is doctor's to say.
				if kernel := a.preserve.Live.Host.Witness; kernel != nil {
					_, _ = kernel.LogEnd(ctx)
				}
				return
			}
			if err == nil {
				err = a.canReload(ctx)
			}
			if err != nil {
				a.log.Warn("a livepatch is to be loaded again, and waits", "err", err)
				pause(ctx, reloadRetry)
				continue
			}
			op, err := a.Patch(ctx, byBoot, maint.PatchRequest{Action: maint.PatchReload, Reason: "this host has booted"})
			if err == nil {
				a.log.Info("loading the livepatch again that was active before the boot", "op", op.ID)
				return
			}
			a.log.Warn("cannot load the livepatch again", "err", err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// reloadRetry is how long what comes up at boot beside belayd is given before it is asked again.
const reloadRetry = 2 * time.Second

// canReload asks those whom a livepatch needs: at boot they may come later than belayd.
func (a *Agent) canReload(ctx context.Context) error {
	if _, err := a.hyp.Guests(ctx); err != nil {
		return err
	}
	_, err := a.preserve.Live.Host.Witness.LogEnd(ctx)
	return err
}

// wantsReload reports whether a livepatch is kept for the kernel that runs, and is not there.
func (a *Agent) wantsReload(ctx context.Context) (bool, error) {
	if a.journal.Patches().Active == nil {
		return false, nil
	}
	v, err := a.Patches(ctx)
	if err != nil || v.Active == nil {
		return false, err
	}
	for _, p := range v.Loaded {
		if p.Kept != nil {
			return false, nil
		}
	}
	switch {
	case v.AutoOff != "":
		a.log.Warn("a livepatch is kept, and not loaded", "patch", v.Active.Name, "reason", v.AutoOff)
		return false, nil
	case v.Active.Release != v.Release || v.Active.Version != v.Version:
		a.log.Info("the livepatch that is kept is for another kernel", "patch", v.Active.Name)
		return false, nil
	}
	return true, nil
}

// ofPatches is what is wrong with livepatches here.
func (a *Agent) ofPatches() (cs []maint.Condition) {
	known := a.journal.Patches()
	if known.NoReload != "" {
		cs = append(cs, maint.Condition{Code: maint.CodeUnwell, Text: "no livepatch is loaded by itself: " + known.NoReload,
			Remedy: "find out why the host went down (journalctl -k -b -1), then: belay patch reload, or belay patch revert"})
	}
	return cs
}
