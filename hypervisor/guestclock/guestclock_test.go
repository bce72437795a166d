package guestclock

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

const ms = time.Millisecond

// right checks that the report says synchronised, and the truth as well.
func right(t *testing.T, w *world, r maint.ClockReport, within time.Duration) {
	t.Helper()
	if r.State != maint.ClockSynchronised || r.Reason != "" {
		t.Errorf("%s: %s", r.State, r.Reason)
	}
	if off := w.guest.offset(); off.Abs() > within {
		t.Errorf("the guest's clock is off by %s", off)
	}
	honest(t, w, r)
}

// honest checks that the truth is within the error bars.
func honest(t *testing.T, w *world, r maint.ClockReport) {
	t.Helper()
	if r.After == nil {
		return
	}
	if off := w.guest.offset(); (off - r.After.Offset).Abs() > r.After.Error+20*time.Microsecond {
		t.Errorf("reported %s ± %s, is %s", r.After.Offset, r.After.Error, off)
	}
}

func TestCorrect(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		r := w.hold(t, ctx, 5*time.Second, nil)
		right(t, w, r, 50*time.Microsecond)
		if r.Shots != 1 || r.Before == nil || r.Before.Offset.Abs() > ms {
			t.Errorf("%+v", r)
		}
		// The setting took effect one way after the release.
		if off := r.Stale - 300*time.Microsecond; off.Abs() > r.StaleError || r.StaleError > ms {
			t.Errorf("stale for %s ± %s", r.Stale, r.StaleError)
		}
	})
}

// The first shot must not wait for any question.
func TestFirstShotIsFirst(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		b, _ := w.Prepare(ctx, w.guest.known())
		w.guest.pause(time.Second)
		w.guest.log = nil
		right(t, w, w.Correct(ctx, b, time.Now(), 0), 50*time.Microsecond)
		if w.guest.log[0] != "guest-set-time" {
			t.Errorf("first the agent was asked for %s", w.guest.log[0])
		}
	})
}

// A way there that is longer than the way back, or the other way round, is within
// the error bars, and as good as can be had.
func TestAsymmetricDelays(t *testing.T) {
	for _, way := range [][2]time.Duration{{4 * ms, 0}, {0, 4 * ms}, {8 * ms, 2 * ms}} {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.there = func() time.Duration { return way[0] }
			w.guest.back = func() time.Duration { return way[1] }
			r := w.hold(t, ctx, 5*time.Second, nil)
			honest(t, w, r)
			if off := w.guest.offset(); off.Abs() > (way[0]+way[1])/2+ms {
				t.Errorf("%v: off by %s", way, off)
			}
		})
	}
}

// A shot that was held up is made good by the next; what was learnt from a busy
// moment does not send the clock ahead.
func TestSlowFirstShot(t *testing.T) {
	for _, late := range []time.Duration{30 * ms, 3 * time.Second} {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			first := w.guest.there
			r := w.hold(t, ctx, 5*time.Second, func() {
				calls := 0
				w.guest.there = func() time.Duration {
					if calls++; calls == 1 {
						return late
					}
					return first()
				}
			})
			right(t, w, r, ms)
			if r.Shots != 2 {
				t.Errorf("%d shots", r.Shots)
			}
			if late < near {
				if off := r.Stale - late; off.Abs() > r.StaleError {
					t.Errorf("stale for %s ± %s, was %s", r.Stale, r.StaleError, late)
				}
			} else if r.Stale < late {
				t.Errorf("stale for %s: it was %s behind after the first shot", r.Stale, late)
			}
		})
	}
}

// The way to set is longer than the way to read: the third shot knows.
func TestLearnsTheWay(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		w.Clocks.host = &slowSet{w, 3 * ms}
		b, _ := w.Prepare(ctx, w.guest.known())
		w.guest.pause(5 * time.Second)
		r := w.Correct(ctx, b, time.Now(), 0)
		honest(t, w, r)
		if off := w.guest.offset(); off > 0 || off < -3*ms || r.State != maint.ClockSynchronised {
			t.Errorf("off by %s: %+v", off, r)
		}
	})
}

