package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// told is a command that a message tells the operator to run.
var told = regexp.MustCompile(`(?:['(]|: |or )belay ([a-z][a-z-]*)\b`)

// Remedies name commands that exist.
func TestRemedies(t *testing.T) {
	t.Parallel()
	commands := make(map[string]bool)
	for _, c := range newRoot(&app{}).Commands() {
		commands[c.Name()] = true
	}
	found := 0
	for _, root := range []string{"agent", "hypervisor", "migrate", "patch"} {
		err := filepath.WalkDir(filepath.Join("../..", root), func(path string, d fs.DirEntry, err error) error {
			if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile(path)
			for _, m := range told.FindAllSubmatch(text, -1) {
				if found++; !commands[string(m[1])] {
					t.Errorf("%s: there is no 'belay %s'", path, m[1])
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 10 {
		t.Errorf("only %d commands are named", found)
	}
}
