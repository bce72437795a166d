package main

import (
	"cmp"
	"fmt"
	"io"
	"path/filepath"

	"github.com/spf13/cobra"

	"belay/agent/maint"
)

func (a *app) kexecCmd() *cobra.Command {
	var r maint.KexecRequest
	var dryRun, detach bool
	c := &cobra.Command{
		Use:   "kexec --kernel IMAGE --initrd FILE {--all | --guest GUEST ...} [flags]",
		Short: "Start another host kernel under the guests, which go on where they were",
		Long: `Save every guest into memory that outlives the kernel, start another kernel from
this one, and restore them: they stand still for as long as that takes, and do not
boot. The host needs memory that is reserved for it, see 'belay doctor'. A guest whose
memory is there already is not copied: --dry-run says which, and why others are.

A new kernel that is not well has the old one started in the same way, and the
guests go on under that. What the memory does not hold any more, after a power cut
say, is told as lost. 'belay ops abort' has the guests go on under this kernel,
until the host goes down.

All guests that run are part of it: name each, or say --all.`,
		Example: `  belay kexec --kernel /boot/vmlinuz-6.1.0-30-amd64 --initrd /boot/initrd.img-6.1.0-30-amd64 --all --dry-run
  belay kexec --kernel /boot/vmlinuz-6.1.0-30-amd64 --initrd /boot/initrd.img-6.1.0-30-amd64 --all`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			switch {
			case r.Kernel == "" || r.Initrd == "":
				return usage("belay kexec needs --kernel and --initrd")
			case r.All == (len(r.Guests) > 0):
				return usage("belay kexec needs either --all or --guest")
			}
			if r.Kernel, err = filepath.Abs(r.Kernel); err != nil {
				return err
			}
			if r.Initrd, err = filepath.Abs(r.Initrd); err != nil {
				return err
			}
			if dryRun {
				return a.planKexec(c, r)
			}
			op, err := a.client().Kexec(c.Context(), r)
			if err != nil {
				return err
			}
			return a.begun(c.Context(), op, detach, 0)
		},
	}
	f := c.Flags()
	f.StringVar(&r.Kernel, "kernel", "", "the new kernel's image on this host")
	f.StringVar(&r.Initrd, "initrd", "", "its initrd")
	f.StringVar(&r.Append, "append", "", "its command line (default: this kernel's)")
	f.StringArrayVar(&r.Guests, "guest", nil, "a guest that runs (name or UUID); may be given more than once")
	f.BoolVar(&r.All, "all", false, "every guest that runs")
	f.StringVar(&r.Reason, "reason", "", "why, for the record")
	emergencyFlag(f, &r.Emergency)
	f.BoolVar(&dryRun, "dry-run", false, "only say what would be done, and what stands in the way")
	f.BoolVar(&detach, "detach", false, "print the operation's ID and return at once")
	_ = c.RegisterFlagCompletionFunc("guest", a.completeGuests)
	return c
}

func (a *app) planKexec(c *cobra.Command, r maint.KexecRequest) error {
	v, err := a.client().PlanKexec(c.Context(), r)
	if err != nil {
		return err
	}
	err = a.print(v, func(w io.Writer) {
		row(w, "kernel", dash(v.Old.Release)+" → "+dash(v.New.Release))
		row(w, "command line", v.New.Cmdline)
		row(w, "memory", fmt.Sprintf("%s of %s free in %s", bytes(v.NeedBytes), bytes(v.FreeBytes), v.Dir))
		for _, g := range v.Guests {
			text := fmt.Sprintf("%s, %s at most", g.Memory, bytes(g.Bytes))
			if g.Why != "" {
				text += ", not in place: " + g.Why
			}
			row(w, "  "+g.Guest, text)
		}
	})
	if err != nil || len(v.Problems) == 0 {
		return err
	}
	printProblems(a.err, "it would not be begun", v.Problems)
	return &ended{exitBlocked}
}

// printKexec tells what became of the host's kernel and its guests.
func printKexec(w io.Writer, op maint.Op) {
	r := op.Kexeced
	if r == nil {
		return
	}
	booted := "booted"
	if r.BootBefore == r.BootAfter {
		booted = "not booted"
	}
	if r.Up > 0 {
		booted += fmt.Sprintf(": down in %s, up in %s", span(r.Down), span(r.Up))
	}
	row(w, "kernel", fmt.Sprintf("%s → %s, %s", r.Before, r.After, booted))
	for _, g := range r.Guests {
		text := string(cmp.Or(g.Fate, "unknown"))
		if g.Pause > 0 {
			text += fmt.Sprintf(", stood still for %s: %s %s, saved in %s, checked in %s, restored in %s",
				span(g.Pause), bytes(g.Bytes), cmp.Or(g.Memory, maint.KexecCopied), span(g.Save), span(g.Check), span(g.Restore))
		}
		if g.SameBoot != nil && *g.SameBoot {
			text += ", boot ID as before"
		}
		if g.Clock != nil {
			text += ", clock " + clockAfter(*g.Clock)
		}
		if g.Started {
			text += ", booted afresh"
		}
		row(w, "  "+g.Guest, text)
	}
}
