package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"belay/agent/maint"
)

func (a *app) policyCmd() *cobra.Command {
	return group(&cobra.Command{Use: "policy", Short: "What may be done to guests, and when"},
		a.policyShowCmd(), a.policySetCmd(), a.policyCheckCmd())
}

func (a *app) policyShowCmd() *cobra.Command {
	return &cobra.Command{
		Use: "show GUEST", Short: "Show a guest's policy, and what is wrong with it", Args: exactly("GUEST"),
		ValidArgsFunction: a.completeGuests,
		RunE: func(c *cobra.Command, args []string) error {
			v, err := a.client().Policy(c.Context(), args[0])
			if err != nil {
				return err
			}
			return a.printPolicy(v)
		},
	}
}

// policyFlags are what can be set of a policy.
type policyFlags struct {
	refuse, prefer, ask, groups, windows, unset []string
	clear                                       bool
	set                                         maint.GuestPolicy
}

func (p *policyFlags) add(f *pflag.FlagSet) {
	f.DurationVar(&p.set.MaxPause, "max-pause", 0, "longest standstill by rung B")
	f.DurationVar(&p.set.MaxBlackout, "max-blackout", 0, "longest standstill by a move")
	f.StringSliceVar(&p.refuse, "refuse", nil, "rungs that are not for it: B, B1, B2, B3, D; an empty list: none, whatever the host's configuration says")
	f.StringSliceVar(&p.prefer, "prefer", nil, "rungs that are taken before others with less impact")
	f.StringSliceVar(&p.ask, "ask", nil, "rungs that wait for its owner's approval, or the update's deadline")
	f.DurationVar(&p.set.Notice, "notice", 0, "how long beforehand it is told")
	f.DurationVar(&p.set.SecurityNotice, "security-notice", 0, "the same, of an update that closes a hole")
	f.StringArrayVar(&p.windows, "window", nil, "when it may be disturbed: zone, length and rule (RFC 5545), as in \"Europe/Berlin 4h FREQ=WEEKLY;BYDAY=SA;BYHOUR=2\"; can be given several times")
	f.StringSliceVar(&p.groups, "anti-affinity", nil, "groups of which there is to be one guest on a host")
	f.IntVar(&p.set.Priority, "priority", 0, "who is served where not all can be, from -100 to 100")
	f.StringVar(&p.set.Owner, "owner", "", "whose it is")
	f.StringSliceVar(&p.unset, "unset", nil, "settings to take out, by the names of these flags")
	f.BoolVar(&p.clear, "clear", false, "take all out that it has, and then set what is given")
}

// over is a guest's policy with what was given.
func (p *policyFlags) over(f *pflag.FlagSet, own maint.GuestPolicy) (maint.GuestPolicy, error) {
	if p.clear {
		own = maint.GuestPolicy{}
	}
	fields := map[string]func(from maint.GuestPolicy){
		"max-pause":       func(from maint.GuestPolicy) { own.MaxPause = from.MaxPause },
		"max-blackout":    func(from maint.GuestPolicy) { own.MaxBlackout = from.MaxBlackout },
		"refuse":          func(from maint.GuestPolicy) { own.Refuse = from.Refuse },
		"prefer":          func(from maint.GuestPolicy) { own.Prefer = from.Prefer },
		"ask":             func(from maint.GuestPolicy) { own.Ask = from.Ask },
		"notice":          func(from maint.GuestPolicy) { own.Notice = from.Notice },
		"security-notice": func(from maint.GuestPolicy) { own.SecurityNotice = from.SecurityNotice },
		"window":          func(from maint.GuestPolicy) { own.Windows = from.Windows },
		"anti-affinity":   func(from maint.GuestPolicy) { own.AntiAffinity = from.AntiAffinity },
		"priority":        func(from maint.GuestPolicy) { own.Priority = from.Priority },
		"owner":           func(from maint.GuestPolicy) { own.Owner = from.Owner },
	}
	for _, name := range p.unset {
		take, known := fields[name]
		if !known {
			return own, usage("--unset %q is no setting of a policy", name)
		}
		take(maint.GuestPolicy{})
	}
	given := p.set
	given.Refuse, given.Prefer, given.Ask, given.AntiAffinity = rungs(p.refuse), rungs(p.prefer), rungs(p.ask), p.groups
	given.Windows = []maint.Window{}
	for _, text := range p.windows {
		words := strings.Fields(text)
		if len(words) == 0 && len(p.windows) == 1 {
			break // none
		}
		if len(words) != 3 {
			return own, usage("--window %q has %d words, and needs three: zone, length and rule", text, len(words))
		}
		length, err := time.ParseDuration(words[1])
		if err != nil {
			return own, usage("--window: %q is no length such as 4h", words[1])
		}
		given.Windows = append(given.Windows, maint.Window{Zone: words[0], Length: length, Rule: words[2]})
	}
	n := 0
	for name, take := range fields {
		if f.Changed(name) {
			n++
			take(given)
		}
	}
	if n == 0 && len(p.unset) == 0 && !p.clear {
		return own, usage("say what is to be set, unset or cleared")
	}
	return own, nil
}

