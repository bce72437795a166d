package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"belay/agent/api"
	"belay/agent/maint"
)

func (a *app) maintenanceCmd() *cobra.Command {
	return group(&cobra.Command{Use: "maintenance", Short: "Maintenance for which guests' owners pick the moment",
		Long: `Maintenance that guests feel, in two phases: until its deadline the owner of each
guest picks the moment, in the guest or here; at the deadline what is left is done.`},
		a.maintenanceListCmd(), a.maintenanceShowCmd(), a.maintenanceCreateCmd(), a.maintenanceBookCmd(),
		a.maintenanceGuestCmd("start", "Have a guest done now, instead of at a booked moment or the deadline",
			func(ctx context.Context, id maint.CampaignID, guest string) (maint.Campaign, error) {
				return a.client().BookCampaign(ctx, id, api.Booking{Guest: guest})
			}),
		a.maintenanceGuestCmd("defer", "Take back the moment that was picked for a guest",
			func(ctx context.Context, id maint.CampaignID, guest string) (maint.Campaign, error) {
				return a.client().DeferCampaign(ctx, id, guest)
			}),
		a.maintenanceCloseCmd())
}

func (a *app) maintenanceListCmd() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List campaigns", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			all, err := a.client().Campaigns(c.Context())
			if err != nil {
				return err
			}
			return a.print(all, func(w io.Writer) {
				row(w, "ID", "OPENS", "DEADLINE", "GUESTS", "DONE", "DESCRIPTION")
				for _, k := range all {
					done := 0
					for _, g := range k.Guests {
						if g.State == maint.CampaignDone {
							done++
						}
					}
					text := k.Description
					if !k.Closed.IsZero() {
						text = "closed: " + text
					}
					row(w, k.ID, day(k.Opens), day(k.Deadline), len(k.Guests), done, text)
				}
			})
		},
	}
}

// day is a moment that may be weeks ahead.
func day(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format("2006-01-02 15:04 MST")
}

func (a *app) maintenanceShowCmd() *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show a campaign and where each guest is in it", Args: exactly("a campaign ID"), ValidArgsFunction: a.completeCampaigns,
		RunE: func(c *cobra.Command, args []string) error {
			k, err := a.client().Campaign(c.Context(), maint.CampaignID(args[0]))
			if err != nil {
				return err
			}
			return a.printCampaign(k)
		},
	}
}

func (a *app) printCampaign(k maint.Campaign) error {
	return a.print(k, func(w io.Writer) {
		row(w, "campaign", k.ID)
		row(w, "description", dash(k.Description))
		row(w, "what is done", action(k.Action))
		row(w, "impact", fmt.Sprintf("%s, %s", k.Impact, duration(maint.ScheduledEvent{Duration: k.Duration})))
		row(w, "owners pick", fmt.Sprintf("from %s to %s", day(k.Opens), day(k.Deadline)))
		row(w, "deferrals", k.MaxDefers)
		if !k.Closed.IsZero() {
			row(w, "closed", day(k.Closed))
		}
		row(w)
		row(w, "GUEST", "STATE", "AT", "PICKED BY", "DEFERRED", "OPERATION")
		for _, uuid := range slices.SortedFunc(maps.Keys(k.Guests), func(x, y string) int {
			return strings.Compare(k.Guests[x].Guest, k.Guests[y].Guest)
		}) {
			g := k.Guests[uuid]
			row(w, g.Guest, g.State, day(g.At), dash(g.By), g.Defers, dash(string(g.Op)))
		}
	})
}

func action(do maint.CampaignAction) string {
	switch {
	case do.Migrate != nil:
		return "migrate to " + do.Migrate.To
	case do.Replace != nil:
		return strings.TrimSpace("replace-vmm " + string(do.Replace.Method))
	case do.Hold != nil:
		return "hold, " + strings.Join(do.Hold.Step.Command, " ") + do.Hold.Step.Unit
	}
	return "-"
}

