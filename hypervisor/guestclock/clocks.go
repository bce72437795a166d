package guestclock

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"runtime"
	"time"

	"belay/agent/maint"
)

// Host passes calls to guests' agents. What it returns wraps maint.ErrNoAgent
// when the agent does not answer.
type Host interface {
	// GuestTime reads the guest's wall clock (virDomainGetTime).
	GuestTime(ctx context.Context, uuid string) (time.Time, error)
	// SetGuestTime sets it, and has QEMU forget the RTC's ticks that it owes the
	// guest (virDomainSetTime). It waits for the agent for ever.
	SetGuestTime(ctx context.Context, uuid string, to time.Time) error
	// AgentCommand runs a command of the guest agent, and gives up with ctx
	// (virDomainQemuAgentCommand).
	AgentCommand(ctx context.Context, uuid, command string, args any) (json.RawMessage, error)
}

// Clocks measures and sets the clocks of a host's guests. It is safe for
// concurrent use: one goroutine per guest is how it is meant to be used.
type Clocks struct {
	host  Host
	lanes chan struct{} // calls under way
	again chan struct{} // settings under way that are not a guest's first
	now   func() moment
	// longest bounds the wait for a setting's answer.
	longest time.Duration
}

// New makes a Clocks that has up to atOnce calls under way. The host must be able
// to take that many at once beside all else: a call that has to wait there carries
// a time that grows old. Setting a clock takes up to a second (see the package
// comment), so atOnce is also how many clocks are set in a second.
func New(host Host, atOnce int) *Clocks {
	epoch := time.Now()
	return &Clocks{
		host:  host,
		lanes: make(chan struct{}, atOnce),
		again: make(chan struct{}, max(1, min(atOnce/2, runtime.NumCPU()))),
		// Each guest's hwclock takes a CPU for up to a second.
		longest: longestSet + time.Duration(atOnce-1)*time.Second/time.Duration(runtime.NumCPU()),
		now: func() moment {
			t := time.Now()
			return moment{wall: t.Round(0), mono: t.Sub(epoch)}
		},
	}
}

// enter waits for a free lane. Waiters are let in in the order in which they came.
func enter(ctx context.Context, lanes chan struct{}) error {
	select {
	case lanes <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waited for its turn: %w", context.Cause(ctx))
	}
}

// read asks a guest for its time, and tells when it asked and was answered.
func (c *Clocks) read(ctx context.Context, uuid string) (t time.Time, begin, end moment, err error) {
	if err = enter(ctx, c.lanes); err != nil {
		return
	}
	defer func() { <-c.lanes }()
	begin = c.now()
	t, err = c.host.GuestTime(ctx, uuid)
	return t, begin, c.now(), err
}

// set sets a guest's time to the host's and ahead of it, and tells when it did so
// and was answered. What ahead has to ask of the guest is done in the same lane: a
// guest does not lose its turn by it.
//
// A worker of libvirtd's is kept until the agent answers, which a guest that
// somebody pauses now does not do before it is resumed: with virDomainSetTime it
// would take as many guests as there are workers to have nobody left to resume
// them. Only Windows needs what that does beside, and its agent answers at once.
func (c *Clocks) set(ctx context.Context, uuid string, coarse bool, ahead func() time.Duration) (begin, end moment, err error) {
	if err = enter(ctx, c.lanes); err != nil {
		return
	}
	defer func() { <-c.lanes }()
	by := ahead()
	begin = c.now()
	to := begin.wall.Add(by)
	if coarse {
		err = c.host.SetGuestTime(ctx, uuid, to)
	} else {
		bounded, cancel := context.WithTimeout(ctx, c.longest)
		defer cancel()
		_, err = c.host.AgentCommand(bounded, uuid, "guest-set-time", map[string]int64{"time": to.UnixNano()})
	}
	return begin, c.now(), err
}

const (
	// firstAnswer bounds the wait for an agent's first answer. One that is dead
	// would otherwise keep a connection from those that live, until ctx ends.
	firstAnswer = 5 * time.Second

	// unconnected is how soon libvirt says of an agent that is not connected that it is not. One that
	// is has five seconds for libvirt's own question (guest-sync), and may have them again.
	unconnected = time.Second

	// longAway bounds what an agent is given beyond that, a quarter of the time that
	// its guest has lost: what has come due meanwhile comes first.
	longAway = 20 * time.Second

	// longestSet bounds the wait for the answer to a setting that is alone: hwclock
	// takes a second. What came of it is measured in any case.
	longestSet = 3 * time.Second

	// onPurpose is from where on a clock that is off is taken to be so on
	// purpose: another time zone, a test of what will be.
	onPurpose = time.Second
)

