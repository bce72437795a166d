package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// stepRun is one of the steps of a hold that was begun.
type stepRun struct {
	name string
	*maint.StepRun
}

func stepRuns(op maint.Op) (runs []stepRun) {
	if op.Held == nil {
		return nil
	}
	for _, r := range []stepRun{{"command", op.Held.Step}, {"verify", op.Held.Verify}, {"undo", op.Held.Undo}} {
		if r.StepRun != nil {
			runs = append(runs, r)
		}
	}
	return runs
}

// printHeld tells what a hold did to each guest.
func printHeld(w io.Writer, op maint.Op) {
	if op.Held == nil || op.Outcome == maint.OutcomeBlocked {
		return
	}
	if len(op.Held.Guests) > 0 {
		row(w, "GUEST", "PAUSED FOR", "RELEASED BY", "CLOCK WAS OFF", "CLOCK IS OFF", "RAN WITH A STALE CLOCK")
	}
	for _, g := range op.Held.Guests {
		if g.Left != "" {
			row(w, g.Guest, "not paused: "+g.Left)
			continue
		}
		before, after, stale := "-", "unsynchronised", "-"
		if k := g.Clock; k != nil {
			before, after, stale = offset(k.Before), clockState(*k), staleness(*k)
		}
		pause := span(g.Pause)
		if g.AtMost {
			pause = "≤ " + pause
		}
		row(w, g.Guest, pause, dash(g.ReleasedBy), before, after, stale)
	}
	for _, g := range op.Held.Guests { // below: they can be long
		if k := g.Clock; g.Left == "" && k != nil && clockReason(*k) != "" {
			row(w, g.Guest, fmt.Sprintf("clock %s: %s", k.State, k.Reason))
		}
	}
	for _, r := range stepRuns(op) {
		row(w, r.name, fmt.Sprintf("%s, %s%s", exitText(r.ExitCode), span(r.Ended.Sub(r.Started)), suffix(": ", inWords(op, r.Error))))
	}
}

// exitText is how a step's command ended.
func exitText(code int) string {
	const signals = 64
	if n := code - 128; n > 0 && n <= signals {
		return fmt.Sprintf("killed by signal %d (%d)", n, code)
	}
	return fmt.Sprintf("exit code %d", code)
}

// inWords is why a step of a hold was ended, where all that is written down is
// that the operation's context was: an abort says so, and so does a deadline.
func inWords(op maint.Op, reason string) string {
	lost := func(p maint.Problem) bool { return p.Code == maint.CodeLeash }
	before, ended := strings.CutSuffix(reason, "context canceled")
	if op.Kind != maint.OpHold || !ended || slices.ContainsFunc(op.Problems, lost) {
		return reason
	}
	return before + "belayd was stopped"
}

// problems are an operation's, for people.
func problems(op maint.Op) []maint.Problem {
	ps := slices.Clone(op.Problems)
	for i := range ps {
		ps[i].Reason = inWords(op, ps[i].Reason)
	}
	return ps
}

// fewLines is how much is shown of a step's output where it is not asked for.
const fewLines = 30

// printOutput shows the end of what a step wrote.
func printOutput(w io.Writer, r stepRun) {
	if r.Output == "" {
		return
	}
	lines := strings.Split(strings.TrimRight(r.Output, "\n"), "\n")
	left := max(0, len(lines)-fewLines)
	more := ""
	if left > 0 || r.OutputDropped > 0 {
		more = " (its end; -o json has more)"
	}
	fmt.Fprintf(w, "%s wrote%s:\n", r.name, more)
	for _, line := range lines[left:] {
		fmt.Fprintln(w, "  "+oneLine(shorten(strings.ReplaceAll(line, "\t", "    "))))
	}
}

// shorten bounds a line of output.
func shorten(line string) string {
	const most = 400
	if r := []rune(line); len(r) > most {
		return string(r[:most]) + " …"
	}
	return line
}

// recorded is the time of what a record tells: belayd fetches what the leash has
// noted when it is over.
func recorded(r maint.Record) time.Time {
	var e maint.LeashEvent
	if r.Kind == maint.RecLeash && json.Unmarshal(r.Data, &e) == nil && !e.Time.IsZero() {
		return e.Time
	}
	return r.Time
}

// inTime has records in the order in which it happened.
func inTime(recs []maint.Record) []maint.Record {
	recs = slices.Clone(recs)
	slices.SortStableFunc(recs, func(x, y maint.Record) int { return recorded(x).Compare(recorded(y)) })
	return recs
}

// lost tells of an operation whose belayd has not come back.
func lost(w io.Writer, id maint.OpID, hold bool, err error) {
	fmt.Fprintf(w, "belay: belayd has not answered for %s: %s\n", reconnectFor, oneLine(err.Error()))
	fmt.Fprintf(w, "  operation %s is not known to have ended; belayd takes it up when it is back.\n", id)
	if hold {
		fmt.Fprintf(w, "  the guests do not wait for that: the leash releases them without belayd.\n")
	}
	fmt.Fprintf(w, "  start belayd:  systemctl start belayd\n  follow it:     belay ops watch %s\n", id)
}
