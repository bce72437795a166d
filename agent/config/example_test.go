package config

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// TestShippedDefaults: the settings that dist/belayd.toml shows as defaults are the defaults.
func TestShippedDefaults(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../dist/belayd.toml")
	if err != nil {
		t.Fatal(err)
	}
	own, _, found := strings.Cut(string(text), "# For peers: one section") // which is all an example
	if !found {
		t.Fatal("it has no section for a peer")
	}
	setting := regexp.MustCompile(`^#(\[|[a-z_0-9]+ *= )`)
	var shown strings.Builder
	example, n := false, 0
	for line := range strings.SplitSeq(own, "\n") {
		switch {
		case line == "# Example:":
			example = true
		case setting.MatchString(line):
			if !example {
				shown.WriteString(line[1:] + "\n")
				n++
			}
		case strings.HasPrefix(line, "["):
			example = false
			shown.WriteString(line + "\n")
		default: // text or nothing: an example ends with its last line
			example = false
		}
	}
	if n < 30 {
		t.Errorf("only %d settings are shown:\n%s", n, shown.String())
	}
	want, err := Load(one(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	got, err := Load(one(t, shown.String()))
	if err != nil {
		t.Fatalf("%v\n%s", err, shown.String())
	}
	if d := cmp.Diff(want, got, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("what it shows as defaults is otherwise (-default +shown):\n%s", d)
	}
}
