package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/agent/run"
	"belay/patch/preserve"
	"belay/patch/vmm"
)

// replaceTimeout bounds what comes before a guest's pause; from the point of no
// return on there is no deadline.
const replaceTimeout = 15 * time.Minute

// vmmHost gives package vmm this host's hypervisor in its own terms.
type vmmHost struct{ Hypervisor }

func (h vmmHost) Describe(ctx context.Context, uuid string) (vmm.Description, error) {
	x, err := h.GuestXML(ctx, uuid)
	return vmm.Description{Live: x.Live, Portable: x.Portable, Inactive: x.Inactive, CPU: x.CPU}, err
}

// Replace admits the replacement of a guest's QEMU, writes it down and starts it.
func (a *Agent) Replace(ctx context.Context, by string, r maint.ReplaceRequest) (maint.Op, error) {
	return a.replace(ctx, by, r, false, asAsked)
}

// checkReplace refuses what can be refused without knowing the guest.
func checkReplace(r maint.ReplaceRequest) error {
	switch {
	case r.Guest == "":
		return badRequest("guest", "name one", "is empty")
	case r.Method != "" && !slices.Contains(maint.VMMMethods, r.Method):
		return badRequest("method", fmt.Sprintf("choose one of %q, or leave the choice to Belay", maint.VMMMethods), "%.20q is none", r.Method)
	case r.MaxPause < 0 || r.MaxPause > maxTimeout:
		return badRequest("max_pause", fmt.Sprintf("choose one up to %s", maxTimeout), "%s is out of range", r.MaxPause)
	}
	return cmp.Or(checkReason(r.Reason), checkEmergency(r.Emergency))
}

// errNotInTwin is why nothing is begun for a guest that is to be brought home only.
var errNotInTwin = errors.New("it is not in the twin")

// replace is Replace. homeOnly says that nothing is to be begun, with the error
// errNotInTwin, for a guest that is not in the twin (any more): nobody has asked
// for a new QEMU under it. edit says more of the operation.
func (a *Agent) replace(ctx context.Context, by string, r maint.ReplaceRequest, homeOnly bool, edit func(*maint.Op)) (maint.Op, error) {
	what := "cannot put a new QEMU under guest " + r.Guest
	if err := checkReplace(r); err != nil {
		return maint.Op{}, err
	}
	g, where, err := a.toReplace(ctx, what, r.Guest)
	if err != nil {
		return maint.Op{}, err
	}
	if homeOnly && where != inTwin {
		return maint.Op{}, errNotInTwin
	}
	if err := a.unlessHeld(what, g); err != nil {
		return maint.Op{}, err
	}
	f := vmm.Facts{Guest: g}
	if where != inTwin {
		if f, err = vmm.Survey(ctx, vmmHost{a.hyp}, a.preserve.Places, g.UUID); err != nil {
			return maint.Op{}, a.cannotAsk(what, err)
		}
	}
	switch {
	case where == inTwin: // an earlier one has left it there: it is brought home
		r.Method = maint.VMMBounce
	case f.Guarded != "" && !g.State.Active(): // an earlier one is gone on with, by its own method
		r.Method = maint.VMMInPlace
	case r.Method == "":
		choices, err := a.choices(ctx, f)
		if err != nil {
			return maint.Op{}, a.cannotAsk(what, err)
		}
		best, err := vmm.Choose(g.Name, choices, "", r.MaxPause)
		if err != nil {
			return maint.Op{}, err
		}
		r.Method = best.Method
	}
	now := time.Now()
	op := maint.Op{ID: newOpID("vmm", now), Kind: maint.OpReplace, Guest: g.Name, GuestUUID: g.UUID, By: by,
		Reason: r.Reason, Deadline: now.Add(replaceTimeout), Replace: &r}
	edit(&op)
	if where != inTwin && g.State.Active() { // one that is to go on feels nothing that it has not felt
		a.tell(&op)
	}
	return a.submitIf(ctx, what, op, func() error { // no operation can begin to bring it home meanwhile
		if e, there := a.findElsewhere(g); homeOnly && (!there || e.Where != inTwin) {
			return errNotInTwin
		}
		return nil
	})
}

// ReplaceChoices says what each method would cost a guest.
func (a *Agent) ReplaceChoices(ctx context.Context, guest string) ([]maint.VMMChoice, error) {
	what := "cannot plan a new QEMU for guest " + guest
	g, where, err := a.toReplace(ctx, what, guest)
	switch {
	case err != nil:
		return nil, err
	case a.unlessHeld(what, g) != nil:
		return nil, a.unlessHeld(what, g)
	case where == inTwin: // there is one way, home
		return []maint.VMMChoice{{Method: maint.VMMBounce, MemoryBytes: g.MemoryBytes}}, nil
	}
	f, err := vmm.Survey(ctx, vmmHost{a.hyp}, a.preserve.Places, g.UUID)
	if err != nil {
		return nil, a.cannotAsk(what, err)
	}
	choices, err := a.choices(ctx, f)
	if err != nil {
		return nil, a.cannotAsk(what, err)
	}
	return choices, nil
}

