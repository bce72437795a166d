package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"belay/agent/maint"
	"belay/agent/report"
)

// topEvery is how often the view of a host is drawn, unless it is told otherwise, and
// topLeast the most often.
const (
	topEvery = 2 * time.Second
	topLeast = 200 * time.Millisecond
)

func (a *app) topCmd() *cobra.Command {
	every := topEvery
	c := &cobra.Command{
		Use: "top", Short: "Show this host live: what goes on, what is coming, its guests", Args: noArgs,
		Long: `Show this host: what is wrong, the operations that run and how far they are, the notices
that guests have, and the guests. On a terminal it is drawn anew until Ctrl-C; elsewhere, and
with -o json or yaml, it is written once.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if every < topLeast {
				return usage("--every is %s, it can be %s and more", every, topLeast)
			}
			f, is := a.out.(*os.File)
			if !is || !term.IsTerminal(int(f.Fd())) || a.format != "table" {
				v, err := a.see(c.Context())
				if err != nil {
					return err
				}
				return a.print(v, func(w io.Writer) { v.rows(w) })
			}
			return a.top(c.Context(), f, every)
		},
	}
	c.Flags().DurationVar(&every, "every", topEvery, "how often it is drawn")
	return c
}

// hostView is what is seen of a host at one moment.
type hostView struct {
	Status maint.Status           `json:"status"`
	Guests maint.Inventory        `json:"guests"`
	Events []maint.ScheduledEvent `json:"events"`
}

func (a *app) see(ctx context.Context) (v hostView, err error) {
	c := a.client()
	defer c.Close()
	if v.Status, err = c.Status(ctx); err != nil {
		return v, err
	}
	if v.Guests, err = c.Inventory(ctx); err != nil {
		return v, err
	}
	v.Events, err = c.Events(ctx, false)
	return v, err
}

// top draws the host until ctx ends. A belayd that is restarted is waited for.
func (a *app) top(ctx context.Context, f *os.File, every time.Duration) error {
	const clear, hide, show = "\x1b[H\x1b[2J", "\x1b[?25l", "\x1b[?25h"
	fmt.Fprint(f, hide+clear)
	defer fmt.Fprint(f, show)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for seen := false; ; {
		v, err := a.see(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && (!seen || !errors.Is(err, maint.ErrPeerDown)):
			return err
		}
		var b strings.Builder
		if err == nil {
			seen = true
			if err := a.table(&b, func(w io.Writer) { v.rows(w) }); err != nil {
				return err
			}
		} else {
			fmt.Fprintln(&b, "belayd does not answer, waiting for it: "+oneLine(err.Error()))
		}
		width, height, err := term.GetSize(int(f.Fd()))
		if err != nil {
			width, height = 80, 24
		}
		if _, err := fmt.Fprint(f, screen(b.String(), width, height)); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// screen draws a text over what a terminal shows, as much of it as fits.
func screen(text string, width, height int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if most := max(height-1, 1); len(lines) > most {
		left := len(lines) - most + 1
		lines = append(lines[:most-1], fmt.Sprintf("… %s more", count(left, "line")))
	}
	const home, restOfLine, below = "\x1b[H", "\x1b[K", "\x1b[J"
	var b strings.Builder
	b.WriteString(home)
	for _, line := range lines {
		if width > 0 && utf8.RuneCountInString(line) > width {
			line = string([]rune(line)[:width-1]) + "…"
		}
		b.WriteString(line + restOfLine + "\r\n")
	}
	return b.String() + below
}

// rows writes the view of a host as a table.
func (v hostView) rows(w io.Writer) {
	s := v.Status
	head := fmt.Sprintf("%s at %s, belayd %s up %s, %s of %s free", s.Host.Name, s.Now.Local().Format(time.TimeOnly),
		s.Version, span(s.Now.Sub(s.Since)), bytes(s.Host.FreeMemoryBytes), bytes(s.Host.MemoryBytes))
	if s.Cordon != nil {
		head += ", cordoned" + s.Cordon.Why()
	}
	fmt.Fprintln(w, oneLine(head))
	for _, c := range s.Conditions {
		fmt.Fprintln(w, oneLine("PROBLEM "+c.Text))
	}
	for _, p := range s.Peers {
		if !p.OK && p.Error == "" {
			fmt.Fprintln(w, oneLine("peer "+p.Name+" has not answered yet"))
		}
	}
	v.operations(w)
	v.notices(w)
	v.guests(w)
}

func (v hostView) operations(w io.Writer) {
	fmt.Fprintln(w)
	row(w, "OPERATION", "ON", "BY", "FOR", "WHERE IT IS", "")
	if len(v.Status.Operations) == 0 {
		row(w, "none")
	}
	for _, op := range v.Status.Operations {
		row(w, op.ID, about(op), op.By, span(v.Status.Now.Sub(op.Started)), describe(op), gauge(op))
		if op.Trouble != nil {
			fmt.Fprintln(w, oneLine("  "+op.Trouble.Error()))
		}
	}
}

// gauge draws how much of an operation is done, "" where that is not known.
func gauge(op maint.Op) string {
	done, of := report.Progress(op)
	if of == 0 {
		return ""
	}
	const cells = 20
	full := int(float64(done) / float64(of) * cells)
	return fmt.Sprintf("[%s%s] %d %%", strings.Repeat("#", full), strings.Repeat("-", cells-full), int(float64(done)/float64(of)*100))
}

func (v hostView) notices(w io.Writer) {
	if len(v.Events) == 0 {
		return
	}
	fmt.Fprintln(w)
	row(w, "NOTICE", "STATE", "NOT BEFORE", "GUESTS", "APPROVED BY", "OPERATION")
	for _, e := range v.Events {
		names := make([]string, len(e.Guests))
		for i, g := range e.Guests {
			names[i] = g.Name
		}
		by := "-"
		if e.Approval != nil {
			by = e.Approval.By
		}
		row(w, e.Impact, e.State, clock(e.NotBefore), strings.Join(names, ","), by, dash(string(e.Op)))
	}
}

// guests has those first with which something goes on.
func (v hostView) guests(w io.Writer) {
	fmt.Fprintln(w)
	if v.Guests.Stale != "" {
		fmt.Fprintln(w, oneLine("libvirt does not answer, this is as of "+clock(v.Guests.AsOf)+": "+v.Guests.Stale))
	}
	row(w, "GUEST", "STATE", "MEMORY", "VCPUS", "AGENT", "JOB")
	all := slices.Clone(v.Guests.Guests)
	idle := func(g maint.Guest) int {
		switch {
		case g.Job != "":
			return 0
		case g.State.Active():
			return 1
		}
		return 2
	}
	slices.SortStableFunc(all, func(a, b maint.Guest) int {
		return cmp.Or(cmp.Compare(idle(a), idle(b)), cmp.Compare(a.Name, b.Name))
	})
	for _, g := range all {
		row(w, g.Name, fmt.Sprintf("%s (%s)", g.State, dash(g.Reason)), bytes(g.MemoryBytes), g.VCPUs, g.Agent, dash(g.Job))
	}
}
