package main

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/spf13/cobra"

	"belay/vmtests/lab"
)

func downCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Take a lab down, leaving nothing of it",
		Args:  usage(cobra.NoArgs),
	}
	name := nameFlag(cmd)
	all := cmd.Flags().Bool("all", false, "take down every lab that no living process owns")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *all && cmd.Flags().Changed("name") {
			return errUsage{errors.New("use --name or --all, not both")}
		}
		// A crashed lab cannot be opened, only cleaned up.
		if err := clean(cmd); err != nil {
			return err
		}
		if !*all {
			return down(cmd, *name)
		}
		names, err := lab.List()
		if err != nil {
			return err
		}
		var errs []error
		for _, name := range names {
			errs = append(errs, down(cmd, name))
		}
		return errors.Join(errs...)
	}
	return cmd
}

// down takes one lab down. That it is not up is what was asked for.
func down(cmd *cobra.Command, name string) error {
	l, err := lab.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return l.Down(cmd.Context())
}

func cleanCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "clean",
		Short: "Remove the labs whose owners have died",
		Args:  usage(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return clean(cmd) },
	}
}

func clean(cmd *cobra.Command) error {
	names, err := lab.CleanCrashed(cmd.Context())
	for _, name := range names {
		fmt.Println("removed", name)
	}
	return err
}
