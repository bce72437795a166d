package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"belay/agent/maint"
)

func (a *app) patchCmd() *cobra.Command {
	return group(&cobra.Command{Use: "patch", Short: "Change the running host, felt by no guest: livepatches, microcode, components",
		Long: `Change what runs on this host while guests go on and feel nothing: rung A.

A kernel livepatch is three files side by side: NAME.ko, its manifest NAME.toml, and the
manifest's minisign signature NAME.toml.minisig. Before it is loaded all is checked that can
be; its transition is watched and turned round when it does not come to its end; the host
is watched for a while after that, and the livepatch taken back if it is not well. The one
that is active is loaded again after a boot of the same kernel.`},
		a.patchListCmd(), a.patchInspectCmd(), a.patchApplyCmd(), a.patchRevertCmd(), a.patchReloadCmd(), a.patchWatchCmd(), a.patchCoversCmd(), a.patchMicrocodeCmd(), a.patchRestartCmd(), a.patchQEMUCmd())
}

func (a *app) patchListCmd() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the livepatches that the kernel has", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			v, err := a.client().Patches(c.Context())
			if err != nil {
				return err
			}
			return a.print(v, func(w io.Writer) { printPatches(w, v) })
		},
	}
}

func printPatches(w io.Writer, v maint.PatchView) {
	row(w, "kernel", v.Release+", "+v.Version)
	if v.AutoOff != "" {
		row(w, "at boot", "no livepatch is loaded: "+v.AutoOff)
	}
	if k := v.Active; k != nil && !slices.ContainsFunc(v.Loaded, func(p maint.LivePatch) bool { return p.Kept != nil }) {
		row(w, "kept", fmt.Sprintf("%s, for kernel %s, is not loaded", k.Name, k.Release))
	}
	if len(v.Microcode) > 0 {
		row(w, "microcode", revisions(v.Microcode))
	}
	if len(v.Loaded) == 0 {
		row(w, "livepatches", "none")
		return
	}
	row(w, "LIVEPATCH", "STATE", "BY", "CHANGES", "COVERS")
	for _, p := range v.Loaded {
		by, covers := "somebody else", ""
		if p.Kept != nil {
			by, covers = "belay", strings.Join(p.Kept.Covers, " ")
		}
		var changes []string
		for _, o := range p.Objects {
			for _, f := range o.Functions {
				changes = append(changes, o.Name+"/"+f)
			}
		}
		row(w, p.Name, patchState(p), by, dash(strings.Join(changes, " ")), dash(covers))
	}
	printTasks(w, "waits for", v.Waiting)
}

func patchState(p maint.LivePatch) string {
	switch {
	case p.Transition && p.Enabled:
		return "in transition"
	case p.Transition:
		return "on its way out"
	case p.Enabled:
		return "active"
	}
	return "disabled"
}

func printTasks(w io.Writer, what string, tasks []maint.KernelTask) {
	for _, t := range tasks {
		in := "stack not readable"
		if len(t.Stack) > 0 {
			in = strings.Join(t.Stack, " < ")
		}
		if t.Function != "" {
			in = "in " + t.Function + ": " + in
		}
		row(w, what, fmt.Sprintf("%s (task %d)", t.Comm, t.TID), in)
	}
}

// revisions says which CPUs have which microcode.
func revisions(cpus []maint.CPUMicrocode) string {
	count := make(map[string]int)
	for _, c := range cpus {
		count[c.Revision]++
	}
	var words []string
	for r, n := range count {
		words = append(words, fmt.Sprintf("%s on %d CPUs", r, n))
	}
	slices.Sort(words)
	return strings.Join(words, ", ")
}

func (a *app) patchInspectCmd() *cobra.Command {
	return &cobra.Command{
		Use: "inspect FILE.ko", Short: "Say what a livepatch is, and whether it could be loaded now", Args: exactly("a livepatch's FILE.ko"),
		Long: "Say what a livepatch is, and whether it could be loaded here now. Exits with 3 when it could not.",
		RunE: func(c *cobra.Command, args []string) error {
			file, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			f, err := a.client().InspectPatch(c.Context(), file)
			if err != nil {
				return err
			}
			if err := a.print(f, func(w io.Writer) { printPatchFile(w, f) }); err != nil {
				return err
			}
			if len(f.Problems) > 0 {
				printProblems(a.err, "it would not be loaded", f.Problems)
				return &ended{exitBlocked}
			}
			return nil
		},
	}
}

func printPatchFile(w io.Writer, f maint.PatchFile) {
	row(w, "livepatch", dash(f.Name))
	row(w, "for kernel", dash(f.Release)+suffix(", ", f.Version))
	row(w, "vermagic", dash(f.VerMagic))
	row(w, "srcversion", dash(f.SrcVersion))
	row(w, "SHA-256", dash(f.SHA256))
	row(w, "cumulative", map[bool]string{true: "yes, it takes the place of the one before", false: "no"}[f.Cumulative])
	row(w, "covers", dash(strings.Join(f.Covers, " ")))
	row(w, "cannot cover", dash(strings.Join(f.Reboot, " ")))
	row(w, "changes", dash(strings.Join(f.Functions, " ")))
	printTasks(w, "may wait for", f.Forecast)
}

