package journal

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"belay/agent/maint"
)

func data(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

func accepted(id maint.OpID) maint.Record {
	return maint.Record{Op: id, Kind: maint.RecAccepted, Data: data(maint.Op{Guest: "web-1", Kind: maint.OpMigrate})}
}

func open(t *testing.T, dir string) *Journal {
	t.Helper()
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

var kinds = []maint.RecordKind{maint.RecAccepted, maint.RecResumed, maint.RecStepStart, maint.RecStepNote, maint.RecStepDone,
	maint.RecStepFailed, maint.RecUndoStart, maint.RecUndoDone, maint.RecUndoFailed, maint.RecAbort, maint.RecMove, maint.RecMoved, maint.RecHealth, maint.RecEnded,
	maint.RecReserved, maint.RecReleased}

// Whatever is appended, and whatever of it is refused: what a reopened journal
// folds is what the live one had.
func TestReopenedJournalHasTheSameState(t *testing.T) {
	base := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(base, "j")
		if err != nil {
			rt.Fatal(err)
		}
		j, err := Open(dir)
		if err != nil {
			rt.Fatal(err)
		}
		n := rapid.IntRange(1, 40).Draw(rt, "n")
		refused := 0
		for range n {
			r := maint.Record{Op: maint.OpID(rapid.SampledFrom([]string{"a", "b"}).Draw(rt, "op")),
				Kind: rapid.SampledFrom(kinds).Draw(rt, "kind"), Step: rapid.SampledFrom([]string{"one", "two"}).Draw(rt, "step"), Text: "x"}
			switch r.Kind {
			case maint.RecAccepted:
				r = accepted(r.Op)
			case maint.RecEnded, maint.RecStepFailed:
				r.Data = data(maint.Ending{Outcome: maint.OutcomeFailed, Problems: []maint.Problem{{Code: maint.CodeFailed}}})
			case maint.RecMoved:
				r.Data = data(maint.MoveResult{From: "a", To: "b"})
			case maint.RecHealth:
				r.Data = data(maint.HealthReport{Check: "tcp web:80"})
			case maint.RecMove:
				r.Data = data(maint.GuestMove{GuestUUID: rapid.SampledFrom([]string{"u1", "u2"}).Draw(rt, "guest"), State: maint.MoveMoving})
			case maint.RecReserved:
				r.Data = data(maint.Reservation{Op: r.Op, Guest: "g", Expires: time.Now().Add(time.Hour).Round(0)})
			}
			if j.Append(r) != nil {
				refused++
			}
		}
		ops, res := j.Ops(), j.Reservations(time.Now())
		j.Close()
		j, err = Open(dir)
		if err != nil {
			rt.Fatalf("cannot reopen after %d records, %d refused: %v", n, refused, err)
		}
		defer j.Close()
		if d := cmp.Diff(ops, j.Ops()); d != "" {
			rt.Fatalf("operations differ (-live +reopened):\n%s", d)
		}
		if d := cmp.Diff(res, j.Reservations(time.Now())); d != "" {
			rt.Fatalf("reservations differ:\n%s", d)
		}
	})
}

func TestAppendIsAllOrNone(t *testing.T) {
	j := open(t, t.TempDir())
	err := j.Append(accepted("a"), maint.Record{Op: "a", Kind: maint.RecStepDone, Step: "never started"})
	if err == nil {
		t.Fatal("a step that was never started was accepted as done")
	}
	if ops := j.Ops(); len(ops) != 0 {
		t.Fatalf("a refused append left %v", ops)
	}
	if err := j.Append(accepted("a"), maint.Record{Op: "a", Kind: maint.RecStepStart, Step: "one"}); err != nil {
		t.Fatal(err)
	}
}

func TestNothingFollowsAnEnd(t *testing.T) {
	j := open(t, t.TempDir())
	end := maint.Record{Op: "a", Kind: maint.RecEnded, Data: data(maint.Ending{Outcome: maint.OutcomeDone})}
	if err := j.Append(accepted("a"), end); err != nil {
		t.Fatal(err)
	}
	for _, k := range kinds[:13] {
		if err := j.Append(maint.Record{Op: "a", Kind: k, Step: "one", Data: data(maint.Ending{})}); err == nil {
			t.Errorf("%q was accepted after the end", k)
		}
	}
}

func TestChangedIsClosedByAppend(t *testing.T) {
	j := open(t, t.TempDir())
	c := j.Changed()
	select {
	case <-c:
		t.Fatal("changed before anything was appended")
	default:
	}
	if err := j.Append(accepted("a")); err != nil {
		t.Fatal(err)
	}
	<-c
}

