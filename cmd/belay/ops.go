package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"belay/agent/maint"
)

func (a *app) migrateCmd() *cobra.Command {
	var r maint.MigrateRequest
	var detach bool
	var allow []string
	var wait time.Duration
	c := &cobra.Command{
		Use: "migrate GUEST --to HOST", Short: "Live-migrate a guest to a peer host", Args: migrateArgs,
		Long: `Live-migrate a guest to a peer host. Both hosts are asked first, as by
'belay guests --why'. If anything fails on the way, the guest runs where it ran before.
Ctrl-C detaches: the migration goes on.

A guest that writes faster than the network takes it stays here, unless --allow has
more be done for it. With postcopy the guest runs on the peer while a part of its memory
is still here: from then on there is no way back, no abort, and if either host or its
QEMU dies before the end, the guest is lost, as by a power cut.

Of disks that --copy-disks copies the old images are left here, for you to remove.

Exit codes: 0 done; 1 failed, aborted or stuck; 2 wrong usage; 3 blocked, nothing was
changed; 4 the guest has moved, something after that did not work; 5 goes on; 70 the
peer is this host.`,
		Example: `  belay migrate web-1 --to host-b
  belay migrate web-1 --to host-b --timeout 10m --reason "firmware"
  belay migrate web-1 --to host-b --copy-disks --timeout 4h
  belay migrate web-1 --to host-b --detach`,
		ValidArgsFunction: a.completeGuests,
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkWait(wait); err != nil {
				return err
			}
			if c.Flags().Changed("copy-disks") && len(r.CopyDisks) == 0 {
				return usage("--copy-disks= names no disk; it can be all, none, or disks' targets")
			}
			r.Guest = args[0]
			r.Allow = allowed(c.Flags(), allow)
			if r.To == "" {
				return usage("belay migrate needs --to HOST")
			}
			op, err := a.client().Migrate(c.Context(), r)
			if err != nil {
				return err
			}
			return a.begun(c.Context(), op, detach, wait)
		},
	}
	f := c.Flags()
	f.StringVar(&r.To, "to", "", "the peer host, as belayd's configuration names it")
	f.DurationVar(&r.Timeout, "timeout", 0, "cancel the copy after this time, the guest stays (default: belayd's migration.timeout)")
	f.Uint64Var(&r.BandwidthMiBs, "bandwidth", 0, "limit for the memory stream in MiB/s (default: belayd's migration.bandwidth_mib_s)")
	f.DurationVar(&r.MaxPause, "max-pause", 0, "longest pause that the copy may end with; it ends with a shorter one if the guest writes little enough (default: belayd's migration.max_pause)")
	f.StringSliceVar(&allow, "allow", nil, "what may be done if the guest writes faster than the network takes it, tried in this order: bandwidth (lift the limit), parallel (copy anew by several connections), slow (copy anew and slow the guest down), postcopy (run it on the destination before all of its memory is there: no way back from then on, see above) (default: belayd's migration.allow)")
	copyDisksFlag(f, &r.CopyDisks)
	f.StringVar(&r.Reason, "reason", "", "why, for the record")
	emergencyFlag(f, &r.Emergency)
	f.BoolVar(&detach, "detach", false, "print the operation's ID and return at once")
	f.DurationVar(&wait, "wait", 0, "wait no longer than this, then exit with 5 while the operation goes on (default: wait for its end)")
	_ = c.RegisterFlagCompletionFunc("to", a.completePeers)
	_ = c.RegisterFlagCompletionFunc("allow", completeMeans)
	return c
}

func (a *app) opsCmd() *cobra.Command {
	return group(&cobra.Command{Use: "ops", Short: "List, show, watch and abort operations"},
		a.opsListCmd(), a.opsShowCmd(), a.opsWatchCmd(), a.opsAbortCmd())
}

func (a *app) opsListCmd() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "list", Short: "List operations, the newest first", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ops, err := a.client().Ops(c.Context())
			if err != nil {
				return err
			}
			slices.Reverse(ops)
			const few = 20
			left := max(0, len(ops)-few)
			if all || a.format != "table" {
				left = 0
			}
			return a.print(ops, func(w io.Writer) {
				row(w, "ID", "STARTED", "GUEST", "TO", "BY", "STATE")
				for _, op := range ops[:len(ops)-left] {
					row(w, op.ID, clock(op.Started), about(op), dash(op.Peer), op.By, describe(op))
				}
				if left > 0 {
					row(w, fmt.Sprintf("… and %d more, see --all", left))
				}
			})
		},
	}
	c.Flags().BoolVar(&all, "all", false, "list all of them")
	return c
}

