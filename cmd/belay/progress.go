package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"sync/atomic"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"belay/agent/maint"
	"belay/agent/report"
)

// progress shows how an operation gets on.
type progress interface {
	update(maint.Op)
	close()
}

// newProgress draws a bar on a terminal and writes a line for each step
// elsewhere.
func newProgress(w io.Writer, id maint.OpID) progress {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		fmt.Fprintf(w, "operation %s (Ctrl-C detaches from it)\n", id)
		return newBar(w)
	}
	return &lines{w: w, id: id, at: make(map[string]string)}
}

// lines writes a line whenever a step begins.
type lines struct {
	w    io.Writer
	id   maint.OpID
	last string
	// postCopy is how it was told last: from then on there is no way back.
	postCopy maint.PostCopy
	at       map[string]string // where each guest of a drain was, as told last
}

func (l *lines) update(op maint.Op) {
	if op.State == maint.OpEnded {
		return
	}
	moveLines(l.w, op, l.at, true)
	now := op.Step
	if op.State == maint.OpUndoing {
		if nothingToUndo(op) {
			return
		}
		now = "undo " + now
	}
	if now != "" && now != l.last {
		l.last = now
		fmt.Fprintf(l.w, "%s: %s%s\n", l.id, now, suffix(": ", waitsFor(op)))
	}
	if p := op.Progress; p != nil && p.PostCopy != l.postCopy {
		if l.postCopy = p.PostCopy; op.Step == "perform" && p.PostCopy != "" {
			fmt.Fprintf(l.w, "%s: %s\n", l.id, describe(op))
		}
	}
	moveLines(l.w, op, l.at, false)
}

func (l *lines) close() {}

// waitsFor says what an operation waits for that guests are told of.
func waitsFor(op maint.Op) string {
	if op.Step != "announce" && !waitsInPlan(op) {
		return ""
	}
	return "guests are told, and have their notice unless they approve; see 'belay events list'"
}

// waitsInPlan reports whether an apply is at a step whose guests are told beforehand.
func waitsInPlan(op maint.Op) bool {
	if op.Apply == nil || op.State != maint.OpRunning {
		return false
	}
	for _, s := range op.Apply.Plan.Steps {
		if s.Name() == op.Step && s.At.After(op.Started) {
			return slices.ContainsFunc(op.Apply.Plan.Guests, func(g maint.PlannedGuest) bool {
				return !g.Told.IsZero() && slices.Contains(s.Guests, g.UUID)
			})
		}
	}
	return false
}

// nothingToUndo: what took effect, or is stuck, is left as it is; and a hold that goes back without
// an --undo only sees that its guests are released.
func nothingToUndo(op maint.Op) bool {
	return op.Outcome == maint.OutcomePartly || op.Outcome == maint.OutcomeStuck || op.Hold != nil && op.Hold.Undo == nil
}

// bar shows disks, then memory that has been copied, less what was dirtied again.
type bar struct {
	container *mpb.Progress
	bar       *mpb.Bar
	text      atomic.Value // string; the bar is drawn by a goroutine of its own
}

func newBar(w io.Writer) *bar {
	b := &bar{container: mpb.New(mpb.WithOutput(w), mpb.WithWidth(40))}
	b.text.Store("…")
	b.bar = b.container.AddBar(100, mpb.BarRemoveOnComplete(),
		mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return b.text.Load().(string) })))
	return b
}

func (b *bar) update(op maint.Op) {
	b.text.Store(describe(op))
	if done, of := report.Progress(op); of > 0 {
		b.bar.SetCurrent(int64(float64(done) / float64(of) * 99)) // at 100 it would go away
	}
}

func (b *bar) close() {
	b.bar.Abort(true)
	b.container.Wait()
}
