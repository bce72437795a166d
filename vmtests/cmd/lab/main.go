// Command lab brings labs of namespace hosts up and down by hand; package lab
// says what they are.
//
// Exit codes: 0 done, 1 failed, 2 wrong usage. exec passes on the code of the
// program it runs.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"belay/vmtests/lab"
)

const (
	exitFailed = 1
	exitUsage  = 2
)

// errUsage marks errors in how the command was called.
type errUsage struct{ error }

func main() {
	// A first Ctrl-C ends what is being done in order: up removes what it
	// has made. A second one, after stop, ends the process at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx))
}

func run(ctx context.Context) int {
	err := rootCommand().ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "lab:", err)
	if usage := (errUsage{}); errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "lab",
		Short:         "Make virtualisation hosts out of namespaces on this machine",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          usage(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return errUsage{err} })
	root.AddCommand(upCommand(), downCommand(), statusCommand(), execCommand(), cleanCommand())
	return root
}

// usage turns complaints about arguments into usage errors.
func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return errUsage{err}
		}
		return nil
	}
}

// nameFlag adds --name to a command.
func nameFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("name", lab.DefaultName, "name of the lab")
}