func rungs(words []string) (all []maint.Rung) {
	all = []maint.Rung{}
	for _, w := range words {
		all = append(all, maint.Rung(w))
	}
	return all
}

func (a *app) policySetCmd() *cobra.Command {
	var p policyFlags
	c := &cobra.Command{
		Use: "set GUEST", Short: "Change a guest's policy", Args: exactly("GUEST"),
		Long: `Change what a guest's definition says may be done to it. It goes along wherever the guest
does, and counts for more than what belayd's configuration says ([policy]). What is not
named stays as it is. A policy that contradicts itself, or something else on this host, is
refused.`,
		Example: `  belay policy set voip-1 --max-pause 1s --prefer D
  belay policy set shop-1 --window "Europe/Berlin 4h FREQ=DAILY;BYHOUR=2" --ask D
  belay policy set shop-1 --unset ask`,
		ValidArgsFunction: a.completeGuests,
		RunE: func(c *cobra.Command, args []string) error {
			if _, err := p.over(c.Flags(), maint.GuestPolicy{}); err != nil {
				return err // before belayd is asked
			}
			v, err := a.client().Policy(c.Context(), args[0])
			if err != nil {
				return err
			}
			own, err := p.over(c.Flags(), v.Own)
			if err != nil {
				return err
			}
			if v, err = a.client().SetPolicy(c.Context(), v.UUID, own); err != nil {
				return err
			}
			return a.printPolicy(v)
		},
	}
	p.add(c.Flags())
	return c
}

func (a *app) policyCheckCmd() *cobra.Command {
	return &cobra.Command{
		Use: "check", Short: "List what is wrong with the guests' policies", Args: noArgs,
		Long: `List what contradicts itself, or something else on this host, in the guests' policies.

Exit codes: 0 nothing; 1 failed; 2 wrong usage; 3 something.`,
		RunE: func(c *cobra.Command, _ []string) error {
			all, err := a.client().Policies(c.Context())
			if err != nil {
				return err
			}
			n := 0
			for _, v := range all {
				n += len(v.Problems)
			}
			if err := a.print(all, func(w io.Writer) {
				for _, v := range all {
					for _, p := range v.Problems {
						row(w, p.Subject, p.Reason)
						if p.Remedy != "" {
							row(w, "", "→ "+p.Remedy)
						}
					}
				}
				if n == 0 {
					row(w, fmt.Sprintf("nothing is wrong with the policies of %s", count(len(all), "guest")))
				}
			}); err != nil {
				return err
			}
			if n > 0 {
				return &ended{exitBlocked}
			}
			return nil
		},
	}
}

// printPolicy prints what a guest says itself, and what holds for it.
func (a *app) printPolicy(v maint.PolicyView) error {
	return a.print(v, func(w io.Writer) {
		row(w, "POLICY", "OWN", "HOLDS")
		say := func(name string, of func(maint.GuestPolicy) string) {
			row(w, name, dash(of(v.Own)), dash(of(v.Whole)))
		}
		lasts := func(of func(maint.GuestPolicy) time.Duration) func(maint.GuestPolicy) string {
			return func(p maint.GuestPolicy) string {
				if d := of(p); d != 0 {
					return d.String()
				}
				return ""
			}
		}
		some := func(of func(maint.GuestPolicy) []maint.Rung) func(maint.GuestPolicy) string {
			return func(p maint.GuestPolicy) string {
				if rs := of(p); rs != nil {
					return strings.Trim(fmt.Sprint(rs), "[]") + strings.Repeat("none", 1-min(1, len(rs)))
				}
				return ""
			}
		}
		say("max-pause", lasts(func(p maint.GuestPolicy) time.Duration { return p.MaxPause }))
		say("max-blackout", lasts(func(p maint.GuestPolicy) time.Duration { return p.MaxBlackout }))
		say("refuse", some(func(p maint.GuestPolicy) []maint.Rung { return p.Refuse }))
		say("prefer", some(func(p maint.GuestPolicy) []maint.Rung { return p.Prefer }))
		say("ask", some(func(p maint.GuestPolicy) []maint.Rung { return p.Ask }))
		say("notice", lasts(func(p maint.GuestPolicy) time.Duration { return p.Notice }))
		say("security-notice", lasts(func(p maint.GuestPolicy) time.Duration { return p.SecurityNotice }))
		say("window", func(p maint.GuestPolicy) string {
			var all []string
			for _, win := range p.Windows {
				all = append(all, fmt.Sprintf("%s %s %s", win.Zone, win.Length, win.Rule))
			}
			return strings.Join(all, ", ")
		})
		say("anti-affinity", func(p maint.GuestPolicy) string { return strings.Join(p.AntiAffinity, ", ") })
		say("priority", func(p maint.GuestPolicy) string {
			if p.Priority == 0 {
				return ""
			}
			return fmt.Sprint(p.Priority)
		})
		say("owner", func(p maint.GuestPolicy) string { return p.Owner })
		for _, p := range v.Problems {
			row(w, p.Error())
		}
	})
}
