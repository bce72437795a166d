package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"belay/vmtests/lab"
)

func upCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Bring up a lab that stays until it is taken down",
		Args:  usage(cobra.NoArgs),
	}
	name := nameFlag(cmd)
	hosts := cmd.Flags().Int("hosts", 2, "number of hosts, 1 to 26")
	tls := cmd.Flags().Bool("tls", false, "libvirt listens on TLS instead of TCP, with certificates of the lab's CA")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c := lab.Config{
			Name:     *name,
			Hosts:    *hosts,
			TLS:      *tls,
			Detached: true,
			Log:      slog.New(slog.NewTextHandler(os.Stderr, nil)),
		}
		if *hosts == 0 { // the package's default, but here somebody wrote it
			c.Hosts = -1
		}
		if err := c.Check(); err != nil {
			return errUsage{err}
		}
		l, err := lab.Up(cmd.Context(), c)
		if err != nil {
			return err
		}
		for _, h := range l.Hosts {
			fmt.Printf("%s\t%s\t%s\n", h.Name, h.Addr, h.URI())
		}
		return nil
	}
	return cmd
}
