package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const module = "belay"

// pkg is what go list tells of a package. Test files are not part of it.
type pkg struct {
	ImportPath, Dir, Name, Doc string
	GoFiles, Imports           []string
}

// path is the package's path inside the module.
func (p pkg) path() string { return strings.TrimPrefix(p.ImportPath, module+"/") }

// ours are the packages of this module that p imports.
func (p pkg) ours() (paths []string) {
	for _, i := range p.Imports {
		if path, ok := strings.CutPrefix(i, module+"/"); ok {
			paths = append(paths, path)
		}
	}
	return paths
}

// testOnly says that a package is for tests: a lab, a fake, a harness.
func testOnly(path string) bool {
	return within(path, "vmtests") || within(path, "internal/archtest") || strings.HasSuffix(path, "test")
}

// within says that a package is in a tree of packages.
func within(path, tree string) bool { return path == tree || strings.HasPrefix(path, tree+"/") }

// list gives all packages of the module, asked for once.
func list(t *testing.T) []pkg {
	t.Helper()
	all, err := listed()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

var listed = sync.OnceValues(func() ([]pkg, error) {
	c := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,Name,Doc,GoFiles,Imports", module+"/...")
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w: %s", err, &stderr)
	}
	var all []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		if len(p.GoFiles) > 0 { // else it has tests only
			all = append(all, p)
		}
	}
})

// alone are the packages that import little of the project: only what is
// listed, and what is in their own tree.
var alone = []struct {
	tree   string
	may    []string
	reason string
}{
	{"agent/maint", nil, "everything imports the vocabulary, so it can import nothing"},
	{"agent/plan", []string{"agent/maint"}, "planning is a pure function of what is known and wanted"},
	{"agent/update", []string{"agent/maint"}, "a manifest is text that becomes a value, whatever is done with it"},
	{"agent/journal", []string{"agent/maint"}, "what is on disk must be readable whatever becomes of the rest"},
	{"agent/run", []string{"agent/maint"}, "steps come to the runner as values: it knows none of them"},
	{"agent/api", []string{"agent/maint"}, "the API is served for an interface, and the client is linked into belay"},
	{"agent/config", []string{"agent/maint"}, "configuration is values; who uses them imports it, not the other way round"},
	{"hypervisor", []string{"agent/maint"}, "it speaks libvirt for anybody and knows nobody"},
	{"migrate", []string{"agent/maint"}, "a rung is given its host and its peer as interfaces and knows no other rung"},
	{"agent/health", []string{"agent/maint"}, "it asks for anybody, and knows neither why nor what follows"},
	{"agent/boottime", nil, "everything that outlives a process reckons by it, so it can import nothing"},
	{"patch", []string{"agent/maint", "agent/boottime"}, "a rung is given its host as interfaces and knows no other rung"},
	{"notify", []string{"agent/maint"}, "guests are told of any rung alike"},
	{"cmd/belay-guest", []string{"notify/channel/wire"}, "it runs in guests, and shares with the host nothing but what goes between them"},
	{"cmd/belay-kernel", []string{"patch/kexec", "patch/live", "patch/live/remote", "agent/maint"}, "it has the capabilities that nobody else has, and so is small"},
	{"agent/page", []string{"agent/maint", "agent/report"}, "the status page is served for an interface that has nothing to change"},
	{"agent/report", []string{"agent/maint"}, "a report is a pure function of what was written down, also in belay"},
	{"cmd/belay", []string{"agent/api", "agent/maint", "agent/report"}, "belay runs as whoever calls it: what it may do is what the API lets it"},
}

// owned are the packages that few may import, whatever else those import.
var owned = []struct {
	imported string // a tree of packages
	by       []string
	reason   string
}{
	{"github.com/digitalocean/go-libvirt", []string{"hypervisor"}, "one package has the deadlines, the errors and no call that could end a guest"},
	{module + "/hypervisor", []string{"hypervisor", "agent", "cmd/belayd", "cmd/belay-leash"}, "only package agent and its wiring know that a host is libvirt; the leash has a connection of its own"},
	{module + "/migrate", []string{"migrate", "agent"}, "only package agent makes steps of a rung's phases"},
	{module + "/patch", []string{"patch", "agent", "cmd/belayd", "cmd/belay-leash", "cmd/belay-kernel"}, "only package agent makes steps of a rung's phases; programs are wired up in their mains"},
	{module + "/notify", []string{"notify", "agent", "cmd/belay-guest"}, "only package agent makes steps of a rung's phases; the guest's end of a channel speaks its protocol"},
	{module + "/agent/run", []string{"agent"}, "only package agent runs operations"},
	{module + "/agent/journal", []string{"agent", "cmd/belayd"}, "the journal has one owner, and who wires it up opens it"},
	{module + "/agent", []string{"cmd/belayd", "agent/agenttest"}, "an agent is the top: belayd runs it"},
	{"aead.dev/minisign", []string{"patch/live"}, "one package judges who has signed a livepatch"},
	{"go.etcd.io/bbolt", []string{"agent/journal"}, "how the journal is kept on disk is the journal's affair"},
	{"github.com/spf13/cobra", []string{"cmd/belay"}, "the daemon has a handful of flags"},
}

