package page

import (
	"fmt"
	"strings"

	"belay/agent/maint"
	"belay/agent/report"
)

func text(v any) string { return fmt.Sprint(v) }

// percent is how much of an operation is done, -1 where that is not known.
func percent(op maint.Op) int {
	done, of := report.Progress(op)
	if of == 0 {
		return -1
	}
	return int(float64(done) / float64(of) * 100)
}

func names(guests []maint.EventGuest) string {
	all := make([]string, len(guests))
	for i, g := range guests {
		all[i] = g.Name
	}
	return strings.Join(all, ", ")
}

// class is how something is coloured: "good", "warn", "bad" or "". The words say it, too.
func class(v any) string {
	switch text(v) {
	case string(maint.CheckOK), string(maint.OutcomeDone), string(maint.GuestRunning):
		return "good"
	case string(maint.CheckWarn), string(maint.OutcomePartly), string(maint.OutcomeAborted), string(maint.OutcomeBlocked):
		return "warn"
	case string(maint.CheckFail), string(maint.OutcomeFailed), string(maint.OutcomeStuck), string(maint.GuestCrashed):
		return "bad"
	}
	return ""
}
