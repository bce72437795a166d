package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"belay/agent/maint"
)

// A belayd that does not come back leaves the end unknown: it is no failure, and
// what to do is said.
func TestLostBelayd(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "no-belayd.sock")
	synctest.Test(t, func(t *testing.T) {
		var said strings.Builder
		a := &app{err: &said, socket: socket}
		_, err := a.await(t.Context(), "hold-1", 0)
		var end *ended
		if !errors.As(err, &end) || end.code != exitTimeout {
			t.Errorf("it ends with %v", err)
		}
		for _, want := range []string{"has not answered for 1m0s", "operation hold-1 is not known to have ended", "belay ops watch hold-1"} {
			if !strings.Contains(said.String(), want) {
				t.Errorf("%q is not in:\n%s", want, &said)
			}
		}
	})
	for hold, want := range map[bool]int{true: 1, false: 0} {
		var said strings.Builder
		lost(&said, "op-1", hold, context.DeadlineExceeded)
		if strings.Count(said.String(), "the leash releases them") != want {
			t.Errorf("of a hold: %t:\n%s", hold, &said)
		}
	}
}

// A reason as long as libvirt's are does not widen the table.
func TestHeldTableIsNarrow(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("error: internal error: ", 12)
	op := maint.Op{Held: &maint.HoldResult{Guests: []maint.HeldGuest{
		{Guest: "web-1", ReleasedBy: "leash", Pause: time.Second, Clock: &maint.ClockReport{State: maint.ClockUnsynchronised, Reason: long}},
		{Guest: "web-2", ReleasedBy: "belayd", Pause: time.Second, Clock: &maint.ClockReport{State: maint.ClockSynchronised, Before: &maint.ClockOffset{}}},
	}}}
	var b strings.Builder
	if err := (&app{}).table(&b, func(w io.Writer) { printHeld(w, op) }); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	if len(lines) != 4 || !strings.HasPrefix(lines[3], "web-1") || !strings.Contains(lines[3], "clock unsynchronised: error") {
		t.Fatalf("the reason is not below:\n%s", &b)
	}
	for _, line := range lines[:3] {
		if utf8.RuneCountInString(line) > 110 {
			t.Errorf("wide: %q", line)
		}
	}
}

func TestExitText(t *testing.T) {
	t.Parallel()
	for code, want := range map[int]string{0: "exit code 0", 7: "exit code 7", 128: "exit code 128", 137: "killed by signal 9 (137)",
		192: "killed by signal 64 (192)", 193: "exit code 193", 255: "exit code 255", -1: "exit code -1"} {
		if got := exitText(code); got != want {
			t.Errorf("%d is %q, want %q", code, got, want)
		}
	}
}

// What belayd writes down when it is stopped is told apart from a leash that was
// lost, and from an abort, which says so.
func TestStoppedInWords(t *testing.T) {
	t.Parallel()
	const canceled = "the step: ended before it was done: context canceled"
	hold := maint.Op{Kind: maint.OpHold, Problems: []maint.Problem{{Code: maint.CodeStep, Reason: canceled}}}
	if ps := problems(hold); ps[0].Reason != "the step: ended before it was done: belayd was stopped" {
		t.Errorf("%q", ps[0].Reason)
	}
	if hold.Problems[0].Reason != canceled {
		t.Error("the operation was changed")
	}
	lost := maint.Op{Kind: maint.OpHold, Problems: []maint.Problem{{Code: maint.CodeLeash, Reason: "was lost"}}}
	if got := inWords(lost, canceled); got != canceled {
		t.Errorf("without a leash: %q", got)
	}
	const aborted = "ended before it was done: aborted by root"
	if got := inWords(hold, aborted); got != aborted {
		t.Errorf("an abort: %q", got)
	}
}

// A hold without an undo undoes nothing.
func TestUndoIsTold(t *testing.T) {
	t.Parallel()
	undoing := maint.Op{State: maint.OpUndoing, Step: "hold", Hold: &maint.HoldRequest{}}
	for want, undo := range map[string]*maint.HostStep{"": nil, "op-1: undo hold\n": {Command: []string{"true"}}} {
		undoing.Hold.Undo = undo
		var said strings.Builder
		(&lines{w: &said, id: "op-1"}).update(undoing)
		if said.String() != want || strings.Contains(describe(undoing), "back") != (undo != nil) {
			t.Errorf("said %q and %q", &said, describe(undoing))
		}
	}
	for outcome, told := range map[maint.Outcome]bool{maint.OutcomeFailed: true, maint.OutcomePartly: false, maint.OutcomeStuck: false} {
		var said strings.Builder
		op := maint.Op{State: maint.OpUndoing, Step: "finish", Outcome: outcome, Replace: &maint.ReplaceRequest{}}
		(&lines{w: &said, id: "op-1"}).update(op)
		if (said.Len() > 0) != told || strings.Contains(describe(op), "back") != told {
			t.Errorf("%s: said %q and %q", outcome, &said, describe(op))
		}
	}
}

func TestOutputIsBounded(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	printOutput(&b, stepRun{"verify", &maint.StepRun{Output: strings.Repeat("a\n", 1000) + "\x1b[31m\tred" + strings.Repeat("x", 5000) + "\n"}})
	if got := strings.Count(b.String(), "\n"); got != fewLines+1 || len(b.String()) > 1000 || strings.Contains(b.String(), "\x1b") ||
		!strings.Contains(b.String(), "verify wrote (its end; -o json has more):\n  a\n") || !strings.Contains(b.String(), `\u001b[31m    red`) {
		t.Errorf("%d lines:\n%s", got, &b)
	}
}

// What the leash did stands at the time at which it did it.
func TestLeashRecordsInTime(t *testing.T) {
	t.Parallel()
	at := time.Now()
	event, err := json.Marshal(maint.LeashEvent{Time: at.Add(time.Second), Kind: maint.LeashArmed})
	if err != nil {
		t.Fatal(err)
	}
	recs := []maint.Record{{Seq: 1, Time: at}, {Seq: 2, Time: at.Add(2 * time.Second), Kind: maint.RecHeld},
		{Seq: 3, Time: at.Add(3 * time.Second), Kind: maint.RecLeash, Data: event}, {Seq: 4, Time: at.Add(3 * time.Second)}}
	var order []uint64
	for _, r := range inTime(recs) {
		order = append(order, r.Seq)
	}
	if !slices.Equal(order, []uint64{1, 3, 2, 4}) || !recorded(recs[2]).Equal(at.Add(time.Second)) || recs[1].Seq != 2 {
		t.Errorf("in the order %d", order)
	}
}
