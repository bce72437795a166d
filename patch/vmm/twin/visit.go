package twin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// Looker sees one libvirt's guests.
type Looker interface {
	Guest(ctx context.Context, nameOrUUID string) (maint.Guest, error)
	Describe(ctx context.Context, uuid string) (Description, error)
}

// Description is a guest's XML in the forms that a visit needs.
type Description struct {
	Portable string // what a migration sends, with secrets
	Inactive string // the definition, "" for a transient guest
}

// Mover moves a guest by live migration. Migrate goes on when its ctx ends.
type Mover interface {
	DryRun(ctx context.Context, uuid string, p maint.MoveParams) error
	Migrate(ctx context.Context, uuid string, p maint.MoveParams) error
	AbortJob(ctx context.Context, uuid string) error
}

// Teller tells how a copy gets on, and what a finished one was like.
type Teller interface {
	Job(ctx context.Context, uuid string) (maint.Job, error)
	CompletedJob(ctx context.Context, uuid string) (maint.Job, error)
}

// QEMU is a guest's QEMU.
type QEMU interface {
	QMP(ctx context.Context, uuid, command string, args any) (json.RawMessage, error)
	// QuitMigrated ends a QEMU that is in "postmigrate", and no other.
	QuitMigrated(ctx context.Context, uuid string) error
	// QuitIncoming ends a QEMU that is in "inmigrate", and no other: it waits
	// for a guest, and none has run in it.
	QuitIncoming(ctx context.Context, uuid string) error
}

// Starter starts a guest's QEMU, and its vCPUs.
type Starter interface {
	CreatePaused(ctx context.Context, xml string) error
	// Resume is a success for a guest that runs.
	Resume(ctx context.Context, uuid string) error
}

// Side is home's libvirt or the twin's; see package hypervisor.
type Side interface {
	Looker
	Mover
	Teller
	QEMU
	Starter
}

// Daemon is the twin as a visit needs it.
type Daemon interface {
	Start(ctx context.Context) error
	Stop(ctx context.Context) error
	// Guests are the names of those in it, whether or not its libvirtd answers.
	Guests() ([]string, error)
}

// Ways are those on which a guest crosses.
type Ways interface {
	// Route says how libvirt moves a guest, out or back.
	Route(uuid string, out bool) maint.MoveParams
	// Incoming is the socket on which a QEMU waits for its guest.
	Incoming(uuid string) string
}

// Second is the twin, and what there is of this host for it; [Twin] is one.
type Second interface {
	Daemon
	Ways
	Ground
}

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
	PhaseOut       = "out"
	PhaseBack      = "back"
	PhaseFinish    = "finish"
)

// ErrStuck marks an error after which there must be no automatic undo: the guest
// is not at home and could not be brought there, or nobody knows where it is. The
// twin must not be stopped. Back may be tried again.
var ErrStuck = errors.New("the guest is not at home")

// Visit takes one guest to the twin and back. The phases are its methods. Two
// visits of one guest must not be made at once.
type Visit struct {
	Op     maint.OpID
	Guest  string // name
	UUID   string
	Method maint.VMMMethod // maint.VMMBounce or maint.VMMPrewarmed
	// MaxPause is how long a blackout may become for a guest that writes its
	// memory faster than it is copied; 0 is 2 s. libvirt's 300 ms are tried
	// first.
	MaxPause time.Duration
	// Limit bounds one way of a live migration; 0 is a minute and a second
	// for each 64 MiB.
	Limit time.Duration

	Home Side
	Away Side // the twin's libvirt
	Twin Second
	Log  *slog.Logger
	// Progress is told the statistics of a running copy.
	Progress func(maint.Job)

	// BeforePause, unless nil, is called right before the pause of a prewarmed
	// crossing, with the side (at home or in the twin) whose QEMU, and no other,
	// has to be resumed if belayd dies or hangs. QEMU before 10.0 refuses that
	// once the second has loaded the state, as that one has the disks' locks
	// then: the guest stands until the next belayd resumes it there. An error
	// calls the crossing off.
	BeforePause func(ctx context.Context, atHome bool) error
	// PointOfNoReturn, unless nil, is called right before the guest is resumed
	// on the other side, in the pause. When it has returned nil nobody may
	// resume the first QEMU. An error (somebody has) calls the crossing off.
	PointOfNoReturn func(ctx context.Context) error

	pace *pace // tests shorten it
}

