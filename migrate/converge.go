package migrate

import (
	"fmt"
	"slices"
	"time"

	"belay/agent/maint"
)

const (
	// firstPause is the pause that a copy may end with at first. Most guests write so
	// little that it does, a pass or two later than with a longer one.
	firstPause = 50 * time.Millisecond
	// getsOn is how much a pass over the guest's memory leaves, at most, of what the one
	// before did, where the copy gets on.
	getsOn = 0.9
	// The pause is raised to hopeful of what a pass leaves behind first: they differ, and
	// QEMU ends the copy after the first that leaves less. If none does, it is raised to
	// spare of it. growth is by how much it is raised at least.
	hopeful, spare, growth = 0.5, 1.25, 1.5
	// patience is for how long a copy is watched at least before more is done.
	patience = 600 * time.Millisecond
	// mostSlowed is by how much QEMU slows a guest down at most, per cent
	// (max-cpu-throttle).
	mostSlowed = 99
)

// convergence sees to it that one copy comes to its end: that a pass over the guest's
// memory leaves no more behind than can be sent while the guest is paused. It starts
// with a short pause, and raises it only as what the guest writes shows that it must, up
// to the longest allowed; then it does what else is allowed, one after the other.
//
// It is told the copy's statistics, in order, and decides; it does nothing by itself.
type convergence struct {
	maxPause time.Duration
	allowed  []maint.Means // what may still be done, the least impact first
	used     []maint.Means // what was done to this copy, or is to be done to the next
	again    bool          // it is cancelled, to be begun anew
	able     bool          // it can go on as post-copy, as it was begun
	owed     bool          // it was begun anew to do so
	slowing  bool          // the guest is slowed down as much as it must be

	pause  time.Duration // the longest that the copy may end with now; 0: not set yet
	passes []pass        // whose beginning was seen since something was done last
	since  time.Duration // when that was, by the copy's clock
	slowed int           // the most that the guest was slowed by, per cent
	stuck  bool          // the last passes did not get on
	told   string        // what they left, for people; "" before any were measured
}

// pass is one over the guest's memory, when it was first seen.
type pass struct {
	number uint64
	sent   uint64 // by all before it, bytes
}

// size is how much a pass sends between two that were seen, bytes: the mean of those
// that were not. It is what the one before it has left.
func size(a, b pass) uint64 { return minus(b.sent, a.sent) / (b.number - a.number) }

// decision is what to do to a copy.
type decision struct {
	pause time.Duration // not 0: let it end with a pause of so long
	means maint.Means   // not "": do that
	why   string        // with the numbers; "" where nothing is to be done
}

// beginsAnew reports whether a copy must be begun anew for a means.
func (c *convergence) beginsAnew(m maint.Means) bool {
	return m != maint.MeansBandwidth && (m != maint.MeansPostCopy || !c.able)
}

// converge is for a copy that is begun with some means already. Others are tried in the
// order of maint.AllMeans.
func (m *Migration) converge(a attempt) *convergence {
	with := a.Means
	c := &convergence{maxPause: m.MaxPause, able: a.Able, slowing: slices.Contains(with, maint.MeansSlow),
		owed: a.Able && slices.Contains(with, maint.MeansPostCopy)}
	limited := m.Params.BandwidthMiBs > 0 && !slices.Contains(with, maint.MeansBandwidth)
	for _, means := range maint.AllMeans {
		switch {
		case !slices.Contains(m.Allow, means) || slices.Contains(with, means):
		case means == maint.MeansBandwidth && !limited:
		case means == maint.MeansParallel && limited && !slices.Contains(c.allowed, maint.MeansBandwidth):
			// More connections bring no more through a limit.
		case means == maint.MeansPostCopy && !m.canPostCopy(a):
		default:
			c.allowed = append(c.allowed, means)
		}
	}
	return c
}

// next is told the copy as it is now.
func (c *convergence) next(j maint.Job) decision {
	c.slowed = max(c.slowed, j.SlowedPercent)
	if c.pause == 0 {
		c.pause = min(firstPause, c.maxPause)
		return decision{pause: c.pause}
	}
	// The first pass is over all memory, and says nothing of what the guest writes.
	if j.Iteration < 2 || j.BytesPerSecond == 0 {
		return decision{}
	}
	if c.owed {
		c.owed = false
		return decision{means: maint.MeansPostCopy, why: "it was begun anew for that"}
	}
	n := len(c.passes)
	if n > 0 && c.passes[n-1].number >= j.Iteration {
		return decision{}
	}
	c.passes = append(c.passes, pass{j.Iteration, j.MemorySent})
	if n < 2 || j.Elapsed-c.since < patience {
		return decision{}
	}
	c.passes = c.passes[n-2:]
	first, second := size(c.passes[0], c.passes[1]), size(c.passes[1], c.passes[2])
	least := min(first, second)
	needs := seconds(float64(least) / float64(j.BytesPerSecond))
	c.stuck = float64(second) >= getsOn*float64(first) && second > 0
	c.told = c.tell(j, first, second, needs)
	if !c.stuck {
		return decision{}
	}
	var d decision
	if c.pause < c.maxPause {
		share := hopeful
		if c.pause > firstPause || needs > c.maxPause {
			share = spare
		}
		d.pause = min(c.maxPause, max(time.Duration(share*float64(needs)), time.Duration(growth*float64(c.pause))))
		c.pause = d.pause
	}
	// A pause that would have to be longer than the longest need not be tried.
	if (d.pause == 0 || needs > c.maxPause) && len(c.allowed) > 0 && !c.slower() {
		d.means, c.allowed = c.allowed[0], c.allowed[1:]
		c.used, c.again = append(c.used, d.means), c.beginsAnew(d.means)
	}
	if d == (decision{}) {
		return d // it may write less later; the operation's time ends it
	}
	d.why, c.passes, c.since = c.told, nil, j.Elapsed
	return d
}

// tell says what two passes left, and how long the least of that takes.
func (c *convergence) tell(j maint.Job, first, second uint64, needs time.Duration) string {
	told := fmt.Sprintf("it dirties %s/s and the network takes %s/s", mib(j.DirtyPerSecond), mib(j.BytesPerSecond))
	if c.stuck {
		told += fmt.Sprintf(", so that each pass over its memory leaves at least %s, which take %s", mib(min(first, second)), round(needs))
	} else {
		told += fmt.Sprintf("; its copy got on: the last passes over its memory left %s, then %s, which take %s", mib(first), mib(second), round(needs))
	}
	if c.slowed > 0 {
		told += fmt.Sprintf(", although it is slowed by %d %%", c.slowed)
	}
	return told
}

// slower reports whether QEMU will slow the guest down further, before post-copy.
func (c *convergence) slower() bool {
	return c.slowing && c.slowed < mostSlowed && c.allowed[0] == maint.MeansPostCopy
}

// remedy is for a copy that did not come to its end in time.
func (c *convergence) remedy() string {
	if !c.stuck {
		return "allow more time (--timeout) or bandwidth, or move it when it writes less memory"
	}
	return fmt.Sprintf("allow a longer pause (--max-pause, now %s) or more means (--allow, of %v), or move it when it writes less", round(c.maxPause), maint.AllMeans)
}

// seconds is a duration, a day for one that is longer: statistics can be of any size.
func seconds(s float64) time.Duration {
	return time.Duration(min(s, (24*time.Hour).Seconds()) * float64(time.Second))
}

func mib(bytes uint64) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }

// round leaves a duration as many digits as people want.
func round(d time.Duration) time.Duration {
	if d > 10*time.Second {
		return d.Round(time.Second)
	}
	return d.Round(time.Millisecond)
}
