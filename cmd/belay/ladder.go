package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"belay/agent/maint"
)

func (a *app) ladderCmd() *cobra.Command {
	return &cobra.Command{
		Use: "ladder [GUEST]", Short: "Say which rungs there are for each guest, and what would lift what is in the way",
		Long: `Say of each guest that runs, or of GUEST, which rungs of the ladder can be taken with it
now, whatever the update, and which its policy allows: what plans are made from. Of what
is in the way it says what would lift it. Of rung B1 it says what a hold takes beside the
command that is run in it, of B3 whether the kernel that runs could be started again
under the guests. Nothing is changed; peers are asked as before a migration.

A cell says how long a guest is expected to stand still, "asks" where its owner is asked
first, "may not" where only its policy is in the way, and "no".

Exit codes: 0 the answer is there, whatever it is; 1 belayd or libvirt could not be
asked; 2 wrong usage; 3 there is no such guest.`,
		Example: `  belay ladder
  belay ladder web-1 -o json`,
		ValidArgsFunction: a.completeGuests,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage("%s: one argument too many: %q", c.CommandPath(), args[1])
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			v, err := a.client().Ladder(c.Context(), append(args, "")[0])
			if err != nil {
				return err
			}
			return a.print(v, func(w io.Writer) { printLadder(w, v) })
		},
	}
}

func printLadder(w io.Writer, v maint.LadderView) {
	row(w, "RUNG", "HOST "+v.Host)
	for _, r := range v.Rungs {
		wants := ""
		if n := len(r.Wanting()); n > 0 {
			wants = fmt.Sprintf(": %s, see 'belay doctor'", count(n, "finding"))
		}
		row(w, r.Rung, string(r.Worst)+wants)
	}
	fmt.Fprintln(w)
	head := []any{"GUEST"}
	for _, r := range maint.Rungs {
		head = append(head, r)
	}
	row(w, head...)
	for _, g := range v.Guests {
		cells := []any{g.Guest}
		for _, r := range g.Rungs {
			cells = append(cells, cell(r))
		}
		row(w, cells...)
	}
	for _, name := range v.Off {
		row(w, name, "off: it feels nothing")
	}
	for i, o := range obstaclesOf(v.Guests) {
		if i == 0 {
			fmt.Fprintln(w)
		}
		who := strings.Join(o.guests, ", ")
		if len(o.guests) == len(v.Guests) && len(v.Guests) > 1 {
			who = fmt.Sprintf("all %d guests", len(v.Guests))
		}
		fmt.Fprintf(w, "%s not by %s: %s: %s\n", oneLine(who), o.rung, oneLine(o.Subject), oneLine(o.Reason))
		if o.Remedy != "" {
			fmt.Fprintf(w, "  → %s\n", oneLine(o.Remedy))
		}
	}
}

// cell is a verdict in a word or two.
func cell(v maint.RungVerdict) string {
	switch {
	case len(v.Cannot) > 0:
		return "no"
	case len(v.MayNot) > 0:
		return "may not"
	case v.Untouched != "":
		return "untouched"
	}
	var words []string
	switch {
	case v.Method != "":
		words = append(words, string(v.Method))
	case len(v.Peers) > 0:
		words = append(words, strings.Join(v.Peers, ","))
	default:
		words = append(words, "yes")
	}
	if v.Feels != nil {
		words = append(words, "~"+span(v.Feels.Typical))
	}
	if v.Asks {
		words = append(words, "asks")
	}
	return strings.Join(words, " ")
}

// obstacle is what stands in the way of a rung, of those guests.
type obstacle struct {
	rung maint.Rung
	maint.Problem
	guests []string
}

// obstaclesOf are all, each once, by rung.
func obstaclesOf(guests []maint.GuestRungs) (all []obstacle) {
	for _, rung := range maint.Rungs {
		for _, g := range guests {
			for _, v := range g.Rungs {
				if v.Rung != rung {
					continue
				}
				for _, p := range slices.Concat(v.Cannot, v.MayNot) {
					i := slices.IndexFunc(all, func(o obstacle) bool { return o.rung == rung && o.Problem == p })
					if i < 0 {
						i, all = len(all), append(all, obstacle{rung: rung, Problem: p})
					}
					if !slices.Contains(all[i].guests, g.Guest) {
						all[i].guests = append(all[i].guests, g.Guest)
					}
				}
			}
		}
	}
	return all
}