func (a *app) maintenanceCreateCmd() *cobra.Command {
	var r maint.CampaignRequest
	var to, method, opens, deadline string
	var replace bool
	c := &cobra.Command{
		Use:   "create ID {--migrate HOST | --replace-vmm | -- COMMAND [ARGUMENT ...]}",
		Short: "Announce maintenance, of which guests' owners pick the moment",
		Long: `Announce maintenance. Each guest is migrated, gets a new QEMU, or is held around a
command, at the moment that its owner picks, or at the deadline. Refused when a guest has
no usable slot before the deadline.`,
		Example: `  belay maintenance create qemu-10 --replace-vmm --description "QEMU 10.0.3" --deadline 2027-01-10T02:00:00Z
  belay maintenance create nic-firmware --migrate host-b --guest web-1 --defers 2`,
		Args: func(c *cobra.Command, args []string) error {
			if n := c.ArgsLenAtDash(); len(args) == 0 || n == 0 || n < 0 && len(args) > 1 || n > 1 {
				return usage("%s needs one campaign ID", c.CommandPath())
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			r.ID = maint.CampaignID(args[0])
			if to != "" {
				r.Action.Migrate = &maint.MigrateRequest{To: to}
			}
			if replace || method != "" {
				r.Action.Replace = &maint.ReplaceRequest{Method: maint.VMMMethod(method)}
			}
			if command := args[1:]; len(command) > 0 {
				r.Action.Hold = &maint.HoldRequest{Step: maint.HostStep{Command: command}}
			}
			for what, at := range map[string]struct {
				text string
				into *time.Time
			}{"--opens": {opens, &r.Opens}, "--deadline": {deadline, &r.Deadline}} {
				if err := moment(what, at.text, at.into); err != nil {
					return err
				}
			}
			k, err := a.client().CreateCampaign(c.Context(), r)
			if err != nil {
				return err
			}
			return a.printCampaign(k)
		},
	}
	f := c.Flags()
	f.StringVar(&to, "migrate", "", "migrate each guest to this peer")
	f.BoolVar(&replace, "replace-vmm", false, "put a new QEMU under each guest")
	f.StringVar(&method, "method", "", "how, with --replace-vmm: "+list(methods()))
	f.StringArrayVar(&r.Guests, "guest", nil, "this guest (name or UUID); may be given more than once (default: all that run)")
	f.StringVar(&r.Description, "description", "", "what it is, for owners to read")
	f.StringVar(&opens, "opens", "", "when owners may begin to pick, such as 2026-12-01T00:00:00Z (default: now)")
	f.StringVar(&deadline, "deadline", "", "when what is left is done (default: 35 days after it opens)")
	f.DurationVar(&r.Duration, "duration", 0, "how long a guest feels it, as far as is known")
	f.BoolVar(&r.Security, "security", false, "it closes a hole: owners may have less than 35 days")
	f.IntVar(&r.MaxDefers, "defers", 3, "how often an owner may put off what is booked")
	_ = c.RegisterFlagCompletionFunc("guest", a.completeGuests)
	_ = c.RegisterFlagCompletionFunc("migrate", a.completePeers)
	fixed(c, "method", methods()...)
	return c
}

// moment reads a time, if there is one.
func moment(what, text string, into *time.Time) error {
	if text == "" {
		return nil
	}
	for _, form := range []string{time.RFC3339, "2006-01-02 15:04", "2006-01-02T15:04"} {
		if t, err := time.ParseInLocation(form, text, time.Local); err == nil && !t.IsZero() { // the zero time is none
			*into = t
			return nil
		}
	}
	return usage("%s is %q; write it as 2026-12-01T02:00:00Z, or \"2026-12-01 02:00\" on this machine's clock", what, text)
}

func (a *app) maintenanceBookCmd() *cobra.Command {
	var at string
	c := &cobra.Command{
		Use: "book ID GUEST --at TIME", Short: "Pick the moment for a guest", Args: exactly("a campaign ID", "a GUEST"), ValidArgsFunction: a.completeCampaigns,
		RunE: func(c *cobra.Command, args []string) error {
			b := api.Booking{Guest: args[1]}
			if at == "" {
				return usage("belay maintenance book needs --at TIME; 'belay maintenance start' is for now")
			}
			if err := moment("--at", at, &b.At); err != nil {
				return err
			}
			k, err := a.client().BookCampaign(c.Context(), maint.CampaignID(args[0]), b)
			if err != nil {
				return err
			}
			return a.printCampaign(k)
		},
	}
	c.Flags().StringVar(&at, "at", "", "when, such as 2026-12-01T02:00:00Z")
	return c
}

func (a *app) maintenanceGuestCmd(verb, short string, do func(context.Context, maint.CampaignID, string) (maint.Campaign, error)) *cobra.Command {
	return &cobra.Command{
		Use: verb + " ID GUEST", Short: short, Args: exactly("a campaign ID", "a GUEST"), ValidArgsFunction: a.completeCampaigns,
		RunE: func(c *cobra.Command, args []string) error {
			k, err := do(c.Context(), maint.CampaignID(args[0]), args[1])
			if err != nil {
				return err
			}
			return a.printCampaign(k)
		},
	}
}

func (a *app) maintenanceCloseCmd() *cobra.Command {
	return &cobra.Command{
		Use: "close ID", Short: "Call a campaign off; operations that it has begun go on", Args: exactly("a campaign ID"), ValidArgsFunction: a.completeCampaigns,
		RunE: func(c *cobra.Command, args []string) error {
			k, err := a.client().CloseCampaign(c.Context(), maint.CampaignID(args[0]))
			if err != nil {
				return err
			}
			return a.printCampaign(k)
		},
	}
}

// completeCampaigns completes a campaign's ID, and then a guest.
func (a *app) completeCampaigns(c *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return a.completeGuests(c, nil, word)
	}
	return a.complete(c, args, func(ctx context.Context) (ids []string) {
		all, _ := a.client().Campaigns(ctx)
		for _, k := range all {
			if k.Closed.IsZero() {
				ids = append(ids, string(k.ID))
			}
		}
		return ids
	})
}
