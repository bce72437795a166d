package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"belay/agent/maint"
)

func (a *app) replaceCmd() *cobra.Command {
	var r maint.ReplaceRequest
	var method string
	var all, dryRun, detach bool
	c := &cobra.Command{
		Use:   "replace-vmm {GUEST | --all}",
		Short: "Put a new QEMU under a running guest",
		Long: `Put a new QEMU, the one that is installed now, under a guest that runs. The
guest keeps its memory and goes on; it feels a pause. Without --method the one
with the shortest pause is taken that is possible for the guest; --dry-run says
what each would cost and what stands in its way.

--max-pause is compared with what a method is expected to take, before anything
is begun. It is no limit: a pause that turns out longer is not cut short.

With --all the guests are done one after the other, past those that cannot be.

Exit codes: 0 done; 1 failed, aborted or stuck; 2 wrong usage; 3 blocked, nothing
was paused; 4 done, but not all is well beside, such as a clock, or with --all:
some guests were done and others not; 5 not waited for the end, the operation goes
on; 70 no guest runs. With --all and no guest done it is the highest of the guests'
codes. With --dry-run 0 says only that belayd has answered.`,
		Example: `  belay replace-vmm web-1 --dry-run
  belay replace-vmm web-1
  belay replace-vmm --all --max-pause 2s`,
		ValidArgsFunction: a.completeGuests,
		Args: func(c *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return usage("%s: one argument too many: %q", c.CommandPath(), args[1])
			case all == (len(args) == 1):
				return usage("belay replace-vmm needs either a GUEST or --all")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			switch r.Method = maint.VMMMethod(method); {
			case r.MaxPause < 0:
				return usage("--max-pause cannot be negative")
			case detach && all:
				return usage("--detach is for one guest; --all does one after the other")
			case !known(r.Method):
				return usage("--method is %q, it can be %s", method, list(methods()))
			}
			guests := args
			if all {
				inv, err := a.client().Inventory(c.Context())
				if err != nil {
					return err
				}
				for _, g := range inv.Guests {
					if g.State == maint.GuestRunning {
						guests = append(guests, g.Name)
					}
				}
				if len(guests) == 0 {
					fmt.Fprintln(a.err, "belay: no guest runs here")
					return &ended{exitNothing}
				}
			}
			if dryRun {
				return a.printChoices(c, guests)
			}
			if !all {
				r.Guest = guests[0]
				return a.replace(c, r, detach)
			}
			return a.replaceEach(c, r, guests)
		},
	}
	f := c.Flags()
	f.StringVar(&method, "method", "", "how: "+list(methods())+" (default: the one with the shortest pause)")
	f.DurationVar(&r.MaxPause, "max-pause", 0, "refuse a method whose estimated pause is longer; no limit to the pause itself (default: any)")
	f.StringVar(&r.Reason, "reason", "", "why, for the record")
	emergencyFlag(f, &r.Emergency)
	f.BoolVar(&all, "all", false, "all guests that run, one after the other")
	f.BoolVar(&dryRun, "dry-run", false, "only say what each method would cost, and what stands in its way")
	f.BoolVar(&detach, "detach", false, "print the operation's ID and return at once")
	fixed(c, "method", methods()...)
	return c
}

func methods() []string {
	var names []string
	for _, m := range maint.VMMMethods {
		names = append(names, string(m))
	}
	return names
}

func known(m maint.VMMMethod) bool {
	return m == "" || slices.Contains(maint.VMMMethods, m)
}

func list(words []string) string {
	text := words[0]
	for _, w := range words[1:] {
		text += ", " + w
	}
	return text
}

// replace does one guest and waits for it.
func (a *app) replace(c *cobra.Command, r maint.ReplaceRequest, detach bool) error {
	op, err := a.client().Replace(c.Context(), r)
	if err != nil {
		return err
	}
	return a.begun(c.Context(), op, detach, 0)
}

// replaceEach does one guest after the other, goes on past one that cannot be
// done, and stops where it is interrupted.
func (a *app) replaceEach(c *cobra.Command, r maint.ReplaceRequest, guests []string) error {
	done, code := 0, exitDone
	for _, g := range guests {
		r.Guest = g
		err := a.replace(c, r, false)
		if c.Context().Err() != nil {
			return err
		}
		if err == nil {
			done++
			continue
		}
		var end *ended
		if !errors.As(err, &end) {
			end = &ended{exitCode(a.err, err)}
		}
		code = max(code, end.code)
	}
	switch {
	case code == exitDone:
		return nil
	case done > 0:
		code = exitPartly
	}
	return &ended{code}
}

// printChoices says what each method would cost each guest.
func (a *app) printChoices(c *cobra.Command, guests []string) error {
	type plan struct {
		Guest   string            `json:"guest"`
		Choices []maint.VMMChoice `json:"choices"`
	}
	var plans []plan
	for _, g := range guests {
		choices, err := a.client().ReplaceChoices(c.Context(), g)
		if err != nil {
			return err
		}
		plans = append(plans, plan{g, choices})
	}
	return a.print(plans, func(w io.Writer) {
		row(w, "GUEST", "METHOD", "PAUSE ABOUT", "MEMORY BESIDE", "POSSIBLE")
		for _, p := range plans {
			for _, k := range p.Choices {
				possible := "yes"
				if len(k.Problems) > 0 {
					possible = "no: " + k.Problems[0].Reason
				} else if k.Unproven != "" {
					possible = "only by --method: " + k.Unproven
				}
				row(w, p.Guest, k.Method, k.Pause.Round(10*time.Millisecond), bytes(k.MemoryBytes), possible)
				for i, problem := range k.Problems {
					if i > 0 {
						row(w, "", "", "", "", "no: "+problem.Reason)
					}
					if problem.Remedy != "" {
						row(w, "", "", "", "", "→ "+problem.Remedy)
					}
				}
			}
		}
	})
}
