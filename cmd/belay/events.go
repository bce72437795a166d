package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"belay/agent/maint"
)

func (a *app) eventsCmd() *cobra.Command {
	return group(&cobra.Command{Use: "events", Short: "List, show, watch, approve and cancel guests' scheduled events",
		Long: `Scheduled events are what guests are told will happen to them: what, when at the
earliest, and for how long. They start when their notice has passed, or when
somebody has approved them: in the guest, or here.`},
		a.eventsListCmd(), a.eventsShowCmd(), a.eventsWatchCmd(),
		a.eventsAnswerCmd("approve", "Have an event start as soon as it can, on behalf of the guests' owner", `Have an event start as soon as it can: its notice is waived on behalf of the guests'
owner. Programs in the guests that have registered are still waited for.`,
			func(ctx context.Context, id maint.EventID, reason string) (maint.ScheduledEvent, error) {
				return a.client().ApproveEvent(ctx, id, reason)
			}),
		a.eventsAnswerCmd("cancel", "Call an event off that has not started", `Call an event off that has not started. The operation that waits for it ends, with
nothing done.`,
			func(ctx context.Context, id maint.EventID, reason string) (maint.ScheduledEvent, error) {
				return a.client().CancelEvent(ctx, id, reason)
			}))
}

func (a *app) eventsListCmd() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "list", Short: "List scheduled events, the oldest first", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			events, err := a.client().Events(c.Context(), all)
			if err != nil {
				return err
			}
			return a.print(events, func(w io.Writer) { printEvents(w, events) })
		},
	}
	c.Flags().BoolVar(&all, "all", false, "also those that are over")
	return c
}

func printEvents(w io.Writer, events []maint.ScheduledEvent) {
	row(w, "ID", "IMPACT", "STATE", "GUESTS", "NOT BEFORE", "OPERATION")
	for _, e := range events {
		row(w, e.ID, e.Impact, eventState(e), guestNames(e), notBefore(e), dash(string(e.Op)))
	}
}

func eventState(e maint.ScheduledEvent) string {
	if e.State == maint.EventScheduled && e.Approval != nil {
		return "approved"
	}
	return string(e.State)
}

func notBefore(e maint.ScheduledEvent) string {
	if e.State != maint.EventScheduled {
		return "-"
	}
	return clock(e.NotBefore)
}

func guestNames(e maint.ScheduledEvent) string {
	var names []string
	for _, g := range e.Guests {
		names = append(names, g.Name)
	}
	return strings.Join(names, ", ")
}

func (a *app) eventsShowCmd() *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show a scheduled event", Args: exactly("an event ID"), ValidArgsFunction: a.completeEvents,
		RunE: func(c *cobra.Command, args []string) error {
			e, err := a.client().Event(c.Context(), maint.EventID(args[0]))
			if err != nil {
				return err
			}
			return a.print(e, func(w io.Writer) { printEvent(w, e) })
		},
	}
}

func printEvent(w io.Writer, e maint.ScheduledEvent) {
	row(w, "event", e.ID)
	row(w, "impact", fmt.Sprintf("%s, %s", e.Impact, duration(e)))
	row(w, "state", e.State)
	row(w, "guests", guestNames(e))
	row(w, "description", dash(e.Description))
	row(w, "announced", clock(e.Announced))
	row(w, "not before", notBefore(e))
	printApproval(w, "approved", e.Approval)
	printApproval(w, "emergency", e.Emergency)
	for _, l := range e.Listeners {
		state := "waited for until " + clock(l.Until)
		if !l.Ready.IsZero() {
			state = "ready, " + clock(l.Ready)
		}
		row(w, "listener", l.Name+": "+state)
	}
	if !e.Started.IsZero() {
		row(w, "started", clock(e.Started))
	}
	if !e.Ended.IsZero() {
		row(w, "ended", clock(e.Ended)+suffix(": ", e.Note))
	}
	for _, g := range e.Guests {
		if p, measured := e.Pauses[g.UUID]; measured {
			row(w, "paused", g.Name+": "+fine(p))
		}
	}
	row(w, "operation", dash(string(e.Op)))
}

func printApproval(w io.Writer, what string, by *maint.EventApproval) {
	if by != nil {
		row(w, what, fmt.Sprintf("by %s, %s%s", by.By, clock(by.At), suffix(": ", by.Reason)))
	}
}

// duration is how long an event is expected to be felt.
func duration(e maint.ScheduledEvent) string {
	switch {
	case e.Duration == maint.DurationUnknown:
		return "for an unknown time"
	case e.Duration == 0:
		return "not felt"
	}
	return "for about " + span(e.Duration)
}

func (a *app) eventsWatchCmd() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "watch", Short: "Print scheduled events now and whenever they change, until interrupted", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			known := make(map[maint.EventID]string)
			err := a.client().WatchEvents(c.Context(), true, func(events []maint.ScheduledEvent) error {
				for _, e := range events {
					was, now := known[e.ID], eventState(e)
					known[e.ID] = now
					if was == now || was == "" && e.State.Over() && !all {
						continue
					}
					if err := a.printChange(e); err != nil {
						return err
					}
				}
				return nil
			})
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		},
	}
	c.Flags().BoolVar(&all, "all", false, "begin with those that are over")
	return c
}

// printChange prints an event as one line, or one document.
func (a *app) printChange(e maint.ScheduledEvent) error {
	return a.print(e, func(w io.Writer) {
		row(w, time.Now().Format(time.TimeOnly), e.ID, e.Impact, eventState(e), guestNames(e), notBefore(e), e.Note)
	})
}

func (a *app) eventsAnswerCmd(verb, short, long string, do func(context.Context, maint.EventID, string) (maint.ScheduledEvent, error)) *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use: verb + " ID ...", Short: short, Long: long, ValidArgsFunction: a.completeEvents,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 || slices.Contains(args, "") {
				return usage("%s needs an event ID", c.CommandPath())
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			var events []maint.ScheduledEvent
			for _, id := range args {
				e, err := do(c.Context(), maint.EventID(id), reason)
				if err != nil {
					return err
				}
				events = append(events, e)
			}
			return a.print(events, func(w io.Writer) { printEvents(w, events) })
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the record")
	return c
}

// emergencyFlag is for operations that guests are told of.
func emergencyFlag(f *pflag.FlagSet, reason *string) {
	f.StringVar(reason, "emergency", "", "do not wait for the guests' notice, for the reason given, which they are told")
}

func (a *app) completeEvents(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(c, nil, func(ctx context.Context) (ids []string) {
		events, _ := a.client().Events(ctx, false)
		for _, e := range events {
			if !slices.Contains(args, string(e.ID)) {
				ids = append(ids, string(e.ID))
			}
		}
		return ids
	})
}
