package maint_test

import (
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

// TestCoverByUpdates: an update's covers count for the very kernel that it has booted, and for
// nothing else; what is not known is not covered.
func TestCoverByUpdates(t *testing.T) {
	t.Parallel()
	const change, release, version = "CVE-2026-1234", "6.1.0-30-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.124-1 (2025-01-12)"
	running := maint.PatchView{Release: release, Version: version}
	kernel := func(version string) maint.Change {
		return maint.Change{Name: "kernel", Kind: maint.ChangeKernel, Version: version}
	}
	applied := func(o maint.Outcome, changes ...maint.Change) maint.Op {
		u := maint.Update{ID: "u", Covers: []string{"CVE-2025-1", change}, Changes: changes}
		return maint.Op{Kind: maint.OpApply, State: maint.OpEnded, Outcome: o, Ended: time.Unix(1e9, 0), Apply: &maint.ApplyRequest{Plan: maint.Plan{Update: u}}}
	}
	other := applied(maint.OutcomeDone, kernel(release))
	other.Apply.Plan.Update.Covers = []string{"CVE-2026-12345"}
	unsure := maint.Coverage{Change: change, Verdict: maint.CoverageUnsure, Reason: "no livepatch"}
	reboot := maint.Coverage{Change: change, Verdict: maint.NeedsReboot, Reason: "its manifest"}
	for name, c := range map[string]struct {
		before maint.Coverage
		ops    []maint.Op
		want   maint.CoverageVerdict
		says   string
	}{
		"no update":                     {unsure, nil, maint.CoverageUnsure, "no livepatch"},
		"of another change":             {unsure, []maint.Op{other, {Kind: maint.OpHold, Outcome: maint.OutcomeDone}}, maint.CoverageUnsure, "no livepatch"},
		"this kernel, by its release":   {unsure, []maint.Op{applied(maint.OutcomeDone, kernel(release))}, maint.Covered, "that kernel runs"},
		"this kernel, by its version":   {unsure, []maint.Op{applied(maint.OutcomePartly, kernel("6.1.124-1"))}, maint.Covered, "that kernel runs"},
		"a part of its version":         {unsure, []maint.Op{applied(maint.OutcomeDone, kernel("6.1.12"))}, maint.CoverageUnsure, "kernel 6.1.0-30-amd64 runs"},
		"another kernel runs":           {unsure, []maint.Op{applied(maint.OutcomeDone, kernel("6.1.0-31-amd64"))}, maint.CoverageUnsure, "it has booted kernel 6.1.0-31-amd64, and kernel"},
		"one of two runs":               {unsure, []maint.Op{applied(maint.OutcomeDone, kernel("6.1.0-31-amd64")), applied(maint.OutcomeDone, kernel(release))}, maint.Covered, "update u of 2001-09-09"},
		"it does not say which":         {unsure, []maint.Op{applied(maint.OutcomeDone, kernel(""))}, maint.CoverageUnsure, "does not say which kernel"},
		"something beside":              {unsure, []maint.Op{applied(maint.OutcomeDone, kernel(release), maint.Change{Name: "ovs", Kind: maint.ChangeService})}, maint.CoverageUnsure, "change ovs (service) still is in effect"},
		"not the kernel":                {unsure, []maint.Op{applied(maint.OutcomeDone, maint.Change{Name: "arp", Kind: maint.ChangeSysctl})}, maint.CoverageUnsure, "change arp (sysctl)"},
		"taken back":                    {unsure, []maint.Op{applied(maint.OutcomeFailed, kernel(release))}, maint.CoverageUnsure, "no livepatch"},
		"stuck":                         {unsure, []maint.Op{applied(maint.OutcomeStuck, kernel(release))}, maint.CoverageUnsure, "no livepatch"},
		"goes on":                       {unsure, []maint.Op{applied("", kernel(release))}, maint.CoverageUnsure, "no livepatch"},
		"who has signed says otherwise": {reboot, []maint.Op{applied(maint.OutcomeDone, kernel(release))}, maint.NeedsReboot, "its manifest"},
	} {
		got := maint.CoverByUpdates(c.before, running, c.ops)
		if got.Verdict != c.want || !strings.Contains(got.Reason, c.says) || (got.By != "") != (c.want == maint.Covered) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