// choices are all methods, those that are possible first, by their pause.
func (a *Agent) choices(ctx context.Context, f vmm.Facts) ([]maint.VMMChoice, error) {
	f.NoBounce = true // asked of the twin itself
	choices := vmm.Choices(f)
	if a.preserve.Twin != nil && f.Guest.State.Active() {
		for _, m := range []maint.VMMMethod{maint.VMMPrewarmed, maint.VMMBounce} {
			c, err := a.visitChoice(ctx, f.Guest, m)
			if err != nil {
				return nil, err
			}
			choices = append(choices, c)
		}
	}
	vmm.Order(choices)
	return choices, nil
}

// isVisit: the guest goes by way of the twin.
func isVisit(m maint.VMMMethod) bool { return m == maint.VMMBounce || m == maint.VMMPrewarmed }

// replaceSteps wires the phases of a replacement to the runner.
func (a *Agent) replaceSteps(op maint.Op) []run.Step {
	if isVisit(op.Replace.Method) && a.preserve.Twin != nil {
		return a.visitSteps(op)
	}
	l := &pauseLeash{a: a, op: op, leash: a.preserve.Leash, hyp: a.hyp}
	r := &vmm.Replacement{Op: op.ID, Guest: op.Guest, UUID: op.GuestUUID, Method: op.Replace.Method, MaxPause: op.Replace.MaxPause,
		Host: vmmHost{a.hyp}, Places: a.preserve.Places, Log: a.log.With("op", op.ID),
		BeforePause: l.arm, PointOfNoReturn: l.pass}
	return a.unlessCalm(vmm.PhaseSwap, a.told(op, vmm.PhaseSwap, []run.Step{
		{Name: vmm.PhasePreflight,
			Do: func(ctx context.Context, s *run.Scratch) error { return r.Preflight(ctx, s) }},
		{Name: vmm.PhasePrepare,
			Do:   func(ctx context.Context, s *run.Scratch) error { return r.Prepare(ctx, s) },
			Undo: func(ctx context.Context, s *run.Scratch) error { return r.Unprepare(ctx, s) }},
		{Name: vmm.PhaseSwap, Commit: true,
			Do: func(ctx context.Context, s *run.Scratch) error {
				return l.around(ctx, s, func() error { return unlessBetween(op, r.Swap(ctx, s)) })
			},
			Undo: func(ctx context.Context, s *run.Scratch) error {
				return l.around(ctx, s, func() error { return unlessBetween(op, r.Back(ctx, s)) })
			}},
		{Name: vmm.PhaseProve, Do: func(ctx context.Context, s *run.Scratch) error {
			result, err := r.Measure(ctx, s)
			if err != nil {
				return err
			}
			result.Total = time.Since(op.Started)
			clock := a.clockAfter(ctx, op, result.Lost())
			result.Clock = &clock
			return errors.Join(s.Record(maint.RecReplaced, result), r.Prove(ctx, s))
		}},
		{Name: vmm.PhaseFinish, Do: func(ctx context.Context, s *run.Scratch) error {
			if err := r.Finish(ctx, s); err != nil {
				return err
			}
			return a.clockLeft(ctx, op.ID)
		}},
	}))
}

// unlessBetween gives err, as one that ends the operation without any undo
// where the guest is between two QEMUs.
func unlessBetween(op maint.Op, err error) error {
	if errors.Is(err, vmm.ErrStuck) {
		return &run.Stuck{Problem: maint.AsProblem(err, maint.CodeUnverified, "guest "+op.Guest)}
	}
	return err
}

// clockAfter puts the guest's clock right, which stood still in the pause.
func (a *Agent) clockAfter(ctx context.Context, op maint.Op, lost time.Duration) maint.ClockReport {
	ctx, cancel := context.WithTimeout(ctx, clockWait)
	defer cancel()
	g, err := a.hyp.Guest(ctx, op.GuestUUID)
	if err != nil {
		return maint.ClockReport{Guest: op.Guest, UUID: op.GuestUUID, State: maint.ClockUnsynchronised, Reason: err.Error()}
	}
	r := a.preserve.Clocks.Restore(ctx, g, lost)
	a.metrics.clock(r)
	return r
}

// clockLeft is the problem of a guest whose clock its replacement has left behind. It is told
// when all else is done: nothing of that is left undone for a clock.
func (a *Agent) clockLeft(ctx context.Context, id maint.OpID) error {
	op, _ := a.journal.Op(id)
	v := op.Replaced
	if v == nil || v.Clock == nil {
		return nil
	}
	behind := v.Clock.Behind(v.Lost())
	if behind == nil {
		return nil
	}
	if g, err := a.hyp.Guest(ctx, op.GuestUUID); err == nil && g.Agent == maint.AgentNone {
		return nil
	}
	return behind
}

// pauseLeash has a guest resumed that is paused in order to leave its QEMU, if
// belayd dies before it has left, or cannot resume it.
type pauseLeash struct {
	a      *Agent
	op     maint.Op
	leash  preserve.Leash
	hyp    Hypervisor    // in which the guest is paused
	suffix string        // of the operation's ID, where it has several leashes
	line   preserve.Line // nil while none is armed
	events []maint.LeashEvent
	told   []maint.LeashEvent // by a leash that was left: it tells them again
}