// slowSet has settings take longer to arrive than questions.
type slowSet struct {
	*world
	by time.Duration
}

func (s *slowSet) AgentCommand(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	if command == "guest-set-time" {
		time.Sleep(s.by)
	}
	return s.world.AgentCommand(ctx, uuid, command, args)
}

// A guest that was ahead before is put right if its clock thereby goes forward,
// and is left ahead if it would go back.
func TestAheadBefore(t *testing.T) {
	for _, c := range []struct {
		pause time.Duration
		want  maint.ClockState
		left  time.Duration
	}{{5 * time.Second, maint.ClockSynchronised, 0}, {100 * ms, maint.ClockOff, 600 * ms}} {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.put(time.Now().Add(600 * ms))
			r := w.hold(t, ctx, c.pause, nil)
			honest(t, w, r)
			if r.State != c.want || (w.guest.offset()-c.left).Abs() > ms {
				t.Errorf("pause %s: off by %s: %s, %s", c.pause, w.guest.offset(), r.State, r.Reason)
			}
			if c.want == maint.ClockOff && !strings.Contains(r.Reason, "ahead") {
				t.Errorf("reason %q", r.Reason)
			}
		})
	}
}

// A clock that was off on purpose stays so: only the pause is undone.
func TestOffOnPurpose(t *testing.T) {
	for _, off := range []time.Duration{-time.Hour, 3 * time.Hour, -2 * time.Second} {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.put(time.Now().Add(off))
			r := w.hold(t, ctx, 5*time.Second, nil)
			honest(t, w, r)
			if left := w.guest.offset() - off; left.Abs() > ms {
				t.Errorf("was off by %s, is by %s", off, w.guest.offset())
			}
			if r.State != maint.ClockOff || !strings.Contains(r.Reason, "left so") || r.Shots == 0 || r.StaleError == 0 {
				t.Errorf("%+v", r)
			}
		})
	}
}

// A clock is not believed to be set because nobody complained, nor to be not set
// because somebody did.
func TestHwclock(t *testing.T) {
	t.Run("fails, although the clock was set", func(t *testing.T) {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.hwclock = "failing"
			right(t, w, w.hold(t, ctx, 5*time.Second, nil), ms)
		})
	})
	t.Run("is missing, nothing was set", func(t *testing.T) {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.hwclock = "missing"
			r := w.hold(t, ctx, 5*time.Second, nil)
			honest(t, w, r)
			if r.State != maint.ClockOff || r.Shots != 1 || r.Stale != 0 || !strings.Contains(r.Reason, "5s behind") ||
				!strings.Contains(r.Reason, "not currently supported") || !strings.Contains(r.Reason, "util-linux-extra") {
				t.Errorf("%+v", r)
			}
		})
	})
	t.Run("guest-set-time is disabled", func(t *testing.T) {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.disabled["guest-set-time"] = true
			r := w.hold(t, ctx, 5*time.Second, nil)
			honest(t, w, r)
			if r.State != maint.ClockOff || r.Shots != 0 || !strings.Contains(r.Reason, cannotSet) {
				t.Errorf("%+v", r)
			}
		})
	})
}

// An agent that is gone, at whatever call, never makes a success, and its report
// comes before ctx ends or right then.
func TestAgentLost(t *testing.T) {
	var calls int
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		w.hold(t, ctx, time.Second, nil)
		calls = w.guest.calls
	})
	if calls < 8 {
		t.Fatalf("%d calls are too few", calls)
	}
	for n := range calls {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.lostAfter = n
			prep, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			b, p := w.Prepare(prep, w.guest.known())
			if p != nil {
				t.Fatal(p)
			}
			w.guest.pause(time.Second)
			begin := time.Now()
			r := w.Correct(ctx, b, begin, 0)
			switch {
			case r.State == maint.ClockSynchronised:
				// The last measurement had begun, and went with what it had.
				right(t, w, r, ms)
				if n < calls-3 {
					t.Errorf("lost after %d of %d calls: %+v", n, calls, r)
				}
			case r.State != maint.ClockUnsynchronised || r.Reason == "" || r.After != nil:
				t.Errorf("lost after %d of %d calls: %+v", n, calls, r)
			case n == 0 && (r.Shots != 0 || time.Since(begin) > ms):
				t.Error("a dead agent was waited for once more")
			}
		})
	}
}

