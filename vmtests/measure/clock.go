package measure

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
)

// ClockSeen is what a guest's probe, which nobody sets a clock by, says of the
// guest's wall clock.
type ClockSeen struct {
	Offset time.Duration // of the guest's clock less the host's
	Error  time.Duration // ±: half the way there and back
	// Steps is how often the clock was set since the release, Stale how long the
	// guest ran until the first time, ± Error.
	Steps int
	Stale time.Duration
}

// clockLooks is how often a guest's clock is read; the quickest answer counts.
const clockLooks = 20

// clock reads a guest's clock, resumed being when its vCPUs began to run.
func (p *patient) clock(ctx context.Context, resumed time.Time) (c ClockSeen, err error) {
	for i := range clockLooks {
		asked := time.Now()
		r, err := p.probe.Clock(ctx)
		if err != nil {
			return c, fmt.Errorf("guest %s: %w", p.name, err)
		}
		way := time.Since(asked) / 2
		if i > 0 && way >= c.Error {
			continue
		}
		half := asked.Add(way)
		c = ClockSeen{Offset: time.Unix(0, r.Wall).Sub(half), Error: way}
		for _, step := range r.Steps {
			// The guest's monotonic clock stood still with it.
			ran := half.Sub(resumed) - (r.Monotonic - step.Monotonic)
			if ran < -way {
				continue // before the pause
			}
			if c.Steps++; c.Steps == 1 {
				c.Stale = ran
			}
		}
	}
	return c, nil
}

// Domtime has virsh set the clock of the first guest, and then reads it.
func (w *Ward) Domtime(ctx context.Context) (ClockSeen, error) {
	p := w.guests[0]
	if _, err := w.Node.Virsh(ctx, "domtime", p.name, "--now"); err != nil {
		return ClockSeen{}, err
	}
	return p.clock(ctx, time.Now())
}

const (
	// syncTries is how often all clocks are put right at most.
	syncTries = 5
	// syncGood is how far off they may be then: a hold keeps the offset of a
	// clock that was off by a second before, as if that were on purpose.
	syncGood = 250 * time.Millisecond
)

// Sync has Belay put all clocks right.
func (w *Ward) Sync(ctx context.Context) error { return SyncClocks(ctx, w.Node) }

// SyncClocks has Belay put the clocks of all guests of a host right, however far they are
// behind. One that is ahead, as a guest's can be by half a second after its boot, stays so.
func SyncClocks(ctx context.Context, n *cluster.Node) error {
	var bad []string
	for range syncTries {
		var reports []maint.ClockReport
		r, err := n.Belay(ctx, "-o", "json", "clock", "--sync")
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(r.Stdout), &reports); err != nil {
			return fmt.Errorf("belay clock --sync ended with %d: %s", r.Code, r.Stderr)
		}
		bad = nil
		for _, r := range reports {
			if o := cmp.Or(r.After, r.Before); o == nil || o.Offset < -syncGood {
				bad = append(bad, r.Guest+": "+r.Reason)
			}
		}
		if bad == nil {
			return nil
		}
	}
	return fmt.Errorf("clocks cannot be synchronised: %s", strings.Join(bad, "; "))
}
