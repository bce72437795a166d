package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"belay/agent/maint"
)

func (a *app) applyCmd() *cobra.Command {
	var o maint.PlanOptions
	var reason string
	var dryRun, detach bool
	var wait time.Duration
	c := &cobra.Command{
		Use:   "apply {PLAN | MANIFEST} [flags]",
		Short: "Do an update to this host, each guest with the least impact",
		Long: `Carry out a plan that 'belay plan --out' has saved, or plan the update of a manifest
and carry that out; "-" reads either from standard input. A plan is refused if it would
not be the same any more.

Guests are told first, where belayd tells guests; then each step is an operation of its
own, in the plan's order. If one fails, or a check of the update after it, what was done
is taken back, and guests that have moved away are brought back, unless the
update's checks say otherwise (on_fail).

'belay ops abort' has it go back, at any moment. If belayd dies, or the host boots, it is
taken up again. One that can go neither on nor back is stuck: guests run, the host is
cordoned, and its record says why.

Exit codes: 0 done; 1 failed and taken back, aborted, or stuck; 2 wrong usage; 3 blocked,
nothing was changed; 4 done, but not all is well; 5 goes on.`,
		Example: `  belay plan update.toml --out update.plan
  belay apply update.plan
  belay apply update.toml --dry-run`,
		Args: exactly("a plan or a manifest"),
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkWait(wait); err != nil {
				return err
			}
			p, saved, err := a.readPlan(c.Context(), args[0], o, c.Flags().Changed("to") || c.Flags().Changed("return"))
			if err != nil {
				return err
			}
			if dryRun || len(p.Blockers) > 0 {
				if err := a.print(p, func(w io.Writer) { fmt.Fprint(w, p.Text()) }); err != nil {
					return err
				}
				if len(p.Blockers) > 0 {
					return &ended{exitBlocked}
				}
				if !saved { // it has just been made
					return nil
				}
				return a.client().CheckPlan(c.Context(), p)
			}
			op, err := a.client().Apply(c.Context(), maint.ApplyRequest{Plan: p, Reason: reason})
			if err != nil {
				return err
			}
			return a.begun(c.Context(), op, detach, wait)
		},
	}
	f := c.Flags()
	f.StringSliceVar(&o.To, "to", nil, "of a manifest: the peers that guests may go to (default: all)")
	f.BoolVar(&o.Return, "return", false, "of a manifest: bring back guests that were moved away")
	f.StringVar(&reason, "reason", "", "why, for the record")
	f.BoolVar(&dryRun, "dry-run", false, "only say what would be done, and what stands in the way")
	f.BoolVar(&detach, "detach", false, "print the operation's ID and return at once")
	f.DurationVar(&wait, "wait", 0, "wait no longer than this, then exit with 5 while the operation goes on (default: wait for its end)")
	_ = c.RegisterFlagCompletionFunc("to", a.completePeers)
	return c
}

// readPlan reads a plan that was saved, or has one made of a manifest.
func (a *app) readPlan(ctx context.Context, file string, o maint.PlanOptions, options bool) (p maint.Plan, saved bool, err error) {
	text, err := readFile(file, maint.MaxPlan)
	if err != nil {
		return p, false, err
	}
	if !strings.HasPrefix(strings.TrimSpace(string(text)), "{") {
		p, err = a.client().Plan(ctx, maint.PlanRequest{Manifest: string(text), Options: o})
		return p, false, err
	}
	if options {
		return p, true, usage("a plan says itself where guests go, and whether they are brought back: --to and --return are for manifests")
	}
	p, err = maint.DecodePlan(file, text)
	return p, true, err
}