// patch asks for a change and waits for its end.
func (a *app) patch(c *cobra.Command, r maint.PatchRequest, detach bool) error {
	op, err := a.client().Patch(c.Context(), r)
	if err != nil {
		return err
	}
	return a.begun(c.Context(), op, detach, 0)
}

// change makes a command that changes the host by a request that fill completes.
func (a *app) change(c *cobra.Command, action maint.PatchAction, fill func(r *maint.PatchRequest, args []string) error) *cobra.Command {
	r, detach := maint.PatchRequest{Action: action}, false
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := fill(&r, args); err != nil {
			return err
		}
		return a.patch(c, r, detach)
	}
	c.Flags().StringVar(&r.Reason, "reason", "", "why, for the record")
	c.Flags().BoolVar(&detach, "detach", false, "print the operation's ID and return at once")
	return c
}

func (a *app) patchApplyCmd() *cobra.Command {
	return a.change(&cobra.Command{
		Use: "apply FILE.ko", Short: "Load a kernel livepatch", Args: exactly("a livepatch's FILE.ko"),
		Long: `Load a kernel livepatch, and see it through. When anything is not well, it is taken back, and
the one before is active again. 'belay ops abort' takes it back as long as the host is watched.`,
		Example: "  belay patch inspect /root/fix.ko\n  belay patch apply /root/fix.ko",
	}, maint.PatchApply, func(r *maint.PatchRequest, args []string) (err error) {
		r.File, err = filepath.Abs(args[0])
		return err
	})
}

func (a *app) patchRevertCmd() *cobra.Command {
	return a.change(&cobra.Command{
		Use: "revert NAME", Short: "Disable a livepatch, unload it, and keep it no more", Args: exactly("a livepatch's NAME"),
		Long:              "Disable a livepatch, unload it, and load it no more at boot. The kernel is without one then, also where it had taken another's place.",
		ValidArgsFunction: a.completePatches,
	}, maint.PatchRevert, func(r *maint.PatchRequest, args []string) error { r.Name = args[0]; return nil })
}

func (a *app) completePatches(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(c, args, func(ctx context.Context) (names []string) {
		v, _ := a.client().Patches(ctx) // no belayd, no names
		if v.Active != nil {
			names = append(names, v.Active.Name)
		}
		return names
	})
}

func (a *app) patchReloadCmd() *cobra.Command {
	return a.change(&cobra.Command{
		Use: "reload", Short: "Load the livepatch that is kept, as after a boot", Args: noArgs,
		Long: "Load the livepatch that is kept, as belayd does after a boot. When that has worked, it is loaded by itself again.",
	}, maint.PatchReload, func(*maint.PatchRequest, []string) error { return nil })
}

func (a *app) patchMicrocodeCmd() *cobra.Command {
	return a.change(&cobra.Command{
		Use: "microcode", Short: "Load newer CPU microcode, where the kernel can", Args: noArgs,
		Long: "Load newer CPU microcode from /lib/firmware, and read its revision on every CPU. It is not taken back. A kernel that cannot is told so: it needs rung B3 or D.",
	}, maint.PatchMicrocode, func(*maint.PatchRequest, []string) error { return nil })
}

func (a *app) patchRestartCmd() *cobra.Command {
	reload := false
	c := a.change(&cobra.Command{
		Use: "restart UNIT", Short: "Restart a component that guests do not touch, and prove that none felt it", Args: exactly("a UNIT"),
		Long: `Restart a component that guests do not touch (patch.components in belayd's
configuration), or with --reload reload it. Each guest must have the same QEMU process and
state afterwards, and must not have been paused; exits with 4 if one has not.`,
		Example: "  belay patch restart libvirtd.service\n  belay patch restart --reload virtlogd.service",
	}, maint.PatchRestart, func(r *maint.PatchRequest, args []string) error {
		if r.Name = args[0]; reload {
			r.Job = "reload"
		}
		return nil
	})
	c.Flags().BoolVar(&reload, "reload", false, "reload it instead")
	return c
}

