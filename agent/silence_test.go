package agent

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
)

// A peer that says something every now and then is listened to for as long as that takes; one
// that is silent is given up.
func TestUnlessSilent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const words, apart, grace = 5, 20 * time.Second, 30 * time.Second
		heard := 0
		watch := func(end bool) func(context.Context, func(maint.Op)) (maint.Op, error) {
			return func(ctx context.Context, f func(maint.Op)) (maint.Op, error) {
				for range words {
					if !pause(ctx, apart) {
						return maint.Op{}, ctx.Err()
					}
					f(maint.Op{})
				}
				if end {
					return maint.Op{State: maint.OpEnded}, nil
				}
				<-ctx.Done()
				return maint.Op{}, ctx.Err()
			}
		}
		hear := func(maint.Op) { heard++ }
		if op, err := unlessSilent(t.Context(), grace, grace, watch(true), hear); err != nil || op.State != maint.OpEnded || heard != words {
			t.Errorf("%+v, %v, %d words", op, err, heard)
		}
		began := time.Now()
		_, err := unlessSilent(t.Context(), grace, grace, watch(false), hear)
		if took := time.Since(began); !errors.Is(err, context.Canceled) || took != words*apart+grace {
			t.Errorf("%v after %s", err, took)
		}
		began = time.Now()
		if _, err := unlessSilent(t.Context(), time.Second, grace, watch(true), hear); err == nil || time.Since(began) != time.Second {
			t.Errorf("%v after %s", err, time.Since(began))
		}
	})
}
