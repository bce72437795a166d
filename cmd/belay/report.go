package main

import (
	"github.com/spf13/cobra"

	"belay/agent/maint"
	"belay/agent/report"
)

func (a *app) reportCmd() *cobra.Command {
	return &cobra.Command{
		Use: "report OP", Short: "Report what an operation came to: what each guest felt, and why", Args: exactly("an operation ID"),
		ValidArgsFunction: a.completeAllOps,
		Long: `Report what an operation came to, or where it is: what each guest felt, measured, against
what was predicted where anything was; its clock before and after; what was decided, with
the numbers; when what happened; how long each step took. It is Markdown, for a ticket or
a file; -o json and -o yaml have the same for programs.`,
		Example: "  belay report drain-20261122-122337-zrfhv >report.md\n  belay report drain-20261122-122337-zrfhv -o json | jq '.guests[] | {guest, felt}'",
		RunE: func(c *cobra.Command, args []string) error {
			r, err := a.client().Report(c.Context(), maint.OpID(args[0]))
			if err != nil {
				return err
			}
			if a.format == "table" {
				return report.Markdown(a.out, r)
			}
			return a.print(r, nil)
		},
	}
}
