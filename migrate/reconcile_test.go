package migrate

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"belay/agent/maint"
)

// verdictsPaused is what differs for a guest that was paused before.
const verdictsPaused = `
copy
source    unknown   absent    off       running   resumed   sending   arriving  stopped   paused    postcopy  broken
stopped   unknown   not       doubtful  leftover  leftover  leftover  switch    switch    leftover  switch    switch
paused    unknown   not       doubtful  leftover  leftover  leftover  switch    switch    leftover  switch    switch

moved
stopped   unknown   leftover  leftover  leftover  leftover  leftover  switch    switch    leftover  switch    switch
paused    unknown   leftover  leftover  leftover  leftover  leftover  switch    switch    leftover  switch    switch
`

// A guest that was paused is started nowhere, and arrives paused.
func TestReconcilePaused(t *testing.T) {
	t.Parallel()
	for _, text := range strings.Split(strings.TrimSpace(verdictsPaused), "\n\n") {
		lines := strings.Split(text, "\n")
		differs := make(map[sight][]string)
		for _, line := range lines[1:] {
			cells := strings.Fields(line)
			differs[sight(cells[0])] = cells[1:]
		}
		for _, s := range sights {
			for i, d := range sights {
				story := Story{Begun: Begun(lines[0]), Persistent: true, Watched: true}
				want := short[Reconcile(shown[s], shown[d], story)]
				if cells, there := differs[s]; there {
					want = cells[i]
				}
				story.Paused = true
				got := Reconcile(shown[s], shown[d], story)
				if short[got] != want {
					t.Errorf("%s begun, source %s, destination %s: %+v, want %s", story.Begun, s, d, got, want)
				}
				if story.Persistent = false; Reconcile(shown[s], shown[d], story).Action == ResumeSource || got.Action == ResumeSource {
					t.Errorf("%s begun, source %s, destination %s: it is to be started", story.Begun, s, d)
				}
			}
		}
	}
}

// sights are all, in the order of the tables.
var sights = []sight{unknown, absent, off, running, resumed, sending, arriving, stopped, paused, postcopy, broken}

func seen(s maint.GuestState, reason, job string) *maint.View {
	return &maint.View{Guest: &maint.Guest{State: s, Reason: reason, Job: job}}
}

// shown is a view of each sight.
var shown = map[sight]*maint.View{
	unknown:  nil,
	absent:   {},
	off:      seen(maint.GuestShutoff, "shutdown", ""),
	running:  seen(maint.GuestRunning, "booted", ""),
	resumed:  seen(maint.GuestRunning, reasonResumed, ""),
	sending:  seen(maint.GuestPaused, reasonMigrating, jobOut),
	arriving: seen(maint.GuestPaused, reasonMigrating, jobIn),
	stopped:  seen(maint.GuestPaused, reasonMigrating, ""),
	paused:   seen(maint.GuestPaused, "user", ""),
	postcopy: seen(maint.GuestPaused, reasonPostCopy, ""),
	broken:   seen(maint.GuestPaused, reasonPostCopyFailed, ""),
}

// short are the tables' words for verdicts.
var short = map[Verdict]string{
	{NotMoved, Begin}: "not", {Copying, Watch}: "copying", {ForeignCopy, Leave}: "foreign", {Switching, Wait}: "switch",
	{Moved, Finish}: "moved", {MovedDefined, RemoveDefinition}: "defined", {MovedLeftover, Finish}: "leftover",
	{Stranded, ResumeSource}: "stranded", {Doubtful, Alarm}: "doubtful", {PausedTwice, Alarm}: "twice",
	{PostCopyRunning, Watch}: "post", {PostCopyRunning, Wait}: "post,wait",
	{PostCopyBroken, ResumePostCopy}: "broken", {PostCopyBroken, Watch}: "brk,watch", {PostCopyBroken, Wait}: "brk,wait",
	{PostCopyLostThere, Alarm}: "lostthere", {PostCopyLostHere, Alarm}: "losthere",
	{Both, Alarm}: "both", {SecondCopy, Alarm}: "second", {Elsewhere, Leave}: "elsewhere",
	{Unstarted, StartSource}: "unstarted", {Gone, Alarm}: "vanished", {OldCopy, Alarm}: "oldcopy",
	{Off, End}: "off", {Neither, Alarm}: "neither", {Neither, End}: "gone", {Unknown, Wait}: "unknown",
}