// pace has all that is waited for.
type pace struct {
	ask     time.Duration // one question
	settle  time.Duration // a guest that is between the two, or a daemon that does not answer
	silent  time.Duration // home's libvirt, which may be held up for long
	look    time.Duration // the first pause before looking again, doubled up to 2 s
	poll    time.Duration // statistics of a copy
	home    time.Duration // how long a guest that home refuses is tried to be brought there
	again   time.Duration // after the first refusal, doubled up to 30 s
	load    time.Duration // the loading of the devices' state
	migrate time.Duration // the first QEMU's part of a prewarmed crossing
}

func (v *Visit) paced() pace {
	if v.pace != nil {
		return *v.pace
	}
	return pace{ask: 10 * time.Second, settle: time.Minute, silent: 10 * time.Minute, look: 50 * time.Millisecond,
		poll: 500 * time.Millisecond, home: 15 * time.Minute, again: time.Second, load: 30 * time.Second, migrate: 15 * time.Second}
}

// leg is one way of a visit.
type leg struct {
	out      bool
	from, to Side
	// For people: "at home", "in the twin".
	fromAt, toAt string
	// The names of the sides in orders for the hooks.
	fromSide, toSide string
	params           maint.MoveParams
}

func (v *Visit) leg(out bool) leg {
	l := leg{out: out, from: v.Home, to: v.Away, fromAt: "at home", toAt: "in the twin", fromSide: atHome, toSide: inTwin}
	if !out {
		l.from, l.to, l.fromAt, l.toAt, l.fromSide, l.toSide = l.to, l.from, l.toAt, l.fromAt, l.toSide, l.fromSide
	}
	l.params = v.Twin.Route(v.UUID, out)
	return l
}

// before is what preflight writes down: how the guest was at home.
type before struct {
	// Adopted: it is in the twin already, see adopt.
	Adopted   bool   `json:"adopted,omitempty"`
	XML       string `json:"xml,omitempty"`
	Autostart bool   `json:"autostart"`
	Memory    uint64 `json:"memory_bytes"`
	QEMU      string `json:"qemu"` // version
}

// crossing is what Out and Back write down.
type crossing struct {
	// Begun counts the crossings begun; Over says that the last one is known
	// to have ended: a job seen then is somebody else's.
	Begun int  `json:"begun"`
	Over  bool `json:"over,omitempty"`
	// Pause is the standstill of the one that succeeded; OutPause is, in what
	// Back writes down, that of the way out, where Out was killed before it
	// could.
	Pause    time.Duration `json:"pause_ns"`
	OutPause time.Duration `json:"out_pause_ns,omitempty"`
}

func (c crossing) ours() bool { return c.Begun > 0 && !c.Over }

// Preflight asks everything that can be asked before anything is done, and
// returns a *maint.Refusal with every reason why not. A guest that is in the twin
// already, left there by an earlier visit, is only to be brought home.
func (v *Visit) Preflight(ctx context.Context, s Scratch) error {
	ctx, cancel := context.WithTimeout(ctx, v.paced().settle)
	defer cancel()
	switch guests, err := v.Twin.Guests(); {
	case err != nil:
		return err
	case slices.Contains(guests, v.Guest):
		return v.adopt(ctx, s)
	}
	b, sv, err := v.survey(ctx)
	if err != nil {
		return err
	}
	if err := maint.Refuse("cannot put a new QEMU under guest "+v.Guest, sv.Problems); err != nil {
		return err
	}
	if err := s.Note("while it is away it is kept from starting twice by %s", strings.Join(sv.guard.By, ", ")); err != nil {
		return err
	}
	return s.Save(b)
}

// Choice tells a planner whether this way is possible and what it costs.
func (v *Visit) Choice(ctx context.Context) (maint.VMMChoice, error) {
	_, sv, err := v.survey(ctx)
	return sv.VMMChoice, err
}

// unfit is why a guest in this state is not to be taken anywhere.
func (v *Visit) unfit(g maint.Guest) (problems []maint.Problem) {
	add := func(code maint.Code, remedy, format string, args ...any) {
		problems = append(problems, *maint.Problemf(code, "guest "+v.Guest, remedy, format, args...))
	}
	switch {
	case !g.State.Active():
		add(maint.CodeGuestOff, "it gets a new QEMU when it is started", "is %s", g.State)
	case g.State == maint.GuestPaused:
		add(maint.CodeGuestPaused, "resume it first (virsh resume), if whoever paused it agrees", "is paused (%s), and Belay did not pause it", g.Reason)
	case g.State != maint.GuestRunning && g.State != maint.GuestBlocked:
		add(maint.CodeGuestState, "wait until it runs normally", "is %s (%s)", g.State, g.Reason)
	}
	if g.Job != "" {
		add(maint.CodeBusy, "wait for the job to end, or abort it (virsh domjobabort)", "has a %s job in progress", g.Job)
	}
	return problems
}

