package agent

import (
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestSideBySide: all are done, as many at once as there may be and no more, also if one fails.
func TestSideBySide(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const all, atOnce = 10, 4
		failure := errors.New("the third")
		var now, most atomic.Int32
		done := make([]bool, all)
		began := time.Now()
		err := sideBySide(atOnce, make([]struct{}, all), func(i int, _ struct{}) error {
			n := now.Add(1)
			for was := most.Load(); n > was && !most.CompareAndSwap(was, n); was = most.Load() {
			}
			time.Sleep(time.Second)
			now.Add(-1)
			if done[i] = true; i == 2 {
				return failure
			}
			return nil
		})
		if took := time.Since(began); !errors.Is(err, failure) || most.Load() != atOnce || took != 3*time.Second {
			t.Errorf("%v; %d at once, in %s", err, most.Load(), took)
		}
		for i, done := range done {
			if !done {
				t.Errorf("%d is not done", i)
			}
		}
	})
}
