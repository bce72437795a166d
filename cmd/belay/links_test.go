package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	fenced  = regexp.MustCompile("(?ms)^ *```.*?^ *```")
)

// TestLinks: what the documentation links to is there, files and headings.
func TestLinks(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(files) < 10 {
		t.Fatalf("%v, %v", files, err)
	}
	files = append(files, "../../README.md", "../../ARCHITECTURE.md", "../../CONTRIBUTING.md")
	n := 0
	for _, file := range files {
		for _, m := range link.FindAllStringSubmatch(prose(t, file), -1) {
			to, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(to, "://") {
				continue
			}
			n++
			target := file
			if to != "" {
				target = filepath.Join(filepath.Dir(file), to)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %s: %v", file, m[1], err)
				continue
			}
			if anchor != "" && !anchors(t, target)[anchor] {
				t.Errorf("%s: %s: there is no such heading", file, m[1])
			}
		}
	}
	if n < 150 {
		t.Errorf("only %d links", n)
	}
	// Nobody comes to a page that nothing links to.
	readme := prose(t, "../../README.md")
	for _, file := range files[:len(files)-3] {
		if !strings.Contains(readme, "](docs/"+filepath.Base(file)) {
			t.Errorf("README.md does not name %s", file)
		}
	}
}

// prose is a file without what is in fences.
func prose(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return fenced.ReplaceAllString(string(text), "")
}

// anchors are GitHub's of a file's headings.
func anchors(t *testing.T, file string) map[string]bool {
	t.Helper()
	all := make(map[string]bool)
	for _, m := range heading.FindAllStringSubmatch(prose(t, file), -1) {
		words := link.ReplaceAllString(strings.ToLower(m[1]), "]")
		all[strings.ReplaceAll(regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(words, ""), " ", "-")] = true
	}
	return all
}
