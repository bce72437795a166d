package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/agent/run"
	"belay/patch/live"
)

// hold has guests held around a change, or does it right away if none of them is here.
func (x application) hold(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	c, id := x.change(step.Changes[0]), maint.StepOp(x.op.ID, step.N)
	if x.begun(id) { // its guests have been waited for
		_, err := x.through(ctx, id, nil)
		return err
	}
	if err := x.await(ctx, step); err != nil {
		return err
	}
	guests, stranger, err := x.here(ctx, step)
	switch {
	case err != nil:
		return err
	case stranger != nil:
		return stranger
	case c.Apply == nil:
		return maint.Problemf(maint.CodeManifest, "change "+c.Name, "write its apply", "has nothing that could be done")
	case len(guests) == 0:
		return x.service(ctx, s, step)
	}
	r := maint.HoldRequest{Guests: guests, Step: c.Apply.HostStep, Reason: x.reason(), Emergency: x.emergency(), MaxPause: x.longest(step.Guests)}
	if c.Verify != nil {
		r.Verify = &c.Verify.HostStep
	}
	if c.Undo != nil {
		r.Undo = &c.Undo.HostStep
	}
	_, err = x.through(ctx, id, func(edit func(*maint.Op)) (maint.Op, error) {
		if r.Guests, stranger, err = x.here(ctx, step); err != nil || stranger != nil {
			return maint.Op{}, cmp.Or[error](err, stranger)
		}
		if r.MaxPause, err = x.allowed(ctx, r.Guests, r.MaxPause); err != nil {
			return maint.Op{}, err
		}
		return x.a.hold(ctx, x.by(), r, edit)
	})
	return err
}

// unhold takes a change back for which guests were held: they are held once more. A hold
// that has failed has taken it back itself.
func (x application) unhold(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	c := x.change(step.Changes[0])
	if _, done := x.done(maint.StepOp(x.op.ID, step.N)); !done || c.Undo == nil {
		return x.takeBack(ctx, s, step)
	}
	here := func() (guests []string, err error) { // who has come since would feel it, too
		all, err := x.a.presentAtLast(x.a.life)
		for _, g := range all {
			if works(g) {
				guests = append(guests, g.UUID)
			}
		}
		return guests, err
	}
	if !x.begun(maint.UndoOp(x.op.ID, step.N, 1)) { // else guests may be held
		switch guests, err := here(); {
		case err != nil:
			return err
		case len(guests) == 0:
			return x.host(ctx, s, "undo", step, c.Undo)
		}
	}
	r := maint.HoldRequest{Step: c.Undo.HostStep, Reason: x.reason(), Emergency: x.goingBack(), MaxPause: x.longest(step.Guests)}
	return x.takeBackBy(step, func(edit func(*maint.Op)) (op maint.Op, err error) {
		if r.Guests, err = here(); err != nil {
			return op, err
		}
		return x.a.hold(x.a.life, x.by(), r, edit)
	})
}

// longest is for how long guests may be held: as planned, and the host's default at least.
func (x application) longest(uuids []string) time.Duration {
	d := x.a.cfg.Hold.MaxPause.Duration
	for _, g := range x.plan.Guests {
		if slices.Contains(uuids, g.UUID) && g.Pause != nil {
			d = max(d, g.Pause.High)
		}
	}
	return min(d, x.a.cfg.Hold.MaxPauseLimit.Duration)
}

// allowed is a pause that is no longer than any of the guests' policies allow: a step that
// hangs is ended by then, and the leash releases them.
func (x application) allowed(ctx context.Context, uuids []string, d time.Duration) (time.Duration, error) {
	guests, err := x.those(ctx, uuids)
	if err != nil {
		return 0, err
	}
	for _, g := range guests {
		p, err := x.a.policyOf(g)
		if err != nil {
			return 0, err
		}
		if p.MaxPause > 0 {
			d = min(d, max(config.MinPause, p.MaxPause))
		}
	}
	return d, nil
}

func (x application) reason() string {
	return cmp.Or(x.op.Reason, "update "+x.plan.Update.ID)
}

