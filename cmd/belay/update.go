package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"belay/agent/maint"
)

func (a *app) updateCmd() *cobra.Command {
	return group(&cobra.Command{Use: "update", Short: "Make manifests of updates"}, a.updateCreateCmd())
}

func (a *app) updateCreateCmd() *cobra.Command {
	var out string
	c := &cobra.Command{
		Use: "create", Short: "Make a manifest of the packages that are pending", Args: noArgs,
		Long: `Make a manifest of the newer packages that apt-get would install (it is not asked to fetch
lists): of each it is looked who runs its code, and so by which rungs it can be delivered.
What a person has to see to is on standard error. Read the manifest before you plan it:
it is a proposal.

Exit codes: 0 done; 1 failed; 2 wrong usage; 70 nothing is pending.`,
		Example: `  belay update create --out pending.toml
  belay plan pending.toml`,
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := a.client().ProposeUpdate(c.Context())
			if err != nil {
				return err
			}
			for _, n := range p.Notes {
				fmt.Fprintf(a.err, "belay: %s\n", oneLine(n))
			}
			switch {
			case out != "":
				if err := writeWhole(out, []byte(p.Manifest)); err != nil {
					return err
				}
				if a.format == "table" {
					return a.table(a.out, func(w io.Writer) { printPending(w, p.Packages) })
				}
				return a.print(p, nil)
			case a.format != "table":
				return a.print(p, nil)
			}
			_, err = fmt.Fprint(a.out, visible(p.Manifest))
			return err
		},
	}
	c.Flags().StringVar(&out, "out", "", "write the manifest into this file, and print what is pending")
	return c
}

func printPending(w io.Writer, all []maint.PendingPackage) {
	row(w, "PACKAGE", "FROM", "TO", "IN USE BY")
	for _, p := range all {
		by := p.Units
		if p.QEMU {
			by = append([]string{"guests' QEMUs"}, by...)
		}
		row(w, p.Name, dash(p.From), p.To, dash(strings.Join(by, ", ")))
	}
}
