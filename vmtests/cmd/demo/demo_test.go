package main

import (
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"belay/vmtests/observer"
	"belay/vmtests/updates"
)

// Every update of the ladder is shown.
func TestAllUpdatesAreShown(t *testing.T) {
	t.Parallel()
	var shown []string
	for _, u := range stays() {
		shown = append(shown, u.manifest)
	}
	if shown = append(shown, updates.Retire); !slices.Equal(shown, updates.All()) {
		t.Errorf("shown are %v of %v", shown, updates.All())
	}
}

func TestLinesFit(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	d := &demo{out: &out}
	d.fact("what", "%s", strings.Repeat("→", 2*columns))
	d.line("  %s", strings.Repeat("some words ", 30))
	d.title("A title")
	silent := func(ms ...time.Duration) (all []observer.Report) {
		for _, t := range ms {
			all = append(all, observer.Report{LargestGap: observer.Gap{Length: t * time.Millisecond}})
		}
		return all
	}
	d.nothing = 9 * time.Millisecond
	d.rows = []row{
		{what: "virtlogd restarts", rung: "A", belay: silent(5, 6, 17), predicted: "nothing", script: silent(6, 6, 6)},
		{what: "uplink down and up", rung: "D, C", belay: silent(10501, 10502, 10503), predicted: "10500 (5250 to 21000) ms", script: silent(21004, 20000, 22000)},
	}
	d.table()
	d.next()
	for line := range strings.Lines(out.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > columns {
			t.Errorf("a line of %d columns: %s", n, line)
		}
	}
	for _, want := range []string{"→…\n", "\nA title\n-------\n", "words\n      some words", " 6 / 17 ms ", "nothing                 6 / 6 ms        -\n", " 10502 / 10503 ms ", " 0.50\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing:\n%s", want, out.String())
		}
	}
}
