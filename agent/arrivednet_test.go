package agent

import (
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
)

// A guest that the bridge does not find is announced again, and no more often than that.
func TestFollow(t *testing.T) {
	t.Parallel()
	denied := errors.New("denied")
	for _, c := range []struct {
		name      string
		after     time.Duration // the bridge learns it then
		at        string        // behind that port
		heedsFrom int           // or at an announcement
		announce  error
		learned   bool
		announced int
		within    time.Duration
		err       error
	}{
		{"known at once", 0, "vnet0", 0, nil, true, 0, 0, nil},
		{"learned in time", time.Second, "vnet0", 0, nil, true, 0, learnWait, nil},
		{"by the first announcement", time.Hour, "vnet0", 1, nil, true, 1, learnWait, nil},
		{"by the third", time.Hour, "vnet0", 3, nil, true, 3, 3 * (learnWait + learnEvery), nil},
		{"stays behind the uplink", 0, "uplink", 0, nil, false, announceMost, 4 * (learnWait + learnEvery), nil},
		{"QEMU cannot", time.Hour, "vnet0", 0, denied, false, 0, learnWait + learnEvery, denied},
	} {
		synctest.Test(t, func(t *testing.T) {
			begun, told := time.Now(), 0
			p := maint.ArrivedPort{MAC: "52:54:00:00:00:01", Tap: "vnet0"}
			err := follow(t.Context(), &p, func(net.HardwareAddr) ([]string, error) {
				if time.Since(begun) >= c.after || c.heedsFrom > 0 && told >= c.heedsFrom {
					return []string{c.at}, nil
				}
				return nil, nil
			}, func() error { told++; return c.announce })
			if p.Learned != c.learned || p.Announced != c.announced || !errors.Is(err, c.err) || time.Since(begun) > c.within {
				t.Errorf("%s: %+v, %v after %s", c.name, p, err, time.Since(begun))
			}
		})
	}
}