func (l *pauseLeash) name() maint.OpID { return l.op.ID + maint.OpID(l.suffix) }

// arm is called right before the pause.
func (l *pauseLeash) arm(ctx context.Context) error {
	g, err := l.hyp.Guest(ctx, l.op.GuestUUID)
	if err != nil {
		return err
	}
	if err := l.letGo(ctx); err != nil { // of an earlier pause, which is over
		return err
	}
	l.line, err = l.leash.Arm(ctx, preserve.Order{Op: l.name(), MaxPause: l.a.cfg.Hold.MaxPause.Duration,
		Guests: []preserve.Member{{Guest: g.Name, UUID: g.UUID, ID: g.ID, Agent: g.Agent}}})
	if err != nil {
		l.line = nil
		return maint.Problemf(maint.CodeLeash, "leash", "see 'belay doctor' for rung B", "cannot be armed, so nothing was paused: %v", err)
	}
	return nil
}

// pass is called when the guest is about to leave its QEMU: from now on nobody
// must resume it there. An error says that somebody may, or has.
func (l *pauseLeash) pass(ctx context.Context) error {
	before := len(l.events)
	if err := l.letGo(ctx); err != nil {
		return err
	}
	for _, e := range l.events[before:] {
		if e.Kind == maint.LeashReleased {
			return errors.New("the leash has resumed the guest")
		}
	}
	return nil
}

// letGo ends the leash. When it gives an error the leash has the guest as before.
func (l *pauseLeash) letGo(ctx context.Context) error {
	if l.line == nil {
		return nil
	}
	l.line.Mark(preserve.Left, l.op.GuestUUID) // or one that is at it goes on trying
	events, err := l.line.Disarm(ctx)
	if err != nil {
		l.line.Mark(preserve.Paused, l.op.GuestUUID)
		return fmt.Errorf("the leash does not let go: %w", err)
	}
	l.line = nil
	l.take(events)
	return nil
}

// take notes events that were not noted before.
func (l *pauseLeash) take(events []maint.LeashEvent) {
	for _, e := range events {
		if !slices.ContainsFunc(l.told, func(o maint.LeashEvent) bool {
			same := o.Time.Equal(e.Time)
			o.Time = e.Time
			return same && o == e
		}) {
			l.events = append(l.events, e)
		}
	}
}

// around does what pauses the guest. A leash of before keeps a guest that stands
// still, until that is over; in the end one stays only with such a guest.
func (l *pauseLeash) around(ctx context.Context, s *run.Scratch, f func() error) error {
	if err := l.takeUp(ctx); err != nil {
		return err
	}
	failure := f()
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), leashWait)
	defer cancel()
	recs, err := leashRecords(l.rest(end, failure))
	return errors.Join(failure, err, s.Append(recs...))
}

// takeUp takes up the leash of an earlier belayd, or one that was left behind. It
// is kept as long as the guest may stand still in its QEMU: one that has left it,
// or was about to, was marked so.
func (l *pauseLeash) takeUp(ctx context.Context) (err error) {
	l.line, err = l.leash.Attach(ctx, l.name())
	switch {
	case err != nil:
		l.line = nil
		return fmt.Errorf("cannot take up the leash of an earlier belayd: %w", err)
	case l.line == nil:
		return nil
	}
	mark := l.line.Marks()[l.op.GuestUUID]
	if held := mark == preserve.Armed || mark == preserve.Paused; held && l.stands(ctx) {
		return nil
	}
	return l.letGo(ctx)
}

// stands reports whether the guest may be paused in the QEMU that the leash is
// of: it has one and is not seen to run.
func (l *pauseLeash) stands(ctx context.Context) bool {
	g, err := l.hyp.Guest(ctx, l.op.GuestUUID)
	switch {
	case errors.Is(err, maint.ErrNoGuest):
		return false
	case err != nil:
		return true
	}
	return g.State.Active() && !maint.View{Guest: &g}.Running()
}

// leashWait bounds the disarming of a leash that has nothing more to do.
const leashWait = 10 * time.Second

// rest disarms what is still armed, and gives all that was done. After a failure
// that leaves the guest paused the leash is left with it: it goes on trying when
// belayd has ended, or has given up.
func (l *pauseLeash) rest(ctx context.Context, failure error) []maint.LeashEvent {
	if l.line != nil && failure != nil && l.stands(ctx) {
		l.a.log.Warn("the leash is left with a guest that may be paused", "op", l.op.ID, "guest", l.op.Guest)
		l.leave()
	}
	if err := l.letGo(ctx); err != nil {
		l.a.log.Error("a leash could not be disarmed", "op", l.op.ID, "err", err)
		l.line.Mark(preserve.Left, l.op.GuestUUID) // it runs, or has gone
		l.leave()
	}
	events := l.events
	l.events = nil
	return events
}

func (l *pauseLeash) leave() {
	events := l.line.Leave()
	l.take(events)
	l.line, l.told = nil, events
}
