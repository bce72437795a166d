package measure

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/vmtests/observer"
)

// Hold is what was measured of one pause of all guests of a ward.
type Hold struct {
	Tool  string
	Asked time.Time // when the command was started
	Total time.Duration
	// Step is how long the host step really took; for virsh it is what sleep
	// was asked for.
	Step   time.Duration
	Guests []Held
	Op     *maint.Op // Belay's own account, nil for virsh
}

// Held is what one guest felt of it.
type Held struct {
	Guest string
	Standstill
	// Lost is the time that the guest's own clock has lost against the LAN's, by
	// its heartbeats: it is as fine as those travel evenly, not as they are apart.
	Lost     time.Duration
	Recorded time.Duration // by belayd, 0 for virsh
	Stale    time.Duration // how long belayd says that it ran with a wrong clock
	Clock    ClockSeen     // the guest's own word on its clock, afterwards
	Report   observer.Report
}

// Belay holds all guests while sleep runs for so long.
func (w *Ward) Belay(ctx context.Context, step time.Duration) (Hold, error) {
	return w.hold(ctx, Belay, func(m *Hold) error {
		m.Op = new(maint.Op)
		err := w.Node.BelayJSON(ctx, m.Op, "hold", "--all", "--reason", "benchmark", "--", "sleep", seconds(step))
		if err != nil {
			return err
		}
		if m.Op.Outcome != maint.OutcomeDone || m.Op.Held == nil || m.Op.Held.Step == nil {
			return fmt.Errorf("operation %s: outcome %s", m.Op.ID, m.Op.Outcome)
		}
		m.Step = m.Op.Held.Step.Ended.Sub(m.Op.Held.Step.Started)
		return nil
	})
}

// shellLoop is how one holds guests without Belay.
const shellLoop = `set -e; step=$1; shift
for g in "$@"; do virsh -q -c "$URI" suspend "$g"; done
sleep "$step"
for g in "$@"; do virsh -q -c "$URI" resume "$g"; done`

// Virsh does the same by virsh in a loop of the shell. It leaves the guests'
// clocks behind: see [Ward.Sync].
func (w *Ward) Virsh(ctx context.Context, step time.Duration) (Hold, error) {
	return w.hold(ctx, Virsh, func(m *Hold) error {
		m.Step = step
		args := []string{"-c", shellLoop, "sh", seconds(step)}
		for _, p := range w.guests {
			args = append(args, p.name)
		}
		cmd := exec.CommandContext(ctx, "sh", args...)
		cmd.Env = append(cmd.Environ(), "URI="+w.Node.URI())
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) }

// hold lets f hold the guests, and looks on.
func (w *Ward) hold(ctx context.Context, tool string, f func(*Hold) error) (Hold, error) {
	if err := pause(ctx, rest); err != nil {
		return Hold{}, err
	}
	m := Hold{Tool: tool, Asked: time.Now()}
	mark := w.Observer.Mark()
	if err := f(&m); err != nil {
		return m, fmt.Errorf("cannot hold the guests by %s: %w", tool, err)
	}
	m.Total = time.Since(m.Asked)
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	stood, err := w.events.since(ctx, m.Asked, len(w.guests))
	if err != nil {
		return m, err
	}
	for _, p := range w.guests {
		h := Held{Guest: p.name, Standstill: stood[p.name]}
		if h.Clock, err = p.clock(ctx, h.Resumed); err != nil {
			return m, err
		}
		if err := w.Observer.Await(ctx, p.name, wardSettled); err != nil {
			return m, err
		}
		h.Report = w.Observer.Since(mark, p.name)
		if h.Lost = h.Report.Standstill; h.Report.Restarts != 0 {
			return m, fmt.Errorf("guest %s was restarted on the way", p.name)
		}
		m.Guests = append(m.Guests, h)
	}
	return m, m.account()
}

// wardSettled is how many heartbeats must have come after a pause.
const wardSettled = 3

// account takes over what belayd has recorded.
func (m *Hold) account() error {
	if m.Op == nil {
		return nil
	}
	recorded := make(map[string]maint.HeldGuest)
	for _, g := range m.Op.Held.Guests {
		recorded[g.Guest] = g
	}
	for i := range m.Guests {
		h := &m.Guests[i]
		g := recorded[h.Guest]
		if g.ReleasedBy != "belayd" || g.Clock == nil {
			return fmt.Errorf("operation %s, guest %s: %+v", m.Op.ID, h.Guest, g)
		}
		h.Recorded, h.Stale = g.Pause, g.Clock.Stale
	}
	return nil
}

// Armed is when the leash of Belay's hold held.
func (m Hold) Armed() (time.Time, error) {
	for _, e := range m.Op.Leash {
		if e.Kind == maint.LeashArmed {
			return e.Time, nil
		}
	}
	return time.Time{}, fmt.Errorf("operation %s tells of no leash that was armed", m.Op.ID)
}

// LeashKiB holds the guests once more, for a step that looks at its leash: what
// the leash has in memory, in KiB.
func (w *Ward) LeashKiB(ctx context.Context) (int, error) {
	const look = `cat "/proc/$(pgrep -f "belay-leash .*$BELAY_OP")/status"`
	var op maint.Op
	if err := w.Node.BelayJSON(ctx, &op, "hold", "--all", "--", "sh", "-c", look); err != nil {
		return 0, err
	}
	for line := range strings.Lines(op.Held.Step.Output) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(v), " kB"))
		}
	}
	return 0, errors.New("the step has not found its leash: " + op.Held.Step.Output)
}

// pause waits for a while.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
