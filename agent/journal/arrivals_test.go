package journal

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
)

// What was made for disks is remembered until it is settled, through restarts and
// pruning.
func TestDisks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	say := func(op maint.OpID, state maint.DisksState) maint.MadeDisks {
		t.Helper()
		m := maint.MadeDisks{Op: op, From: "a", Guest: "web-1", State: state, Files: []maint.MadeFile{{Temp: "/d/.t", Inode: 7}}}
		data, err := json.Marshal(m)
		if err == nil {
			err = j.Append(maint.Record{Op: op, Kind: maint.RecDisks, Data: data})
		}
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	say("mig-1", maint.DisksMaking)
	open := say("mig-1", maint.DisksMade)
	say("mig-2", maint.DisksMade)
	say("mig-2", maint.DisksKept)
	say("mig-3", maint.DisksMaking)
	say("mig-3", maint.DisksGone)
	if err := j.Append(maint.Record{Op: "mig-4", Kind: maint.RecDisks, Data: []byte(`"x"`)}); err == nil {
		t.Error("took what are no disks")
	}
	if err := j.Append(maint.Record{Op: "mig-4", Kind: maint.RecDisks, Data: []byte(`{"op":"mig-4","state":"frozen"}`)}); err == nil {
		t.Error("took a state that it does not know, and forgets its files")
	}
	for _, when := range []string{"written", "pruned", "reopened"} {
		switch when {
		case "pruned":
			if n, err := j.Prune(time.Now().Add(time.Hour)); err != nil || n != 4 {
				t.Errorf("pruned %d, %v", n, err)
			}
		case "reopened":
			if err := j.Close(); err != nil {
				t.Fatal(err)
			}
			if j, err = Open(dir); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { j.Close() })
		}
		if d := cmp.Diff([]maint.MadeDisks{open}, j.Disks()); d != "" {
			t.Errorf("%s: %s", when, d)
		}
	}
}
