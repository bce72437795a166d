package agent_test

import (
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"

	"belay/agent/agenttest"
	"belay/agent/maint"
)

// TestHoldBounded: what asks for much, or for what cannot be meant, is refused at
// once, in few words, and nothing of it is journaled.
func TestHoldBounded(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a")
	node := w.Nodes[0]
	node.Host.PutGuest("web-1")
	node.Host.PutGuest("web-2")
	ctx := ctxFor(t, patience)
	long := strings.Repeat("x", 900_000)
	unknown := make([]string, 110_000)
	for i := range unknown {
		unknown[i] = "g" + strconv.Itoa(i)
	}
	for name, c := range map[string]struct {
		edit func(r *maint.HoldRequest)
		want string // in the answer
	}{
		"unknown names in groups": {func(r *maint.HoldRequest) { r.Groups = [][]string{unknown} }, "more than 4096"},
		"groups of few":           {func(r *maint.HoldRequest) { r.Groups = slices.Collect(slices.Chunk(unknown[:5000], 1)) }, "more than 4096"},
		"empty groups":            {func(r *maint.HoldRequest) { r.Groups = make([][]string, 100_000) }, "more than 4096"},
		"one unknown in a group":  {func(r *maint.HoldRequest) { r.Groups = [][]string{unknown[:4096]} }, "is not on host"},
		"one guest again":         {func(r *maint.HoldRequest) { r.All, r.Guests = false, slices.Repeat([]string{"web-1"}, 80_001) }, "more than 4096"},
		"no name":                 {func(r *maint.HoldRequest) { r.All, r.Guests = false, []string{""} }, "is empty"},
		"no name in a group":      {func(r *maint.HoldRequest) { r.Groups = [][]string{{"web-1", ""}} }, "is empty"},
		"long name":               {func(r *maint.HoldRequest) { r.All, r.Guests = false, []string{long} }, "900000 bytes"},
		"in two groups":           {func(r *maint.HoldRequest) { r.Groups = [][]string{{"web-1"}, {"web-2", "web-1"}} }, "more than one release group"},
		"in a group, not held": {func(r *maint.HoldRequest) {
			r.All, r.Guests, r.Groups = false, []string{"web-1"}, [][]string{{"web-2"}}
		}, "not among the guests"},
		"long reason":              {func(r *maint.HoldRequest) { r.Reason = strings.Repeat("x", 1001) }, "1001 bytes"},
		"reason of several lines":  {func(r *maint.HoldRequest) { r.Reason = "a\nb" }, "control characters"},
		"reason for the terminal":  {func(r *maint.HoldRequest) { r.Reason = "\x1b[2J" }, "control characters"},
		"long unit":                {func(r *maint.HoldRequest) { r.Step = maint.HostStep{Unit: long} }, "not the name of a unit"},
		"no step":                  {func(r *maint.HoldRequest) { r.Step = maint.HostStep{} }, "nothing to do"},
		"verify without a command": {func(r *maint.HoldRequest) { r.Verify = &maint.HostStep{} }, "nothing to do"},
		"undo of two kinds":        {func(r *maint.HoldRequest) { r.Undo = &maint.HostStep{Command: []string{"true"}, Unit: long} }, "both a command and a unit"},
		"very short timeout":       {func(r *maint.HoldRequest) { r.Verify = &maint.HostStep{Command: []string{"true"}, Timeout: 1} }, "makes no sense"},
	} {
		r := holdAll
		c.edit(&r)
		_, err := node.Client.Hold(ctx, r)
		answer := told(err)
		if !strings.Contains(answer, c.want) || len(answer) > 20_000 {
			t.Errorf("%s: want %q, got %d bytes: %.500s", name, c.want, len(answer), answer)
		}
	}
	if ops, err := node.Client.Ops(ctx); err != nil || len(ops) > 0 {
		t.Errorf("journaled are %d operations, %v", len(ops), err)
	}
}

// told is all that an error says.
func told(err error) string {
	var refusal *maint.Refusal
	var problem *maint.Problem
	var b []byte
	switch {
	case errors.As(err, &refusal):
		b, _ = json.Marshal(refusal)
	case errors.As(err, &problem):
		b, _ = json.Marshal(problem)
	}
	return string(b)
}

func TestReasonBounded(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	node := w.Nodes[0]
	node.Host.PutGuest("web-1")
	ctx := ctxFor(t, patience)
	for _, reason := range []string{strings.Repeat("x", 1001), "a\nb", "\x00", "\u0085"} {
		_, migrate := node.Client.Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: "b", Reason: reason})
		_, replace := node.Client.Replace(ctx, maint.ReplaceRequest{Guest: "web-1", Reason: reason})
		for what, err := range map[string]error{"migrate": migrate, "replace": replace} {
			if answer := told(err); !strings.Contains(answer, string(maint.CodeBadRequest)) || !strings.Contains(answer, "reason") || len(answer) > 500 {
				t.Errorf("%s for %.20q: %s", what, reason, answer)
			}
		}
	}
	_, err := node.Client.Replace(ctx, maint.ReplaceRequest{Guest: "web-1", Method: maint.VMMMethod(strings.Repeat("x", 1<<19))})
	if answer := told(err); !strings.Contains(answer, string(maint.CodeBadRequest)) || !strings.Contains(answer, "in-place") || len(answer) > 500 {
		t.Errorf("a method that there is not: %s", answer)
	}
	if ops, err := node.Client.Ops(ctx); err != nil || len(ops) > 0 {
		t.Errorf("journaled are %d operations, %v", len(ops), err)
	}
}

// TestHoldNamesOnce: who names a guest again, also by its UUID, holds it once.
func TestHoldNamesOnce(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a")
	node := w.Nodes[0]
	one, two := node.Host.PutGuest("web-1"), node.Host.PutGuest("web-2")
	ctx := ctxFor(t, patience)
	r := holdAll
	r.All, r.Guests = false, []string{"web-1", "web-2", one, "web-1", two}
	r.Groups = [][]string{{two, "web-2", two}, {"web-1", one}}
	r.Reason = strings.Repeat("é", 500)
	op, err := node.Client.Hold(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(op.Guests, []string{one, two}) || !slices.Equal(op.Hold.Guests, []string{"web-1", "web-2"}) ||
		!slices.EqualFunc(op.Hold.Groups, [][]string{{two}, {"web-1"}}, slices.Equal) {
		t.Errorf("guests %q, of the request %q, in groups %q", op.Guests, op.Hold.Guests, op.Hold.Groups)
	}
	if op = await(t, ctx, node, op.ID); op.Outcome != maint.OutcomeDone || len(op.Held.Guests) != 2 {
		t.Errorf("%s %+v %+v", op.Outcome, op.Problems, op.Held)
	}
}
