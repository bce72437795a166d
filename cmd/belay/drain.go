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

func (a *app) drainCmd() *cobra.Command {
	var r maint.DrainRequest
	var dry, detach bool
	var allow []string
	var wait time.Duration
	c := &cobra.Command{
		Use: "drain [--to HOST,...]", Short: "Move every guest of this host to peers", Args: noArgs,
		Long: `Move every guest that runs here to peers, each by a migration of its own, several
at once. First it is planned: what peers have room for, which guests must not be on
one host (anti-affinity), and who cannot be moved. If any guest cannot be moved,
nothing is begun, and each is listed with what stands in the way; --partial moves the
others. No guest is ever stopped.

The host takes no guests in from then on, also when the drain has ended, until
'belay restore' or 'belay uncordon'. Ctrl-C detaches: the drain goes on. An abort
(belay ops abort) begins no more moves, lets those that run come to their end, or
with --now cancels them, and lifts the drain's cordon.

Exit codes: 0 done; 1 failed or aborted; 2 wrong usage; 3 refused before any effect,
or with --dry-run: would be; 4 some guests are left; 5 goes on.`,
		Example: `  belay drain --dry-run
  belay drain --reason "new memory"
  belay drain --to host-b,host-c --partial
  belay drain --copy-disks --move-timeout 4h`,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkWait(wait); err != nil {
				return err
			}
			if c.Flags().Changed("to") && len(r.To) == 0 {
				return usage("--to names no host; leave it out for all peers")
			}
			r.Allow = allowed(c.Flags(), allow)
			if dry {
				return a.planDrain(c.Context(), r)
			}
			op, err := a.client().Drain(c.Context(), r)
			if err != nil {
				return err
			}
			return a.begun(c.Context(), op, detach, wait)
		},
	}
	f := c.Flags()
	f.StringSliceVar(&r.To, "to", nil, "the peers that guests may go to (default: all)")
	f.BoolVar(&dry, "dry-run", false, "say what would be done, and do nothing")
	f.BoolVar(&r.Partial, "partial", false, "move the guests that can be moved where others cannot")
	f.IntVar(&r.Parallel, "parallel", 0, "how many guests are moved at once, up to belayd's limits.migrations_out (default: that, or the number of this host's CPUs)")
	f.DurationVar(&r.Timeout, "timeout", 0, "begin no more moves after this time (default 12h)")
	f.DurationVar(&r.MoveTimeout, "move-timeout", 0, "cancel a guest's copy after this time (default: belayd's migration.timeout)")
	f.Uint64Var(&r.BandwidthMiBs, "bandwidth", 0, "limit for each memory stream in MiB/s (default: belayd's migration.bandwidth_mib_s)")
	f.DurationVar(&r.MaxPause, "max-pause", 0, "longest pause that a copy may end with (default: belayd's migration.max_pause)")
	f.StringSliceVar(&allow, "allow", nil, "what may be done for a guest that writes faster than the network takes it, as with 'belay migrate' (default: belayd's migration.allow)")
	f.StringVar(&r.CopyDisks, "copy-disks", "", "copy disks along that a guest's peer does not have: all or none; all without a value; after an = sign, as in --copy-disks=none (default: belayd's migration.copy_disks)")
	f.Lookup("copy-disks").NoOptDefVal = maint.CopyAll
	f.StringVar(&r.Reason, "reason", "", "why, for the record")
	emergencyFlag(f, &r.Emergency)
	f.BoolVar(&detach, "detach", false, "print the operation's ID and return at once")
	f.DurationVar(&wait, "wait", 0, "wait no longer than this, then exit with 5 while the drain goes on (default: wait for its end)")
	_ = c.RegisterFlagCompletionFunc("to", a.completePeers)
	_ = c.RegisterFlagCompletionFunc("allow", completeMeans)
	return c
}

// planDrain shows what a drain would do, and exits as it would be refused.
func (a *app) planDrain(ctx context.Context, r maint.DrainRequest) error {
	p, err := a.client().PlanDrain(ctx, r)
	if err != nil {
		return err
	}
	if err := a.print(p, func(w io.Writer) {
		row(w, "GUEST", "MEMORY", "TO")
		for _, m := range p.Guests {
			to := m.Peer
			if len(m.Copies) > 0 {
				to += ", with its disks copied: " + copied(m.Copies)
			}
			if m.State == maint.MoveLeft {
				to = "cannot be moved: " + count(len(m.Problems), "reason")
			}
			row(w, m.Guest, bytes(m.MemoryBytes), to)
			printWhy(w, m)
		}
		for _, name := range p.Off {
			row(w, name, "-", "does not run, and stays defined here")
		}
		if n := len(p.Guests) - len(maint.Left(p.Guests)); n > 0 {
			row(w, fmt.Sprintf("%s, up to %d at once", count(n, "move"), p.AtOnce))
		}
	}); err != nil {
		return err
	}
	if left := len(maint.Left(p.Guests)); left > 0 && (!r.Partial || left == len(p.Guests)) {
		return &ended{exitBlocked}
	}
	return nil
}

// printWhy prints below a guest why it is left, and what can be done.
func printWhy(w io.Writer, m maint.GuestMove) {
	for _, p := range m.Problems {
		row(w, "", "", "- "+p.Subject+": "+p.Reason)
		if p.Remedy != "" {
			row(w, "", "", "  → "+p.Remedy)
		}
	}
	for _, way := range m.Instead {
		row(w, "", "", "  or "+way)
	}
}

