package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

const mibs = 1 << 20

// A guest is moved with as short a pause as what it writes allows, and no longer one
// than is allowed; what was done for it is told with the numbers.
func TestConvergence(t *testing.T) {
	t.Parallel()
	all := []maint.Means{maint.MeansBandwidth, maint.MeansParallel, maint.MeansSlow} // the last is of TestPostCopy
	for name, test := range map[string]struct {
		writes   hypervisortest.Writes
		limit    uint64 // of the bandwidth, MiB/s
		maxPause time.Duration
		allow    []maint.Means
		moves    bool
		atMost   time.Duration // the pause
		notes    []string      // in order; no other of the copy
	}{
		"it writes little": {writes: hypervisortest.Writes{PerSecond: mibs, WorkingSet: 64 * mibs, Network: 100 * mibs},
			maxPause: time.Second, moves: true, atMost: firstPause},
		"it writes most of what the network takes": {writes: hypervisortest.Writes{PerSecond: 60 * mibs, WorkingSet: 512 * mibs, Network: 100 * mibs},
			maxPause: time.Second, moves: true, atMost: firstPause},
		"it writes more, over and over to a little": {writes: hypervisortest.Writes{PerSecond: 300 * mibs, WorkingSet: 20 * mibs, Network: 100 * mibs},
			maxPause: time.Second, moves: true, atMost: 300 * time.Millisecond,
			notes: []string{"leaves at least 20.0 MiB, which take 200ms; it may end with a pause of 100ms", "it may end with a pause of 250ms"}},
		"it writes more than a pause takes": {writes: hypervisortest.Writes{PerSecond: 300 * mibs, WorkingSet: 64 * mibs, Network: 100 * mibs},
			maxPause: 300 * time.Millisecond, notes: []string{"leaves at least 64.0 MiB, which take 640ms; it may end with a pause of 300ms"}},
		"a limit is in the way": {writes: hypervisortest.Writes{PerSecond: 50 * mibs, WorkingSet: 64 * mibs, Network: 100 * mibs}, limit: 20, allow: all,
			maxPause: 300 * time.Millisecond, moves: true, atMost: 300 * time.Millisecond, notes: []string{"it may end with a pause of 300ms, and the limit of its bandwidth is lifted"}},
		"more connections help": {writes: hypervisortest.Writes{PerSecond: 120 * mibs, WorkingSet: 64 * mibs, Network: 100 * mibs}, allow: all,
			maxPause: 300 * time.Millisecond, moves: true, atMost: firstPause, notes: []string{"begun anew, by 4 connections"}},
		"it must be slowed down": {writes: hypervisortest.Writes{PerSecond: 500 * mibs, WorkingSet: 128 * mibs, Network: 100 * mibs}, allow: all,
			maxPause: 300 * time.Millisecond, moves: true, atMost: 300 * time.Millisecond,
			notes: []string{"begun anew, by 4 connections", "begun anew, with the guest slowed down as far as it must be", "it may end with a pause of 300ms", "the guest was slowed down by up to"}},
		"it may only be slowed down": {writes: hypervisortest.Writes{PerSecond: 500 * mibs, WorkingSet: 128 * mibs, Network: 100 * mibs}, limit: 50, allow: []maint.Means{maint.MeansSlow, maint.MeansParallel},
			maxPause: 300 * time.Millisecond, moves: true, atMost: 300 * time.Millisecond,
			notes: []string{"begun anew, with the guest slowed down as far as it must be", "it may end with a pause of 300ms", "the guest was slowed down by up to"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, x *bench) {
				x.w.SetCopy(hypervisortest.Copy{Writes: test.writes})
				x.MaxPause, x.Allow, x.Params.BandwidthMiBs = test.maxPause, test.allow, test.limit
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
				defer cancel()
				err := x.Perform(ctx, t.Context(), x.page(PhasePerform))
				said := 0
				for _, n := range x.notes {
					if said == len(test.notes) || !strings.Contains(n, test.notes[said]) {
						t.Errorf("note %d: %s", said, n)
						break
					}
					said++
				}
				if said < len(test.notes) {
					t.Errorf("not said: %q", test.notes[said:])
				}
				if !test.moves {
					var p *maint.Problem
					if !errors.As(err, &p) || p.Code != maint.CodeTimeout || !strings.Contains(p.Reason, "300.0 MiB/s and the network takes 100.0 MiB/s") || !strings.Contains(p.Remedy, "--max-pause, now 300ms") {
						t.Errorf("%v", err)
					}
					if g, err := x.a.Guest(t.Context(), x.UUID); err != nil || g.State != maint.GuestRunning {
						t.Errorf("the guest is %+v, %v", g, err)
					}
					return
				}
				job, jobErr := x.b.host.CompletedJob(t.Context(), x.UUID)
				if err != nil || jobErr != nil || job.Downtime > test.atMost {
					t.Errorf("%v; paused for %v, %v", err, job.Downtime, jobErr)
				}
			})
		})
	}
}

