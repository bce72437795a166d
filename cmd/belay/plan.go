package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"belay/agent/maint"
)

// maxManifest is more than belayd reads of a manifest, bytes.
const maxManifest = 1 << 20

func (a *app) planCmd() *cobra.Command {
	var o maint.PlanOptions
	var out, diff, show string
	c := &cobra.Command{
		Use: "plan MANIFEST", Short: "Say how an update would be done, with the least impact on each guest",
		Long: `Say how the update of a manifest (docs/manifest.md) would be done to this host: by
which rung each guest is served, why not by one with less impact, what it will feel as
far as is known, when it is told, and in which steps. Nothing is changed. "-" reads the
manifest from standard input.

--out saves the plan, which --show prints again and --diff compares with. A plan that
was changed since it was saved is refused.

Exit codes: 0 the plan can be applied; 1 failed; 2 wrong usage; 3 it cannot, or the
manifest was refused.`,
		Example: `  belay plan kernel.toml
  belay plan kernel.toml --return --out kernel.json
  belay plan kernel.toml --diff kernel.json
  belay plan --show kernel.json`,
		Args: func(c *cobra.Command, args []string) error {
			if show == "" {
				return exactly("MANIFEST")(c, args)
			}
			if len(args) > 0 || out != "" || c.Flags().Changed("to") || o.Return {
				return usage("--show prints a plan as it is: leave out the manifest, --out, --to and --return")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			var p maint.Plan
			var err error
			if show != "" {
				p, err = readPlan(show)
			} else {
				p, err = a.makePlan(c.Context(), args[0], o)
			}
			if err != nil {
				return err
			}
			if out != "" {
				if err := writeWhole(out, p.Encode()); err != nil {
					return err
				}
			}
			if diff != "" {
				return a.diffPlans(diff, p)
			}
			if err := a.showPlan(p); err != nil {
				return err
			}
			if len(p.Blockers) > 0 {
				return &ended{exitBlocked}
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringSliceVar(&o.To, "to", nil, "the peers that guests may go to (default: all)")
	f.BoolVar(&o.Return, "return", false, "bring guests back at the end that have to move away")
	f.StringVar(&out, "out", "", "save the plan in this file")
	f.StringVar(&diff, "diff", "", "print what is otherwise than in the plan in this file")
	f.StringVar(&show, "show", "", "print the plan in this file")
	_ = c.RegisterFlagCompletionFunc("to", a.completePeers)
	return c
}

func (a *app) makePlan(ctx context.Context, manifest string, o maint.PlanOptions) (maint.Plan, error) {
	text, err := readFile(manifest, maxManifest)
	if err != nil {
		return maint.Plan{}, err
	}
	return a.client().Plan(ctx, maint.PlanRequest{Name: manifest, Manifest: string(text), Options: o})
}

func readPlan(file string) (maint.Plan, error) {
	text, err := readFile(file, maint.MaxPlan)
	if err != nil {
		return maint.Plan{}, err
	}
	return maint.DecodePlan(file, text)
}

// readFile reads a file, or standard input for "-".
func readFile(name string, most int64) ([]byte, error) {
	f := os.Stdin
	if name != "-" {
		var err error
		if f, err = os.Open(name); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = &fs.PathError{Op: "read", Path: name, Err: errors.New("is too large")}
	}
	return b, err
}

// writeWhole writes a file whole or not at all.
func writeWhole(name string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".belay-plan-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // there is nothing to remove once it has its name
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

func (a *app) showPlan(p maint.Plan) error {
	if a.format != "table" {
		return a.print(p, nil)
	}
	_, err := fmt.Fprint(a.out, visible(p.Text()))
	return err
}

func (a *app) diffPlans(file string, is maint.Plan) error {
	was, err := readPlan(file)
	if err != nil {
		return err
	}
	lines := maint.PlanDiff(was, is)
	if lines == nil {
		lines = []string{}
	}
	return a.print(lines, func(w io.Writer) {
		for _, line := range lines {
			row(w, line)
		}
		if len(lines) == 0 {
			row(w, "no difference that a guest would feel")
		}
	})
}
