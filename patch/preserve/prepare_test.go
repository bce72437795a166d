package preserve_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/preserve"
)

// arming tells when a leash is to be armed, and what comes of it.
type arming struct {
	preserve.Leash
	arm func() error
}

func (a arming) Arm(ctx context.Context, o preserve.Order) (preserve.Line, error) {
	if err := a.arm(); err != nil {
		return nil, err
	}
	return a.Leash.Arm(ctx, o)
}

// prepared wants the step, and nothing else, to wait when the leash is armed.
func (b *bed) prepared(then error) *bool {
	armed := new(bool)
	b.hold.Leash = arming{b.leashes, func() error {
		*armed = true
		if waits := b.steps.Prepared(); !slices.Equal(waits, []string{"hold-1-step"}) {
			b.Errorf("prepared before the arming: %v", waits)
		}
		return then
	}}
	return armed
}

func TestStepIsPreparedBeforeTheArming(t *testing.T) {
	r := maint.HoldRequest{All: true, Step: command("sleep 1s"), Verify: ptr(command("false")), Undo: ptr(command("true"))}
	hold(t, r, func(b *bed) {
		armed := b.prepared(nil)
		b.steps.Did = func(name string) {
			if waits := b.steps.Prepared(); len(waits) > 0 {
				b.Errorf("%v waits while %s is run", waits, name)
			}
		}
		if err := b.perform(); !slices.Equal(codes(err), []maint.Code{maint.CodeStep}) {
			b.Error(err)
		}
		if ran := b.steps.Ran(); !*armed || len(ran) != 3 {
			b.Errorf("armed: %v; ran %v", *armed, ran)
		}
	}, "web-1")
}

func TestStepCannotBePrepared(t *testing.T) {
	hold(t, all, func(b *bed) {
		armed := b.prepared(nil)
		b.steps.Refuse = errors.New("no room")
		events, stop := b.host.Subscribe()
		defer stop()
		err := b.perform()
		if !slices.Equal(codes(err), []maint.Code{maint.CodeStep}) || !strings.Contains(err.Error(), "nothing was paused: no room") {
			b.Errorf("refused with %v", err)
		}
		synctest.Wait()
		for len(events) > 0 {
			if e := <-events; e.Change == "suspended" {
				b.Errorf("guest %s was paused", e.Name)
			}
		}
		if ran := b.steps.Ran(); *armed || len(ran) > 0 || b.out.Result.Step != nil {
			b.Errorf("armed: %v; ran %v", *armed, ran)
		}
	}, "web-1")
}

// TestPreparedStepIsDismissed when it does not come to the step.
func TestPreparedStepIsDismissed(t *testing.T) {
	for name, c := range map[string]struct {
		arming error
		setup  func(*bed)
		want   string
	}{
		"the leash cannot be armed": {errors.New("no"), func(*bed) {}, "cannot be armed"},
		"a guest cannot be paused": {nil, func(b *bed) {
			b.host.Fault("Suspend", hypervisortest.Fault{Err: errors.New("no"), Times: 1})
		}, "cannot be paused"},
	} {
		t.Run(name, func(t *testing.T) {
			hold(t, all, func(b *bed) {
				armed := b.prepared(c.arming)
				c.setup(b)
				err := b.perform()
				if !*armed || err == nil || !strings.Contains(err.Error(), c.want) {
					b.Errorf("armed: %v; %v", *armed, err)
				}
				b.allRun("web-1")
				if told := b.out.Result.Guests; len(told) != 1 || c.arming != nil && !strings.Contains(told[0].Left, c.want) {
					b.Errorf("the record has of the guests: %+v", told)
				}
				if waits, ran := b.steps.Prepared(), b.steps.Ran(); len(waits)+len(ran) > 0 {
					b.Errorf("prepared: %v; ran %v", waits, ran)
				}
			}, "web-1")
		})
	}
}

// TestRecoverDismissesThePreparedStep of a belayd that died before it began:
// there is nothing to undo.
func TestRecoverDismissesThePreparedStep(t *testing.T) {
	r := maint.HoldRequest{All: true, Step: command("true"), Undo: ptr(command("true"))}
	for name, do := range map[string]func(*bed, preserve.Line){
		"before the arming": func(b *bed, l preserve.Line) {
			if _, err := l.Disarm(b.Context()); err != nil {
				b.Error(err)
			}
		},
		"in the pause": func(b *bed, l preserve.Line) {
			if err := b.host.Suspend(b.Context(), b.uuids["web-1"]); err != nil {
				b.Error(err)
			}
			l.Mark(preserve.Paused, b.uuids["web-1"])
		},
	} {
		t.Run(name, func(t *testing.T) {
			hold(t, r, func(b *bed) {
				b.died(func(l preserve.Line) {
					if err := b.steps.Prepare(b.Context(), "hold-1-step", r.Step); err != nil {
						b.Fatal(err)
					}
					do(b, l)
				})
				if err := b.hold.Recover(b.Context(), b.scratch, b.record); err != nil {
					b.Fatal(err)
				}
				b.allRun("web-1")
				if waits, ran := b.steps.Prepared(), b.steps.Ran(); len(waits)+len(ran) > 0 || b.out.Result.Step != nil {
					b.Errorf("prepared: %v; ran %v; %+v", waits, ran, b.out.Result)
				}
			}, "web-1")
		})
	}
}
