package agent_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// stuckIn are the functions that can end an operation as stuck, outright or because a step
// cannot be undone, each with the sections of the runbooks for that. A person needs them.
var stuckIn = map[string][]string{
	"unlessUnsettled": { // by where the guest is; package migrate has a test for each
		"stuck: unknown", "stuck: switching over", "stuck: shut off, and not on the destination",
		"stuck: running on the source, although it has come to the destination",
		"stuck: running on the source, with a paused copy on the destination",
		"stuck: off since its host went down", "stuck: on a third host", "stuck: running on both hosts",
		"stuck: lost in post-copy", "stuck: stopped for the switch-over", "stuck: paused on both hosts", "stuck: on neither host",
	},
	"migrateSteps":  {"stuck: undo failed"},
	"unlessBetween": {"stuck: between two QEMUs"},
	"replaceSteps":  {"stuck: between two QEMUs", "guest ... is still paused"},
	"unlessAway":    {"stuck: not at home", "stuck: at home and in the twin"},
	"visitSteps":    {"stuck: not at home"},
	"holdSteps":     {"a failed undo", "guest ... is still paused"},
	"kexecSteps":    {"stuck: undo failed", "guests are off after a new kernel"},
	"patchSteps":    {"stuck: a livepatch is not taken back"},
	"qemuSteps":     {"stuck: a QEMU may be inconsistent"},
	"drainSteps":    {"stuck: undo failed"},
	"seeReturned":   {"stuck: on neither host"},
	"applySteps":    {"stuck: an update"},
	"verify":        {"stuck: an update"},
	"move":          {"stuck: an update"},
	"outcome":       {"stuck: an update"},
	"offUnder":      {"guests are off after a new kernel"},
}

// TestStuckHasRunbooks: whatever ends an operation as stuck has its section in the runbooks, and
// each section there on something stuck is of something that can be.
func TestStuckHasRunbooks(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../docs/runbooks.md")
	check(t, err)
	var sections []string
	for _, m := range regexp.MustCompile(`(?m)^### (.*)$`).FindAllStringSubmatch(string(text), -1) {
		sections = append(sections, strings.ToLower(m[1]))
	}
	found := make(map[string]bool)
	files, err := filepath.Glob("*.go")
	check(t, err)
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		check(t, err)
		for _, d := range f.Decls {
			if f, is := d.(*ast.FuncDecl); is && endsStuck(f) {
				found[f.Name.Name] = true
			}
		}
	}
	if got, want := slices.Sorted(maps.Keys(found)), slices.Sorted(maps.Keys(stuckIn)); !slices.Equal(got, want) {
		t.Errorf("operations end as stuck in\n%v, and there are runbooks for\n%v", got, want)
	}
	of := make(map[string]bool)
	for name, wants := range stuckIn {
		for _, section := range wants {
			section = strings.ToLower(section)
			if of[section] = true; !slices.Contains(sections, section) {
				t.Errorf("%s: the runbooks have no section %q", name, section)
			}
		}
	}
	for _, section := range sections {
		if strings.HasPrefix(section, "stuck: ") && !of[section] {
			t.Errorf("the runbooks have a section %q, which is of nothing", section)
		}
	}
}

// endsStuck reports whether a function makes an error that has an operation be stuck, or a step
// that can be undone, which may fail.
func endsStuck(f *ast.FuncDecl) (is bool) {
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CompositeLit:
			s, sel := n.Type.(*ast.SelectorExpr)
			is = is || sel && s.Sel.Name == "Stuck"
		case *ast.KeyValueExpr:
			k, ident := n.Key.(*ast.Ident)
			is = is || ident && k.Name == "Undo"
		case *ast.AssignStmt:
			for i, to := range n.Lhs {
				s, sel := to.(*ast.SelectorExpr)
				if i < len(n.Rhs) && sel && s.Sel.Name == "Outcome" {
					v, sel := n.Rhs[i].(*ast.SelectorExpr)
					is = is || sel && v.Sel.Name == "OutcomeStuck"
				}
			}
		}
		return true
	})
	return is
}
