package migrate

import (
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"belay/agent/maint"
)

// views are the ways in which one host can be seen to have a guest.
var views = []struct {
	name string
	view *maint.View
}{
	{"unknown", nil},
	{"absent", &maint.View{}},
	{"off", seen(maint.GuestShutoff, "shutdown", "")},
	{"crashed", seen(maint.GuestCrashed, "panicked", "")},
	{"running", seen(maint.GuestRunning, "booted", "")},
	{"resumed", seen(maint.GuestRunning, reasonResumed, "")},
	{"running+out", seen(maint.GuestRunning, "booted", jobOut)},
	{"paused", seen(maint.GuestPaused, "user", "")},
	{"paused+out", seen(maint.GuestPaused, "migrating", jobOut)},
	{"stopped", seen(maint.GuestPaused, "migrating", "")},
	{"postcopy", seen(maint.GuestPaused, "post-copy", "")},
	{"incoming", seen(maint.GuestPaused, "migrating", "migration in")},
}

func seen(s maint.GuestState, reason, job string) *maint.View {
	return &maint.View{Guest: &maint.Guest{State: s, Reason: reason, Job: job}}
}

// situations is Classify in full: a line for each way the source has the
// guest, a column for each way the destination has it. "crashed" is a state
// with a process; "stopped" is paused for a migration, with no job any more.
const situations = `
source \ dest  unknown  absent   off      crashed  running   resumed   running+out  paused   paused+out  stopped  postcopy  incoming
unknown        unknown  unknown  unknown  unknown  unknown   unknown   unknown      unknown  unknown     unknown  unknown   unknown
absent         unknown  neither  moved    moved    moved     moved     moved        moved    switch      switch   moved     switch
off            unknown  off      off      moved    moved     moved     moved        moved    switch      switch   moved     switch
crashed        not      not      not      switch   leftover  leftover  leftover     switch   switch      switch   switch    switch
running        not      not      not      switch   both      both      both         switch   switch      switch   switch    switch
resumed        unknown  not      not      switch   both      both      both         switch   switch      switch   switch    switch
running+out    copying  copying  copying  copying  copying   copying   copying      copying  copying     copying  copying   copying
paused         not      not      not      switch   leftover  leftover  leftover     switch   switch      switch   switch    switch
paused+out     copying  copying  copying  copying  copying   copying   copying      copying  copying     copying  copying   copying
stopped        switch   switch   switch   switch   leftover  leftover  leftover     switch   switch      switch   switch    switch
postcopy       switch   switch   switch   switch   leftover  leftover  leftover     switch   switch      switch   switch    switch
incoming       switch   switch   switch   switch   leftover  leftover  leftover     switch   switch      switch   switch    switch
`

// short are the table's words for the situations.
var short = map[Situation]string{
	NotMoved: "not", Copying: "copying", Switching: "switch", Moved: "moved", MovedLeftover: "leftover",
	Both: "both", Off: "off", Neither: "neither", Unknown: "unknown",
}

func TestClassify(t *testing.T) {
	t.Parallel()
	lines := strings.Split(strings.TrimSpace(situations), "\n")
	columns := strings.Fields(lines[0])[3:]
	if len(lines)-1 != len(views) || len(columns) != len(views) {
		t.Fatalf("the table has %d lines and %d columns, there are %d views", len(lines)-1, len(columns), len(views))
	}
	var got strings.Builder
	fmt.Fprintln(&got, lines[0])
	for i, line := range lines[1:] {
		cells := strings.Fields(line)
		if cells[0] != views[i].name || columns[i] != views[i].name {
			t.Fatalf("the table's line and column %d are %s and %s, want %s", i, cells[0], columns[i], views[i].name)
		}
		fmt.Fprintf(&got, "%-15s", cells[0])
		for j := range views {
			is := short[Classify(views[i].view, views[j].view)]
			if want := cells[j+1]; is != want {
				t.Errorf("source %s, destination %s: %q, want %q", views[i].name, views[j].name, is, want)
			}
			fmt.Fprintf(&got, "%-*s", max(9, len(columns[j])+2), is)
		}
		fmt.Fprintln(&got)
	}
	if t.Failed() {
		t.Logf("the whole table now:\n%s", &got)
	}
}

// TestClassifyKeepsPromises is about any pair of views, also of those that no
// host should ever show.
func TestClassifyKeepsPromises(t *testing.T) {
	t.Parallel()
	states := []maint.GuestState{"", maint.GuestRunning, maint.GuestPaused, maint.GuestShutdown, maint.GuestShutoff,
		maint.GuestCrashed, maint.GuestSuspended, maint.GuestBlocked, maint.GuestNoState}
	view := rapid.Custom(func(t *rapid.T) *maint.View {
		switch rapid.IntRange(0, 5).Draw(t, "view") {
		case 0:
			return nil
		case 1:
			return &maint.View{}
		}
		return seen(rapid.SampledFrom(states).Draw(t, "state"),
			rapid.SampledFrom([]string{"", "booted", "user", "migrating", "post-copy", "migrated", reasonResumed}).Draw(t, "reason"),
			rapid.SampledFrom([]string{"", jobOut, "migration in", "save", "snapshot"}).Draw(t, "job"))
	})
	active := func(v *maint.View) bool { return v != nil && v.Guest != nil && v.Guest.State.Active() }
	running := func(v *maint.View) bool { return v != nil && v.Running() }
	rapid.Check(t, func(t *rapid.T) {
		src, dst := view.Draw(t, "source"), view.Draw(t, "destination")
		s := Classify(src, dst)
		never := func(broken bool, promise string) {
			if broken {
				t.Fatalf("%q: %s", s, promise)
			}
		}
		never(short[s] == "", "is no situation")
		never(s == Moved && active(src), "moved while the source has a process")
		never(s == NotMoved && running(dst), "not moved while the destination runs it")
		never(s == NotMoved && dst == nil && src.Guest.Reason == reasonResumed, "not moved after a switch-over, without the destination's word")
		never(s == Unknown && src != nil && dst != nil, "unknown although both hosts were asked")
		never(src == nil && s != Unknown, "concluded without the source's word")
		never(s == Moved && dst == nil, "moved without the destination's word")
		never(s == MovedLeftover && !running(dst), "moved, and the destination does not run it")
		never(s == MovedLeftover && running(src), "a leftover that runs")
		never(s == Both && !(running(src) && running(dst)), "both, and one of them does not run it")
		never(s == Neither && (src == nil || src.Guest != nil || dst == nil || dst.Guest != nil), "neither, and one host has it")
		never(s == Off && (active(src) || active(dst)), "off while a process exists")
		// What runs on both hosts is told, unless the source is still at it.
		both := running(src) && running(dst) && src.Guest.Job != jobOut
		never(both != (s == Both), "both hosts run it, and that is not said")
	})
}