// verdicts is Reconcile in full, of a guest with a definition: a table for each thing
// that may have been begun, a line for each way the source has the guest, and a column
// for each way the destination has it.
const verdicts = `
nothing
source    unknown   absent    off       running   resumed   sending   arriving  stopped   paused    postcopy  broken
unknown   unknown   unknown   unknown   unknown   unknown   unknown   unknown   unknown   unknown   unknown   unknown
absent    gone      gone      elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere
off       off       off       off       elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere
running   not       not       not       both      both      both      not       not       not       both      both
resumed   not       not       not       both      both      both      not       not       not       both      both
sending   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign
arriving  foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign
stopped   not       not       not       elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere
paused    not       not       not       elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere elsewhere
postcopy  foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign
broken    foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign

copy
source    unknown   absent    off       running   resumed   sending   arriving  stopped   paused    postcopy  broken
unknown   unknown   unknown   unknown   unknown   unknown   unknown   unknown   unknown   unknown   post,wait brk,wait
absent    unknown   neither   moved     moved     moved     moved     switch    switch    moved     losthere  losthere
off       unknown   off       off       defined   defined   defined   switch    switch    defined   losthere  losthere
running   not       not       not       both      both      both      switch    switch    second    both      both
resumed   unknown   not       not       both      both      both      switch    switch    second    both      both
sending   copying   copying   copying   copying   copying   copying   copying   copying   copying   copying   copying
arriving  foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign
stopped   unknown   stranded  doubtful  leftover  leftover  leftover  switch    switch    twice     switch    switch
paused    not       not       not       leftover  leftover  leftover  switch    switch    twice     switch    switch
postcopy  post      lostthere lostthere switch    switch    switch    post      post      switch    post      brk,watch
broken    broken    lostthere lostthere leftover  leftover  leftover  broken    broken    leftover  broken    broken

over: as copy, but
sending   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign   foreign

post-copy: as copy, but
stopped   unknown   doubtful  doubtful  leftover  leftover  leftover  switch    switch    twice     switch    switch

moved: as over, but
off       unknown   off       defined   defined   defined   defined   switch    switch    defined   losthere  losthere
stopped   unknown   leftover  leftover  leftover  leftover  leftover  switch    switch    twice     switch    switch
paused    not       leftover  leftover  leftover  leftover  leftover  switch    switch    twice     switch    switch
`

// wanted reads the tables: by what was begun, then the source's line.
func wanted(t *testing.T) map[Begun]map[sight][]string {
	t.Helper()
	all := make(map[Begun]map[sight][]string)
	for _, text := range strings.Split(strings.TrimSpace(verdicts), "\n\n") {
		lines := strings.Split(text, "\n")
		head, as, another := strings.Cut(lines[0], ": as ")
		table := make(map[sight][]string)
		if another {
			for s, cells := range all[Begun(strings.TrimSuffix(as, ", but"))] {
				table[s] = cells
			}
		}
		for _, line := range lines[1:] {
			cells := strings.Fields(line)
			if cells[0] == "source" {
				for i, s := range sights {
					if cells[i+1] != string(s) {
						t.Fatalf("table %s: column %d is %s, want %s", head, i, cells[i+1], s)
					}
				}
				continue
			}
			table[sight(cells[0])] = cells[1:]
		}
		if len(table) != len(sights) {
			t.Fatalf("table %s has %d lines, there are %d sights", head, len(table), len(sights))
		}
		all[Begun(head)] = table
	}
	return all
}