func TestPackagesThatImportLittle(t *testing.T) {
	t.Parallel()
	met := make(map[string]bool)
	for _, p := range list(t) {
		for _, rule := range alone {
			if testOnly(p.path()) || !within(p.path(), rule.tree) {
				continue
			}
			met[rule.tree] = true
			for _, i := range p.ours() {
				if !slices.Contains(rule.may, i) && !within(i, rule.tree) {
					t.Errorf("%s imports %s; of this project it may import %v: %s", p.path(), i, rule.may, rule.reason)
				}
			}
		}
	}
	for _, must := range []string{"agent/maint", "agent/journal", "agent/run", "agent/api", "hypervisor", "migrate", "cmd/belay", "cmd/belay-guest"} {
		if !met[must] {
			t.Errorf("no package %s was looked at: has it moved?", must)
		}
	}
}

// TestPackagesThatFewImport takes "agent" for that package alone, and a tree's
// root for all of the tree elsewhere.
func TestPackagesThatFewImport(t *testing.T) {
	t.Parallel()
	met := make(map[string]bool)
	for _, p := range list(t) {
		for _, rule := range owned {
			hit := func(i string) bool {
				if rule.imported == module+"/agent" {
					return i == rule.imported
				}
				return within(i, rule.imported)
			}
			if !slices.ContainsFunc(p.Imports, hit) {
				continue
			}
			met[rule.imported] = true
			mayImport := func(by string) bool {
				if by == "agent" {
					return p.path() == by
				}
				return within(p.path(), by)
			}
			if !testOnly(p.path()) && !slices.ContainsFunc(rule.by, mayImport) {
				t.Errorf("%s imports %s, which only %v may: %s", p.path(), rule.imported, rule.by, rule.reason)
			}
		}
	}
	for _, must := range []string{"github.com/digitalocean/go-libvirt", module + "/hypervisor", module + "/migrate", module + "/agent/run", module + "/agent"} {
		if !met[must] {
			t.Errorf("nobody imports %s: has it moved?", must)
		}
	}
}

// TestLibvirtHasOneImporter: unlike the other rules, this one is for tests'
// packages too.
func TestLibvirtHasOneImporter(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		for _, i := range p.Imports {
			if within(i, "github.com/digitalocean/go-libvirt") && !within(p.path(), "hypervisor") {
				t.Errorf("%s imports %s: labs speak to libvirt as operators do, with virsh", p.path(), i)
			}
		}
	}
}

// TestVocabularyDoesNothing: agent/maint is of the standard library and does
// no input or output.
func TestVocabularyDoesNothing(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		if p.path() != "agent/maint" {
			continue
		}
		for _, i := range p.Imports {
			first, _, _ := strings.Cut(i, "/")
			switch {
			case strings.Contains(first, "."):
				t.Errorf("agent/maint imports %s, which is not of the standard library", i)
			case i == "net/netip": // an address is a word
			case slices.Contains([]string{"os", "net", "syscall", "log", "plugin", "embed", "testing"}, first),
				i == "io/ioutil", i == "io/fs", i == "context", i == "unsafe":
				t.Errorf("agent/maint imports %s: words do nothing", i)
			}
		}
		return
	}
	t.Error("there is no package agent/maint")
}

// TestProductionImportsNoTests: what is shipped links no lab and no fake.
func TestProductionImportsNoTests(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		if testOnly(p.path()) {
			continue
		}
		for _, i := range p.Imports {
			path, ours := strings.CutPrefix(i, module+"/")
			if ours && testOnly(path) || !ours && (i == "testing" || strings.HasPrefix(i, "testing/") || strings.HasSuffix(i, "/testscript") || strings.HasSuffix(i, "/rapid")) {
				t.Errorf("%s imports %s, which is for tests", p.path(), i)
			}
		}
	}
}

// TestNames: a package is named for what it provides, and says what that is.
func TestNames(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		if slices.Contains([]string{"util", "utils", "common", "misc", "helpers"}, p.Name) {
			t.Errorf("%s: the name %q says nothing", p.path(), p.Name)
		}
		if p.Doc == "" {
			t.Errorf("%s has no package comment", p.path())
		}
	}
}

// TestNoInit: what a program does begins in main.
func TestNoInit(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		for _, name := range p.GoFiles {
			file := filepath.Join(p.Dir, name)
			parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Error(err)
				continue
			}
			for _, d := range parsed.Decls {
				if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
					t.Errorf("%s has an init function: do it where it is needed", file)
				}
			}
		}
	}
}
