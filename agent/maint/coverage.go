package maint

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// CoverByUpdates is the verdict on a change where livepatches leave it open, from the updates
// that were applied here. An update's covers are the word of who has written its manifest. They
// count for the kernel that runs only where all that the update did was to boot one, which it
// names, and this is the one: whatever has been booted since, and by whom. Of other changes it is
// not known whether they still are in effect.
func CoverByUpdates(c Coverage, v PatchView, ops []Op) Coverage {
	if c.Verdict != CoverageUnsure {
		return c
	}
	for _, op := range slices.Backward(ops) {
		if op.Apply == nil || !op.Outcome.TookEffect() {
			continue
		}
		u := op.Apply.Plan.Update
		if !slices.Contains(u.Covers, c.Change) {
			continue
		}
		when := op.Ended.UTC().Format(time.DateOnly)
		why := unproven(u, v)
		if why == "" {
			return Coverage{c.Change, Covered, "update " + u.ID, fmt.Sprintf("update %s of %s has booted kernel %s, which its manifest says covers it, and that kernel runs", u.ID, when, v.Release)}
		}
		if c.By == "" { // the latest
			c.By, c.Reason = "update "+u.ID, fmt.Sprintf("update %s of %s is to cover it, and %s", u.ID, when, why)
		}
	}
	if c.Verdict == CoverageUnsure {
		c.By = ""
	}
	return c
}

// unproven is why an update's covers say nothing of the kernel that runs, "" if they do.
func unproven(u Update, v PatchView) string {
	boots := ""
	for _, k := range u.Changes {
		switch {
		case k.Kind != ChangeKernel:
			return fmt.Sprintf("whether its change %s (%s) still is in effect is not known", k.Name, k.Kind)
		case k.Version == "":
			return fmt.Sprintf("its change %s does not say which kernel it boots (version)", k.Name)
		}
		boots = k.Version // the last one is the one that runs
	}
	if boots != v.Release && !slices.Contains(strings.Fields(v.Version), boots) {
		return fmt.Sprintf("it has booted kernel %s, and kernel %s runs", boots, v.Release)
	}
	return ""
}