func TestReconcile(t *testing.T) {
	t.Parallel()
	tables := wanted(t)
	for _, begun := range []Begun{NothingBegun, CopyBegun, CopyOver, PostCopyBegun, MoveSeen} {
		for _, s := range sights {
			var got []string
			for i, d := range sights {
				v := Reconcile(shown[s], shown[d], Story{Begun: begun, Persistent: true, Watched: true})
				word := short[v]
				got = append(got, fmt.Sprintf("%-9s", word))
				if want := tables[begun][s]; len(want) != len(sights) || want[i] != word {
					t.Errorf("%s begun, source %s, destination %s: %+v", begun, s, d, v)
				}
				// A transient guest leaves nothing on the destination that proves anything.
				transient := Reconcile(shown[s], shown[d], Story{Begun: begun, Watched: true})
				if v.State == Stranded {
					v = Verdict{Doubtful, Alarm}
				}
				if transient != v {
					t.Errorf("%s begun, transient, source %s, destination %s: %+v, want %+v", begun, s, d, transient, v)
				}
			}
			if t.Failed() {
				t.Logf("%s: %-9s %s", begun, s, strings.Join(got, " "))
			}
		}
	}
}

// otherwise checks what differs of the verdicts where the destination's word is another.
func otherwise(t *testing.T, word func(*Story), differs func(s, d sight, story Story) (Verdict, bool)) {
	t.Helper()
	for _, begun := range []Begun{NothingBegun, CopyBegun, CopyOver, PostCopyBegun, MoveSeen} {
		for _, s := range sights {
			for _, d := range sights {
				for _, wasPaused := range []bool{false, true} {
					story := Story{Begun: begun, Persistent: true, Paused: wasPaused, Watched: true}
					want := Reconcile(shown[s], shown[d], story)
					if v, other := differs(s, d, story); other && (begun == CopyBegun || begun == CopyOver || begun == PostCopyBegun) {
						want = v
					}
					word(&story)
					if got := Reconcile(shown[s], shown[d], story); got != want && !(begun == MoveSeen && got.State == OldCopy) {
						t.Errorf("%s begun, source %s, destination %s, paused %t: %+v, want %+v", begun, s, d, wasPaused, got, want)
					}
				}
			}
		}
	}
}

// A guest that has come is not proven to have stayed away from the destination by its not
// being there any more.
func TestReconcileCame(t *testing.T) {
	t.Parallel()
	otherwise(t, func(s *Story) { s.Watched, s.Came = false, true }, func(s, d sight, _ Story) (Verdict, bool) {
		gone := d == absent || d == off
		switch {
		case (s == stopped || s == paused) && gone:
			return Verdict{Doubtful, Alarm}, true
		case s == resumed && gone:
			return Verdict{OldCopy, Alarm}, true
		case s == off && d == off:
			return Verdict{MovedDefined, RemoveDefinition}, true
		case s == off && d == absent:
			return Verdict{Gone, Alarm}, true
		}
		return Verdict{}, false
	})
}

// Nor where the destination has not watched all the while.
func TestReconcileUnwatched(t *testing.T) {
	t.Parallel()
	otherwise(t, func(s *Story) { s.Watched = false }, func(s, d sight, story Story) (Verdict, bool) {
		switch {
		case d == absent && (s == stopped || s == paused && story.Paused):
			return Verdict{Doubtful, Alarm}, true
		case s == off && (d == absent || d == off):
			return Verdict{Gone, Alarm}, true
		}
		return Verdict{}, false
	})
}

// A guest that was kept from starting with its host is started where it is proven that it
// has not left, and nowhere else.
func TestReconcileRebooted(t *testing.T) {
	t.Parallel()
	for _, begun := range []Begun{NothingBegun, CopyBegun, CopyOver, PostCopyBegun, MoveSeen} {
		for _, s := range sights {
			for _, d := range sights {
				for _, story := range []Story{{Watched: true}, {}, {Came: true}} {
					story.Begun, story.Persistent = begun, true
					want := Reconcile(shown[s], shown[d], story)
					if s == off && d == absent && story.Watched && begun != NothingBegun && begun != MoveSeen {
						want = Verdict{Unstarted, StartSource}
					}
					story.Rebooted = true
					if got := Reconcile(shown[s], shown[d], story); got != want {
						t.Errorf("%+v, source %s, destination %s: %+v, want %+v", story, s, d, got, want)
					}
				}
			}
		}
	}
}