func (a *app) patchQEMUCmd() *cobra.Command {
	var ask maint.PatchRequest
	c := a.change(&cobra.Command{
		Use: "qemu FILE.so {--all | --guest GUEST ...}", Short: "Patch a library of guests' QEMUs while they run", Args: exactly("a livepatch's FILE.so"),
		Long: `Patch a library of guests' QEMUs while they run, by libpulp (ulp), or with --revert take
that back. It is for a QEMU that was started with libpulp.so preloaded, and has mapped a library
that was built for it; a stock QEMU is refused: use belay replace-vmm.

The livepatch is three files side by side: libpulp's container NAME.so, its manifest NAME.toml,
and the manifest's minisign signature NAME.toml.minisig. One QEMU is patched after the other, and
asked whether it has it; each is stopped for that for some milliseconds. When one cannot be
patched, those before it are put as they were. A QEMU that may have been left inconsistent ends
it: nothing more is touched, and the guest should leave that process.`,
		Example: "  belay patch qemu /root/slirp_fix_1.so --guest web-1\n  belay patch qemu /root/slirp_fix_1.so --all\n  belay patch qemu /root/slirp_fix_1.so --all --revert",
	}, maint.PatchQEMU, func(r *maint.PatchRequest, args []string) (err error) {
		if ask.All == (len(ask.Guests) > 0) {
			return usage("belay patch qemu needs either --all or --guest")
		}
		r.Guests, r.All, r.Revert = ask.Guests, ask.All, ask.Revert
		r.File, err = filepath.Abs(args[0])
		return err
	})
	f := c.Flags()
	f.StringArrayVar(&ask.Guests, "guest", nil, "patch this guest's QEMU (name or UUID); may be given more than once")
	f.BoolVar(&ask.All, "all", false, "patch the QEMU of every guest that runs")
	f.BoolVar(&ask.Revert, "revert", false, "take the livepatch back instead")
	_ = c.RegisterFlagCompletionFunc("guest", a.completeGuests)
	return c
}

func (a *app) patchCoversCmd() *cobra.Command {
	return &cobra.Command{
		Use: "covers CHANGE", Short: "Say whether the running kernel is mended of a change, such as a CVE", Args: exactly("a CHANGE, such as CVE-2024-1086"),
		Long: `Say whether the running kernel is mended of a change by what is loaded. Exits with 0 when
it is covered, with 3 when that needs a reboot, and with 1 when it is not known; what is not
known is never said to be covered.`,
		RunE: func(c *cobra.Command, args []string) error {
			v, err := a.client().Coverage(c.Context(), args[0])
			if err != nil {
				return err
			}
			if err := a.print(v, func(w io.Writer) { row(w, v.Change, v.Verdict, v.Reason) }); err != nil {
				return err
			}
			switch v.Verdict {
			case maint.Covered:
				return nil
			case maint.NeedsReboot:
				return &ended{exitBlocked}
			}
			return &ended{exitFailed}
		},
	}
}

// lookEvery is how often the kernel's transition is looked at: it tells nobody of it.
const lookEvery = time.Second

func (a *app) patchWatchCmd() *cobra.Command {
	return &cobra.Command{
		Use: "watch", Short: "Follow a livepatch's transition to its end, and name the tasks that it waits for", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			tick := time.NewTicker(lookEvery)
			defer tick.Stop()
			for {
				v, err := a.client().Patches(c.Context())
				if err != nil {
					return err
				}
				if !slices.ContainsFunc(v.Loaded, func(p maint.LivePatch) bool { return p.Transition }) {
					return a.print(v, func(w io.Writer) { printPatches(w, v) })
				}
				if err := a.table(a.err, func(w io.Writer) { printPatches(w, v) }); err != nil {
					return err
				}
				select {
				case <-tick.C:
				case <-c.Context().Done():
					if errors.Is(c.Context().Err(), context.Canceled) {
						return &ended{exitTimeout}
					}
					return c.Context().Err()
				}
			}
		},
	}
}

// printPatched tells what a change of the running host did.
func printPatched(w io.Writer, op maint.Op) {
	if op.Patch == nil {
		return
	}
	back := ""
	if op.Patch.Revert {
		back = ", taken back"
	}
	row(w, "change", string(op.Patch.Action)+suffix(" ", op.Patch.Name)+back)
	r := op.Patched
	if r == nil {
		return
	}
	if r.Transition > 0 {
		row(w, "took", span(r.Transition))
	}
	if r.Soaked > 0 {
		row(w, "watched for", span(r.Soaked))
	}
	if r.Replaced != "" {
		row(w, "in place of", r.Replaced)
	}
	if len(r.After) > 0 {
		row(w, "microcode", revisions(r.Before)+" → "+revisions(r.After))
	}
	for _, g := range r.Guests {
		text := fmt.Sprintf("%s, QEMU process %d, as before; pauses seen: %d", g.State, g.QEMU, g.Pauses)
		if g.QEMU == 0 {
			text = fmt.Sprintf("%s, as before, as far as libvirt says: its QEMU process is not to be seen; pauses seen: %d", g.State, g.Pauses)
		}
		if g.Problem != nil {
			text = g.Problem.Reason
		}
		row(w, "  "+g.Guest, text)
	}
	for _, q := range r.QEMUs {
		row(w, "  "+q.Guest, qemuPatched(q))
	}
	if r.Unwatched {
		row(w, "", "libvirt or belayd was away meanwhile: a pause would not have been seen")
	}
}

// qemuPatched says what became of a guest's QEMU.
func qemuPatched(q maint.PatchedQEMU) string {
	text := "has not the livepatch"
	if q.Applied {
		text = "has the livepatch"
	}
	switch {
	case q.Problem != nil:
		text = q.Problem.Reason
	case q.Gone:
		text = "had ended"
	case q.Before == q.Applied:
		text += ", as before"
	}
	text = fmt.Sprintf("QEMU process %d %s", q.PID, text)
	if q.Stopped > 0 {
		text += "; stopped for at most " + span(q.Stopped)
	}
	return text
}