// Out starts the twin and takes the guest there. It is idempotent. On an error
// that is not ErrStuck the guest is at home. When ctx ends a copy is cancelled;
// when detach ends, belayd is going down, it is left running for the next Out.
func (v *Visit) Out(ctx, detach context.Context, s Scratch) error {
	if adopted, err := v.adopted(s); err != nil || adopted {
		return err
	}
	if err := v.Twin.Start(ctx); err != nil {
		return err
	}
	var c crossing
	if _, err := s.Load(PhaseOut, &c); err != nil {
		return err
	}
	l := v.leg(true)
	if v.Method == maint.VMMPrewarmed {
		return v.swap(ctx, detach, l, s, &c)
	}
	return v.carry(ctx, detach, l, s, &c)
}

// Back brings the guest home, wherever an Out, or an earlier Back, has left it.
// It is Out's undo too. It does not give up for an abort, only for detach's end:
// a guest that home refuses is tried again for a quarter of an hour. Then, and
// when it is not known where the guest is, the error is ErrStuck.
func (v *Visit) Back(detach context.Context, s Scratch) error {
	switch adopted, err := v.adopted(s); {
	case err != nil:
		return err
	case adopted:
		return v.Fetch(detach, s)
	}
	var c crossing
	if _, err := s.Load(PhaseBack, &c); err != nil {
		return err
	}
	if c.Begun == 0 { // else the way out has been settled before
		home, pause, err := v.settleOut(detach, s)
		if err != nil || home {
			return err
		}
		c.OutPause = pause
	}
	return v.bring(detach, s, &c, v.Method != maint.VMMPrewarmed)
}

// bring brings the guest home, trying again when home refuses it.
func (v *Visit) bring(detach context.Context, s Scratch, c *crossing, live bool) error {
	p := v.paced()
	l := v.leg(false)
	for begun, again := time.Now(), p.again; ; again = min(2*again, 30*time.Second) {
		err := v.Twin.Start(detach)
		if err == nil && !live {
			err = v.swap(detach, detach, l, s, c)
			var stayed *stayedError
			if errors.As(err, &stayed) && detach.Err() == nil {
				live = true
				if err := s.Note("it is brought home by live migration, as its QEMU could not be exchanged in place: %v", err); err != nil {
					return err
				}
				continue
			}
		} else if err == nil {
			err = v.carry(detach, detach, l, s, c)
		}
		switch {
		case err == nil, errors.Is(err, ErrStuck), errors.Is(err, errOff), detach.Err() != nil:
			return err
		case time.Since(begun) > p.home:
			return v.stuck(err)
		}
		v.Log.Warn("a guest cannot be brought home from the twin; it runs there, and is tried again", "guest", v.Guest, "err", err)
		if !wait(detach, again) {
			return detach.Err()
		}
	}
}

// settleOut ends what is left of the way out and reports whether the guest is
// at home, or how long it stood still on its way.
func (v *Visit) settleOut(detach context.Context, s Scratch) (home bool, pause time.Duration, err error) {
	var c crossing
	begun, err := s.Load(PhaseOut, &c)
	if err != nil {
		return false, 0, err
	}
	if !begun || c.Begun == 0 {
		return true, 0, nil // it was never asked to go
	}
	if home, err := v.awaitTwin(detach); err != nil || home {
		return home, 0, err
	}
	s = unsaved{s} // it would be Out's
	gone, cancel := context.WithCancel(detach)
	cancel()
	l := v.leg(true)
	if v.Method == maint.VMMPrewarmed {
		err = v.swap(gone, detach, l, s, &c)
	} else {
		err = v.carry(gone, detach, l, s, &c)
	}
	var stayed *stayedError
	switch {
	case err == nil:
		return false, c.Pause, nil
	case errors.As(err, &stayed):
		return true, 0, nil
	}
	return false, 0, err
}

// unsaved takes notes but saves nothing.
type unsaved struct{ Scratch }

func (unsaved) Save(any) error { return nil }