// TestReconcileKeepsPromises is about every pair of views, also of those that no host
// should ever show: all states with all reasons and jobs that matter, and some that do
// not.
func TestReconcileKeepsPromises(t *testing.T) {
	t.Parallel()
	views := []*maint.View{nil, {}}
	for _, s := range []maint.GuestState{"", maint.GuestRunning, maint.GuestPaused, maint.GuestShutdown, maint.GuestShutoff,
		maint.GuestCrashed, maint.GuestSuspended, maint.GuestBlocked, maint.GuestNoState} {
		for _, reason := range []string{"", "booted", "user", reasonMigrating, reasonPostCopy, reasonPostCopyFailed, "migrated", reasonResumed} {
			for _, job := range []string{"", jobOut, jobIn, "save", jobUnsettled} {
				views = append(views, seen(s, reason, job))
			}
		}
	}
	known := func(v *maint.View) bool {
		return v != nil && (v.Guest == nil || v.Guest.Job != jobUnsettled || !v.Guest.State.Active())
	}
	active := func(v *maint.View) bool { return v != nil && v.Guest != nil && v.Guest.State.Active() }
	runs := func(v *maint.View) bool { return v != nil && v.Running() }
	is := func(v *maint.View, reasons ...string) bool {
		return active(v) && slices.Contains(reasons, v.Guest.Reason)
	}
	met := make(map[State]bool)
	for _, begun := range []Begun{NothingBegun, CopyBegun, CopyOver, PostCopyBegun, MoveSeen} {
		for _, src := range views {
			for _, dst := range views {
				for i := range 4 {
					v := Reconcile(src, dst, Story{Begun: begun, Persistent: true, Watched: i < 2, Came: i == 3, Rebooted: i == 1})
					met[v.State] = true
				}
				v := Reconcile(src, dst, Story{Begun: begun, Persistent: true, Watched: true})
				never := func(broken bool, promise string) {
					if broken {
						t.Fatalf("%s begun, source %s, destination %s: %+v: %s", begun, see(src), see(dst), v, promise)
					}
				}
				never(short[v] == "", "is no verdict")
				starts := v.Action == Begin || v.Action == ResumeSource
				never(starts && known(dst) && runs(dst), "something is begun while the destination runs it")
				never(v.Action == ResumeSource && (!known(dst) || dst.Guest != nil), "resumed without proof that the destination has nothing")
				never(v.Action == ResumeSource && !is(src, reasonMigrating), "resumed although no migration has paused it")
				never(v.Action == ResumeSource && begun != CopyBegun && begun != CopyOver, "resumed without having been stopped by this operation")
				never(v.Action == RemoveDefinition && active(src), "the definition of an active guest is to be removed")
				never(v.Action == RemoveDefinition && (!known(dst) || dst.Guest == nil), "the last definition is to be removed")
				never(v.Action == Finish && !known(dst), "finished without the destination's word")
				never(v.Action == Finish && runs(src), "finished while the source runs it")
				never(v.Action == Finish && is(dst, reasonPostCopy, reasonPostCopyFailed) && dst.Guest.Job != jobOut, "finished in post-copy")
				never(v.Action == ResumePostCopy && !is(src, reasonPostCopyFailed), "post-copy resumed that has not failed")
				never(v.Action == ResumePostCopy && begun == NothingBegun, "somebody else's post-copy resumed")
				never(starts && is(src, reasonPostCopy, reasonPostCopyFailed) && known(src), "half a guest is begun with")
				never(!known(src) && v.Action != Wait, "acted on without the source's word")
				never(known(src) && known(dst) && v.State == Unknown, "unknown although both hosts were asked")
				both := known(src) && known(dst) && runs(src) && runs(dst) && src.Guest.Job != jobOut && src.Guest.Job != jobIn &&
					!is(src, reasonPostCopy, reasonPostCopyFailed) && dst.Guest.Job != jobIn
				never(both && v.State != Both, "both hosts run it, and that is not said")
			}
		}
	}
	for v := range short {
		if !met[v.State] {
			t.Errorf("%s is never met", v.State)
		}
	}
}
