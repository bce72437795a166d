package agent

import (
	"context"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/agent/report"
)

// Report tells what an operation came to, or where it is.
func (a *Agent) Report(ctx context.Context, id maint.OpID) (maint.Report, error) {
	op, err := a.Op(ctx, id)
	if err != nil {
		return maint.Report{}, err
	}
	records, err := a.journal.Records(id)
	if err != nil {
		return maint.Report{}, err
	}
	s := report.Source{Host: a.cfg.Host, Now: time.Now(), Op: op, Records: records, Arrived: a.journal.Arrivals(),
		Events: a.keeper.Events(func(e maint.ScheduledEvent) bool { return e.Op == id })}
	for _, m := range op.Moves {
		if part, known := a.journal.Op(m.Op); known {
			s.Parts = append(s.Parts, part)
		}
	}
	if whole, known := a.journal.Op(op.Part); known && whole.Apply != nil {
		s.Plan = &whole.Apply.Plan
	}
	if op.Apply != nil {
		s.Parts = slices.DeleteFunc(a.journal.Ops(), func(part maint.Op) bool { return part.Part != id })
	}
	return report.Make(s), nil
}