func (a *app) restoreCmd() *cobra.Command {
	var r maint.RestoreRequest
	var detach bool
	var wait time.Duration
	c := &cobra.Command{
		Use: "restore [OP]", Short: "Bring back the guests that a drain or an update has moved away",
		Long: `Bring back exactly what a drain or an update (belay apply) has moved away: the last one
that has moved any and left them there, or OP. The host takes guests in again, and each peer is asked to migrate back what it
was sent, several at once, the last that went first. A guest that has moved on, is off,
or is gone is listed and left. Ctrl-C detaches.

Exit codes: 0 done; 1 failed or aborted; 2 wrong usage; 3 refused before any effect;
4 some guests have not come back; 5 goes on; 70 nothing to do.`,
		Example: `  belay restore
  belay restore drain-20261122-122337-zrfhv --detach`,
		ValidArgsFunction: a.completeDrains,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage("%s: one argument too many: %q", c.CommandPath(), args[1])
			}
			if len(args) == 1 && args[0] == "" {
				return usage("%s: OP is empty; leave it out for the last that has moved guests away", c.CommandPath())
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkWait(wait); err != nil {
				return err
			}
			r.Drain = maint.OpID(append(args, "")[0])
			op, err := a.client().Restore(c.Context(), r)
			if err != nil {
				return err
			}
			return a.begun(c.Context(), op, detach, wait)
		},
	}
	f := c.Flags()
	f.DurationVar(&r.Timeout, "timeout", 0, "begin no more moves after this time (default 12h)")
	f.DurationVar(&r.MaxPause, "max-pause", 0, "longest pause that a copy may end with (default: the peers' migration.max_pause)")
	f.StringVar(&r.Reason, "reason", "", "why, for the record")
	f.BoolVar(&detach, "detach", false, "print the operation's ID and return at once")
	f.DurationVar(&wait, "wait", 0, "wait no longer than this, then exit with 5 while it goes on (default: wait for its end)")
	return c
}

func (a *app) completeDrains(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(c, args, func(ctx context.Context) (ids []string) {
		ops, _ := a.client().Ops(ctx)
		for _, op := range ops {
			if (op.Kind == maint.OpDrain || op.Kind == maint.OpApply) && op.State == maint.OpEnded {
				ids = append(ids, string(op.ID))
			}
		}
		return ids
	})
}

// ofMany reports whether an operation has others move guests.
func ofMany(op maint.Op) bool { return op.Kind == maint.OpDrain || op.Kind == maint.OpRestore }

// movesInWords counts the guests of a drain or a restore by where they are.
func movesInWords(op maint.Op) string {
	n := make(map[maint.MoveState]int)
	for _, m := range op.Moves {
		n[m.State]++
	}
	words := []string{fmt.Sprintf("%d of %s moved", n[maint.MoveMoved], count(len(op.Moves), "guest"))}
	for _, s := range []maint.MoveState{maint.MoveMoving, maint.MoveLeft} {
		if n[s] > 0 {
			words = append(words, fmt.Sprintf("%d %s", n[s], s))
		}
	}
	return strings.Join(words, ", ")
}

// printMoves prints where each guest of a drain or a restore is.
func printMoves(w io.Writer, op maint.Op) {
	if len(op.Moves) == 0 {
		return
	}
	peer := "TO"
	if op.Kind == maint.OpRestore {
		peer = "FROM"
	}
	row(w, "GUEST", "MEMORY", peer, "STATE", "FAILED", "BY")
	for _, m := range op.Moves {
		row(w, m.Guest, bytes(m.MemoryBytes), dash(m.Peer), m.State, m.Tries, dash(string(m.Op)))
	}
	for _, m := range op.Moves { // below: they can be long
		for _, p := range m.Problems {
			row(w, m.Guest, p.Error())
		}
	}
}

// moveLines tells of each guest whose move has got on since: of those whose moves are
// over, or of the others.
func moveLines(w io.Writer, op maint.Op, last map[string]string, over bool) {
	for _, m := range op.Moves {
		if over != (m.State == maint.MoveMoved || m.State == maint.MoveLeft) {
			continue
		}
		now := string(m.State)
		switch m.State {
		case maint.MoveMoving:
			if m.Op == "" { // its peer has been asked to, and has not begun
				continue
			}
			now += suffix(" to ", m.Peer)
			if op.Kind == maint.OpRestore {
				now = string(m.State) + suffix(" from ", m.Peer)
			}
			now += suffix(", ", string(m.Op))
		case maint.MovePlanned:
			if m.Tries == 0 {
				continue
			}
			now = fmt.Sprintf("has not moved, %s failed", count(m.Tries, "try"))
			if m.Tries > 1 {
				now = fmt.Sprintf("has not moved, %d tries failed", m.Tries)
			}
		}
		if (m.State == maint.MovePlanned || m.State == maint.MoveLeft) && len(m.Problems) > 0 {
			now += ": " + m.Problems[0].Error()
		}
		if last[m.GuestUUID] != now {
			last[m.GuestUUID] = now
			fmt.Fprintf(w, "%s: %s %s\n", op.ID, oneLine(m.Guest), oneLine(now))
		}
	}
}
