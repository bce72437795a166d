package main

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"belay/agent/maint"
)

// TestYAMLSaysWhatJSONSays with texts that mean something else to YAML, or to
// a terminal.
func TestYAMLSaysWhatJSONSays(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "web-1", "yes", "no", "null", "~", "1e3", "0x10", "012", "2026-11-01", ".inf", ".nan", "-", "- a", "? a",
		"a: b", "a:", "# c", "a #b", "'", `"`, `\`, `C:\new`, " a ", "a\nb", "\n", "a\r\nb\n", "\ttab", "\x00", "\x1b[31mred", "\x7f", "\u009b2J",
		"\u202eevil", "\u0085", "\u2028", "\ufeff", "\U000e0001", "é", "😀", "{a}", "[b]", "*a", "&b", "!c", "%d", "@e", "|", "> x", "---", "...", "<<",
		"<domain>&'", strings.Repeat("long words ", 200)} {
		key := text[:min(len(text), 1000)] // YAML allows a key no more than 1024 characters
		for _, v := range []any{text, []any{text}, map[string]any{key: text},
			map[string]any{"list": []any{[]any{}, []any{text, map[string]any{"x": text, "y": []any{text}, "z": map[string]any{}}}, map[string]any{key: []any{nil, true, 1.5}}}}} {
			var j, y strings.Builder
			for format, w := range map[string]*strings.Builder{"json": &j, "yaml": &y} {
				if err := (&app{out: w, format: format}).print(v, nil); err != nil {
					t.Fatalf("%s of %q: %v", format, v, err)
				}
				if strings.ContainsAny(w.String(), "\x1b\x7f\u009b\u202e\r\t") {
					t.Errorf("a terminal obeys %q", w.String())
				}
			}
			var fromJSON, fromYAML any
			if err := json.Unmarshal([]byte(j.String()), &fromJSON); err != nil || !reflect.DeepEqual(fromJSON, v) {
				t.Errorf("%q as JSON is %s: %q, %v", v, j.String(), fromJSON, err)
			}
			if err := yaml.Unmarshal([]byte(y.String()), &fromYAML); err != nil || !reflect.DeepEqual(fromYAML, v) {
				t.Errorf("%q as YAML is\n%s%q, %v", v, y.String(), fromYAML, err)
			}
		}
	}
}

// TestTablesShowRatherThanObey: a guest's name is libvirt's, a reason anybody's.
func TestTablesShowRatherThanObey(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	row(&b, "web\n-1", "\x1b]0;owned\a", "a\tb", "Grüße 😀 → \u009b2J")
	if want := `web\u000a-1` + "\t" + `\u001b]0;owned\u0007` + "\t" + `a\u0009b` + "\t" + `Grüße 😀 → \u009b2J` + "\n"; b.String() != want {
		t.Errorf("a row is %q, want %q", b.String(), want)
	}
}

// TestLinesTellOfPostCopy: that there is no way back is said once, and anew when it breaks.
func TestLinesTellOfPostCopy(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	p := newProgress(&b, "mig-1")
	for _, how := range []maint.PostCopy{"", maint.PostCopyRunning, maint.PostCopyRunning, maint.PostCopyBroken, maint.PostCopyRunning} {
		p.update(maint.Op{ID: "mig-1", Peer: "host-b", State: maint.OpRunning, Step: "perform",
			Progress: &maint.Job{PostCopy: how, MemoryLeft: 1 << 20, MemoryTotal: 2 << 20}})
	}
	p.close()
	running := "mig-1: perform: runs on host-b, in post-copy: 1 MiB of 2 MiB left, 0 KiB/s\n"
	want := "mig-1: perform\n" + running + "mig-1: perform: runs on host-b, in post-copy, which is broken and will be resumed\n" + running
	if b.String() != want {
		t.Errorf("it tells\n%swant\n%s", b.String(), want)
	}
}

// TestLinesOfAnApply: that guests have their notice is said with the step that waits for
// it, and of a guest that has moved before the next step.
func TestLinesOfAnApply(t *testing.T) {
	t.Parallel()
	now := time.Now()
	plan := maint.Plan{
		Guests: []maint.PlannedGuest{{Guest: "web-1", UUID: "1", Told: now}, {Guest: "web-2", UUID: "2"}},
		Steps: []maint.PlanStep{{N: 1, Kind: maint.PlanMove, Guests: []string{"1"}, At: now.Add(time.Hour)},
			{N: 2, Kind: maint.PlanMove, Guests: []string{"2"}, At: now.Add(time.Hour)}, {N: 3, Kind: maint.PlanVerify}},
	}
	var b strings.Builder
	p := newProgress(&b, "apply-1")
	step := func(name string, moves ...maint.GuestMove) {
		p.update(maint.Op{ID: "apply-1", State: maint.OpRunning, Started: now, Step: name, Apply: &maint.ApplyRequest{Plan: plan}, Moves: moves})
	}
	move := maint.GuestMove{Guest: "web-1", GuestUUID: "1", Peer: "host-b", State: maint.MovePlanned}
	step("1-move", move)
	move.State = maint.MoveMoving
	step("1-move", move) // it has no name yet
	move.Op = "mig-1"
	step("1-move", move)
	step("2-move", move)
	move.State = maint.MoveMoved
	step("3-verify", move)
	p.close()
	want := `apply-1: 1-move: guests are told, and have their notice unless they approve; see 'belay events list'
apply-1: web-1 moving to host-b, mig-1
apply-1: 2-move
apply-1: web-1 moved
apply-1: 3-verify
`
	if b.String() != want {
		t.Errorf("it tells\n%swant\n%s", b.String(), want)
	}
}
