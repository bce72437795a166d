package agent

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"belay/agent/maint"
)

// clockWait bounds what is asked of guests' agents for a request.
const clockWait = 30 * time.Second

// Clock measures the clock of one guest, or of all that run for "".
func (a *Agent) Clock(ctx context.Context, guest string) ([]maint.ClockReport, error) {
	return a.eachClock(ctx, guest, a.preserve.Clocks.Measure)
}

// SyncClock also steps those forward that are behind.
func (a *Agent) SyncClock(ctx context.Context, by, guest string) ([]maint.ClockReport, error) {
	a.log.Info("clocks are put right on request", "guest", guest, "by", by)
	return a.eachClock(ctx, guest, a.preserve.Clocks.Sync)
}

// eachClock does f to the guests named, all at once.
func (a *Agent) eachClock(ctx context.Context, guest string, f func(ctx context.Context, g maint.Guest) maint.ClockReport) ([]maint.ClockReport, error) {
	const what = "cannot look at guests' clocks"
	ctx, cancel := context.WithTimeout(ctx, clockWait)
	defer cancel()
	var guests []maint.Guest
	if guest != "" {
		g, err := a.guest(ctx, what, guest)
		if err != nil {
			return nil, err
		}
		if err := a.unlessHeld(what, g); err != nil {
			return nil, err
		}
		if !works(g) {
			return nil, refuse(what, maint.Problemf(maint.CodeGuestState, "guest "+g.Name, "start or resume it first", "is %s: its clock cannot be asked for", g.State))
		}
		guests = append(guests, g)
	} else {
		all, err := a.hyp.Guests(ctx)
		if err != nil {
			return nil, a.cannotAsk(what, err)
		}
		for _, g := range all {
			if works(g) {
				guests = append(guests, g)
			}
		}
	}
	reports := make([]maint.ClockReport, len(guests))
	var each sync.WaitGroup
	for i, g := range guests {
		each.Go(func() { reports[i] = f(ctx, g) })
	}
	each.Wait()
	for _, r := range reports {
		a.metrics.clock(r)
	}
	slices.SortFunc(reports, func(x, y maint.ClockReport) int { return strings.Compare(x.Guest, y.Guest) })
	return reports, nil
}