// A copy that ran out of time tells what its last passes left, whether it got on or not.
func TestConvergenceOutOfTime(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		writes        uint64 // by the guest, MiB/s
		timeout       time.Duration
		reason, wrong string
		remedy        string
	}{
		"it got on": {85, 3 * time.Second,
			"it dirties 85.0 MiB/s and the network takes 100.0 MiB/s; its copy got on: the last passes over its memory left ", "at least", "allow more time (--timeout) or bandwidth"},
		"it did not": {300, 30 * time.Second,
			"it dirties 300.0 MiB/s and the network takes 100.0 MiB/s, so that each pass over its memory leaves at least 512.0 MiB, which take 5.12s", "got on", "allow a longer pause (--max-pause, now 300ms)"},
		"no pass was measured": {85, time.Second, "runs on a as before", ":", "allow more time (--timeout) or bandwidth"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, x *bench) {
				x.w.SetCopy(hypervisortest.Copy{Writes: hypervisortest.Writes{PerSecond: test.writes * mibs, WorkingSet: 512 * mibs, Network: 100 * mibs}})
				x.MaxPause = 300 * time.Millisecond
				ctx, cancel := context.WithTimeout(t.Context(), test.timeout)
				defer cancel()
				err := x.Perform(ctx, t.Context(), x.page(PhasePerform))
				var p *maint.Problem
				if !errors.As(err, &p) || p.Code != maint.CodeTimeout || !strings.Contains(p.Reason, test.reason) || strings.Contains(p.Reason, test.wrong) || !strings.HasPrefix(p.Remedy, test.remedy) {
					t.Errorf("%+v", err)
				}
			})
		})
	}
}

// An agent that dies in any copy of several leaves a migration that the next one sees to
// its end.
func TestConvergenceOfTheNextAgent(t *testing.T) {
	t.Parallel()
	for after := time.Second; after < 40*time.Second; after += 1700 * time.Millisecond {
		t.Run(after.String(), func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, x *bench) {
				x.w.SetCopy(hypervisortest.Copy{Writes: hypervisortest.Writes{PerSecond: 500 * mibs, WorkingSet: 128 * mibs, Network: 100 * mibs}})
				x.MaxPause, x.Allow = 300*time.Millisecond, maint.AllMeans
				life, die := context.WithTimeout(t.Context(), after)
				defer die()
				err := x.Perform(life, life, x.page(PhasePerform))
				if err != nil && life.Err() == nil {
					t.Fatal(err)
				}
				if err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform)); err != nil {
					t.Fatal(err)
				}
				if g, err := x.b.host.Guest(t.Context(), x.UUID); err != nil || g.State != maint.GuestRunning {
					t.Errorf("the guest is %+v, %v", g, err)
				}
			})
		})
	}
}

// Whatever statistics come, the pause only grows, to the longest allowed; means are
// used once each, in order, and only those allowed; and every decision has its reason.
func TestConvergenceProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &Migration{MaxPause: time.Duration(rapid.Int64Range(1, 1000).Draw(t, "max")) * time.Millisecond,
			Allow: rapid.SliceOfDistinct(rapid.SampledFrom(maint.AllMeans), func(m maint.Means) maint.Means { return m }).Draw(t, "allow")}
		m.Params.BandwidthMiBs = rapid.Uint64Range(0, 2).Draw(t, "limit")
		c := m.converge(attempt{Able: rapid.Bool().Draw(t, "able")})
		var pause time.Duration
		var done []maint.Means
		job := maint.Job{Active: true}
		for range rapid.IntRange(1, 60).Draw(t, "samples") {
			job.Elapsed += time.Duration(rapid.Int64Range(0, 5e9).Draw(t, "later"))
			job.Iteration += rapid.Uint64Range(0, 2).Draw(t, "passes")
			job.MemorySent = rapid.Uint64Range(0, 1<<34).Draw(t, "sent")
			job.BytesPerSecond = rapid.Uint64Range(0, 1<<30).Draw(t, "network")
			d := c.next(job)
			if d.pause != 0 && (d.pause <= pause || d.pause > m.MaxPause) {
				t.Fatalf("from a pause of %v to %v, of %v", pause, d.pause, m.MaxPause)
			}
			if d.why == "" && (d.means != "" || d.pause != 0 && pause != 0) {
				t.Fatalf("%+v has no reason", d)
			}
			pause = max(pause, d.pause)
			if d.means != "" {
				done = append(done, d.means)
			}
			if c.again {
				break
			}
		}
		last := -1
		for _, means := range done {
			i := slices.Index(maint.AllMeans, means)
			if i <= last || !slices.Contains(m.Allow, means) {
				t.Fatalf("%v, of %v", done, m.Allow)
			}
			last = i
		}
		if fmt.Sprint(done) != fmt.Sprint(c.used) {
			t.Fatalf("%v are kept as %v", done, c.used)
		}
	})
}