func TestPruneTakesOnlyWhatHasEnded(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir)
	end := data(maint.Ending{Outcome: maint.OutcomeDone})
	held := maint.Reservation{Op: "r", Expires: time.Now().Add(time.Hour)}
	lapsed := maint.Reservation{Op: "s", Expires: time.Now().Add(-time.Hour)}
	for _, recs := range [][]maint.Record{
		{accepted("old"), {Op: "old", Kind: maint.RecEnded, Data: end}},
		{accepted("open"), {Op: "open", Kind: maint.RecStepStart, Step: "one"}},
		{{Op: "part", Kind: maint.RecAccepted, Data: data(maint.Op{ID: "part", Kind: maint.OpHold, Part: "open"})}, {Op: "part", Kind: maint.RecEnded, Data: end}},
		{{Op: "r", Kind: maint.RecReserved, Data: data(held)}},
		{{Op: "s", Kind: maint.RecReserved, Data: data(lapsed)}},
	} {
		if err := j.Append(recs...); err != nil {
			t.Fatal(err)
		}
	}
	n, err := j.Prune(time.Now().Add(time.Minute))
	if err != nil || n != 3 {
		t.Fatalf("pruned %d records, %v; want 3 (two of the ended operation, one lapsed reservation)", n, err)
	}
	j.Close()
	j = open(t, dir)
	if ops := j.Ops(); len(ops) != 2 || ops[0].ID != "open" || ops[1].ID != "part" {
		t.Fatalf("left, and it is not the open operation with its part: %v", ops)
	}
	if _, ok := j.Reservation("r"); !ok {
		t.Fatal("a live reservation was pruned")
	}
}

func TestOpenRefusals(t *testing.T) {
	says := func(t *testing.T, err error, words ...string) {
		t.Helper()
		if err == nil {
			t.Fatal("opened")
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q does not say %q", err, w)
			}
		}
	}
	t.Run("in use", func(t *testing.T) {
		dir := t.TempDir()
		open(t, dir)
		_, err := Open(dir)
		says(t, err, dir, "another belayd")
	})
	t.Run("damaged", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, fileName), []byte(strings.Repeat("junk", 4096)), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(dir)
		says(t, err, dir, "damaged")
	})
	t.Run("not a folder", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(filepath.Join(file, "state"))
		says(t, err, file, "state_dir")
	})
}

// A full disk refuses the record and nothing else: what was there stays, and
// when there is room again the journal goes on.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=256k", "belay-test", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	j := open(t, dir)
	if err := j.Append(accepted("a"), maint.Record{Op: "a", Kind: maint.RecStepStart, Step: "one"}); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(dir, "filler")
	full := false
	for range 200 {
		_ = os.WriteFile(filler, make([]byte, 1<<20), 0o600) // fills what is left, then fails
		if err := j.Append(maint.Record{Op: "a", Kind: maint.RecStepNote, Step: "one", Text: strings.Repeat("x", 4000)}); err != nil {
			full = true
			break
		}
	}
	if !full || j.Health() == nil {
		t.Fatal("the full disk was not noticed")
	}
	before := j.Ops()
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-o", "remount,size=4m", dir).CombinedOutput(); err != nil {
		t.Fatalf("remount: %v: %s", err, out)
	}
	if d := cmp.Diff(before, j.Ops()); d != "" {
		t.Fatalf("the failed append changed the state:\n%s", d)
	}
	if err := j.Append(maint.Record{Op: "a", Kind: maint.RecStepDone, Step: "one"}); err != nil {
		t.Fatalf("there is room again, but: %v", err)
	}
	if j.Health() != nil {
		t.Fatal(j.Health())
	}
	j.Close()
	j = open(t, dir)
	if op, _ := j.Op("a"); len(op.Steps) != 1 || op.Steps[0].Status != "done" {
		t.Fatalf("after reopening: %+v", op)
	}
	j.Close()
}