// replace puts a new QEMU under a guest, unless it is not there any more.
func (x application) replace(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	id := maint.StepOp(x.op.ID, step.N)
	if x.begun(id) { // it may be between two QEMUs, and not be here
		_, err := x.through(ctx, id, nil)
		return err
	}
	if err := x.await(ctx, step); err != nil {
		return err
	}
	guests, _, err := x.here(ctx, step)
	if err != nil {
		return err
	}
	if len(guests) == 0 {
		return s.Note("the guest does not run here any more")
	}
	_, err = x.through(ctx, id, x.renew(ctx, step.Guests[0], x.emergency()))
	return err
}

// renew begins to put a new QEMU under a guest.
func (x application) renew(ctx context.Context, uuid, emergency string) beginning {
	r := maint.ReplaceRequest{Guest: uuid, Reason: x.reason(), Emergency: emergency}
	for _, g := range x.plan.Guests {
		if g.UUID == uuid {
			r.Method = g.Method
		}
	}
	return func(edit func(*maint.Op)) (maint.Op, error) { return x.a.replace(ctx, x.by(), r, false, edit) }
}

// kexec starts another kernel under the guests that stay.
func (x application) kexec(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	id := maint.StepOp(x.op.ID, step.N)
	if x.begun(id) { // guests may be saved, and not be here
		_, err := x.through(ctx, id, nil)
		return err
	}
	if err := x.await(ctx, step); err != nil {
		return err
	}
	guests, stranger, err := x.here(ctx, step)
	switch {
	case err != nil:
		return err
	case stranger != nil:
		return stranger
	case len(guests) == 0:
		return x.reboot(ctx, s, step)
	}
	r := maint.KexecRequest{All: true, Reason: x.reason(), Emergency: x.emergency()} // those that are paused, too
	for _, name := range step.Changes {
		if c := x.change(name); c.Kind.BootsKernel() && c.Kernel != "" {
			r.Kernel, r.Initrd, r.Append = c.Kernel, c.Initrd, c.Append
		}
	}
	_, err = x.through(ctx, id, func(edit func(*maint.Op)) (maint.Op, error) { return x.a.kexec(ctx, x.by(), r, edit) })
	return err
}

// unkexec starts the kernel again that was there before.
func (x application) unkexec(step maint.PlanStep) error {
	op, done := x.done(maint.StepOp(x.op.ID, step.N))
	if !done || op.Kexeced == nil || op.Kexeced.Before == op.Kexeced.After {
		return nil
	}
	r := maint.KexecRequest{Kernel: "/boot/vmlinuz-" + op.Kexeced.Before, Initrd: "/boot/initrd.img-" + op.Kexeced.Before,
		All: true, Reason: x.reason(), Emergency: x.goingBack()}
	return x.takeBackBy(step, func(edit func(*maint.Op)) (maint.Op, error) { return x.a.kexec(x.a.life, x.by(), r, edit) })
}

// service changes the host where no guest can feel it.
func (x application) service(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	c := x.change(step.Changes[0])
	if step.Kind == maint.PlanService {
		if err := x.empty(ctx); err != nil {
			return err
		}
	}
	if c.Apply != nil {
		if err := x.host(ctx, s, "apply", step, c.Apply); err != nil {
			return err
		}
	}
	if c.Verify != nil {
		return x.host(ctx, s, "verify", step, c.Verify)
	}
	return nil
}

// empty is an error while a guest runs here.
func (x application) empty(ctx context.Context) error {
	guests, err := x.a.presentAtLast(ctx)
	if err != nil {
		return err
	}
	for _, g := range guests {
		if g.State.Active() {
			return maint.Problemf(maint.CodeUncovered, "guest "+g.Name, "move it away, and apply the plan again", "runs on %s, which was to be without guests", x.a.cfg.Host)
		}
	}
	return nil
}

// prepare sees that files are the right ones, and has the host make ready for a change.
func (x application) prepare(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	c := x.change(step.Changes[0])
	for _, f := range c.Artifacts {
		if err := x.a.checkArtifact(f); err != nil {
			return err
		}
	}
	if c.Prepare == nil {
		return nil
	}
	return x.host(ctx, s, "prepare", step, c.Prepare)
}

