package hypervisor

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// forbidden are the calls that end, or restart, a guest, in libvirt's API and
// in go-libvirt's older wrappers around it.
var forbidden = regexp.MustCompile(`^(Domain)?(Destroy|Shutdown|Reset|Reboot)(Flags)?$`)

// The package cannot end a guest: nothing in it names a call that could.
func TestCallsThatAreNotThere(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok || !forbidden.MatchString(sel.Sel.Name) {
				return true
			}
			// go-libvirt has a state of that name beside the call.
			pkg, _ := sel.X.(*ast.Ident)
			if state := pkg != nil && pkg.Name == "libvirt" && sel.Sel.Name == "DomainShutdown"; !state {
				t.Errorf("%s: %s", set.Position(sel.Pos()), sel.Sel.Name)
			}
			return true
		})
	}
	for _, call := range []string{"DomainDestroy", "DomainDestroyFlags", "DomainShutdownFlags", "DomainReset", "DomainReboot", "Destroy"} {
		if !forbidden.MatchString(call) {
			t.Errorf("the test would not find %s", call)
		}
	}
}
