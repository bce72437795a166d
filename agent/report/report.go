package report

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// Source is all that a report is made from.
type Source struct {
	Host    string
	Now     time.Time
	Op      maint.Op
	Records []maint.Record         // of the operation
	Events  []maint.ScheduledEvent // others than the operation's are left out
	// Parts are the migrations of a drain, and the operations of an apply, that this host
	// knows.
	Parts []maint.Op
	// Arrived are guests that have come to this host: a restore's.
	Arrived []maint.Arrived
	// Plan is what the operation carries out, or is a step of; nil: nothing was planned,
	// and so nothing predicted.
	Plan *maint.Plan
}

// Make makes the report.
func Make(s Source) maint.Report {
	op := s.Op
	if op.Apply != nil {
		s.Plan = &op.Apply.Plan
	}
	r := maint.Report{Host: s.Host, Op: op.ID, Kind: op.Kind, What: What(op), By: op.By, Reason: op.Reason, State: op.State, Step: op.Step,
		Outcome: op.Outcome, Started: op.Started, Ended: op.Ended, Resumed: op.Resumed, Took: took(op.Started, op.Ended, s.Now),
		Guests: guests(s), HostDone: append(hostDone(op), partsDone(s)...), Decisions: decisions(s), Timeline: timeline(s),
		Steps: []maint.StepReport{}, Problems: append([]maint.Problem{}, op.Problems...)}
	if op.State != maint.OpEnded {
		r.Outcome = "" // a step that failed has one in mind
	}
	for _, step := range op.Steps {
		text := maint.StepReport{Name: step.Name, Status: step.Status, Error: step.Error}
		if !step.Ended.IsZero() {
			text.Took = step.Ended.Sub(step.Started)
		}
		r.Steps = append(r.Steps, text)
	}
	for _, m := range op.Moves {
		if m.Op != "" {
			r.Parts = append(r.Parts, m.Op)
		}
	}
	for _, part := range s.Parts {
		if !slices.Contains(r.Parts, part.ID) {
			r.Parts = append(r.Parts, part.ID)
		}
	}
	return r
}

// took is how long something has taken that may go on.
func took(from, to, now time.Time) time.Duration {
	if to.IsZero() {
		to = now
	}
	return max(0, to.Sub(from))
}

// What says what an operation does: "moves guest web-1 to host-b".
func What(op maint.Op) string {
	switch {
	case op.Kind == maint.OpMigrate:
		return "moves guest " + op.Guest + " to " + op.Peer
	case op.Hold != nil:
		return "holds " + held(op) + " while " + hostStep(op.Hold.Step)
	case op.Kind == maint.OpReplace:
		return "puts a new QEMU under guest " + op.Guest
	case op.Kind == maint.OpDrain:
		return "moves every guest to peers"
	case op.Restore != nil:
		return "brings back what " + string(op.Restore.Drain) + " has moved away"
	case op.Patch != nil:
		return "changes the running host: " + strings.TrimSpace(string(op.Patch.Action)+" "+cmp.Or(op.Patch.Name, op.Patch.File))
	case op.Apply != nil:
		u := op.Apply.Plan.Update
		return "applies update " + u.ID + reason(u.Description)
	case op.Kexec != nil:
		return "starts another kernel under all guests: " + op.Kexec.Kernel
	}
	return string(op.Kind)
}

func held(op maint.Op) string {
	if op.Hold.All {
		return "all guests"
	}
	return "guests " + strings.Join(op.Hold.Guests, ", ")
}

// hostStep says what is done to the host.
func hostStep(s maint.HostStep) string {
	if s.Unit != "" {
		return "systemd does " + cmp.Or(s.Job, "restart") + " " + s.Unit
	}
	words := make([]string, len(s.Command))
	for i, w := range s.Command {
		words[i] = maint.ShellWord(w)
	}
	return "this runs: " + strings.Join(words, " ")
}

// hostDone is what became of the host.
func hostDone(op maint.Op) []string {
	done := []string{}
	say := func(format string, args ...any) { done = append(done, fmt.Sprintf(format, args...)) }
	if h := op.Held; h != nil {
		for _, s := range hostSteps(h) {
			say("%s: %s, %s", s.name, runText(*s.run), Span(s.run.Ended.Sub(s.run.Started)))
		}
	}
	if v := op.Replaced; v != nil {
		say("QEMU %s → %s, by the method %s in %s", unknown(v.OldQEMU), unknown(v.NewQEMU), v.Method, Span(v.Total))
	}
	if k := op.Kexeced; k != nil {
		say("kernel %s → %s", unknown(k.Before), unknown(k.After))
		if k.BootBefore == k.BootAfter {
			say("the host was not booted")
		}
	}
	if p := op.Patched; p != nil {
		if p.Transition > 0 {
			say("every task ran it after %s", Span(p.Transition))
		}
		if p.Soaked > 0 {
			say("the host was watched for %s after it", Span(p.Soaked))
		}
		if p.Replaced != "" {
			say("it is in place of %s", p.Replaced)
		}
		if len(p.After) > 0 {
			say("microcode %s → %s", revisions(p.Before), revisions(p.After))
		}
		if p.Unwatched {
			say("libvirt or belayd was away meanwhile: a pause would not have been seen")
		}
	}
	return done
}

// partsDone is what the operations of an apply came to for the host.
func partsDone(s Source) (done []string) {
	if s.Op.Apply == nil {
		return nil
	}
	for _, part := range s.Parts {
		for _, text := range hostDone(part) {
			done = append(done, string(part.ID)+": "+text)
		}
	}
	return done
}

// namedRun is a step of a hold that was begun.
type namedRun struct {
	name string
	run  *maint.StepRun
}

func hostSteps(h *maint.HoldResult) (runs []namedRun) {
	for _, r := range []namedRun{{"command", h.Step}, {"check", h.Verify}, {"undo", h.Undo}} {
		if r.run != nil {
			runs = append(runs, r)
		}
	}
	return runs
}

func runText(r maint.StepRun) string {
	switch {
	case r.Error != "":
		return r.Error
	case r.TimedOut:
		return fmt.Sprintf("ended as its time was up, exit code %d", r.ExitCode)
	}
	return fmt.Sprintf("exit code %d", r.ExitCode)
}

// revisions are the microcode revisions that CPUs have, each once.
func revisions(cpus []maint.CPUMicrocode) string {
	var all []string
	for _, c := range cpus {
		if !slices.Contains(all, c.Revision) {
			all = append(all, c.Revision)
		}
	}
	return strings.Join(all, ", ")
}

func unknown(s string) string { return cmp.Or(s, "unknown") }