func (a *app) opsShowCmd() *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show an operation with all it wrote down", Args: exactly("an operation ID"), ValidArgsFunction: a.completeAllOps,
		RunE: func(c *cobra.Command, args []string) error {
			id := maint.OpID(args[0])
			op, err := a.client().Op(c.Context(), id)
			if err != nil {
				return err
			}
			recs, err := a.client().Records(c.Context(), id)
			if err != nil {
				return err
			}
			v := struct {
				maint.Op
				Records []maint.Record `json:"records"`
			}{op, recs}
			return a.print(v, func(w io.Writer) {
				printOp(w, op)
				for _, p := range problems(op) {
					row(w, "because", p.Error())
				}
				row(w)
				for _, r := range stepRuns(op) {
					printOutput(w, r)
				}
				for _, r := range inTime(recs) {
					row(w, recorded(r).Local().Format("15:04:05.000"), dash(r.Step), r.Kind, r.Text)
				}
			})
		},
	}
}

func (a *app) opsWatchCmd() *cobra.Command {
	var wait time.Duration
	c := &cobra.Command{
		Use: "watch ID", Short: "Follow an operation to its end; exits as the operation does", Args: exactly("an operation ID"), ValidArgsFunction: a.completeOps,
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkWait(wait); err != nil {
				return err
			}
			return a.follow(c.Context(), maint.OpID(args[0]), wait, maint.OutcomeDone)
		},
	}
	c.Flags().DurationVar(&wait, "wait", 0, "wait no longer than this, then exit with 5 while the operation goes on")
	return c
}

func (a *app) opsAbortCmd() *cobra.Command {
	var now bool
	c := &cobra.Command{
		Use: "abort ID", Short: "Ask an operation to stop and go back", Args: exactly("an operation ID"), ValidArgsFunction: a.completeOps,
		Long: "Ask an operation to stop and go back, and wait until it has ended. A guest that has already moved stays moved; a migration in post-copy cannot be aborted. A drain or a restore begins no more moves, and lets those that run come to their end, unless --now cancels them, too.",
		RunE: func(c *cobra.Command, args []string) error {
			id := maint.OpID(args[0])
			abort := a.client().Abort
			if now {
				abort = a.client().AbortNow
			}
			if _, err := abort(c.Context(), id); err != nil {
				return err
			}
			return a.follow(c.Context(), id, 0, maint.OutcomeAborted)
		},
	}
	c.Flags().BoolVar(&now, "now", false, "of a drain or a restore: also cancel the moves that run")
	return c
}

// checkWait refuses a negative --wait before anything is begun.
func checkWait(d time.Duration) error {
	if d < 0 {
		return usage("--wait is %s, it cannot be negative; 0 waits for the end", d)
	}
	return nil
}

// reconnectFor is how long follow waits for a belayd that is being restarted.
const reconnectFor = time.Minute

// follow waits for the end of an operation, showing its progress, and ends as
// the operation does: well, when the outcome is the one wished for.
func (a *app) follow(ctx context.Context, id maint.OpID, wait time.Duration, wish maint.Outcome) error {
	op, err := a.await(ctx, id, wait)
	if err != nil {
		return err
	}
	if err := a.print(op, func(w io.Writer) { printOp(w, op) }); err != nil {
		return err
	}
	if op.Outcome != wish {
		printProblems(a.err, fmt.Sprintf("operation %s: %s", op.ID, op.Outcome), problems(op))
		if len(op.Problems) == 1 && op.Problems[0].Code == maint.CodeNothing {
			return &ended{exitNothing}
		}
		return &ended{outcomeCode(op.Outcome)}
	}
	return nil
}

// await waits for the end of an operation, showing its progress.
func (a *app) await(ctx context.Context, id maint.OpID, wait time.Duration) (maint.Op, error) {
	watchCtx, cancel := ctx, context.CancelFunc(func() {})
	if wait > 0 {
		watchCtx, cancel = context.WithTimeout(ctx, wait)
	}
	defer cancel()
	show := newProgress(a.err, id)
	op, err := a.watch(watchCtx, id, show)
	show.close()
	switch {
	case ctx.Err() != nil:
		fmt.Fprintf(a.err, "\nbelay: detached; operation %s goes on.\n  follow it: belay ops watch %s\n  abort it:  belay ops abort %s\n", id, id, id)
		return op, &ended{exitTimeout}
	case watchCtx.Err() != nil:
		fmt.Fprintf(a.err, "belay: operation %s is still running after %s.\n  follow it: belay ops watch %s\n  abort it:  belay ops abort %s\n", id, wait, id, id)
		return op, &ended{exitTimeout}
	case errors.Is(err, maint.ErrPeerDown):
		lost(a.err, id, op.Kind == maint.OpHold, err)
		return op, &ended{exitTimeout}
	}
	return op, err
}