func TestNoAgent(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		g := w.guest.known()
		g.Agent = maint.AgentNone
		b, p := w.Prepare(ctx, g)
		if p != nil || b.Agent {
			t.Errorf("%+v, %v", b, p)
		}
		for _, r := range []maint.ClockReport{w.Correct(ctx, b, time.Now(), 0), w.Measure(ctx, g), w.Sync(ctx, g)} {
			if r.State != maint.ClockUnsynchronised || r.Reason != noChannel || r.Guest != "web-1" || r.UUID != "u" {
				t.Errorf("%+v", r)
			}
		}
		if w.guest.calls != 0 {
			t.Error("an agent that is not there was asked")
		}
	})
}

func TestFrozen(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		w.guest.frozen = true
		_, p := w.Prepare(ctx, w.guest.known())
		if p == nil || p.Code != maint.CodeFrozen || p.Remedy == "" {
			t.Errorf("%+v", p)
		}
		for _, r := range []maint.ClockReport{w.Measure(ctx, w.guest.known()), w.Sync(ctx, w.guest.known())} {
			if r.State != maint.ClockUnsynchronised || !strings.Contains(r.Reason, "frozen") {
				t.Errorf("%+v", r)
			}
		}
	})
}

// An agent that never answers to a setting keeps libvirt's worker no longer than a
// hwclock can take.
func TestSettingIsBounded(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		b, _ := w.Prepare(ctx, w.guest.known())
		w.guest.pause(time.Second)
		w.guest.lostAfter = w.guest.calls
		begin := time.Now()
		_, _, err := w.set(ctx, w.guest.known().UUID, b.Coarse, func() time.Duration { return 0 })
		if took := time.Since(begin); err == nil || took != w.longest || took < longestSet || w.guest.rtcResets != 0 {
			t.Errorf("given up after %s: %v", took, err)
		}
	})
}

// Windows reads a clock that ticks every 15.6 ms, and has no hwclock.
func TestWindows(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		w.guest.os, w.guest.tick, w.guest.hwclock = `{"id":"mswindows","kernel-version":"10.0"}`, 15625*time.Microsecond, ""
		r := w.hold(t, ctx, 5*time.Second, nil)
		right(t, w, r, 10*ms)
		if r.After.Error < ms {
			t.Errorf("error bar %s of a clock that ticks every %s", r.After.Error, w.guest.tick)
		}
		if w.guest.rtcResets != w.guest.shots {
			t.Errorf("of %d settings %d had QEMU forget the ticks that it owes", w.guest.shots, w.guest.rtcResets)
		}
	})
}

// A system that is not known is taken for one with a coarse clock.
func TestUnknownSystem(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		w.guest.disabled["guest-get-osinfo"] = true
		w.guest.tick = 15625 * time.Microsecond
		b, _ := w.Prepare(ctx, w.guest.known())
		if !b.Coarse || b.Offset == nil {
			t.Fatalf("%+v", b)
		}
		if off := w.guest.offset(); (off - b.Offset.Offset).Abs() > b.Offset.Error {
			t.Errorf("measured %+v, is %s", b.Offset, off)
		}
	})
}

