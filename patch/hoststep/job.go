package hoststep

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"belay/agent/maint"
)

const (
	defaultJob = "restart"
	// unitEvery is how often a unit is looked at whose job's result was lost.
	unitEvery = 100 * time.Millisecond
)

// settled says that a unit waits for no job and is on its way nowhere.
func (u UnitState) settled() bool {
	return u.Job == 0 && u.Active != "deactivating" && u.Active != "reloading" &&
		(u.Active != "activating" || u.Sub == "auto-restart") // it crashes again and again
}

// reached says that a unit is where a job was to bring it.
func (u UnitState) reached(job string) bool {
	if job == "stop" {
		return u.Active == "inactive" || u.Active == "failed"
	}
	return u.Active == "active" || u.Type == "oneshot" && u.Active == "inactive" && u.Result == "success"
}

func (u UnitState) String() string {
	text := fmt.Sprintf("%s (%s)", u.Active, u.Sub)
	if u.Result != "" && u.Result != "success" {
		text += ", result " + u.Result
	}
	if u.Job != 0 {
		text += fmt.Sprintf(", job %d waiting or running", u.Job)
	}
	return text
}

func jobOf(s maint.HostStep) string { return cmp.Or(s.Job, defaultJob) }

// runJob asks for a unit's job and waits for it.
func (r *Runner) runJob(ctx context.Context, p place, s spec) maint.StepRun {
	u, err := r.cfg.Systemd.Unit(ctx, s.Step.Unit)
	if err != nil {
		return r.notLaunched(ctx, p, s, err)
	}
	s.Before = u.Invocation
	if err := p.writeSpec(s); err != nil {
		return r.notLaunched(ctx, p, s, err)
	}
	self, _ := look(os.Getpid())
	if first, err := p.claim(claim{PID: self.pid, Start: self.start, Time: s.Asked}); err != nil || !first {
		return r.jobOver(p, s, -1, "", errors.Join(err, errors.New("the step was given up before it began")))
	}
	result, err := r.cfg.Systemd.Job(ctx, s.Step.Unit, jobOf(s.Step))
	switch {
	case ctx.Err() != nil:
		return r.jobLeft(ctx, p, s)
	case errors.Is(err, ErrJobLost):
		return r.awaitJob(ctx, p, s)
	case err != nil:
		return r.jobOver(p, s, -1, "", err)
	}
	u, err = r.cfg.Systemd.Unit(ctx, s.Step.Unit)
	if err != nil {
		return r.jobOver(p, s, -1, fmt.Sprintf("%s of %s: %s", jobOf(s.Step), s.Step.Unit, result), fmt.Errorf("how the unit is now is not known: %w", err))
	}
	return r.jobEnded(p, s, result, u)
}

// jobEnded tells of a job whose result is known.
func (r *Runner) jobEnded(p place, s spec, result string, u UnitState) maint.StepRun {
	text := fmt.Sprintf("%s of %s: %s; it is %s", jobOf(s.Step), s.Step.Unit, result, u)
	if result == "done" && u.reached(jobOf(s.Step)) {
		return r.jobOver(p, s, 0, text, nil)
	}
	return r.jobOver(p, s, -1, text, nil)
}

// jobOver tells, and notes, how a job went.
func (r *Runner) jobOver(p place, s spec, code int, text string, err error) maint.StepRun {
	run := maint.StepRun{Started: s.Asked, Ended: time.Now(), ExitCode: code, Output: text}
	if err != nil {
		run.Error = fmt.Sprintf("cannot %s %s: %v", jobOf(s.Step), s.Step.Unit, err)
	}
	r.note(p, outcome{StepRun: run})
	return run
}

// jobLeft tells of a job that is no longer waited for. It is not noted as
// ended: systemd goes on with it.
func (r *Runner) jobLeft(ctx context.Context, p place, s spec) maint.StepRun {
	run := maint.StepRun{Started: s.Asked, Ended: time.Now(), ExitCode: -1}
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookLimit)
	defer cancel()
	if u, err := r.cfg.Systemd.Unit(late, s.Step.Unit); err == nil {
		run.Output = fmt.Sprintf("%s of %s is left to systemd; it is %s", jobOf(s.Step), s.Step.Unit, u)
	}
	if run.TimedOut = errors.Is(ctx.Err(), context.DeadlineExceeded); !run.TimedOut {
		run.Error = fmt.Sprintf("no longer waited for: %v", context.Cause(ctx))
	}
	return run
}

// awaitJob waits for the end of a job whose result does not come to us: it
// was asked for by an earlier belayd, or the connection was lost.
func (r *Runner) awaitJob(ctx context.Context, p place, s spec) maint.StepRun {
	if o, ok, _ := p.result(); ok {
		return o.StepRun
	}
	if never, err := p.claim(claim{Time: time.Now()}); err == nil && never {
		return r.jobOver(p, s, -1, "", errors.New("the step was not begun"))
	}
	if c, _, err := p.claimed(); err != nil || c.PID == 0 {
		return r.jobOver(p, s, -1, "", errors.Join(err, errors.New("the step was given up before it began")))
	}
	if r.cfg.Systemd == nil {
		return r.jobOver(p, s, -1, "", errors.New("systemd does not run here"))
	}
	again := time.NewTicker(unitEvery)
	defer again.Stop()
	for {
		u, err := r.cfg.Systemd.Unit(ctx, s.Step.Unit)
		if err == nil && u.settled() {
			return r.jobFound(p, s, u)
		}
		select {
		case <-ctx.Done():
			return r.jobLeft(ctx, p, s)
		case <-again.C:
		}
	}
}

// jobFound concludes from a unit how its job went.
func (r *Runner) jobFound(p place, s spec, u UnitState) maint.StepRun {
	job := jobOf(s.Step)
	text := fmt.Sprintf("%s of %s: its result was lost; it is %s", job, s.Step.Unit, u)
	switch {
	case !u.reached(job):
		return r.jobOver(p, s, -1, text, nil)
	case job == "reload", job == "restart" && u.Invocation == s.Before:
		return r.jobOver(p, s, -1, text, errors.New("whether it took place is not known"))
	}
	return r.jobOver(p, s, 0, text, nil)
}

// jobRuns says that a job is not over.
func (r *Runner) jobRuns(ctx context.Context, s spec) (bool, error) {
	if r.cfg.Systemd == nil {
		return false, nil
	}
	u, err := r.cfg.Systemd.Unit(ctx, s.Step.Unit)
	return err == nil && !u.settled(), err
}

func (r *Runner) lookJob(ctx context.Context, s spec) (maint.StepRun, error) {
	run := maint.StepRun{Started: s.Asked, ExitCode: -1}
	if r.cfg.Systemd == nil {
		return run, errors.New("systemd does not run here")
	}
	u, err := r.cfg.Systemd.Unit(ctx, s.Step.Unit)
	if err != nil {
		return run, err
	}
	run.Output = fmt.Sprintf("%s of %s; it is %s", jobOf(s.Step), s.Step.Unit, u)
	return run, nil
}

// endJob waits for a job's end.
func (r *Runner) endJob(ctx context.Context, p place, s spec) error {
	r.awaitJob(ctx, p, s)
	if _, ended, err := p.result(); err != nil || ended {
		return err
	}
	return fmt.Errorf("the %s of %s goes on", jobOf(s.Step), s.Step.Unit)
}
