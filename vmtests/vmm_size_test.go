package vmtests

import (
	"path/filepath"
	"slices"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/probe"
)

// The pause in place does not grow with memory; that of libvirt's own save and
// restore does. The two guests take turns, and the shortest pauses count: a busy
// machine makes any of them longer.
func TestPauseAndMemory(t *testing.T) {
	t.Parallel()
	if !long() {
		t.Skip("BELAY_LONG=1: four gigabytes of guests, and the machine should be quiet")
	}
	sizes := []int{512, 2048}
	var beds []*swapBed
	for _, mib := range sizes {
		b := newSwapBed(t, lab.Config{}, guest.Spec{FileMemory: true, MemoryMiB: mib})
		c, ctx := b.dial(b.host), b.ctx(2*time.Minute)
		_, err := c.Dirty(ctx, probe.DirtySettings{RateMiBs: 8, WorkingSetMiB: mib / 4}) // memory that is in use
		c.Close()
		if err != nil {
			t.Fatal(err)
		}
		b.first, b.mem = b.look(b.host)
		beds = append(beds, b)
	}
	pauses := make([][]time.Duration, len(beds))
	for range 5 {
		for i, b := range beds {
			pauses[i] = append(pauses[i], b.swap(maint.VMMInPlace).Pause)
		}
	}
	for i, b := range beds {
		begin := time.Now()
		image := filepath.Join(lab.MemoryDir, "saved")
		for _, args := range [][]string{{"save", "web-1", image}, {"restore", image}} {
			if _, err := b.host.Virsh(b.ctx(10*time.Minute), args...); err != nil {
				t.Fatal(err)
			}
		}
		saved := time.Since(begin)
		slices.Sort(pauses[i])
		t.Logf("%d MiB: in place %v, virsh save and restore %v", sizes[i], pauses[i], saved)
		if pauses[i][0] > saved {
			t.Errorf("%d MiB: in place takes %v, as long as virsh save and restore, %v", sizes[i], pauses[i][0], saved)
		}
	}
	if small, large := pauses[0][0], pauses[1][0]; large > small*6/5 {
		t.Errorf("the pause grows with memory: %v, %v", small, large)
	}
}