// Whoever steps the host's clock, and when: a guest follows the host as it is now,
// the error bars hold, and the stale time is not touched.
func TestHostStep(t *testing.T) {
	for _, by := range []time.Duration{-10 * time.Minute, -20 * ms, 7 * ms, 40 * time.Second} {
		for _, when := range []string{"pause", "shot", "measure"} {
			simulate(t, func(t *testing.T, w *world, ctx context.Context) {
				w.guest.backBy = -1 << 62 // a host that was set back takes its guests along only if they lost more
				b, _ := w.Prepare(ctx, w.guest.known())
				w.guest.pause(30 * time.Second)
				resumed := time.Now()
				switch when {
				case "pause":
					w.stepHost(by)
				case "shot":
					time.AfterFunc(200*time.Microsecond, func() { w.stepHost(by) })
				case "measure":
					// The first reply comes at the next half second.
					time.AfterFunc(time.Until(time.Now().Truncate(time.Second).Add(1500*ms))%time.Second+ms, func() { w.stepHost(by) })
				}
				long, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
				defer cancel()
				r := w.Correct(long, b, resumed, 0)
				honest(t, w, r)
				if off := w.guest.offset(); r.State == maint.ClockSynchronised && off.Abs() > 6*ms {
					t.Errorf("%s, %s: off by %s: %+v", by, when, off, r)
				}
				if by > 0 && r.State != maint.ClockSynchronised {
					t.Errorf("%s, %s: %+v", by, when, r)
				}
				if r.StaleError > 0 && r.Stale > 5*time.Second || r.Stale < 0 {
					t.Errorf("%s, %s: stale for %s", by, when, r.Stale)
				}
				w.guest.backBy = 0
			})
		}
	}
}

func TestSync(t *testing.T) {
	for _, c := range []struct {
		off, left time.Duration
		state     maint.ClockState
		shots     int
	}{
		{-90 * time.Second, 0, maint.ClockSynchronised, 1},
		{-24 * time.Hour, 0, maint.ClockSynchronised, 1},
		{-500 * time.Microsecond, -500 * time.Microsecond, maint.ClockSynchronised, 0},
		{2 * ms, 2 * ms, maint.ClockSynchronised, 0},
		{90 * ms, 90 * ms, maint.ClockOff, 0},
		{time.Hour, time.Hour, maint.ClockOff, 0},
	} {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.put(time.Now().Add(c.off))
			r := w.Sync(ctx, w.guest.known())
			honest(t, w, r)
			if r.State != c.state || r.Shots != c.shots || (w.guest.offset()-c.left).Abs() > ms || r.Stale != 0 || r.Before == nil ||
				(r.Before.Offset-c.off).Abs() > r.Before.Error || (c.state == maint.ClockOff) != (r.Reason != "") {
				t.Errorf("was off by %s, is by %s: %+v", c.off, w.guest.offset(), r)
			}
		})
	}
}

// What nothing was prepared for is undone as far as it can have been lost.
func TestRestore(t *testing.T) {
	for off, state := range map[time.Duration]maint.ClockState{-3 * time.Second: maint.ClockSynchronised, -time.Hour: maint.ClockOff} {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.put(time.Now().Add(off))
			r := w.Restore(ctx, w.guest.known(), 5*time.Second)
			if r.State != state || state == maint.ClockOff && (r.Shots != 0 || !strings.Contains(r.Reason, "left alone")) {
				t.Errorf("%s: %+v", off, r)
			}
		})
	}
}

// The longer a guest was away, the longer its agent may take to answer at all.
func TestRestoreBusyGuest(t *testing.T) {
	for lost, state := range map[time.Duration]maint.ClockState{40 * time.Second: maint.ClockSynchronised, 2 * time.Second: maint.ClockUnsynchronised} {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.deaf = 2
			w.guest.put(time.Now().Add(-lost))
			if r := w.Restore(ctx, w.guest.known(), lost); r.State != state {
				t.Errorf("away for %s: %+v", lost, r)
			}
		})
	}
}

// A guest whose clock could not be read before is still put right: by no more than
// what it can have lost.
func TestCorrectWithoutOffset(t *testing.T) {
	for _, off := range []time.Duration{0, -time.Hour} {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.put(time.Now().Add(off))
			w.guest.disabled["guest-get-time"] = true
			b, p := w.Prepare(ctx, w.guest.known())
			if p != nil || !b.Agent || b.Offset != nil || b.Reason == "" {
				t.Fatalf("%+v, %v", b, p)
			}
			w.guest.disabled["guest-get-time"] = false
			w.guest.pause(5 * time.Second)
			r := w.Correct(ctx, b, time.Now(), 0)
			if off == 0 {
				right(t, w, r, ms)
			} else if r.State != maint.ClockOff || r.Shots != 0 {
				t.Errorf("%+v", r)
			}
		})
	}
}

