package twin

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"

	"belay/agent/maint"
)

// A guest whose memory a second QEMU would empty gets none.
func TestSwapOfVirtioMem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.home.plugged = true
		err := p.phases(p.visit(), t.Context(), t.Context(), map[string]bool{}, false)
		var r *maint.Refusal
		if !errors.As(err, &r) || len(r.Problems) != 1 || !strings.Contains(r.Problems[0].Reason, "virtio-mem") {
			t.Errorf("refusal: %v", err)
		}
		// It was plugged when all had been asked.
		x := &exchange{Visit: p.visit(), leg: p.visit().leg(true)}
		if err := x.warm(t.Context()); err == nil || p.away.state != "" || len(p.second.lent) > 0 {
			t.Errorf("%v; the second QEMU is %q, and may have %v", err, p.away.state, p.second.lent)
		}
	})
}

// A QEMU that a belayd that died has left waiting is of the devices that the guest had then: it is ended,
// and another one started.
func TestSwapWithASecondQEMUOfBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		v := p.visit()
		if err := (&exchange{Visit: v, leg: v.leg(true)}).warm(t.Context()); err != nil || p.away.state != "inmigrate" {
			t.Fatalf("%v; it is %q", err, p.away.state)
		}
		p.book.Phase = PhaseOut
		if err := v.swap(t.Context(), t.Context(), v.leg(true), p.book, &crossing{Begun: 1}); err != nil {
			t.Fatal(err)
		}
		if p.away.state != "running" || p.home.state != "" || p.away.starts != 2 || p.spoilt != "" {
			t.Errorf("it is %q in the twin, in QEMU %d, and %q at home; %s", p.away.state, p.away.starts, p.home.state, p.spoilt)
		}
	})
}
