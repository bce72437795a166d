package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// othersTexts are what docs/troubleshooting.md quotes of others' messages.
var othersTexts = map[string]string{
	"permission denied":                           "the kernel",
	"no route to host":                            "the kernel",
	"Network is unreachable":                      "the guest's kernel",
	"i/o timeout":                                 "package net",
	"remote error: tls":                           "crypto/tls",
	"certificate is valid for":                    "crypto/x509",
	"Unable to resolve address":                   "libvirt",
	"Name or service not known":                   "glibc",
	"unable to connect to server at":              "libvirt",
	"Connection refused":                          "the kernel",
	"certificate has expired or is not yet valid": "crypto/x509",
	"certificate signed by unknown authority":     "crypto/x509",
	"Migration without shared storage is unsafe":  "libvirt",
	"Migration may lead to data corruption if disks use cache other than none or directsync": "libvirt",
}

// sourceTexts are the string constants of the programs, with "..." for what is put in, and
// the problems' codes among them.
type sourceTexts struct {
	all   string          // one a line
	whole map[string]bool // each, without punctuation around it
	codes map[string]bool
}

func readSource(t *testing.T) sourceTexts {
	t.Helper()
	s := sourceTexts{whole: make(map[string]bool), codes: make(map[string]bool)}
	verb := regexp.MustCompile(`"?%(\[\d\])?[#+ .0-9]*[a-zA-Z]"?`)
	all := new(strings.Builder)
	take := func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.BasicLit:
			if text, err := strconv.Unquote(n.Value); err == nil && n.Kind == token.STRING {
				text = verb.ReplaceAllString(text, "...")
				all.WriteString("\n" + text + "\n")
				s.whole[strings.Trim(text, punctuation)] = true
			}
		case *ast.ValueSpec:
			if of, is := n.Type.(*ast.Ident); is && of.Name == "Code" {
				for _, v := range n.Values {
					code, err := strconv.Unquote(v.(*ast.BasicLit).Value)
					s.codes[code] = err == nil
				}
			}
		}
		return true
	}
	for _, dir := range []string{"agent", "cmd", "hypervisor", "internal", "migrate", "notify", "patch"} {
		if err := filepath.WalkDir(filepath.Join("../..", dir), func(file string, d fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
				return err
			}
			f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
			if err == nil {
				ast.Inspect(f, take)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	s.all = all.String()
	return s
}

const punctuation = " ,;:()\"'"

// says reports whether a program can say a text: it is part of one constant, or one is put into
// another, or a subject before a reason. What it is put into is of some length, or any two words
// would do.
func (s sourceTexts) says(text string) bool {
	const enough = 10 // bytes
	if strings.Contains(s.all, text) {
		return true
	}
	for i := range text {
		if text[i] != ' ' {
			continue
		}
		left, right := strings.Trim(text[:i], punctuation), text[i+1:]
		if len(right) >= enough && s.whole[left] && (strings.Contains(s.all, "... "+right) || strings.Contains(s.all, "\n"+right)) ||
			i >= enough && s.whole[right] && strings.Contains(s.all, text[:i]+" ...") {
			return true
		}
	}
	return false
}

// TestTroubleshootingIsTrue: the messages that docs/troubleshooting.md quotes, between "..." and
// NAMES, are ones that the programs have, and the codes are problems' codes.
func TestTroubleshootingIsTrue(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	source, others := readSource(t), maps.Clone(othersTexts)
	gap := regexp.MustCompile(`\.\.\.|\b[A-Z][A-Z0-9]*\b`)
	aside := regexp.MustCompile(`\([^()]*` + "`" + `[^()]*\)$`)
	code := regexp.MustCompile("`([a-z]+(?:-[a-z]+)*(?:-\\*)?)`")
	var head []string
	messages, codes := 0, 0
	for i, line := range strings.Split(string(text), "\n") {
		cells := strings.Split(line, " | ")
		switch {
		case strings.HasPrefix(line, "|--"):
			continue
		case !strings.HasPrefix(line, "| "):
			head = nil
			continue
		case head == nil:
			head = cells
			continue
		}
		quoted := strings.TrimSuffix(cells[0], aside.FindString(cells[0]))
		for _, m := range inline.FindAllStringSubmatch(quoted, -1) {
			messages++
			for _, part := range gap.Split(m[1], -1) {
				part = strings.Trim(part, punctuation)
				if _, theirs := othersTexts[part]; theirs {
					delete(others, part)
				} else if !source.says(part) {
					t.Errorf("docs/troubleshooting.md:%d: nothing says %q, of %q", i+1, part, m[1])
				}
			}
		}
		named := aside.FindString(cells[0])
		if head[1] == "code" {
			named += cells[1]
		}
		for _, m := range code.FindAllStringSubmatch(named, -1) {
			codes++
			known := source.codes[m[1]]
			for c := range source.codes {
				prefix, any := strings.CutSuffix(m[1], "*")
				known = known || any && strings.HasPrefix(c, prefix)
			}
			if !known {
				t.Errorf("docs/troubleshooting.md:%d: %s is no problem's code", i+1, m[1])
			}
		}
	}
	for text := range others {
		t.Errorf("docs/troubleshooting.md does not quote %q any more", text)
	}
	if messages < 150 || codes < 80 {
		t.Errorf("only %d messages and %d codes", messages, codes)
	}
}