// watch follows the operation through restarts of belayd.
func (a *app) watch(ctx context.Context, id maint.OpID, show progress) (maint.Op, error) {
	lost, last := time.Time{}, maint.Op{}
	for {
		op, err := a.client().Watch(ctx, id, func(op maint.Op) {
			lost, last = time.Time{}, op
			show.update(op)
		})
		if err == nil || ctx.Err() != nil || !errors.Is(err, maint.ErrPeerDown) {
			return op, err
		}
		if lost.IsZero() {
			lost = time.Now()
			fmt.Fprintln(a.err, "belay: belayd does not answer; the operation will be taken up when it is back, waiting")
		}
		if time.Since(lost) > reconnectFor {
			return last, err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return op, ctx.Err()
		}
	}
}

func outcomeCode(o maint.Outcome) int {
	switch o {
	case maint.OutcomeDone:
		return exitDone
	case maint.OutcomeBlocked:
		return exitBlocked
	case maint.OutcomePartly:
		return exitPartly
	}
	return exitFailed
}

// begun prints the ID of an operation that was begun, or follows it to its end.
func (a *app) begun(ctx context.Context, op maint.Op, detach bool, wait time.Duration) error {
	if detach {
		return a.print(op, func(w io.Writer) { row(w, op.ID) })
	}
	return a.follow(ctx, op.ID, wait, maint.OutcomeDone)
}

// allowed are the means of --allow; nil where the flag was not given.
func allowed(f *pflag.FlagSet, names []string) []maint.Means {
	if !f.Changed("allow") {
		return nil
	}
	means := []maint.Means{}
	for _, name := range names {
		means = append(means, maint.Means(name))
	}
	return means
}

// about names what an operation is about.
func about(op maint.Op) string {
	switch {
	case op.Guest != "":
		return op.Guest
	case op.Hold != nil && op.Hold.All:
		return "all guests"
	case op.Hold != nil:
		return strings.Join(op.Hold.Guests, ",")
	case ofMany(op):
		return "all that can"
	case op.Patch != nil:
		return "this host"
	case op.Kexec != nil:
		return "all guests"
	}
	return "-"
}

// describe says in a few words where an operation is.
func describe(op maint.Op) string {
	switch {
	case op.State == maint.OpEnded && op.Outcome == maint.OutcomeDone && op.Move != nil:
		return fmt.Sprintf("done in %s, downtime %s", span(op.Move.Total), downtime(*op.Move))
	case op.State == maint.OpEnded && op.Outcome == maint.OutcomeDone && op.Held != nil:
		longest := time.Duration(0)
		for _, g := range op.Held.Guests {
			longest = max(longest, g.Pause)
		}
		return fmt.Sprintf("done, longest pause %s", span(longest))
	case op.State == maint.OpEnded && op.Outcome == maint.OutcomeDone && op.Replaced != nil:
		return fmt.Sprintf("done, %s, paused for %s", op.Replaced.Method, span(op.Replaced.Pause))
	case op.State == maint.OpEnded && op.Kexeced != nil:
		return fmt.Sprintf("%s, kernel %s", op.Outcome, op.Kexeced.After)
	case op.State == maint.OpEnded && op.Patch != nil:
		return fmt.Sprintf("%s, %s %s", op.Outcome, op.Patch.Action, op.Patch.Name)
	case op.State == maint.OpEnded && len(op.Moves) > 0:
		return fmt.Sprintf("%s, %s", op.Outcome, movesInWords(op))
	case op.State == maint.OpEnded:
		return string(op.Outcome)
	case op.State == maint.OpUndoing && !nothingToUndo(op):
		return "going back: " + op.Step
	case len(op.Moves) > 0:
		return op.Step + ": " + movesInWords(op)
	case op.Progress != nil && op.Step == "perform":
		p := op.Progress
		if disks := describeDisks(p); disks != "" {
			return "perform: " + disks
		}
		switch p.PostCopy {
		case maint.PostCopyRunning:
			return fmt.Sprintf("perform: runs on %s, in post-copy: %s of %s left, %s/s", op.Peer, bytes(p.MemoryLeft), bytes(p.MemoryTotal), bytes(p.BytesPerSecond))
		case maint.PostCopyBroken:
			return fmt.Sprintf("perform: runs on %s, in post-copy, which is broken and will be resumed", op.Peer)
		}
		return fmt.Sprintf("perform: %s of %s left, %s/s, pass %d", bytes(p.MemoryLeft), bytes(p.MemoryTotal), bytes(p.BytesPerSecond), p.Iteration)
	}
	return op.Step
}

