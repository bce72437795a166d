package main

import (
	"fmt"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"belay/vmtests/lab"
)

func execCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec HOST -- COMMAND [ARGUMENT…]",
		Short: "Run a program inside a host, with this terminal and exit code",
		Args:  usage(cobra.MinimumNArgs(2)),
	}
	name := nameFlag(cmd)
	// What follows the host belongs to the program, with or without "--".
	cmd.Flags().SetInterspersed(false)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		l, err := lab.Open(*name)
		if err != nil {
			return err
		}
		h := l.Host(args[0])
		if h == nil {
			return errUsage{fmt.Errorf("lab %s has no host %q", l.Name, args[0])}
		}
		args = args[1:]
		if args[0] == "--" {
			args = args[1:]
		}
		if len(args) == 0 {
			return errUsage{fmt.Errorf("no command to run on %s", h.Name)}
		}
		c := h.Command(cmd.Context(), args[0], args[1:]...)
		if c.Err != nil {
			return c.Err
		}
		// This process becomes the program: nothing stands between it and
		// the terminal, signals and exit code.
		return fmt.Errorf("cannot run %s: %w", c.Path, syscall.Exec(c.Path, c.Args, os.Environ()))
	}
	return cmd
}
