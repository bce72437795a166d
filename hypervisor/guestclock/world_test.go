package guestclock

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
)

// world is a host with one guest, on the time of a synctest bubble.
type world struct {
	*Clocks
	mu      sync.Mutex
	hostAdd time.Duration // by how much the host's wall clock was stepped
	guest   *simGuest
}

// simGuest is a guest with an agent. What it does takes time, and it does one
// thing after another.
type simGuest struct {
	w *world

	// Its clock read wall at a time of the bubble, and runs by rate.
	at   time.Time
	wall time.Time
	rate float64

	there, back func() time.Duration // the way to the agent and back
	tick        time.Duration        // its readings are rounded down to this
	hwclock     string               // "util-linux", "missing", "failing"
	lostAfter   int                  // calls; the agent is gone then
	deaf        int                  // calls that libvirt gives up, after five seconds
	frozen      bool
	disabled    map[string]bool // commands
	os          string          // guest-get-osinfo

	agent   sync.Mutex
	calls   int
	log     []string      // commands
	backBy  time.Duration // the largest step back
	aheadBy time.Duration // what a setting left it ahead of the host at most
	shots   int

	rtcResets int // settings that did without the RTC's ticks owed
}

func newWorld(t *testing.T) *world {
	w := &world{}
	fixed := func() time.Duration { return 300 * time.Microsecond }
	w.guest = &simGuest{w: w, at: time.Now(), wall: time.Now(), there: fixed, back: fixed, tick: time.Microsecond,
		hwclock: "util-linux", lostAfter: 1 << 30, os: `{"id":"debian","kernel-version":"#1 SMP"}`, disabled: map[string]bool{}}
	w.Clocks = New(w, 4)
	w.Clocks.now = func() moment {
		m := moment{wall: w.hostWall(), mono: time.Since(time.Unix(0, 0))}
		return m
	}
	t.Cleanup(func() {
		if w.guest.backBy > 0 {
			t.Errorf("the guest's clock was stepped back by %s", w.guest.backBy)
		}
	})
	return w
}

func (w *world) hostWall() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Round(0).Add(w.hostAdd)
}

// stepHost sets the host's wall clock.
func (w *world) stepHost(by time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hostAdd += by
}

// clock is what the guest's clock reads.
func (g *simGuest) clock() time.Time {
	d := time.Since(g.at)
	return g.wall.Add(d + time.Duration(g.rate*float64(d)))
}

// put sets the guest's clock.
func (g *simGuest) put(to time.Time) { g.at, g.wall = time.Now(), to.Round(0) }

// offset is the truth.
func (g *simGuest) offset() time.Duration { return g.clock().Sub(g.w.hostWall()) }

// pause is what a pause does to the clock, with the world going on.
func (g *simGuest) pause(d time.Duration) {
	stood := g.clock()
	time.Sleep(d)
	g.put(stood)
}

func (g *simGuest) known() maint.Guest {
	return maint.Guest{Name: "web-1", UUID: "u", Agent: maint.AgentConnected}
}

// call is one command to the agent.
func (g *simGuest) call(ctx context.Context, name string, do func() error) error {
	if err := sleep(ctx, g.there()); err != nil {
		return errors.Join(maint.ErrNoAgent, err)
	}
	g.agent.Lock()
	defer g.agent.Unlock()
	g.log = append(g.log, name)
	if g.deaf > 0 {
		g.deaf--
		return errors.Join(maint.ErrNoAgent, sleep(ctx, 5*time.Second))
	}
	if g.calls++; g.calls > g.lostAfter {
		<-ctx.Done()
		return fmt.Errorf("no answer: %w", errors.Join(maint.ErrNoAgent, ctx.Err()))
	}
	if g.disabled[name] || g.frozen && name != "guest-info" && name != "guest-fsfreeze-status" {
		return errors.New("The command " + name + " has been disabled for this instance")
	}
	if err := do(); err != nil {
		return err
	}
	if err := sleep(ctx, g.back()); err != nil {
		return errors.Join(maint.ErrNoAgent, err)
	}
	return nil
}

func (w *world) GuestTime(ctx context.Context, _ string) (t time.Time, err error) {
	err = w.guest.call(ctx, "guest-get-time", func() error {
		t = w.guest.clock().Truncate(w.guest.tick)
		return nil
	})
	return t, err
}

func (w *world) SetGuestTime(ctx context.Context, _ string, to time.Time) error {
	w.guest.rtcResets++
	return w.guest.call(ctx, "guest-set-time", w.guest.set(ctx, to))
}

// set is what guest-set-time does.
func (g *simGuest) set(ctx context.Context, to time.Time) func() error {
	return func() error {
		if g.hwclock == "missing" {
			return errors.New("this feature or command is not currently supported")
		}
		g.shots++
		g.backBy = max(g.backBy, g.clock().Sub(to))
		g.put(to)
		g.aheadBy = max(g.aheadBy, g.offset())
		switch g.hwclock {
		case "failing":
			return errors.New("hwclock failed to set hardware clock to system time")
		case "util-linux":
			now := g.clock()
			return sleep(ctx, now.Truncate(time.Second).Add(1500*time.Millisecond).Sub(now)%time.Second)
		}
		return nil
	}
}

func (w *world) AgentCommand(ctx context.Context, uuid, command string, args any) (out json.RawMessage, err error) {
	g := w.guest
	if command == "guest-set-time" {
		return json.RawMessage("{}"), g.call(ctx, command, g.set(ctx, time.Unix(0, args.(map[string]int64)["time"])))
	}
	err = g.call(ctx, command, func() error {
		switch command {
		case "guest-info":
			type cmd struct {
				Name    string `json:"name"`
				Enabled bool   `json:"enabled"`
			}
			var list []cmd
			for _, name := range []string{"guest-get-time", "guest-set-time", "guest-get-osinfo"} {
				list = append(list, cmd{name, !g.disabled[name]})
			}
			out, err = json.Marshal(map[string]any{"supported_commands": list})
			return err
		case "guest-fsfreeze-status":
			out = json.RawMessage(map[bool]string{true: `"frozen"`, false: `"thawed"`}[g.frozen])
		case "guest-get-osinfo":
			out = json.RawMessage(g.os)
		default:
			return fmt.Errorf("unexpected command %s", command)
		}
		return nil
	})
	return out, err
}

// simulate runs f in a bubble.
func simulate(t *testing.T, f func(t *testing.T, w *world, ctx context.Context)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		f(t, newWorld(t), ctx)
	})
}

// hold prepares, pauses the guest for d, and corrects.
func (w *world) hold(t *testing.T, ctx context.Context, d time.Duration, meanwhile func()) maint.ClockReport {
	t.Helper()
	b, p := w.Prepare(ctx, w.guest.known())
	if p != nil {
		t.Fatal(p)
	}
	w.guest.pause(d)
	stood := d
	if meanwhile != nil { // which may be a pause of its own
		stood = 0
	}
	resumed := time.Now()
	if meanwhile != nil {
		meanwhile()
	}
	return w.Correct(ctx, b, resumed, stood)
}
