package hoststep

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/boottime"
	"belay/agent/maint"
)

// Transients run services that exist only while they run.
type Transients interface {
	// Start starts a service and returns when it has said that it is ready
	// (Manager.StartTransientUnit, Type=notify).
	Start(ctx context.Context, t Transient) error
	// Kill sends SIGKILL to all of a unit's processes (Manager.KillUnit).
	Kill(ctx context.Context, unit string) error
}

// Jobs change and show systemd's units.
type Jobs interface {
	// Job asks for a job ("restart", "reload", "start", "stop"), which
	// replaces conflicting ones, and waits for its result: "done", "failed",
	// … (Manager.RestartUnit and so on, JobRemoved). ErrJobLost: it was asked
	// for and its result cannot be learnt any more.
	Job(ctx context.Context, unit, job string) (result string, err error)
	// Unit looks at a unit, which need not exist.
	Unit(ctx context.Context, unit string) (UnitState, error)
}

// Systemd is the systemd of this host.
type Systemd interface {
	Transients
	Jobs
}

// Transient is a service to be run once.
type Transient struct {
	Unit, Description string
	Program           string
	Args              []string // from argv[0] on
	StopTimeout       time.Duration
}

// UnitState is what systemd tells of a unit, in its own words.
type UnitState struct {
	Load, LoadError              string // LoadState "loaded", "not-found", "masked", …
	Active, Sub                  string // "active" "running", "failed" "failed", …
	Type, Result                 string // of a service: "notify", "success"
	CanStart, CanStop, CanReload bool
	Job                          uint32 // the number of the job that it waits for, 0: none
	Invocation                   string // another one each time it is started
}

// ErrJobLost: a job was asked for, and the connection over which its result
// was to come is lost.
var ErrJobLost = errors.New("the connection to systemd was lost")

// ErrUnknown: no step of that name was asked for.
var ErrUnknown = errors.New("no such step")

// Config says how steps are run. Of the zero value only Dir needs to be set.
type Config struct {
	Dir     string        // the steps' folder, on tmpfs; it must outlive belayd
	Grace   time.Duration // between SIGTERM and SIGKILL; 0 is 300 ms
	Wait    time.Duration // how long one that is prepared waits to be begun; 0 is 1 min
	Systemd Systemd       // nil: none runs here
	// Program is this program under the name by which systemd can start it;
	// "" is its path. It must come to Supervise (see SuperviseArg).
	Program string
	Log     *slog.Logger // nil: none
}

const (
	defaultGrace = 300 * time.Millisecond
	// defaultWait is long enough to arm a leash and stop all vCPUs.
	defaultWait = time.Minute
	// startLimit bounds the start of a supervisor.
	startLimit = 10 * time.Second
	// slack is how much longer than it can need a supervisor is waited for.
	slack = time.Second
)

// Runner runs steps. Its methods can be called at any time, from anywhere.
type Runner struct {
	cfg  Config
	anew sync.Mutex // held by relaunch
}

