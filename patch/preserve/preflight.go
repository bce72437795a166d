package preserve

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"belay/agent/maint"
)

// prepareTimeout bounds what is asked of all guests' agents before the pause.
const prepareTimeout = 10 * time.Second

// Preflight finds out who is to be held and whether anything stands in the
// way, and returns a *maint.Refusal with every reason. Nothing is changed.
func (h *Hold) Preflight(ctx context.Context, s Scratch) error {
	guests, err := h.Host.Guests(ctx)
	if err != nil {
		return fmt.Errorf("cannot list the guests: %w", err)
	}
	order, held, problems := h.choose(guests)
	for _, step := range []*maint.HostStep{&h.Request.Step, h.Request.Verify, h.Request.Undo} {
		if step != nil {
			problems = append(problems, h.Steps.Check(ctx, *step)...)
		}
	}
	if len(problems) == 0 { // agents are asked last: they may be slow
		problems = h.prepareClocks(ctx, held)
	}
	if err := maint.Refuse("cannot hold "+h.what(), problems); err != nil {
		return err
	}
	for _, m := range order.Guests {
		if m.Left != "" {
			if err := s.Note("guest %s is left as it is: %s", m.Guest, m.Left); err != nil {
				return err
			}
		}
	}
	return s.Save(order)
}

func (h *Hold) what() string {
	switch r := h.Request; {
	case r.All:
		return "all guests"
	case len(r.Guests) == 1:
		return "guest " + r.Guests[0]
	default:
		return "guests " + strings.Join(r.Guests, ", ")
	}
}

// choose makes the order, and the guests that it holds.
func (h *Hold) choose(guests []maint.Guest) (o Order, held []maint.Guest, problems []maint.Problem) {
	o = Order{Op: h.Op, MaxPause: h.MaxPause}
	add := func(p *maint.Problem) { problems = append(problems, *p) }
	find := func(name string) *maint.Guest {
		for _, match := range []func(maint.Guest) bool{
			func(g maint.Guest) bool { return g.UUID == name }, func(g maint.Guest) bool { return g.Name == name }} {
			if i := slices.IndexFunc(guests, match); i >= 0 {
				return &guests[i]
			}
		}
		add(maint.Problemf(maint.CodeUnknownGuest, "guest "+name, "see 'belay guests' for the names", "is not on this host"))
		return nil
	}
	chosen := make(map[string]bool)
	for _, name := range h.Request.Guests {
		if g := find(name); g != nil {
			chosen[g.UUID] = true
		}
	}
	group := make(map[string]int)
	for i, names := range h.Request.Groups {
		for _, name := range names {
			g := find(name)
			if g == nil {
				continue
			}
			if _, twice := group[g.UUID]; twice {
				add(maint.Problemf(maint.CodeBadRequest, "guest "+name, "name it once", "is in more than one release group"))
			}
			if !h.Request.All && !chosen[g.UUID] {
				add(maint.Problemf(maint.CodeBadRequest, "guest "+name, "add --guest "+name, "is in a release group but not among the guests to hold"))
			}
			group[g.UUID] = i
		}
	}
	for _, g := range guests {
		if !h.Request.All && !chosen[g.UUID] {
			continue
		}
		m := Member{Guest: g.Name, UUID: g.UUID, ID: g.ID, Group: len(h.Request.Groups), Agent: g.Agent}
		if i, ok := group[g.UUID]; ok {
			m.Group = i
		}
		switch {
		case g.Job != "":
			add(maint.Problemf(maint.CodeBusy, "guest "+g.Name, "wait for it to end", "has a job running: %s", g.Job))
		case !g.State.Active():
			if h.Request.All {
				continue
			}
			m.Left = "it is " + string(g.State)
		case g.State == maint.GuestPaused:
			m.Left = fmt.Sprintf("it is paused already (%s), not by Belay", g.Reason)
		case g.State != maint.GuestRunning && g.State != maint.GuestBlocked:
			m.Left = fmt.Sprintf("it is %s (%s)", g.State, g.Reason)
		default:
			held = append(held, g)
		}
		o.Guests = append(o.Guests, m)
	}
	if len(held) == 0 && len(problems) == 0 {
		add(maint.Problemf(maint.CodeNothing, h.what(), "run the command itself: no guest would feel it", "no guest to hold runs here"))
	}
	return o, held, problems
}

// prepareClocks has every guest's clock looked at, all at once.
func (h *Hold) prepareClocks(ctx context.Context, guests []maint.Guest) []maint.Problem {
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	var mu sync.Mutex
	var problems []maint.Problem
	h.clocks = make(map[string]Clock, len(guests))
	var all sync.WaitGroup
	for _, g := range guests {
		all.Go(func() {
			clock, problem := h.Clocks.Prepare(ctx, g)
			mu.Lock()
			defer mu.Unlock()
			if problem != nil {
				problems = append(problems, *problem)
			}
			h.clocks[g.UUID] = clock
		})
	}
	all.Wait()
	slices.SortFunc(problems, func(a, b maint.Problem) int { return strings.Compare(a.Subject, b.Subject) })
	return problems
}