func TestMeasure(t *testing.T) {
	for off, state := range map[time.Duration]maint.ClockState{0: maint.ClockSynchronised, -4 * ms: maint.ClockSynchronised, -9 * ms: maint.ClockOff, time.Minute: maint.ClockOff} {
		simulate(t, func(t *testing.T, w *world, ctx context.Context) {
			w.guest.put(time.Now().Add(off))
			r := w.Measure(ctx, w.guest.known())
			if r.State != state || r.After != nil || w.guest.shots != 0 || (r.Before.Offset-off).Abs() > r.Before.Error {
				t.Errorf("%s: %+v", off, r)
			}
		})
	}
}

// A measurement ends early when it is good, or when time is short.
func TestMeasureEnds(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		w.guest.there = func() time.Duration { return 50 * time.Microsecond }
		w.guest.back = w.guest.there
		if _, err := w.compare(ctx, "u", grainOf(false)); err != nil || w.guest.calls != 3 {
			t.Errorf("%d calls, %v", w.guest.calls, err)
		}
	})
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		w.guest.there = func() time.Duration { return 300 * ms }
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		r, err := w.compare(short, "u", grainOf(false))
		if err != nil || short.Err() != nil || r.bar() == 0 {
			t.Errorf("%+v, %v, %v", r, err, short.Err())
		}
	})
}

// A host that is busy right after a release is not left with a measurement that
// says nothing.
func TestBusyMomentPasses(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		r := w.hold(t, ctx, 5*time.Second, func() {
			quick := w.guest.there
			w.guest.there = func() time.Duration { return 40 * ms }
			w.guest.back = w.guest.there
			time.AfterFunc(5*time.Second, func() { w.guest.there, w.guest.back = quick, quick })
		})
		right(t, w, r, ms)
		if r.After.Error > ms {
			t.Errorf("error bar %s", r.After.Error)
		}
	})
}

// A clock that somebody sets while it is measured: the readings before are void.
func TestSetWhileMeasured(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		w.guest.there = func() time.Duration { return 3 * ms }
		time.AfterFunc(10*ms, func() { w.guest.put(time.Now().Add(time.Minute)) })
		r, err := w.compare(ctx, "u", grainOf(false))
		if o := r.offset(); err != nil || (o.Offset-time.Minute).Abs() > o.Error {
			t.Errorf("%+v, %v", o, err)
		}
	})
}

// No guest waits in the host's queue with a time that grows old.
func TestTimesDoNotGrowOld(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		b, _ := w.Prepare(ctx, w.guest.known())
		w.guest.pause(5 * time.Second)
		for range cap(w.lanes) {
			w.lanes <- struct{}{}
		}
		time.AfterFunc(2*time.Second, func() {
			for range cap(w.lanes) {
				<-w.lanes
			}
		})
		r := w.Correct(ctx, b, time.Now(), 0)
		right(t, w, r, ms)
		if r.Shots != 1 || (r.Stale-2*time.Second).Abs() > ms {
			t.Errorf("%+v", r)
		}
	})
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		b, _ := w.Prepare(ctx, w.guest.known())
		w.guest.pause(5 * time.Second)
		for range cap(w.lanes) {
			w.lanes <- struct{}{}
		}
		if r := w.Correct(ctx, b, time.Now(), 0); r.State != maint.ClockUnsynchronised || r.Shots != 0 || !strings.Contains(r.Reason, "not told") {
			t.Errorf("%+v", r)
		}
	})
}

func TestBaselineIsKeptAsJSON(t *testing.T) {
	simulate(t, func(t *testing.T, w *world, ctx context.Context) {
		b, _ := w.Prepare(ctx, w.guest.known())
		w.guest.pause(5 * time.Second)
		text, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		var kept Baseline
		if err := json.Unmarshal(text, &kept); err != nil {
			t.Fatal(err)
		}
		right(t, w, w.Correct(ctx, kept, time.Now().Round(0), 0), ms)
	})
}