// Whether the host takes guests in outlives restarts, and what is pruned.
func TestCordon(t *testing.T) {
	dir := t.TempDir()
	reopen := func(j *Journal) *Journal {
		t.Helper()
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		j, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if c := j.Cordon(); c != nil {
		t.Fatalf("a new journal has %+v", c)
	}
	for i, reason := range []string{"disks", "fans", "", "cables"} {
		r := maint.Record{Kind: maint.RecUncordoned}
		if reason != "" {
			r = maint.Record{Kind: maint.RecCordoned, Data: data(maint.Cordon{By: "root", Reason: reason})}
		}
		if err := j.Append(r); err != nil {
			t.Fatal(err)
		}
		for _, prune := range []bool{false, true} {
			if prune {
				if _, err := j.Prune(time.Now().Add(time.Hour)); err != nil {
					t.Fatal(err)
				}
				if all, err := j.Records(""); err != nil || len(all) != 1 {
					t.Errorf("%d: %d records are left, %v", i, len(all), err)
				}
			}
			j = reopen(j)
			if c := j.Cordon(); (c == nil) != (reason == "") || c != nil && c.Reason != reason {
				t.Errorf("%d, pruned %t: %+v, want %q", i, prune, c, reason)
			}
		}
	}
	if err := j.Append(maint.Record{Kind: maint.RecCordoned, Data: []byte("[]")}); err == nil {
		t.Error("what cannot be read is written down")
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
}

// What is kept of livepatches outlives restarts, and the operation that it is of.
func TestPatches(t *testing.T) {
	dir := t.TempDir()
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	add := func(recs ...maint.Record) {
		t.Helper()
		for i := range recs {
			recs[i].Op = "patch-1"
		}
		if err := j.Append(recs...); err != nil {
			t.Fatal(err)
		}
	}
	add(maint.Record{Kind: maint.RecAccepted, Data: data(maint.Op{ID: "patch-1", Kind: maint.OpPatch})})
	for _, name := range []string{"fix_1", "fix_2"} {
		add(maint.Record{Kind: maint.RecPatches, Data: data(maint.Patches{Active: &maint.KeptPatch{Name: name}, NoReload: "no"})},
			maint.Record{Kind: maint.RecPatched, Data: data(maint.PatchResult{Name: name})})
	}
	if op, _ := j.Op("patch-1"); op.Patched == nil || op.Patched.Name != "fix_2" {
		t.Errorf("%+v", op.Patched)
	}
	add(maint.Record{Kind: maint.RecEnded, Data: data(maint.Ending{Outcome: maint.OutcomeDone})})
	if _, err := j.Prune(time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if all, err := j.Records(""); err != nil || len(all) != 1 {
		t.Errorf("%d records are left, %v", len(all), err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if j, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	if p := j.Patches(); p.Active == nil || p.Active.Name != "fix_2" || p.NoReload != "no" {
		t.Errorf("%+v", p)
	}
	if err := j.Append(maint.Record{Kind: maint.RecPatches, Data: []byte("[]")}); err == nil {
		t.Error("what cannot be read is written down")
	}
}

// Guests that have come are known, as they were last written down, until they are pruned.
func TestArrivals(t *testing.T) {
	dir := t.TempDir()
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Round(0)
	old := maint.Arrived{Op: "mig-1", From: "a", Guest: "web-1", At: now.Add(-2 * time.Hour)}
	seen := maint.Arrived{Op: "mig-2", From: "a", Guest: "web-2", At: now.Add(-time.Minute)}
	report := maint.ArrivalReport{Clock: maint.ClockReport{State: maint.ClockSynchronised}}
	for _, a := range []maint.Arrived{seen, old} {
		if err := j.Append(maint.Record{Op: a.Op, Kind: maint.RecArrived, Data: data(a)}); err != nil {
			t.Fatal(err)
		}
	}
	seen.Report = &report
	if err := j.Append(maint.Record{Op: seen.Op, Kind: maint.RecArrived, Data: data(seen)}); err != nil {
		t.Fatal(err)
	}
	if err := j.Append(maint.Record{Op: "mig-3", Kind: maint.RecArrived, Data: []byte("[]")}); err == nil {
		t.Error("an arrival that cannot be read was taken")
	}
	if d := cmp.Diff([]maint.Arrived{old, seen}, j.Arrivals()); d != "" {
		t.Error(d)
	}
	if _, err := j.Prune(now.Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if d := cmp.Diff([]maint.Arrived{seen}, j.Arrivals()); d != "" {
			t.Error(d)
		}
		if _, known := j.Arrival("mig-1"); known {
			t.Error("what was pruned is still known")
		}
		if all, err := j.Records(""); err != nil || len(all) != 2 {
			t.Errorf("%d records are left, %v", len(all), err)
		}
		j.Close()
		if j, err = Open(dir); err != nil {
			t.Fatal(err)
		}
	}
	j.Close()
}

// What a guest's new host did for it follows the end of the operation, and nothing else.
func TestSeenToFollowsTheEnd(t *testing.T) {
	j := open(t, t.TempDir())
	defer j.Close()
	seen := maint.Record{Op: "a", Kind: maint.RecSeenTo, Data: data(maint.ArrivalReport{Clock: maint.ClockReport{Shots: 1}})}
	if err := j.Append(accepted("a")); err != nil {
		t.Fatal(err)
	}
	if err := j.Append(seen); err == nil {
		t.Error("it was taken before the end")
	}
	if err := j.Append(maint.Record{Op: "a", Kind: maint.RecEnded, Data: data(maint.Ending{Outcome: maint.OutcomeDone})}, seen); err != nil {
		t.Fatal(err)
	}
	if op, _ := j.Op("a"); op.Arrival == nil || op.Arrival.Clock.Shots != 1 {
		t.Errorf("the operation has %+v", op.Arrival)
	}
	seen.Data = []byte("[]")
	if err := j.Append(seen); err == nil {
		t.Error("a report that cannot be read was taken")
	}
}

// A journal of an earlier belayd, which put a moved guest's clock right before the end, is
// read.
func TestEarlierClock(t *testing.T) {
	j := open(t, t.TempDir())
	defer j.Close()
	if err := j.Append(accepted("a"), maint.Record{Op: "a", Kind: maint.RecClock, Data: data(maint.ClockReport{Shots: 2})}); err != nil {
		t.Fatal(err)
	}
	if op, _ := j.Op("a"); op.Arrival == nil || op.Arrival.Clock.Shots != 2 {
		t.Errorf("the operation has %+v", op.Arrival)
	}
}
