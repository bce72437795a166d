package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"belay/agent/maint"
	"belay/agent/report"
)

func (a *app) holdCmd() *cobra.Command {
	var r maint.HoldRequest
	var groups []string
	var verify, undo string
	var detach bool
	c := &cobra.Command{
		Use:   "hold {--all | --guest GUEST ...} [flags] {-- COMMAND [ARGUMENT ...] | --unit UNIT}",
		Short: "Run a command on the host while guests are held",
		Long: `Pause guests together, run a command on the host, see that it worked, release
the guests and put their clocks right. The guests' memory stays where it is.

The command runs as root, started by belayd, in the current folder. It is named by
its full path, or is in one of the usual folders; --verify and --undo run in /. Its
output goes to standard output; what Belay has to say goes to standard error.

Guests are released at the latest when --max-pause has passed, whatever the
command does, and also when belayd or libvirtd has died: a leash, a process of
its own, sees to it. Two things keep a guest paused for longer: a libvirtd that
hangs, alive, until it is killed (the leash does that only where belayd's
hold.kill_libvirt is set), and somebody else's lock on the guest's disk.

The command and --verify have together a bit less than --max-pause, which runs
from before the first guest is paused: a tenth of it (0.1 to 1 s) is kept for the
release, and 0.4 s (a fifth of a short pause) for ending the command; with --undo
a third as well. A command that still runs then is ended; a --unit's job is left
to systemd. Of 10 s a command has 8.6 s, and with --undo 5.2 s.

Guests that are paused already, by somebody else, stay as they are.

Exit codes: the command's own, where it ran and ended with another than 0 (128+N
when signal N ended it). Otherwise 0 done; 1 failed or aborted, such as by
--verify; 2 wrong usage; 3 blocked, nothing was paused; 4 the command worked, but
something about the guests did not; 5 not waited for the end, the operation goes
on; 70 no guest runs. A command that itself ends with one of these cannot be told
from Belay by the code: with -o json, see "outcome" and "held.step.exit_code".`,
		Example: `  belay hold --all -- systemctl restart openvswitch-switch
  belay hold --guest web-1 --guest db-1 --group db-1 --group web-1 -- /usr/local/sbin/swap-bridge
  belay hold --all --max-pause 30s --verify 'ip link show br0 up' --undo old-bridge -- new-bridge
  belay hold --all --unit openvswitch-switch.service`,
		RunE: func(c *cobra.Command, args []string) error {
			switch {
			case len(args) > 0 && c.ArgsLenAtDash() != 0:
				return usage("put -- before the command: belay hold ... -- %s", strings.Join(args, " "))
			case len(args) == 0 && r.Step.Unit == "":
				return usage("belay hold needs a command after --, or --unit")
			case len(args) > 0 && r.Step.Unit != "":
				return usage("belay hold takes a command or --unit, not both")
			case r.All == (len(r.Guests) > 0):
				return usage("belay hold needs either --all or --guest")
			case r.MaxPause < 0 || r.Step.Timeout < 0:
				return usage("--max-pause and --timeout cannot be negative")
			}
			if len(args) > 0 {
				dir, err := os.Getwd()
				if err != nil {
					return err
				}
				r.Step.Command, r.Step.Dir = args, dir
			}
			for _, g := range groups {
				r.Groups = append(r.Groups, strings.Split(g, ","))
			}
			r.Verify, r.Undo = shell(verify), shell(undo)
			op, err := a.client().Hold(c.Context(), r)
			if err != nil {
				return err
			}
			if detach {
				return a.print(op, func(w io.Writer) { row(w, op.ID) })
			}
			return a.followHold(c, op.ID)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&r.Guests, "guest", nil, "hold this guest (name or UUID); may be given more than once")
	f.BoolVar(&r.All, "all", false, "hold every guest that runs")
	f.StringArrayVar(&groups, "group", nil, "guests, with commas, that are released together: one group after the other in the order given, all others last")
	f.DurationVar(&r.MaxPause, "max-pause", 0, "the longest a guest may stand still (default: belayd's hold.max_pause)")
	f.DurationVar(&r.Step.Timeout, "timeout", 0, "end the command after this time (default: in time for --max-pause)")
	f.StringVar(&r.Step.Unit, "unit", "", "instead of a command: a systemd unit")
	f.StringVar(&r.Step.Job, "job", "", "what to do with the unit: restart (default), reload, start, stop")
	f.StringVar(&verify, "verify", "", "shell command that sees whether it worked, while the guests are still held")
	f.StringVar(&undo, "undo", "", "shell command that takes it back when it, or --verify, failed")
	f.StringVar(&r.Reason, "reason", "", "why, for the record")
	emergencyFlag(f, &r.Emergency)
	f.BoolVar(&detach, "detach", false, "print the operation's ID and return at once")
	_ = c.RegisterFlagCompletionFunc("guest", a.completeGuests)
	fixed(c, "job", "restart", "reload", "start", "stop")
	return c
}

// shell is a step that a shell runs, nil for "".
func shell(command string) *maint.HostStep {
	if command == "" {
		return nil
	}
	return &maint.HostStep{Command: []string{"/bin/sh", "-c", command}}
}

// followHold waits for the end of a hold, and ends as its command did.
func (a *app) followHold(c *cobra.Command, id maint.OpID) error {
	op, err := a.await(c.Context(), id, 0)
	if err != nil {
		return err
	}
	if a.format == "table" {
		if op.Held != nil && op.Held.Step != nil {
			fmt.Fprint(a.out, op.Held.Step.Output)
		}
		err = a.table(a.err, func(w io.Writer) { printHeld(w, op) })
		for _, r := range stepRuns(op) {
			if r.StepRun != op.Held.Step && !r.OK() {
				printOutput(a.err, r)
			}
		}
	} else {
		err = a.print(op, nil)
	}
	if err != nil {
		return err
	}
	if op.Outcome != maint.OutcomeDone {
		printProblems(a.err, fmt.Sprintf("operation %s: %s", op.ID, op.Outcome), problems(op))
	}
	if op.Held != nil && op.Held.Step != nil && op.Held.Step.ExitCode > 0 {
		return &ended{op.Held.Step.ExitCode}
	}
	if op.Outcome != maint.OutcomeDone {
		return &ended{outcomeCode(op.Outcome)}
	}
	return nil
}

func offset(o *maint.ClockOffset) string { return report.Offset(o) }

// clockAfter is how a clock was left, and why.
func clockAfter(r maint.ClockReport) string { return clockState(r) + suffix(": ", clockReason(r)) }

// clockState is how a clock was left.
func clockState(r maint.ClockReport) string {
	if r.State == maint.ClockUnsynchronised {
		return string(r.State)
	}
	return offset(cmp.Or(r.After, r.Before))
}

// clockReason says why a clock was left so, "" where it is right.
func clockReason(r maint.ClockReport) string {
	if r.State == maint.ClockUnsynchronised || r.State == maint.ClockOff {
		return r.Reason
	}
	return ""
}

func staleness(r maint.ClockReport) string {
	if r.Stale == 0 {
		return "-"
	}
	return fmt.Sprintf("%s ± %s", fine(r.Stale), fine(r.StaleError))
}

func fine(d time.Duration) string { return report.Fine(d) }

func (a *app) clockCmd() *cobra.Command {
	var sync bool
	c := &cobra.Command{
		Use: "clock [GUEST]", Short: "Measure guests' clocks, and put them right",
		Long: `Measure the wall clock of a guest, or of all that run, against this host's
through the guest agent. With --sync, clocks that are behind are stepped forward;
none is ever stepped back. Exits with 4 when a clock is not synchronised.`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage("%s: one argument too many: %q", c.CommandPath(), args[1])
			}
			return nil
		},
		ValidArgsFunction: a.completeGuests,
		RunE: func(c *cobra.Command, args []string) error {
			ask, guest := a.client().Clock, ""
			if sync {
				ask = a.client().SyncClock
			}
			if len(args) == 1 {
				guest = args[0]
				if guest == "" {
					return usage("GUEST is empty")
				}
			}
			reports, err := ask(c.Context(), guest)
			if err != nil {
				return err
			}
			err = a.print(reports, func(w io.Writer) {
				row(w, "GUEST", "CLOCK", "OFF BY", "AFTER", "REMARK")
				for _, r := range reports {
					row(w, r.Guest, r.State, offset(r.Before), offset(r.After), r.Reason)
				}
			})
			if err != nil {
				return err
			}
			for _, r := range reports {
				if r.State != maint.ClockSynchronised {
					return &ended{exitPartly}
				}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&sync, "sync", false, "step clocks forward that are behind")
	return c
}