// New returns a runner of steps.
func New(cfg Config) *Runner {
	if cfg.Grace == 0 {
		cfg.Grace = defaultGrace
	}
	if cfg.Wait == 0 {
		cfg.Wait = defaultWait
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Runner{cfg: cfg}
}

var validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$`)

func (r *Runner) place(name string) (place, error) {
	if !validName.MatchString(name) {
		return "", fmt.Errorf("%q cannot be a step's name", name)
	}
	return place(filepath.Join(r.cfg.Dir, name)), nil
}

func (p place) name() string { return filepath.Base(string(p)) }

func unitOf(p place) string { return "belay-step-" + p.name() + ".service" }

// Prepare does ahead what takes time before a step can begin, and begins
// nothing: a command's supervisor is started, and waits for Run, or for End, or
// in the end for nobody. A unit's job needs none. An error leaves nothing
// behind.
func (r *Runner) Prepare(ctx context.Context, name string, step maint.HostStep) error {
	p, err := r.check(name, step)
	if err != nil || step.Unit != "" {
		return err
	}
	s, err := r.enter(ctx, p, step)
	if err != nil {
		return err
	}
	if err := r.launch(ctx, p, s); err != nil {
		r.over(ctx, p, request{Why: "it could not be prepared"}) // one that comes late finds that out
		return errors.Join(fmt.Errorf("cannot prepare the step: %w", err), p.remove())
	}
	return nil
}

// Run runs a step and returns when it has ended, soon after ctx's end at the
// latest: a command and all its descendants are ended then, which TimedOut
// (ctx's deadline) or Error (it was cancelled) tells. A unit's job is left to
// systemd.
//
// A step of a name begins once: when it was begun before, perhaps by a belayd
// that has died, Run waits for that one. One that was prepared begins at once.
// env are BELAY_ variables beside the fixed PATH, LANG and HOME.
func (r *Runner) Run(ctx context.Context, name string, step maint.HostStep, env []string) maint.StepRun {
	run, err := r.run(ctx, name, step, env)
	if err != nil {
		now := time.Now()
		run = maint.StepRun{Started: now, Ended: now, ExitCode: -1, Error: err.Error(), TimedOut: errors.Is(err, context.DeadlineExceeded)}
	}
	r.cfg.Log.Info("host step ended", "step", name, "exit_code", run.ExitCode, "timed_out", run.TimedOut, "err", run.Error)
	return run
}

func (r *Runner) run(ctx context.Context, name string, step maint.HostStep, env []string) (maint.StepRun, error) {
	p, err := r.check(name, step)
	if err != nil {
		return maint.StepRun{}, err
	}
	for _, v := range env {
		if !strings.HasPrefix(v, "BELAY_") || strings.HasPrefix(v, tokenVar+"=") || strings.Contains(v, "\x00") || !strings.Contains(v, "=") {
			return maint.StepRun{}, fmt.Errorf("cannot run the step with %q in its environment", v)
		}
	}
	if step.Timeout > 0 {
		limited, cancel := context.WithTimeout(ctx, step.Timeout)
		defer cancel()
		ctx = limited
	}
	s, err := r.enter(ctx, p, step)
	switch {
	case errors.Is(err, fs.ErrExist):
		if s, err = p.spec(); err != nil { // it was not begun then
			r.cfg.Log.Warn("a host step has no specification", "step", name, "err", err)
		}
		if s.Step.Unit != "" {
			return r.awaitJob(ctx, p, s), nil
		}
	case err != nil:
		return maint.StepRun{}, err
	case step.Unit != "":
		return r.runJob(ctx, p, s), nil
	default:
		if err := r.launch(ctx, p, s); err != nil {
			return r.notLaunched(ctx, p, s, err), nil
		}
	}
	return r.await(ctx, p, s, env), nil
}

// check gives the place of a step that can be asked for.
func (r *Runner) check(name string, step maint.HostStep) (place, error) {
	p, err := r.place(name)
	if err != nil {
		return "", err
	}
	if err := maint.Refuse("cannot run the step", Shape(step)); err != nil {
		return "", err
	}
	if step.Unit != "" && r.cfg.Systemd == nil {
		return "", fmt.Errorf("cannot run a job of unit %s: systemd does not run here", step.Unit)
	}
	return p, nil
}

// enter makes the place of a step; the error is fs.ErrExist when there is one.
func (r *Runner) enter(ctx context.Context, p place, step maint.HostStep) (spec, error) {
	if err := os.MkdirAll(r.cfg.Dir, 0o700); err != nil {
		return spec{}, err
	}
	r.clear()
	if err := os.Mkdir(string(p), 0o700); err != nil {
		return spec{}, err
	}
	if err := ctx.Err(); err != nil {
		return spec{}, errors.Join(fmt.Errorf(notBegun+"%w", err), os.Remove(string(p)))
	}
	return spec{Step: step, Token: rand.Text(), Asked: time.Now(), Wait: r.cfg.Wait, Grace: r.cfg.Grace}, nil
}

// clear removes what a belayd has left that died while it removed a place. What
// cannot be removed is in nobody's way.
func (r *Runner) clear() {
	left, _ := filepath.Glob(filepath.Join(r.cfg.Dir, goneMark+"*"))
	for _, dir := range left {
		_ = os.RemoveAll(dir)
	}
}

// launch starts the step's supervisor and returns when that waits to be told
// to begin.
func (r *Runner) launch(ctx context.Context, p place, s spec) error {
	if err := p.writeSpec(s); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	if r.cfg.Systemd == nil {
		return launchChild(ctx, p)
	}
	program := r.cfg.Program
	if program == "" {
		var err error
		if program, err = os.Executable(); err != nil {
			return err
		}
	}
	return r.cfg.Systemd.Start(ctx, Transient{
		Unit:        unitOf(p),
		Description: "Belay: a step on the host while guests are held",
		Program:     program,
		Args:        []string{supervisorName, SuperviseArg, string(p)},
		StopTimeout: s.Grace + killLimit + slack,
	})
}

func launchChild(ctx context.Context, p place) error {
	log, err := os.OpenFile(p.file("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	ready, say, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	defer say.Close()
	c := &exec.Cmd{
		Path:        "/proc/self/exe", // also when the file was replaced
		Args:        []string{supervisorName, SuperviseArg, string(p), "3"},
		Env:         []string{"PATH=" + searchPath, "LANG=C.UTF-8"},
		Dir:         "/",
		Stderr:      log,
		ExtraFiles:  []*os.File{say},
		SysProcAttr: &unix.SysProcAttr{Setsid: true},
	}
	if err := c.Start(); err != nil {
		return err
	}
	go func() { _ = c.Wait() }() // how it went is in the result, not in its exit code
	say.Close()
	defer context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Now()) })()
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		said, _ := os.ReadFile(p.file("log"))
		return fmt.Errorf("its supervisor ended at once: %s", strings.TrimSpace(valid(string(said[max(0, len(said)-keep):]))))
	}
	return nil
}

// relaunch starts a supervisor in the place of one that was killed before it was
// told to begin. The claim sees to it that only one of them ever begins.
func (r *Runner) relaunch(ctx context.Context, p place, s spec) error {
	r.anew.Lock()
	defer r.anew.Unlock()
	if _, asked := p.ask(ctx, request{Ask: askLook}); !p.deserted(asked) {
		return nil // somebody else has
	}
	r.cfg.Log.Warn("a host step's supervisor was killed before the step began: starting it again", "step", p.name())
	if err := os.Remove(p.file("sock")); err != nil {
		return err
	}
	return r.launch(ctx, p, s)
}

// notLaunched tells of a step whose supervisor may not have started; it sees
// to it that the step does not begin later, and waits for one that has begun.
func (r *Runner) notLaunched(ctx context.Context, p place, s spec, cause error) maint.StepRun {
	first, err := p.claim(claim{Time: time.Now()})
	if err == nil && !first {
		return r.await(ctx, p, s, nil)
	}
	r.dismiss(ctx, p)
	o := never(fmt.Sprintf("cannot start the step: %v", errors.Join(cause, err)))
	o.TimedOut = errors.Is(ctx.Err(), context.DeadlineExceeded)
	r.note(p, o)
	return o.StepRun
}

// note writes down how a step went that has no supervisor to do it.
func (r *Runner) note(p place, o outcome) {
	if err := p.writeResult(o); err != nil {
		r.cfg.Log.Error("cannot note how a host step went", "step", p.name(), "err", err)
	}
}

// await has a command begun, unless it was, waits for its end, and ends it with
// ctx.
func (r *Runner) await(ctx context.Context, p place, s spec, env []string) maint.StepRun {
	for range 3 { // its supervisor may just be starting, or be started again
		begin := request{Ask: askBegin, Env: env}
		if end, ok := ctx.Deadline(); ok {
			begin.Until = max(boottime.Now()+time.Until(end), time.Nanosecond)
		}
		o, asked := p.ask(ctx, begin)
		switch {
		case asked == nil:
			return o.StepRun
		case ctx.Err() != nil:
			q := request{Ask: askEnd, TimedOut: errors.Is(ctx.Err(), context.DeadlineExceeded), Why: fmt.Sprint(context.Cause(ctx))}
			return r.end(context.WithoutCancel(ctx), p, s, q).StepRun
		case p.deserted(asked):
			if err := r.relaunch(ctx, p, s); err != nil {
				return r.notLaunched(ctx, p, s, err)
			}
		case errors.Is(asked, fs.ErrNotExist): // it has ended, or does not listen yet
			if o, over := r.over(ctx, p, request{Why: "it has no supervisor"}); over {
				return o.StepRun
			}
		}
	}
	return r.end(context.WithoutCancel(ctx), p, s, request{Ask: askEnd, Why: "its supervisor does not answer"}).StepRun
}

// over tells how a command went that has ended, or that has not begun, and
// from now on never will, for the reason that q gives. Else its supervisor has
// begun it and listens.
func (r *Runner) over(ctx context.Context, p place, q request) (outcome, bool) {
	if o, ok, _ := p.result(); ok {
		return o, true
	}
	_, err := p.claim(claim{Time: time.Now()})
	c, ok, err2 := p.claimed()
	if err := errors.Join(err, err2); err != nil || !ok || c.PID != 0 {
		return outcome{}, false
	}
	r.dismiss(ctx, p)
	if o, ok, _ := p.result(); ok { // it had given up by itself
		return o, true
	}
	o := never(notBegun + q.Why)
	o.TimedOut = q.TimedOut
	r.note(p, o)
	return o, true
}

// dismiss has a supervisor end that waits to begin what never will. One that
// does not answer finds that out, or ends when it has waited long enough.
func (r *Runner) dismiss(ctx context.Context, p place) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookLimit)
	defer cancel()
	_, _ = p.ask(ctx, request{Ask: askEnd, Why: "it was given up"})
}

// end ends a command, by its supervisor where that answers.
func (r *Runner) end(ctx context.Context, p place, s spec, q request) outcome {
	if o, over := r.over(ctx, p, q); over {
		return o
	}
	asking, cancel := context.WithTimeout(ctx, s.Grace+killLimit+slack)
	defer cancel()
	if o, err := p.ask(asking, q); err == nil {
		return o
	}
	if o, ok, _ := p.result(); ok { // it has ended meanwhile
		return o
	}
	o := outcome{StepRun: maint.StepRun{Started: s.Asked, ExitCode: -1, TimedOut: q.TimedOut}}
	c, _, err := p.claimed()
	if err != nil || c.PID == 0 { // the step may have removed our files: its mark is left
		r.cfg.Log.Error("cannot find a host step's supervisor", "step", p.name(), "err", err)
	} else {
		o.Started = c.Time
	}
	o.Error, o.Stuck = r.force(ctx, p, s, c)
	o.Ended = time.Now()
	r.note(p, o)
	return o
}

// force ends what is left of a step whose supervisor does not answer.
func (r *Runner) force(ctx context.Context, p place, s spec, c claim) (text string, isStuck bool) {
	supervisor := process{pid: c.PID, start: c.Start}
	find := func() []process { return remains(s, supervisor) }
	left := endAll(find, nil, s.Grace)
	supervisor.signal(unix.SIGKILL) // after its descendants, which are found through it
	if len(left) == 0 {
		left = endAll(find, nil, 0) // those that were begun meanwhile
	}
	if r.cfg.Systemd != nil {
		ctx, cancel := context.WithTimeout(ctx, killLimit) // it may hang, and guests wait
		defer cancel()
		if err := r.cfg.Systemd.Kill(ctx, unitOf(p)); err != nil {
			r.cfg.Log.Warn("cannot kill a host step's unit", "step", p.name(), "err", err)
		}
	}
	text = "its supervisor was killed or does not answer: how the step went is not known; "
	if len(left) > 0 {
		return text + stuck(left), true
	}
	return text + "what was left of it was ended", false
}

// remains are the processes of a step, less its supervisor.
func remains(s spec, supervisor process) []process {
	var all []process
	if supervisor.is() {
		all = descendants(supervisor.pid)
	}
	if s.Token != "" {
		all = append(all, marked(s.Token)...)
	}
	return all
}
