package hoststep

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"belay/agent/maint"
)

// lookLimit bounds the wait for a supervisor that is asked how it goes.
const lookLimit = time.Second

// known is the folder of a step that was asked for.
func (r *Runner) known(name string) (place, error) {
	p, err := r.place(name)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(string(p)); errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("step %s: %w", name, ErrUnknown)
	} else if err != nil {
		return "", err
	}
	return p, nil
}

// Begun reports whether a step was ever begun.
func (r *Runner) Begun(name string) (bool, error) {
	p, err := r.known(name)
	if errors.Is(err, ErrUnknown) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	c, _, err := p.claimed()
	return c.PID != 0, err
}

// Look tells how a step goes, or went: Ended is zero while it runs, and so is
// Started before it begins. It wraps ErrUnknown when none of that name was
// asked for.
func (r *Runner) Look(ctx context.Context, name string) (maint.StepRun, error) {
	p, err := r.known(name)
	if err != nil {
		return maint.StepRun{}, err
	}
	if o, ok, err := p.result(); ok || err != nil {
		return o.StepRun, err
	}
	s, err := p.spec()
	if err != nil {
		return maint.StepRun{}, fmt.Errorf("cannot look at step %s: %w", name, err)
	}
	if s.Step.Unit != "" {
		return r.lookJob(ctx, s)
	}
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	now, asked := p.ask(ctx, request{Ask: askLook})
	if asked == nil {
		return now.StepRun, nil
	}
	if o, ok, err := p.result(); ok || err != nil { // it has ended meanwhile
		return o.StepRun, err
	}
	return maint.StepRun{Started: s.Asked, ExitCode: -1}, fmt.Errorf("cannot look at step %s: its supervisor does not answer: %w", name, asked)
}

// Leftover reports whether something runs, or may yet begin, of a step that
// an earlier belayd began. What a step that has ended left behind on purpose
// does not count.
func (r *Runner) Leftover(ctx context.Context, name string) (bool, error) {
	p, err := r.known(name)
	if errors.Is(err, ErrUnknown) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	ended, isEnded, err := p.result()
	if err != nil || isEnded && !ended.Stuck {
		return false, err
	}
	c, claimed, err := p.claimed()
	if err != nil {
		return false, err
	}
	if !claimed {
		return true, nil // a supervisor may be starting, or wait to be told to begin
	}
	s, err := p.spec()
	if err != nil {
		return false, err
	}
	if s.Step.Unit != "" && c.PID != 0 {
		return r.jobRuns(ctx, s)
	}
	supervisor := process{pid: c.PID, start: c.Start}
	return !isEnded && supervisor.is() || len(remains(s, supervisor)) > 0, nil
}

// End ends what runs of a step, and sees to it that one that has not begun
// never will; how it went is told by Look from then on. For a unit's job it
// waits until ctx ends. An error says that something may still run.
func (r *Runner) End(ctx context.Context, name string) error {
	p, err := r.known(name)
	if errors.Is(err, ErrUnknown) {
		return nil
	} else if err != nil {
		return err
	}
	s, err := p.spec()
	if err != nil { // it was not begun then
		r.cfg.Log.Warn("a host step has no specification", "step", name, "err", err)
	}
	if s.Step.Unit != "" {
		if err := r.endJob(ctx, p, s); err != nil {
			return fmt.Errorf("cannot end step %s: %w", name, err)
		}
		return nil
	}
	o, over := r.over(ctx, p, request{Why: "it was given up"})
	if !over {
		o = r.end(ctx, p, s, request{Ask: askEnd, Why: "by belayd, after its restart"})
	}
	if o.Stuck {
		return fmt.Errorf("cannot end step %s: %s", name, o.Error)
	}
	return nil
}

// Forget removes what is known of a step that has ended, once that is noted
// elsewhere.
func (r *Runner) Forget(name string) error {
	p, err := r.known(name)
	if errors.Is(err, ErrUnknown) {
		return nil
	} else if err != nil {
		return err
	}
	if _, ended, err := p.result(); err != nil {
		return err
	} else if !ended {
		return fmt.Errorf("cannot forget step %s: it has not ended", name)
	}
	return p.remove()
}
