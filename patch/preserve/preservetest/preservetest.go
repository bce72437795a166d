// Package preservetest has, in memory, what a hold works with beside libvirt:
// leashes that hold and fire, host steps, clocks.
package preservetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"belay/agent/maint"
	"belay/patch/preserve"
)

// Silence is how long a leash waits for its belayd.
const Silence = 3 * time.Second

// Leashes are the leashes of one host. They outlive a belayd that is killed.
type Leashes struct {
	// Host is what they release guests with.
	Host preserve.VCPUs
	// Refuse, if set, has every arming fail.
	Refuse error
	// Alive says whether belayd lives: a dead one does not renew.
	Alive func() bool

	mu    sync.Mutex
	armed map[maint.OpID]*leash
}

type leash struct {
	all      *Leashes
	order    preserve.Order
	deadline time.Time
	marks    map[string]preserve.Mark
	events   []maint.LeashEvent
	fired    bool
	stop     chan struct{}
	lost     chan struct{}
}

// Arm implements preserve.Leash.
func (ls *Leashes) Arm(ctx context.Context, o preserve.Order) (preserve.Line, error) {
	if ls.Refuse != nil {
		return nil, ls.Refuse
	}
	if strings.ContainsFunc(string(o.Op), func(r rune) bool {
		return !strings.ContainsRune("-_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", r)
	}) {
		return nil, fmt.Errorf("%q is no name of an operation", o.Op) // as package leash has it
	}
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.armed == nil {
		ls.armed = make(map[maint.OpID]*leash)
	}
	if ls.armed[o.Op] != nil {
		return nil, fmt.Errorf("the leash of %s is armed already", o.Op)
	}
	l := &leash{all: ls, order: o, deadline: time.Now().Add(o.MaxPause), marks: make(map[string]preserve.Mark),
		stop: make(chan struct{}), lost: make(chan struct{})}
	for _, m := range o.Guests {
		if m.Left != "" {
			l.marks[m.UUID] = preserve.Left
		}
	}
	l.note(maint.LeashEvent{Kind: maint.LeashArmed})
	ls.armed[o.Op] = l
	go l.hold()
	return &line{l}, nil
}

// Attach implements preserve.Leash.
func (ls *Leashes) Attach(_ context.Context, op maint.OpID) (preserve.Line, error) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if l := ls.armed[op]; l != nil {
		return &line{l}, nil
	}
	return nil, nil
}

// Armed are the operations whose leash is armed.
func (ls *Leashes) Armed() []maint.OpID {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	return slices.Collect(maps.Keys(ls.armed))
}

// hold waits for the deadline, or for belayd's silence, and then releases.
func (l *leash) hold() {
	tick := time.NewTicker(Silence / 10)
	defer tick.Stop()
	heard := time.Now()
	for {
		select {
		case <-l.stop:
			return
		case <-tick.C:
		}
		if l.all.Alive == nil || l.all.Alive() {
			heard = time.Now()
		}
		if time.Now().Before(l.deadline) && time.Since(heard) < Silence {
			continue
		}
		l.fire()
	}
}

func (l *leash) fire() {
	l.all.mu.Lock()
	if !l.fired {
		l.fired = true
		l.note(maint.LeashEvent{Kind: maint.LeashFired, Text: "deadline or silence"})
	}
	ours := l.ours()
	l.all.mu.Unlock()
	for _, m := range ours {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		state, reason, err := l.all.Host.State(ctx, m.UUID)
		if err == nil && state == maint.GuestPaused && reason == "user" && l.all.Host.Resume(ctx, m.UUID) == nil {
			l.all.mu.Lock()
			l.marks[m.UUID] = preserve.Released
			l.note(maint.LeashEvent{Kind: maint.LeashReleased, Guest: m.Guest, UUID: m.UUID, Way: "libvirt"})
			l.all.mu.Unlock()
		}
		cancel()
	}
}

func (l *leash) ours() (ours []preserve.Member) {
	for _, m := range l.order.Guests {
		if k := l.marks[m.UUID]; k != preserve.Left && k != preserve.Released {
			ours = append(ours, m)
		}
	}
	return ours
}

func (l *leash) note(e maint.LeashEvent) {
	e.Time = time.Now()
	l.events = append(l.events, e)
}

// line implements preserve.Line.
type line struct{ l *leash }

func (n *line) Deadline() time.Time { return n.l.deadline }

func (n *line) Check() error {
	select {
	case <-n.l.lost:
		return errors.New("it is lost")
	default:
		return nil
	}
}

func (n *line) Mark(m preserve.Mark, uuid string) {
	n.l.all.mu.Lock()
	defer n.l.all.mu.Unlock()
	n.l.marks[uuid] = m
}

func (n *line) Marks() map[string]preserve.Mark {
	n.l.all.mu.Lock()
	defer n.l.all.mu.Unlock()
	marks := make(map[string]preserve.Mark)
	for _, m := range n.l.order.Guests {
		marks[m.UUID] = cmp.Or(n.l.marks[m.UUID], preserve.Armed)
	}
	return marks
}

func (n *line) Lost() <-chan struct{} { return n.l.lost }

func (n *line) Disarm(context.Context) ([]maint.LeashEvent, error) {
	l := n.l
	l.all.mu.Lock()
	defer l.all.mu.Unlock()
	if l.all.armed[l.order.Op] == l {
		delete(l.all.armed, l.order.Op)
		close(l.stop)
		l.note(maint.LeashEvent{Kind: maint.LeashDisarmed})
	}
	return slices.Clone(l.events), nil
}

func (n *line) Leave() []maint.LeashEvent {
	n.l.all.mu.Lock()
	defer n.l.all.mu.Unlock()
	return slices.Clone(n.l.events)
}