// grain says how finely a guest keeps its time.
type grain struct {
	resolution time.Duration // of the agent's readings
	tolerance  time.Duration // off by less is synchronised
}

// grainOf: Windows' system time, as the agent reads it, goes by the timer
// interrupt, every 15.6 ms as a rule.
func grainOf(coarse bool) grain {
	if coarse {
		return grain{resolution: 16 * time.Millisecond, tolerance: 40 * time.Millisecond}
	}
	return grain{resolution: time.Microsecond, tolerance: 5 * time.Millisecond}
}

// abilities are what a guest's agent says of itself and its system.
type abilities struct {
	frozen bool // its file systems are
	canSet bool // guest-set-time is not disabled
	coarse bool // Windows, or unknown
}

// ask asks a guest's agent what it can do (guest-info, guest-fsfreeze-status,
// guest-get-osinfo). It is an error only if the agent cannot be asked: what it
// refuses to say is not known, and tried. The first answer may take so long.
func (c *Clocks) ask(ctx context.Context, uuid string, within time.Duration) (abilities, error) {
	a := abilities{canSet: true, coarse: true}
	var info struct {
		Commands []struct {
			Name    string `json:"name"`
			Enabled bool   `json:"enabled"`
		} `json:"supported_commands"`
	}
	var freeze string
	var system struct {
		ID     string `json:"id"`
		Kernel string `json:"kernel-version"`
	}
	first, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var err error
	for again := true; again; {
		asked := time.Now()
		err = c.command(first, uuid, "guest-info", &info)
		again = errors.Is(err, maint.ErrNoAgent) && time.Since(asked) > unconnected && first.Err() == nil
	}
	for _, cause := range []error{maint.ErrNoAgent, maint.ErrNoGuest, maint.ErrHypervisorDown, context.DeadlineExceeded, context.Canceled} {
		if errors.Is(err, cause) {
			return a, fmt.Errorf("its agent cannot be asked: %w", err)
		}
	}
	for _, cmd := range info.Commands {
		if cmd.Name == "guest-set-time" && !cmd.Enabled {
			a.canSet = false
		}
	}
	if err := c.command(ctx, uuid, "guest-fsfreeze-status", &freeze); err == nil {
		a.frozen = freeze == "frozen"
	}
	if err := c.command(ctx, uuid, "guest-get-osinfo", &system); err == nil && system.Kernel != "" {
		a.coarse = system.ID == "mswindows"
	}
	return a, nil
}

func (c *Clocks) command(ctx context.Context, uuid, name string, result any) error {
	if err := enter(ctx, c.lanes); err != nil {
		return err
	}
	defer func() { <-c.lanes }()
	out, err := c.host.AgentCommand(ctx, uuid, name, nil)
	if err != nil {
		return err
	}
	return json.Unmarshal(out, result)
}

// Baseline is what is known of a guest's clock before it is paused. It can be kept
// as JSON.
type Baseline struct {
	Guest string    `json:"guest"`
	UUID  string    `json:"uuid"`
	Taken time.Time `json:"taken"`
	// Agent: the guest's agent answered, and nothing that follows is known
	// otherwise. Reason says why not, or why Offset is nil or CanSet false.
	Agent  bool               `json:"agent"`
	CanSet bool               `json:"can_set"`
	Coarse bool               `json:"coarse,omitempty"` // Windows, or not known
	Offset *maint.ClockOffset `json:"offset,omitempty"` // nil: not measured
	RTT    time.Duration      `json:"rtt_ns,omitempty"` // the shortest round trip
	Reason string             `json:"reason,omitempty"`
}

