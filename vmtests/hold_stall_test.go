package vmtests

import (
	"context"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

// stalls are what a Linux kernel says when it believes that a CPU was stuck, or
// finds its clock to be wrong.
var stalls = regexp.MustCompile(`(?i)soft lockup|hard lockup|rcu.*stall|stall.*rcu|clocksource|hung task|blocked for more than|time went backwards|watchdog: BUG`)

// TestHoldStall holds a Linux guest for so long that its watchdogs could take
// the pause for a stall, and reads what its kernel has to say.
func TestHoldStall(t *testing.T) {
	longOnly(t)
	t.Parallel()
	w := newWard(t, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	const pause = time.Minute // beyond the 20 s of the soft lockup detector, and the 21 s of RCU's
	g := w.guests[0]
	before, err := g.Console(ctx, w)
	if err != nil {
		t.Fatal(err)
	}
	looks := w.look(ctx)
	mark := w.obs.Mark()
	var op maint.Op
	if err := w.BelayJSON(ctx, &op, "hold", "--all", "--max-pause", (pause + 10*time.Second).String(), "--", "sleep", strconv.Itoa(int(pause.Seconds()))); err != nil {
		t.Fatal(err)
	}
	if gap := w.obs.Since(mark, g.Spec.Name).LargestGap.Length; gap < pause {
		t.Fatalf("it stood still for %s only", gap)
	}
	sleep(ctx, 25*time.Second) // the watchdogs look every few seconds
	after, err := g.Console(ctx, w)
	if err != nil {
		t.Fatal(err)
	}
	c, err := g.Dial(ctx, w)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	kmsg, err := c.Kmsg(ctx)
	if err != nil {
		t.Fatal(err)
	}
	said := 0
	for line := range strings.Lines(strings.TrimPrefix(after, before)) {
		if stalls.MatchString(line) {
			said++
			t.Logf("console: %s", strings.TrimSpace(line))
		}
	}
	held := op.Held.Guests
	t.Logf("held for %s: %d such lines on the console; kernel: %+v; clock %+v", pause, said, kmsg, held[len(held)-1].Clock)
	if said > 0 {
		t.Errorf("the guest's kernel took the pause for a stall")
	}
	c.Close()
	w.same(looks, w.look(ctx))
}
