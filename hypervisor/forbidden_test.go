package hypervisor

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
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
			// go-libvirt has a state of that name beside the call, and a socket has its end.
			pkg, _ := sel.X.(*ast.Ident)
			state := pkg != nil && pkg.Name == "libvirt" && sel.Sel.Name == "DomainShutdown"
			socket := pkg != nil && pkg.Name == "unix" && sel.Sel.Name == "Shutdown"
			if !state && !socket {
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

// Commands to QEMU that end a guest are named in one place, where they are
// refused; "quit" beside that in quitIn alone, which asks first.
func TestCommandsThatAreNotThere(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	named := map[string][]string{} // functions by command
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			where := "package level"
			if f, ok := decl.(*ast.FuncDecl); ok {
				where = f.Name.Name
			}
			ast.Inspect(decl, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.BasicLit:
					if text, err := strconv.Unquote(n.Value); err == nil && (text == "quit" || EndsGuest(text, nil)) {
						named[text] = append(named[text], where)
					}
				case *ast.Ident:
					if n.Name == "quit" && where != "package level" {
						named["quit"] = append(named["quit"], where)
					}
				}
				return true
			})
		}
	}
	for command, where := range named {
		want := []string{"EndsGuest"}
		if command == "quit" {
			want = []string{"package level", "quitIn", "EndsGuest"}
		}
		slices.Sort(where)
		slices.Sort(want)
		if !slices.Equal(where, want) {
			t.Errorf("%q is named in %q, want %q", command, where, want)
		}
	}
	if len(named) < 5 {
		t.Errorf("found %v only", named)
	}
	for command, args := range map[string]any{
		"quit":             nil,
		"migrate":          map[string]any{"uri": "exec:true"},
		"migrate-incoming": map[string]any{"channels": []any{map[string]any{"addr": map[string]any{"transport": "exec", "args": []string{"true"}}}}},
	} {
		if !EndsGuest(command, args) {
			t.Errorf("%s %v is let through", command, args)
		}
	}
	for command, args := range map[string]any{
		"migrate":      map[string]any{"uri": "unix:/run/executive"},
		"query-status": nil,
		"cont":         nil,
	} {
		if EndsGuest(command, args) {
			t.Errorf("%s %v is refused", command, args)
		}
	}
}
