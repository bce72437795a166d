package preserve_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
	"belay/patch/preserve"
	"belay/patch/preserve/preservetest"
)

// died is a bed whose belayd has armed the leash, has done what do says, and
// died of it.
func (b *bed) died(do func(preserve.Line)) {
	b.Helper()
	if err := b.preflight(); err != nil {
		b.Fatal(err)
	}
	b.scratch.Phase = preserve.PhaseHold
	if err := b.scratch.Save(map[string]time.Time{"begun": time.Now()}); err != nil {
		b.Fatal(err)
	}
	var order preserve.Order
	if _, err := b.scratch.Load(preserve.PhasePreflight, &order); err != nil {
		b.Fatal(err)
	}
	line, err := b.leashes.Arm(b.Context(), order)
	if err != nil {
		b.Fatal(err)
	}
	do(line)
	h := b.hold // of which nothing is left but what was given to it
	b.hold = &preserve.Hold{Op: h.Op, Request: h.Request, MaxPause: h.MaxPause, Host: h.Host, Leash: h.Leash, Steps: h.Steps, Clocks: h.Clocks, Log: h.Log}
}

// What is said of a guest after a recovery is so, wherever belayd died, and its
// clock is looked at in every case.
func TestRecoverTellsTheTruth(t *testing.T) {
	r := maint.HoldRequest{All: true, Step: command("sleep 1s")}
	for _, c := range []struct {
		name string
		do   func(*bed, preserve.Line)
		by   string // "": it was not paused
	}{
		{"before the pause", func(*bed, preserve.Line) {}, ""},
		{"while it asked for the pause", func(b *bed, _ preserve.Line) {
			time.AfterFunc(2*time.Second, func() {
				if err := b.host.Suspend(b.Context(), b.uuids["web-1"]); err != nil {
					b.Error(err)
				}
			})
		}, "belayd"},
		{"in the pause", func(b *bed, l preserve.Line) {
			if err := b.host.Suspend(b.Context(), b.uuids["web-1"]); err != nil {
				b.Error(err)
			}
			l.Mark(preserve.Paused, b.uuids["web-1"])
			time.Sleep(time.Second)
		}, "belayd"},
		{"after the release", func(b *bed, l preserve.Line) {
			l.Mark(preserve.Paused, b.uuids["web-1"])
			l.Mark(preserve.Released, b.uuids["web-1"])
		}, "belayd"},
		{"after somebody else's release", func(b *bed, l preserve.Line) {
			l.Mark(preserve.Paused, b.uuids["web-1"])
		}, "somebody else"},
		{"after the disarming", func(b *bed, l preserve.Line) {
			b.steps.Run(b.Context(), "hold-1-step", r.Step, nil)
			if _, err := l.Disarm(b.Context()); err != nil {
				b.Error(err)
			}
		}, "belayd"},
		{"before the arming", func(b *bed, l preserve.Line) {
			if _, err := l.Disarm(b.Context()); err != nil {
				b.Error(err)
			}
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			hold(t, r, func(b *bed) {
				b.died(func(l preserve.Line) { c.do(b, l) })
				if err := b.hold.Recover(b.Context(), b.scratch, b.record); err != nil {
					b.Fatal(err)
				}
				b.allRun("web-1")
				g := b.result("web-1")
				if g.ReleasedBy != c.by || (g.Left != "") != (c.by == "") || g.Problem != nil {
					b.Errorf("%+v", g)
				}
				if g.Clock == nil {
					b.Error("nobody has looked at its clock")
				}
				if known := !g.Released.IsZero(); known != (g.Pause > 0) || c.by == "somebody else" && known {
					b.Errorf("it was released at %s, after %s", g.Released, g.Pause)
				}
				time.Sleep(time.Minute)
				b.allRun("web-1")
			}, "web-1")
		})
	}
}

// relocking are leashes that release every guest once more, as they do after a
// release past libvirt.
type relocking struct {
	preserve.Leash
	again time.Duration
}

type relockingLine struct {
	preserve.Line
	again time.Duration
}

func (r relocking) Attach(ctx context.Context, op maint.OpID) (preserve.Line, error) {
	l, err := r.Leash.Attach(ctx, op)
	return relockingLine{l, r.again}, err
}

func (l relockingLine) Disarm(ctx context.Context) ([]maint.LeashEvent, error) {
	events, err := l.Line.Disarm(ctx)
	for _, e := range events {
		if e.Kind == maint.LeashReleased {
			e.Time = e.Time.Add(l.again)
			events = append(events, e)
		}
	}
	return events, err
}

// What the leash released was paused until it did so first.
func TestFirstReleaseCounts(t *testing.T) {
	hold(t, all, func(b *bed) {
		b.leashes.Alive = func() bool { return false }
		b.died(func(l preserve.Line) {
			if err := b.host.Suspend(b.Context(), b.uuids["web-1"]); err != nil {
				b.Fatal(err)
			}
			l.Mark(preserve.Paused, b.uuids["web-1"])
		})
		time.Sleep(8 * time.Second)
		b.allRun("web-1")
		b.hold.Leash = relocking{b.leashes, 4 * time.Second}
		if err := b.hold.Recover(b.Context(), b.scratch, b.record); err != nil {
			b.Fatal(err)
		}
		if g := b.result("web-1"); g.ReleasedBy != "leash" || g.Pause > preservetest.Silence+time.Second || g.Clock == nil {
			b.Errorf("%+v", g)
		}
	}, "web-1")
}

// A belayd that finds a hold begun by one that died goes back, however often.
func TestRecover(t *testing.T) {
	r := maint.HoldRequest{All: true, Step: command("sleep 5s"), Undo: ptr(command("true"))}
	hold(t, r, func(b *bed) {
		b.died(func(line preserve.Line) { // it had paused one of two, and begun the step
			if err := b.host.Suspend(b.Context(), b.uuids["web-1"]); err != nil {
				b.Fatal(err)
			}
			line.Mark(preserve.Paused, b.uuids["web-1"])
			go b.steps.Run(context.Background(), "hold-1-step", r.Step, nil)
			go b.steps.Run(context.Background(), "hold-1-undo", command("sleep 1h"), nil) // died with it
		})
		synctest.Wait()

		if err := b.hold.Perform(b.Context(), b.scratch, b.record); err == nil {
			b.Fatal("it was begun again")
		}
		for range 2 {
			b.out = nil
			if err := b.hold.Recover(b.Context(), b.scratch, b.record); err != nil {
				b.Fatal(err)
			}
			b.allRun("web-1", "web-2")
			if first := b.out.Result.Undo; first != nil && !first.OK() {
				b.Errorf("undone: %+v", first)
			}
		}
		if ran := b.steps.Ran(); !slices.Equal(ran, []string{"hold-1-step", "hold-1-undo"}) {
			b.Errorf("ran %v", ran)
		}
		if armed := b.leashes.Armed(); len(armed) > 0 {
			b.Errorf("armed: %v", armed)
		}
	}, "web-1", "web-2")
}
