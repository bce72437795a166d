package agent

import (
	"encoding/json"
	"testing"
	"time"

	"belay/agent/journal"
	"belay/agent/maint"
	"belay/patch/leash"
	"belay/patch/preserve"
)

// TestPausedByUser: a guest stands still by its owner's call only if nothing says that it could
// be by Belay's.
func TestPausedByUser(t *testing.T) {
	t.Parallel()
	still := maint.Problemf(maint.CodePaused, "guest web-1", "virsh resume web-1", "is still paused")
	clock := maint.Problemf(maint.CodeClock, "guest web-1", "", "its clock may be behind")
	held := func(p *maint.Problem) *maint.HoldResult {
		return &maint.HoldResult{Guests: []maint.HeldGuest{{Guest: "web-1", UUID: "u1", Problem: p}}}
	}
	hold := maint.Op{ID: "op", Kind: maint.OpHold, Guests: []string{"u1"}}
	replace := maint.Op{ID: "op", Kind: maint.OpReplace, Guest: "web-1", GuestUUID: "u1"}
	apply := maint.Op{ID: "op", Kind: maint.OpApply, Guests: []string{"u1"}}
	order, err := json.Marshal(preserve.Order{Guests: []preserve.Member{{Guest: "web-1", UUID: "u1"}}})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for name, c := range map[string]struct {
		reason string
		op     maint.Op
		fit    bool // a hold has found it fit to be paused
		held   *maint.HoldResult
		end    *maint.Ending
		before bool // it ended before what is asked of began
		leash  leash.Fate
		want   bool
	}{
		"by a call":                       {want: true},
		"by QEMU":                         {reason: "I/O error"},
		"by libvirt, which knows no more": {reason: "unknown"},
		"a leash has it":                  {leash: leash.Paused},
		"a leash was to have it":          {leash: leash.Armed},
		"a leash has released it":         {leash: leash.Released, want: true},
		"an update goes on":               {op: apply, want: true},
		"a hold goes on":                  {op: hold},
		"a hold has released it":          {op: hold, fit: true, held: held(nil), end: &maint.Ending{Outcome: maint.OutcomeDone}, want: true},
		"a hold has left its clock":       {op: hold, fit: true, held: held(clock), end: &maint.Ending{Outcome: maint.OutcomePartly, Problems: []maint.Problem{*clock}}, want: true},
		"a hold has left it paused":       {op: hold, fit: true, held: held(still), end: &maint.Ending{Outcome: maint.OutcomePartly}},
		"a hold says so":                  {op: hold, end: &maint.Ending{Outcome: maint.OutcomeStuck, Problems: []maint.Problem{*still}}},
		"a hold before has":               {op: hold, fit: true, held: held(still), end: &maint.Ending{Outcome: maint.OutcomePartly}, before: true, want: true},
		"a hold does not know":            {op: hold, fit: true, end: &maint.Ending{Outcome: maint.OutcomeFailed}},
		"a hold was refused":              {op: hold, end: &maint.Ending{Outcome: maint.OutcomeBlocked}, want: true},
		"a new QEMU":                      {op: replace, end: &maint.Ending{Outcome: maint.OutcomeDone}, want: true},
		"a new QEMU that has failed":      {op: replace, end: &maint.Ending{Outcome: maint.OutcomeFailed}},
		"another kernel, and no word":     {op: maint.Op{ID: "op", Kind: maint.OpKexec}, end: &maint.Ending{Outcome: maint.OutcomeDone}},
	} {
		j, err := journal.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		put := func(kind maint.RecordKind, step string, data any) {
			t.Helper()
			b, err := json.Marshal(data)
			if err != nil {
				t.Fatal(err)
			}
			if err := j.Append(maint.Record{Op: c.op.ID, Kind: kind, Step: step, Data: b}); err != nil {
				t.Fatal(err)
			}
		}
		if c.op.ID != "" {
			put(maint.RecAccepted, "", c.op)
		}
		if c.fit {
			put(maint.RecStepStart, preserve.PhasePreflight, nil)
			put(maint.RecStepNote, preserve.PhasePreflight, json.RawMessage(order))
		}
		if c.held != nil {
			put(maint.RecHeld, "", c.held)
		}
		if c.end != nil {
			put(maint.RecEnded, "", c.end)
		}
		left := []leash.Leftover{{Status: leash.Status{Op: "hold-1", Guests: []leash.GuestStatus{{Guest: leash.Guest{UUID: "u1"}, Fate: c.leash}}}}}
		a := &Agent{journal: j, preserve: Preserve{Leash: remnants{left: left}}}
		since := began
		if c.before {
			since = time.Now()
		}
		g := maint.Guest{Name: "web-1", UUID: "u1", State: maint.GuestPaused, Reason: "user"}
		if c.reason != "" {
			g.Reason = c.reason
		}
		if got := a.pausedByUser(g, since); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
		if g.State = maint.GuestRunning; a.pausedByUser(g, since) {
			t.Errorf("%s: it runs, and is said to be paused", name)
		}
	}
}