// awaitTwin has the twin run, or finds that it is not needed: the guest runs at
// home, and cannot be on its way.
func (v *Visit) awaitTwin(detach context.Context) (home bool, err error) {
	p := v.paced()
	for begun, again := time.Now(), p.again; ; again = min(2*again, 30*time.Second) {
		err := v.Twin.Start(detach)
		if err == nil {
			return false, nil
		}
		if here := v.view(detach, v.Home); here != nil && here.Running() && here.Guest.Job != jobOut && here.Guest.Reason != reasonResumed {
			return true, v.retry(detach, func(ctx context.Context) error { return ignoreShared(ctx, v.Home, v.UUID, false) })
		}
		if time.Since(begun) > p.home {
			return false, v.stuck(err)
		}
		if !wait(detach, again) {
			return false, detach.Err()
		}
	}
}

// stuck is a guest that stays in the twin.
func (v *Visit) stuck(err error) error {
	return fmt.Errorf("%w: %w", ErrStuck, maint.Problemf(maint.CodeUnverified, "guest "+v.Guest,
		fmt.Sprintf("mend what is named, then have belay bring it home (belay replace-vmm %s); do not stop the twin, nor start the guest at home: it would be a second one on the same disks", maint.ShellWord(v.Guest)),
		"runs in the twin and could not be brought home: %v", err))
}

// stayedError says that a crossing was not made: the guest is where it was.
type stayedError struct{ problem *maint.Problem }

func (e *stayedError) Error() string { return e.problem.Error() }
func (e *stayedError) Unwrap() error { return e.problem }

func (v *Visit) stayed(l leg, code maint.Code, remedy, format string, args ...any) error {
	reason := fmt.Sprintf(format, args...)
	return &stayedError{maint.Problemf(code, "guest "+v.Guest, remedy, "%s; it runs %s as before", reason, l.fromAt)}
}

// Finish sees that the guest is defined at home as it was, stops the twin if no
// other guest is in it, and gives the result. A difference in the definition is
// noted: somebody else has made it.
func (v *Visit) Finish(ctx context.Context, s Scratch) (maint.VMMResult, error) {
	r := maint.VMMResult{Guest: v.Guest, UUID: v.UUID, Method: v.Method}
	var b before
	if _, err := s.Load(PhasePreflight, &b); err != nil {
		return r, err
	}
	r.OldQEMU = b.QEMU
	if b.Adopted {
		r.Attempts = -1 // Fetch counts the one that whoever left it there may have begun
	}
	for _, phase := range []string{PhaseOut, PhaseBack} {
		var c crossing
		if _, err := s.Load(phase, &c); err != nil {
			return r, err
		}
		if c.Begun > 0 {
			r.Pauses++
			r.Attempts += c.Begun
			r.Pause = max(r.Pause, c.Pause, c.OutPause)
		}
	}
	ask, cancel := context.WithTimeout(ctx, v.paced().ask)
	defer cancel()
	var err error
	if r.NewQEMU, err = version(ask, v.Home, v.UUID); err != nil {
		if err := s.Note("the version of its new QEMU is not known: %v", err); err != nil {
			return r, err
		}
	}
	if err := v.compare(ask, b, s); err != nil {
		return r, err
	}
	if err := v.Twin.Stop(ctx); err != nil {
		return r, s.Note("the twin is left running: %v", err)
	}
	return r, nil
}

// compare notes what is not as it was at home.
func (v *Visit) compare(ctx context.Context, b before, s Scratch) error {
	g, err := v.Home.Guest(ctx, v.UUID)
	if err != nil {
		return fmt.Errorf("cannot look at guest %s: %w", v.Guest, err)
	}
	d, err := v.Home.Describe(ctx, v.UUID)
	if err != nil {
		return fmt.Errorf("cannot describe guest %s: %w", v.Guest, err)
	}
	if d.Inactive != b.XML {
		if err := s.Note("its definition at home has been changed meanwhile, not by Belay"); err != nil {
			return err
		}
	}
	if g.Autostart != b.Autostart {
		return s.Note("its autostart was %t and is %t, which is not Belay's doing", b.Autostart, g.Autostart)
	}
	return nil
}

// version is a QEMU's own.
func version(ctx context.Context, q QEMU, uuid string) (string, error) {
	text, err := q.QMP(ctx, uuid, "query-version", nil)
	if err != nil {
		return "", err
	}
	var r struct {
		QEMU struct{ Major, Minor, Micro int } `json:"qemu"`
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d.%d.%d", r.QEMU.Major, r.QEMU.Minor, r.QEMU.Micro), nil
}
