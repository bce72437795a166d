package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

func (a *app) cordonCmd() *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use: "cordon", Short: "Have this host take no guests in", Args: noArgs,
		Long: `Have this host take no guests in, until 'belay uncordon'. Guests that run here or
are on their way are left alone.`,
		RunE: func(c *cobra.Command, _ []string) error {
			k, err := a.client().Cordon(c.Context(), reason)
			if err != nil {
				return err
			}
			return a.print(k, func(w io.Writer) {
				row(w, "cordoned", fmt.Sprintf("since %s, by %s%s", clock(k.Since), k.By, k.Why()))
			})
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the record and for who asks")
	return c
}

func (a *app) uncordonCmd() *cobra.Command {
	return &cobra.Command{
		Use: "uncordon", Short: "Have this host take guests in again", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.client().Uncordon(c.Context()) },
	}
}
