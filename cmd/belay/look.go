package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"belay/agent/maint"
)

func (a *app) statusCmd() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show this host, what is going on and what is wrong", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := a.client().Status(c.Context())
			if err != nil {
				return err
			}
			return a.print(s, func(w io.Writer) { printStatus(w, s) })
		},
	}
}

func printStatus(w io.Writer, s maint.Status) {
	row(w, "host", fmt.Sprintf("%s (libvirt %s, QEMU %s)", s.Host.Name, dash(s.Host.LibvirtVersion), dash(s.Host.QEMUVersion)))
	row(w, "memory", fmt.Sprintf("%s, %s free", bytes(s.Host.MemoryBytes), bytes(s.Host.FreeMemoryBytes)))
	row(w, "belayd", fmt.Sprintf("%s, up %s", s.Version, span(s.Now.Sub(s.Since))))
	var guests []string
	for _, state := range slices.Sorted(maps.Keys(s.Guests)) {
		guests = append(guests, fmt.Sprintf("%d %s", s.Guests[state], state))
	}
	row(w, "guests", dash(strings.Join(guests, ", ")))
	for _, p := range s.Peers {
		state := "answers in " + span(p.Latency)
		switch {
		case !p.OK:
			state = p.Error
		case p.Cordoned:
			state += ", takes no guests in (cordoned)"
		}
		row(w, "peer", fmt.Sprintf("%s (%s): %s", p.Name, p.Address, state))
	}
	for _, op := range s.Operations {
		row(w, "operation", fmt.Sprintf("%s: %s", op.ID, describe(op)))
	}
	for _, r := range s.Reservations {
		row(w, "expected", fmt.Sprintf("%s from %s, %s", r.Guest, r.From, bytes(r.MemoryBytes)))
	}
	if c := s.Cordon; c != nil {
		row(w, "cordoned", fmt.Sprintf("takes no guests in since %s, by %s%s", clock(c.Since), c.By, c.Why()))
	}
	if len(s.Conditions) == 0 {
		row(w, "health", "good")
	}
	for _, c := range s.Conditions {
		row(w, "PROBLEM", c.Text)
		if c.Remedy != "" {
			row(w, "", "→ "+c.Remedy)
		}
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (a *app) guestsCmd() *cobra.Command {
	var why bool
	var to string
	c := &cobra.Command{
		Use: "guests [--why [--to HOST] [GUEST]]", Short: "List the guests of this host, or say where each could be moved to",
		Long: `List the guests of this host.

With --why say of each guest, or of GUEST, and of each peer, or of HOST, whether
the one could be migrated to the other now: "can move", "can move with --copy-disks"
where only disks are in the way that can be copied along, or every reason against with
its remedy. Both hosts are asked, as before a migration. Nothing is changed and
no room is kept: what was true a moment ago may be refused when it is tried. While a
peer looks for a guest's disks, an empty file (.belay-...) is beside them for a
moment; it shows whether both hosts have the same storage.

Exit codes: 0 the answer is there, whatever it is; 1 belayd or libvirt could not be
asked; 2 wrong usage; 3 there is no such guest or peer.`,
		Example: `  belay guests
  belay guests --why
  belay guests --why --to host-b web-1 -o json`,
		ValidArgsFunction: a.completeGuests,
		Args: func(c *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return usage("%s: one argument too many: %q", c.CommandPath(), args[1])
			case !why && (len(args) > 0 || to != ""):
				return usage("%s takes a GUEST and --to only with --why", c.CommandPath())
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if why {
				return a.why(c.Context(), append(args, "")[0], to)
			}
			inv, err := a.client().Inventory(c.Context())
			if err != nil {
				return err
			}
			if inv.Stale != "" {
				fmt.Fprintf(a.err, "belay: libvirt does not answer (%s); this is as of %s\n", oneLine(inv.Stale), clock(inv.AsOf))
			}
			return a.print(inv, func(w io.Writer) {
				row(w, "NAME", "STATE", "MEMORY", "VCPUS", "AGENT", "DEFINED", "AUTOSTART", "JOB")
				for _, g := range inv.Guests {
					row(w, g.Name, fmt.Sprintf("%s (%s)", g.State, dash(g.Reason)), bytes(g.MemoryBytes), g.VCPUs, g.Agent, yes(g.Persistent), yes(g.Autostart), dash(g.Job))
				}
			})
		},
	}
	c.Flags().BoolVar(&why, "why", false, "say where each could be moved to, and why not")
	c.Flags().StringVar(&to, "to", "", "with --why: of this peer only")
	// Fails only for a flag that does not exist, which every test would show.
	_ = c.RegisterFlagCompletionFunc("to", a.completePeers)
	return c
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (a *app) doctorCmd() *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Say what is missing for each rung on this host", Args: noArgs,
		Long: "Say what is missing for each rung on this host. Exits with 1 when a check fails.",
		RunE: func(c *cobra.Command, _ []string) error {
			checks, err := a.client().Doctor(c.Context())
			if err != nil {
				return err
			}
			err = a.print(checks, func(w io.Writer) {
				row(w, "RUNG", "CHECK", "RESULT", "FOUND")
				for _, k := range checks {
					row(w, k.Rung, k.Name, k.Result, k.Text)
					if k.Remedy != "" {
						row(w, "", "", "", "→ "+k.Remedy)
					}
				}
			})
			if err == nil && slices.ContainsFunc(checks, func(k maint.Check) bool { return k.Result == maint.CheckFail }) {
				return &ended{exitFailed}
			}
			return err
		},
	}
}

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of belay and of the belayd it speaks to", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			v := struct {
				Belay  string `json:"belay"`
				Belayd string `json:"belayd"`
			}{Belay: version}
			s, err := a.client().Status(c.Context())
			v.Belayd = s.Version
			if err != nil {
				v.Belayd = "not reachable"
			}
			return a.print(v, func(w io.Writer) {
				row(w, "belay", v.Belay)
				row(w, "belayd", v.Belayd)
			})
		},
	}
}

func (a *app) manCmd() *cobra.Command {
	return &cobra.Command{
		Use: "man FOLDER", Short: "Write the man pages into a folder", Args: exactly("a FOLDER"), Hidden: true,
		RunE: func(c *cobra.Command, args []string) error {
			root := c.Root()
			root.DisableAutoGenTag = true
			for _, k := range root.Commands() {
				if k.Name() == "completion" { // cobra's own; its help says how to install completions
					root.RemoveCommand(k)
				}
				exitStatus(k)
			}
			exitStatus(root)
			// A fixed date keeps what is generated reproducible.
			date := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
			return doc.GenManTree(root, &doc.GenManHeader{Section: "8", Manual: "Belay", Source: "belay " + version, Date: &date}, args[0])
		},
	}
}

// exitStatus gives the man page of a command a section for what its help has of
// exit codes.
func exitStatus(c *cobra.Command) {
	c.Long = strings.Replace(c.Long, "\n\nExit codes: ", "\n\n# EXIT STATUS\n", 1)
}
