package agent

import (
	"slices"
	"testing"
	"time"

	"belay/agent/maint"
)

// What an operation has left for a person is shown until one has put the same
// guests, or the same thing of the host, in order.
func TestUnresolved(t *testing.T) {
	t.Parallel()
	problem := &maint.Problem{Code: maint.CodeClock, Subject: "guest x", Reason: "its clock is behind"}
	hold := func(id maint.OpID, command string, outcome maint.Outcome, undone bool, guests ...maint.HeldGuest) maint.Op {
		undo := &maint.StepRun{}
		if !undone {
			undo.ExitCode = 1
		}
		return maint.Op{ID: id, Kind: maint.OpHold, State: maint.OpEnded, Outcome: outcome, Ended: time.Now(),
			Hold: &maint.HoldRequest{All: true, Step: maint.HostStep{Command: []string{command}}},
			Held: &maint.HoldResult{Guests: guests, Undo: undo}}
	}
	well := func(uuid string) maint.HeldGuest { return maint.HeldGuest{UUID: uuid} }
	ill := func(uuid string) maint.HeldGuest { return maint.HeldGuest{UUID: uuid, Problem: problem} }
	paused := func(uuid string) maint.HeldGuest { return maint.HeldGuest{UUID: uuid, Left: "it is paused"} }
	moved := func(id maint.OpID, uuid string, outcome maint.Outcome) maint.Op {
		return maint.Op{ID: id, Kind: maint.OpMigrate, GuestUUID: uuid, State: maint.OpEnded, Outcome: outcome, Ended: time.Now()}
	}
	long := moved("long ago", "a", maint.OutcomeStuck)
	long.Ended = time.Now().Add(-2 * stuckFor)
	open := moved("open", "a", "")
	open.State = maint.OpRunning

	for name, c := range map[string]struct {
		ops  []maint.Op
		want []string
	}{
		"nothing":                           {nil, nil},
		"a guest in trouble":                {[]maint.Op{hold("1", "x", maint.OutcomePartly, true, ill("a"), well("b"))}, []string{"1"}},
		"another guest was held since":      {[]maint.Op{hold("1", "x", maint.OutcomePartly, true, ill("a")), hold("2", "x", maint.OutcomeDone, true, well("b"))}, []string{"1"}},
		"it was left alone since":           {[]maint.Op{hold("1", "x", maint.OutcomePartly, true, ill("a")), hold("2", "x", maint.OutcomeDone, true, paused("a"))}, []string{"1"}},
		"it was held in order since":        {[]maint.Op{hold("1", "x", maint.OutcomePartly, true, ill("a")), hold("2", "y", maint.OutcomeDone, true, well("a"))}, nil},
		"it was moved in order since":       {[]maint.Op{hold("1", "x", maint.OutcomePartly, true, ill("a")), moved("2", "a", maint.OutcomeDone)}, nil},
		"only one of two was":               {[]maint.Op{hold("1", "x", maint.OutcomePartly, true, ill("a"), ill("b")), moved("2", "a", maint.OutcomeDone)}, []string{"1"}},
		"the latest shows it anew":          {[]maint.Op{hold("1", "x", maint.OutcomePartly, true, ill("a")), hold("2", "x", maint.OutcomePartly, true, ill("a"))}, []string{"2"}},
		"a failed one puts nothing right":   {[]maint.Op{moved("1", "a", maint.OutcomeStuck), moved("2", "a", maint.OutcomeFailed)}, []string{"1"}},
		"nor one that is not over":          {[]maint.Op{moved("1", "a", maint.OutcomeStuck), open}, []string{"1"}},
		"the host half changed":             {[]maint.Op{hold("1", "x", maint.OutcomeStuck, false, well("a"))}, []string{"1"}},
		"something else was done to it":     {[]maint.Op{hold("1", "x", maint.OutcomeStuck, false, well("a")), hold("2", "y", maint.OutcomeDone, true, well("a"))}, []string{"1"}},
		"the same was done to it, in order": {[]maint.Op{hold("1", "x", maint.OutcomeStuck, false, well("a")), hold("2", "x", maint.OutcomeDone, true, well("a"))}, nil},
		"long ago":                          {[]maint.Op{long}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got []string
			for _, k := range unresolved(c.ops) {
				got = append(got, k.Remedy[len("belay ops show "):])
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("shown are %q, not %q", got, c.want)
			}
		})
	}
}
