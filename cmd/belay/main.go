// Command belay is the operator's way to speak to belayd.
//
// What it finds out goes to standard output, in the form that -o asks for;
// everything else (progress, errors, hints) goes to standard error. Progress is
// drawn on a terminal only. Ctrl-C never stops an operation: it detaches, and
// says how to abort.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"

	"github.com/spf13/cobra"

	"belay/agent/api"
	"belay/agent/maint"
)

// version is set by the build (-X main.version).
var version = "devel"

// The exit codes.
const (
	exitDone    = 0
	exitFailed  = 1
	exitUsage   = 2
	exitBlocked = 3
	exitPartly  = 4
	exitTimeout = 5 // the operation is still running, as far as is known
	exitNothing = 70
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run is belay from arguments to exit code.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	c := newRoot(&app{out: stdout, err: stderr})
	c.SetArgs(args)
	c.SetOut(stdout)
	c.SetErr(stderr)
	err := c.ExecuteContext(ctx)
	return exitCode(stderr, err)
}

// app is what the commands share.
type app struct {
	out, err io.Writer
	socket   string
	format   string
}

func (a *app) client() *api.Client { return api.NewUnix(a.socket) }

// defaultSocket is where belayd listens unless configured otherwise.
const defaultSocket = "/run/belay/belayd.sock"

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "belay",
		Short: "Service a KVM host while its guests keep running",
		Long: `belay speaks to the belayd of this host.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 blocked (refused before any
effect), 4 partly done, 5 not known to have ended, and
may go on, 70 nothing to do.`,
		SilenceErrors: true, SilenceUsage: true,
		PersistentPreRunE: func(c *cobra.Command, _ []string) error {
			switch a.format {
			case "table", "json", "yaml":
				return nil
			}
			return usage("--output is %q, it can be table, json or yaml", a.format)
		},
	}
	socket := os.Getenv("BELAY_SOCKET")
	if socket == "" {
		socket = defaultSocket
	}
	root.PersistentFlags().StringVar(&a.socket, "socket", socket, "belayd's unix socket; also from $BELAY_SOCKET")
	root.PersistentFlags().StringVarP(&a.format, "output", "o", "table", "form of the answer: table, json or yaml")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	fixed(root, "output", "table", "json", "yaml")
	root.AddCommand(a.statusCmd(), a.guestsCmd(), a.holdCmd(), a.replaceCmd(), a.kexecCmd(), a.clockCmd(), a.migrateCmd(), a.drainCmd(), a.restoreCmd(), a.cordonCmd(), a.uncordonCmd(), a.eventsCmd(), a.maintenanceCmd(), a.patchCmd(), a.ladderCmd(), a.planCmd(), a.applyCmd(), a.updateCmd(), a.policyCmd(), a.opsCmd(), a.reportCmd(), a.topCmd(), a.doctorCmd(), a.versionCmd(), a.manCmd())
	return root
}

// group makes a command of those below it: alone it does nothing.
func group(c *cobra.Command, below ...*cobra.Command) *cobra.Command {
	var verbs []string
	for _, b := range below {
		verbs = append(verbs, b.Name())
	}
	c.Args = func(c *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usage("%s has no %q; it has %s", c.CommandPath(), args[0], list(verbs))
		}
		return nil
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		return usage("%s needs one of %s", c.CommandPath(), list(verbs))
	}
	c.AddCommand(below...)
	return c
}

// fixed completes a flag from a fixed list.
func fixed(c *cobra.Command, flag string, values ...string) {
	// Fails only for a flag that does not exist, which every test would show.
	_ = c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// usageError is a wrong call: exit code 2.
type usageError struct{ error }

func usage(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// noArgs and exactly are cobra's checks of arguments, as usage errors.
func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage("%s takes no argument, there is %q", c.CommandPath(), args[0])
	}
	return nil
}

func exactly(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usage("%s needs %s", c.CommandPath(), names[len(args)])
		case len(args) > len(names):
			return usage("%s: one argument too many: %q", c.CommandPath(), args[len(names)])
		}
		for i, arg := range args {
			if arg == "" {
				return usage("%s needs %s, not an empty one", c.CommandPath(), names[i])
			}
		}
		return nil
	}
}

// ended is the error of an operation that did not end as asked; what there is
// to say has been said.
type ended struct{ code int }

func (e *ended) Error() string { return fmt.Sprintf("ended with code %d", e.code) }

// exitCode says what err is about and turns it into the exit code: the only
// place that does.
func exitCode(w io.Writer, err error) int {
	var end *ended
	var use *usageError
	var refusal *maint.Refusal
	var problem *maint.Problem
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &end):
		return end.code
	case errors.As(err, &use):
		fmt.Fprintf(w, "belay: %v\nSee 'belay --help'.\n", use)
		return exitUsage
	case errors.As(err, &refusal):
		printProblems(w, refusal.What, refusal.Problems)
		if len(refusal.Problems) == 1 && (refusal.Problems[0].Code == maint.CodeSameHost || refusal.Problems[0].Code == maint.CodeNothing) {
			return exitNothing
		}
		return exitBlocked
	case errors.As(err, &problem):
		printProblems(w, "", []maint.Problem{*problem})
		switch problem.Code {
		case maint.CodeBadRequest:
			return exitUsage
		case maint.CodeEnded:
			return exitNothing
		}
		return exitFailed
	case errors.Is(err, context.Canceled):
		fmt.Fprintf(w, "belay: interrupted before belayd had answered; what it has begun goes on, see 'belay ops list'\n")
		return exitFailed
	case errors.As(err, new(*fs.PathError)): // what was to be written could not be
		fmt.Fprintf(w, "belay: %v\n", err)
		return exitFailed
	}
	// What is left are cobra's own complaints, such as an unknown command.
	fmt.Fprintf(w, "belay: %v\nSee 'belay --help'.\n", err)
	return exitUsage
}

// printProblems prints each problem with its remedy.
func printProblems(w io.Writer, what string, ps []maint.Problem) {
	if what != "" {
		fmt.Fprintf(w, "belay: %s:\n", oneLine(what))
	}
	for _, p := range ps {
		subject := p.Subject
		if subject != "" {
			subject += ": "
		}
		lead := "  - "
		if what == "" {
			lead = "belay: "
		}
		fmt.Fprintf(w, "%s%s\n", lead, oneLine(subject+p.Reason))
		if p.Remedy != "" {
			fmt.Fprintf(w, "    %s\n", oneLine(p.Remedy))
		}
	}
}