// downtime is what was measured of a move's pause, which libvirt does not always tell.
func downtime(r maint.MoveResult) string {
	if r.Downtime == 0 {
		return "not measured"
	}
	return span(r.Downtime)
}

// printOp prints an operation as a small table.
func printOp(w io.Writer, op maint.Op) {
	row(w, "operation", op.ID)
	if !ofMany(op) && op.Patch == nil {
		row(w, "guest", about(op))
	}
	if op.Part != "" {
		row(w, "part of", op.Part)
	}
	if op.Trouble != nil {
		row(w, "now", op.Trouble.Error())
	}
	if op.Move != nil {
		row(w, "moved", fmt.Sprintf("%s → %s", op.Move.From, op.Move.To))
		row(w, "downtime", downtime(*op.Move))
		row(w, "memory sent", fmt.Sprintf("%s in %d passes, %s", bytes(op.Move.MemorySent), op.Move.Iterations, span(op.Move.Copy)))
	}
	printCopied(w, op)
	if v := op.Replaced; v != nil {
		row(w, "method", v.Method)
		row(w, "paused for", span(v.Pause)+suffix(", at most, in pauses: ", times(v.Pauses)))
		row(w, "QEMU", dash(v.OldQEMU)+" → "+dash(v.NewQEMU))
		if v.Clock != nil {
			row(w, "clock", fmt.Sprintf("%s: was off by %s, is by %s", v.Clock.State, offset(v.Clock.Before), clockAfter(*v.Clock)))
		}
	}
	if op.Arrival != nil {
		k := op.Arrival.Clock
		row(w, "clock", fmt.Sprintf("%s: was off by %s, is by %s", k.State, offset(k.Before), clockAfter(k)))
		printArrival(w, *op.Arrival)
	}
	printHealth(w, op)
	printHeld(w, op)
	printPatched(w, op)
	printKexec(w, op)
	printMoves(w, op)
	row(w, "asked by", op.By+", "+clock(op.Started)+suffix(": ", op.Reason))
	for _, s := range op.Steps {
		took := "…"
		if !s.Ended.IsZero() {
			took = span(s.Ended.Sub(s.Started))
		}
		row(w, "  "+s.Name, s.Status+", "+took)
	}
	if op.Resumed > 0 {
		row(w, "resumed", fmt.Sprintf("%d times after a restart of belayd", op.Resumed))
	}
	row(w, "outcome", dash(string(op.Outcome)))
}

// printHealth tells how a guest did its work before a move, and does after it.
func printHealth(w io.Writer, op maint.Op) {
	told := func(r *maint.HealthReport, well string) string {
		if r.Healthy {
			return well
		}
		return "not healthy: " + r.Reason
	}
	if b := op.HealthBefore; b != nil {
		row(w, "health before", told(b, "healthy")+", "+b.Check)
	}
	if op.Arrival == nil || op.Arrival.Health == nil {
		return
	}
	r := op.Arrival.Health
	text := told(r, "healthy after "+span(r.Took))
	if !r.Healthy {
		text += ", given up after " + span(r.Took)
		if b := op.HealthBefore; b != nil && !b.Healthy {
			text += "; as it was before the move"
		}
	}
	row(w, "health", text+", "+r.Check)
}

// printArrival tells how the guest is found at its new host.
func printArrival(w io.Writer, r maint.ArrivalReport) {
	if r.Agent != "" {
		row(w, "guest agent", r.Agent)
	}
	for _, p := range r.Ports {
		text := "its new host's bridge has learned it behind " + p.Tap
		if !p.Learned {
			text = "its new host's bridge has not learned it behind " + p.Tap
		}
		if p.Announced > 0 {
			text += fmt.Sprintf(", announced %d times more", p.Announced)
		}
		row(w, p.MAC, text+suffix("; the old host's sees it by ", p.SeenAt))
	}
}

// times is a number of times, "" for one.
func times(n int) string {
	if n < 2 {
		return ""
	}
	return fmt.Sprint(n)
}

func suffix(sep, s string) string {
	if s == "" {
		return ""
	}
	return sep + s
}