// Lose has the leash of an operation be gone for good.
func (ls *Leashes) Lose(op maint.OpID) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.armed[op]
	delete(ls.armed, op)
	close(l.stop)
	close(l.lost)
}

// Steps are host steps: words that say what they do.
//
//	true             succeed at once
//	sleep DURATION   take that long
//	false            fail
//	exit CODE        end with that
//	stuck DURATION   take that long, and cannot be ended
//
// A unit's job succeeds at once.
type Steps struct {
	// Did, if set, is told the name of every step as it is run.
	Did func(name string)
	// Refuse, if set, has every step fail to be prepared.
	Refuse error

	mu       sync.Mutex
	prepared map[string]bool // and neither run nor ended
	runs     map[string]*maint.StepRun
	ends     map[string]context.CancelFunc
	ran      map[string]int // how often begun
}

// Check implements preserve.Steps.
func (s *Steps) Check(_ context.Context, step maint.HostStep) []maint.Problem {
	if step.Unit != "" {
		return nil
	}
	if len(step.Command) == 0 || !slices.Contains([]string{"true", "false", "sleep", "stuck", "exit", "/bin/sh"}, step.Command[0]) {
		return []maint.Problem{{Code: maint.CodeBadRequest, Subject: strings.Join(step.Command, " "), Reason: "is no program"}}
	}
	return nil
}

// Prepare implements preserve.Steps.
func (s *Steps) Prepare(_ context.Context, name string, _ maint.HostStep) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Refuse != nil {
		return s.Refuse
	}
	if s.prepared == nil {
		s.prepared = make(map[string]bool)
	}
	s.prepared[name] = true
	return nil
}

// Prepared are the names of the steps that wait to be run or ended, sorted.
func (s *Steps) Prepared() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.prepared))
}

// Run implements preserve.Steps.
func (s *Steps) Run(ctx context.Context, name string, step maint.HostStep, _ []string) maint.StepRun {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	run := &maint.StepRun{Started: time.Now(), ExitCode: -1, Error: "has not ended"}
	s.mu.Lock()
	if s.runs == nil {
		s.runs, s.ends, s.ran = make(map[string]*maint.StepRun), make(map[string]context.CancelFunc), make(map[string]int)
	}
	if before := s.runs[name]; before != nil { // a name is begun once
		s.mu.Unlock()
		return *before
	}
	delete(s.prepared, name)
	s.runs[name], s.ends[name] = run, cancel
	s.ran[name]++
	s.mu.Unlock()
	if s.Did != nil {
		s.Did(name)
	}
	words := step.Command
	if step.Unit != "" {
		words = []string{"true"}
	}
	if words[0] == "/bin/sh" {
		words = strings.Fields(words[2])
	}
	end := maint.StepRun{Started: run.Started, Output: strings.Join(words, " ") + "\n"}
	switch words[0] {
	case "false":
		end.ExitCode = 1
	case "exit":
		code, err := strconv.Atoi(words[1])
		if err != nil {
			end.Error = err.Error()
		}
		end.ExitCode = code
	case "sleep", "stuck":
		d, err := time.ParseDuration(words[1])
		if err != nil {
			end.Error = err.Error()
			break
		}
		stop := ctx.Done()
		if words[0] == "stuck" {
			stop = nil
		}
		select {
		case <-time.After(d):
		case <-stop:
			end.ExitCode, end.TimedOut = 143, true
		}
	}
	end.Ended = time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	*run = end
	return end
}

// End implements preserve.Steps.
func (s *Steps) End(_ context.Context, name string) (*maint.StepRun, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.prepared, name)
	if s.runs[name] == nil {
		return nil, nil
	}
	s.ends[name]()
	run := *s.runs[name]
	return &run, nil
}

// Forget implements preserve.Steps.
func (s *Steps) Forget(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.runs, name)
}

// Kept are the names of the steps of which something is left, sorted.
func (s *Steps) Kept() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	kept := slices.Collect(maps.Keys(s.prepared))
	for name := range s.runs {
		if !s.prepared[name] {
			kept = append(kept, name)
		}
	}
	slices.Sort(kept)
	return kept
}

// Ran are the names of the steps that were begun, sorted.
func (s *Steps) Ran() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.ran))
}

// Clocks reports every clock as synchronised that Frozen does not name.
type Clocks struct{ Frozen string }

// Prepare implements preserve.Clocks.
func (c Clocks) Prepare(_ context.Context, g maint.Guest) (preserve.Clock, *maint.Problem) {
	if g.Name == c.Frozen {
		return nil, maint.Problemf(maint.CodeFrozen, "guest "+g.Name, "thaw them", "its file systems are frozen")
	}
	return clock{g}, nil
}

// Sync implements the agent's Clocks.
func (c Clocks) Sync(_ context.Context, g maint.Guest) maint.ClockReport {
	return maint.ClockReport{Guest: g.Name, UUID: g.UUID, State: maint.ClockSynchronised, Shots: 1,
		Before: &maint.ClockOffset{Offset: -time.Second}, After: &maint.ClockOffset{}}
}

// Restore implements preserve.Clocks.
func (c Clocks) Restore(ctx context.Context, g maint.Guest, _ time.Duration) maint.ClockReport {
	return c.Sync(ctx, g)
}

// Measure implements the agent's Clocks.
func (c Clocks) Measure(_ context.Context, g maint.Guest) maint.ClockReport {
	return maint.ClockReport{Guest: g.Name, UUID: g.UUID, State: maint.ClockSynchronised, Before: &maint.ClockOffset{}}
}

type clock struct{ g maint.Guest }

func (c clock) Correct(ctx context.Context, _ time.Time, _ time.Duration) maint.ClockReport {
	return Clocks{}.Sync(ctx, c.g)
}