// Prepare looks at a guest's clock before a pause, for Correct. All of it is
// bounded by ctx. What cannot be learnt is missing from the Baseline, with the
// reason, and no reason not to pause the guest. The one Problem is that its file
// systems are frozen: a pause would be added to a freeze that somebody wants
// short, and the agent of a frozen guest sets no clock.
func (c *Clocks) Prepare(ctx context.Context, g maint.Guest) (Baseline, *maint.Problem) {
	b := Baseline{Guest: g.Name, UUID: g.UUID, Taken: time.Now()}
	if g.Agent == maint.AgentNone {
		b.Reason = noChannel
		return b, nil
	}
	a, err := c.ask(ctx, g.UUID, firstAnswer)
	if err != nil {
		b.Reason = err.Error()
		return b, nil
	}
	if a.frozen {
		return b, maint.Problemf(maint.CodeFrozen, "guest "+g.Name,
			"let the backup or snapshot end that froze them, or thaw them: virsh domfsthaw "+g.Name, "its file systems are frozen")
	}
	b.Agent, b.CanSet, b.Coarse = true, a.canSet, a.coarse
	if !a.canSet {
		b.Reason = cannotSet
	}
	read, err := c.compare(ctx, g.UUID, grainOf(a.coarse))
	if err != nil {
		b.Reason = err.Error()
		return b, nil
	}
	offset := read.offset()
	b.Offset, b.RTT = &offset, read.rtt
	return b, nil
}

// Reasons that are given in more than one place.
const (
	noChannel = "it has no guest agent: add a channel org.qemu.guest_agent.0 and install qemu-guest-agent in it"
	cannotSet = "its agent has guest-set-time disabled"
)

// Measure compares a guest's clock with the host's.
func (c *Clocks) Measure(ctx context.Context, g maint.Guest) maint.ClockReport {
	k, ok := c.begin(ctx, g, firstAnswer)
	if ok {
		k.judge(*k.report.Before)
	}
	return k.report
}

// Sync measures a guest's clock and steps it forward to the host's time if it is
// behind, however far. One that is ahead is reported and left alone.
func (c *Clocks) Sync(ctx context.Context, g maint.Guest) maint.ClockReport {
	return c.restore(ctx, g, math.MaxInt64, time.Time{}, firstAnswer)
}

// Restore is Sync for a guest that has lost some time, but not more than lost, and
// for which nothing was prepared: after a migration, for instance. One that is
// much further behind was off before, and is left alone.
func (c *Clocks) Restore(ctx context.Context, g maint.Guest, lost time.Duration) maint.ClockReport {
	return c.restore(ctx, g, lost, time.Time{}, firstAnswer+min(lost/4, longAway))
}

func (c *Clocks) restore(ctx context.Context, g maint.Guest, lost time.Duration, resumed time.Time, within time.Duration) maint.ClockReport {
	k, ok := c.begin(ctx, g, within)
	if !ok {
		return k.report
	}
	before := *k.report.Before
	switch {
	case !k.behind(before, k.rtt):
		k.judge(before)
	case before.Offset < -onPurpose && -before.Offset-onPurpose > lost:
		k.judge(before)
		k.report.Reason += ", more than it can have lost: it was so before and was left alone"
	case !k.canSet:
		k.judge(before)
		k.report.Reason += "; " + cannotSet
	default:
		k.resumed = resumed
		k.shoot(ctx)
	}
	return k.report
}

// begin asks a guest's agent and measures. It reports false when nothing more is
// to be done; the report says why. The agent's first answer may take so long.
func (c *Clocks) begin(ctx context.Context, g maint.Guest, within time.Duration) (*correction, bool) {
	k := &correction{c: c, report: maint.ClockReport{Guest: g.Name, UUID: g.UUID, State: maint.ClockUnsynchronised}}
	if g.Agent == maint.AgentNone {
		k.report.Reason = noChannel
		return k, false
	}
	a, err := c.ask(ctx, g.UUID, within)
	if err != nil {
		k.report.Reason = err.Error()
		return k, false
	}
	if a.frozen {
		k.report.Reason = "its file systems are frozen, and its agent does nothing else until they are thawed"
		return k, false
	}
	k.grain, k.coarse, k.canSet = grainOf(a.coarse), a.coarse, a.canSet
	read, err := c.compare(ctx, g.UUID, k.grain)
	if err != nil {
		k.report.Reason = err.Error()
		return k, false
	}
	offset := read.offset()
	k.report.Before, k.rtt = &offset, read.rtt
	return k, true
}