// unprepare takes back what was made ready, and has guests leave what came of it: each
// goes back to the QEMU that is there again.
func (x application) unprepare(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	c := x.change(step.Changes[0])
	if !x.ran(s, "prepare", step) {
		return nil
	}
	if c.Undo != nil && !x.tookBack(c) {
		if err := x.host(ctx, s, "undo", step, c.Undo); err != nil {
			return err
		}
	}
	var beside []maint.Problem
	for _, t := range x.plan.Steps {
		if t.Kind != maint.PlanReplace || !slices.Contains(t.Changes, c.Name) {
			continue
		}
		if _, done := x.done(maint.StepOp(x.op.ID, t.N)); !done {
			continue
		}
		err := x.takeBackBy(t, x.renew(x.a.life, t.Guests[0], x.goingBack()))
		if b := new(run.Beside); errors.As(err, &b) {
			beside, err = append(beside, b.Problems...), nil
		}
		if err != nil {
			return err
		}
	}
	if len(beside) > 0 {
		return &run.Beside{Problems: beside}
	}
	return nil
}

// tookBack reports whether a hold, of a step of the change, has taken it back.
func (x application) tookBack(c maint.Change) bool {
	return slices.ContainsFunc(x.plan.Steps, func(t maint.PlanStep) bool {
		if t.Kind != maint.PlanHold || !slices.Contains(t.Changes, c.Name) {
			return false
		}
		op, known := x.a.journal.Op(maint.StepOp(x.op.ID, t.N))
		undone := slices.ContainsFunc(x.a.journal.Ops(), func(o maint.Op) bool {
			return strings.HasPrefix(string(o.ID), string(maint.StepOp(x.op.ID, t.N))+"-undo") && o.Outcome == maint.OutcomeDone
		})
		return undone || known && op.Held != nil && op.Held.Undo != nil && op.Held.Undo.OK()
	})
}

// takeBack undoes a change that was made without holding anybody, if it was begun.
func (x application) takeBack(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	c := x.change(step.Changes[0])
	if c.Undo == nil || !x.ran(s, "apply", step) {
		return nil
	}
	return x.host(ctx, s, "undo", step, c.Undo)
}

// hostRun is what was done to the host in a step, written down as intent and as outcome.
type hostRun struct {
	Begun []string                 `json:"begun,omitempty"`
	Runs  map[string]maint.StepRun `json:"runs,omitempty"`
	Boot  string                   `json:"boot,omitempty"` // in which the host was to boot
	// Before is the livepatch that was active before.
	Before *maint.KeptPatch `json:"before,omitempty"`
}

// stepTimeout is for what is run while no guest is held, and has no time-out of its own: one
// that hangs would have the update never end.
const stepTimeout = time.Hour

// host runs a command or a unit's job on the host, once: one that was begun by a belayd that
// has died is waited for.
func (x application) host(ctx context.Context, s *run.Scratch, what string, step maint.PlanStep, do *maint.ChangeStep) error {
	var h hostRun
	if _, err := s.Load(step.Name(), &h); err != nil {
		return err
	}
	name := string(maint.StepOp(x.op.ID, step.N)) + "-" + what
	if r, ended := h.Runs[what]; ended {
		x.a.preserve.Steps.Forget(name) // a belayd that died may not have
		return failedRun(what, do.HostStep, r)
	}
	if !slices.Contains(h.Begun, what) {
		h.Begun = append(h.Begun, what)
		if err := s.Save(h); err != nil {
			return err
		}
	}
	timed := do.HostStep
	timed.Timeout = cmp.Or(timed.Timeout, stepTimeout)
	r := x.a.preserve.Steps.Run(ctx, name, timed, nil)
	if x.a.life.Err() != nil {
		return x.a.life.Err()
	}
	if h.Runs == nil {
		h.Runs = make(map[string]maint.StepRun)
	}
	h.Runs[what] = r
	if err := s.Save(h); err != nil {
		return err
	}
	x.a.preserve.Steps.Forget(name)
	return failedRun(what, do.HostStep, r)
}

// ran reports whether something may have been done to the host in a step.
func (x application) ran(s *run.Scratch, what string, step maint.PlanStep) bool {
	var h hostRun
	_, err := s.Load(step.Name(), &h)
	return err != nil || slices.Contains(h.Begun, what)
}

