package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"belay/agent/maint"
)

// completeTimeout bounds what a press of the tab key waits for.
const completeTimeout = time.Second

func (a *app) complete(c *cobra.Command, args []string, names func(ctx context.Context) []string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(c.Context(), completeTimeout)
	defer cancel()
	return names(ctx), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completeGuests(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(c, args, func(ctx context.Context) (names []string) {
		inv, _ := a.client().Inventory(ctx) // no belayd, no names
		for _, g := range inv.Guests {
			names = append(names, g.Name)
		}
		return names
	})
}

func (a *app) completePeers(c *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(c, nil, func(ctx context.Context) (names []string) {
		s, _ := a.client().Status(ctx)
		for _, p := range s.Peers {
			names = append(names, p.Name)
		}
		return names
	})
}

// completeMeans completes a list of means, separated by commas.
func completeMeans(_ *cobra.Command, _ []string, typed string) (lists []string, _ cobra.ShellCompDirective) {
	before := typed[:strings.LastIndex(typed, ",")+1]
	for _, m := range maint.AllMeans {
		if !slices.Contains(strings.Split(before, ","), string(m)) {
			lists = append(lists, before+string(m))
		}
	}
	return lists, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}

// completeAllOps completes also those that have ended, the newest first.
func (a *app) completeAllOps(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	ids, how := a.complete(c, args, func(ctx context.Context) (names []string) {
		ops, _ := a.client().Ops(ctx)
		for _, op := range slices.Backward(ops) {
			names = append(names, string(op.ID))
		}
		return names
	})
	return ids, how | cobra.ShellCompDirectiveKeepOrder
}

func (a *app) completeOps(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(c, args, func(ctx context.Context) (names []string) {
		ops, _ := a.client().Ops(ctx)
		for _, op := range ops {
			if op.State != maint.OpEnded {
				names = append(names, string(op.ID))
			}
		}
		return names
	})
}
