package main

import (
	"strings"
	"testing"
	"unicode/utf8"

	"belay/vmtests/measure"
)

// Each tool must go as often there as back, or a difference between the ways
// would be taken for one between the tools.
func TestTurnsAreFair(t *testing.T) {
	t.Parallel()
	there := map[string]int{}
	for i, tool := range turns() {
		there[tool] += 1 - i%2*2
	}
	if len(there) != 2 || there[measure.Belay] != 0 || there[measure.Virsh] != 0 || len(turns())%4 != 0 {
		t.Errorf("turns %v: one way more than the other: %v", turns(), there)
	}
}

func TestLinesFit(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	d := &demo{out: &out}
	d.fact("what", "%s", strings.Repeat("→", 2*columns))
	d.title("A title")
	d.next()
	for line := range strings.Lines(out.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > columns {
			t.Errorf("a line of %d columns: %s", n, line)
		}
	}
	if !strings.Contains(out.String(), "→…\n") || !strings.Contains(out.String(), "\nA title\n-------\n") {
		t.Error(out.String())
	}
}