func failedRun(what string, do maint.HostStep, r maint.StepRun) error {
	if r.OK() {
		return nil
	}
	how := fmt.Sprintf("exit code %d", r.ExitCode)
	switch {
	case r.Error != "":
		how = r.Error
	case r.TimedOut:
		how = "its time was up"
	}
	name := do.Unit
	if name == "" {
		name = fmt.Sprintf("%q", do.Command)
	}
	return maint.Problemf(maint.CodeStep, what+" "+name, "see its output in the operation's record", "has failed: %s", how)
}

// reboot boots a host that is without guests.
func (x application) reboot(ctx context.Context, s *run.Scratch, step maint.PlanStep) error {
	var h hostRun
	if _, err := s.Load(step.Name(), &h); err != nil {
		return err
	}
	boot := x.a.preserve.Live.BootID
	if h.Boot != "" && h.Boot != boot {
		return s.Note("the host has booted")
	}
	if err := x.empty(ctx); err != nil {
		return err
	}
	if h.Boot = boot; boot == "" || boot == "unknown" {
		return maint.Problemf(maint.CodeFailed, "host "+x.a.cfg.Host, "see that /proc/sys/kernel/random/boot_id can be read", "cannot tell one boot from another")
	}
	if err := s.Save(h); err != nil {
		return err
	}
	name := string(maint.StepOp(x.op.ID, step.N)) + "-boot"
	defer x.a.preserve.Steps.Forget(name)
	if err := failedRun("boot", rebooting, x.a.preserve.Steps.Run(ctx, name, rebooting, nil)); err != nil && x.a.life.Err() == nil {
		return err
	}
	select { // systemd ends this belayd
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(rebootGrace):
		return maint.Problemf(maint.CodeFailed, "host "+x.a.cfg.Host, "see what holds its shutdown up (systemctl list-jobs, systemd-inhibit --list)", "has not gone down within %s", rebootGrace)
	}
}

var rebooting = maint.HostStep{Command: []string{"/usr/bin/systemctl", "reboot"}}

// rebootGrace is how long the host's services may take to end.
const rebootGrace = 10 * time.Minute

// cordon has the host take no guests in. A cordon that is there already is somebody else's.
func (x application) cordon(s *run.Scratch) error {
	if c := x.a.journal.Cordon(); c != nil && c.By != x.by() {
		if err := s.Save(*c); err != nil {
			return err
		}
		return s.Note("the host was cordoned before, by %s at %s", c.By, c.Since.Format(time.RFC3339))
	}
	_, err := x.a.Cordon(x.a.life, x.by(), x.reason())
	return err
}

// recordon has the host be cordoned by whom it was before the apply: to bring guests back lifts
// that.
func (x application) recordon(s *run.Scratch) error {
	if !slices.ContainsFunc(x.a.journal.Ops(), func(op maint.Op) bool { return op.Part == x.op.ID && op.Kind == maint.OpRestore }) {
		return nil
	}
	for _, step := range x.plan.Steps {
		var c maint.Cordon
		if step.Kind != maint.PlanCordon {
			continue
		}
		if was, err := s.Load(step.Name(), &c); err != nil || !was || x.a.journal.Cordon() != nil {
			return err
		}
		_, err := x.a.Cordon(x.a.life, c.By, c.Reason)
		return err
	}
	return nil
}

func (x application) uncordon() error {
	if c := x.a.journal.Cordon(); c != nil && c.By == x.by() {
		return x.a.uncordon(x.by())
	}
	return nil
}

// checkArtifact sees that a file is the one that was meant. Who else could change it is the
// file system's affair: a livepatch is judged once more by who loads it.
func (a *Agent) checkArtifact(f maint.Artifact) error {
	sum, err := live.CheckFile(f.Path, f.Signature, a.cfg.Patch.Keys)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return maint.Problemf(maint.CodeManifest, "file "+f.Path, "put it there", "is not there")
	case err != nil:
		return err
	case sum != f.SHA256:
		return maint.Problemf(maint.CodeManifest, "file "+f.Path, "fetch it again, or correct the manifest", "has the SHA-256 %s, and the manifest says %s", sum, f.SHA256)
	}
	return nil
}
