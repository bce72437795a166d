package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"belay/agent/agenttest"
	"belay/agent/api"
	"belay/agent/config"
	"belay/agent/maint"
)

// documented is a command line of the documentation.
type documented struct {
	at    string   // file:line
	words []string // of one simple command, its program first
	block int      // number of the fenced block in its file, 0: in running text
}

// programs are those whose command lines are looked at.
var programs = []string{"belay", "belayd", "belay-kernel", "belay-guest", "make"}

var (
	inline = regexp.MustCompile("`([^`]+)`")
	fence  = regexp.MustCompile("^ *```([a-z]*)")
	prompt = regexp.MustCompile(`^ *(host-[a-z]# )?`)
)

// commandLines are those of README.md, CONTRIBUTING.md and docs.
func commandLines(t *testing.T) (all []documented) {
	t.Helper()
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(files) < 10 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, file := range append(files, "../../README.md", "../../CONTRIBUTING.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		blocks, in, language, whole := 0, false, "", ""
		for i, line := range strings.Split(string(text), "\n") {
			at := fmt.Sprintf("%s:%d", strings.TrimPrefix(file, "../../"), i+1)
			if m := fence.FindStringSubmatch(line); m != nil {
				in, language = !in, m[1]
				blocks++
				continue
			}
			switch {
			case in && (language == "sh" || prompt.FindString(line) != "" && language == "" && strings.Contains(line, "# belay ")):
				if language == "" {
					line = line[len(prompt.FindString(line)):]
				}
				if cut, more := strings.CutSuffix(line, `\`); more {
					whole += cut
					continue
				}
				for _, words := range simple(whole + line) {
					all = append(all, documented{at, words, blocks})
				}
				whole = ""
			case !in:
				for _, m := range inline.FindAllStringSubmatch(line, -1) {
					for _, words := range simple(m[1]) {
						all = append(all, documented{at, words, 0})
					}
				}
			}
		}
	}
	return slices.DeleteFunc(all, func(d documented) bool { return !slices.Contains(programs, d.words[0]) })
}

// simple are the simple commands of a line of shell, without what goes in and out of them.
func simple(line string) (commands [][]string) {
	var words []string
	word, quote, begun := "", rune(0), false
	end := func() {
		if begun {
			words = append(words, word)
		}
		word, begun = "", false
	}
	next := func() {
		end()
		if i := slices.IndexFunc(words, func(w string) bool { return strings.HasPrefix(w, ">") || strings.HasPrefix(w, "<") }); i >= 0 {
			words = words[:i]
		}
		if len(words) > 0 && words[0] == "sudo" {
			words = words[1:]
		}
		if len(words) > 0 {
			commands = append(commands, words)
		}
		words = nil
	}
loop:
	for _, r := range line {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote == 0 && (r == '\'' || r == '"'):
			quote, begun = r, true
		case quote != 0:
			word += string(r)
		case r == ' ' || r == '\t':
			end()
		case r == '#' && !begun:
			break loop
		case r == '|' || r == ';' || r == '&':
			next()
		default:
			word, begun = word+string(r), true
		}
	}
	next()
	return commands
}

// TestDocumentedCommands: every command line of the documentation is one that its program
// takes: there is such a command, with these flags and as many arguments. In running text a
// command may be named without the rest.
func TestDocumentedCommands(t *testing.T) {
	t.Parallel()
	targets := makeTargets(t)
	n := 0
	for _, d := range commandLines(t) {
		if d.block == 0 && !isCommand(d.words) {
			continue
		}
		n++
		var err error
		switch d.words[0] {
		case "belay":
			_, err = parse(d.words[1:], d.block == 0)
		case "make":
			for _, w := range d.words[1:] {
				if !targets[w] && !strings.Contains(w, "=") {
					err = fmt.Errorf("there is no target %q", w)
				}
			}
		default:
			err = flagsOf(t, d.words[0]).Parse(d.words[1:])
		}
		if err != nil {
			t.Errorf("%s: %s: %v", d.at, strings.Join(d.words, " "), err)
		}
	}
	if n < 150 {
		t.Errorf("only %d commands are documented", n)
	}
}

// isCommand tells a command from the beginning of a sentence or of a message: of "belayd" only
// flags follow.
func isCommand(words []string) bool {
	return words[0] == "belay" || words[0] == "make" || len(words) > 1 && strings.HasPrefix(words[1], "-")
}

// parse finds the command of a command line, and has it look at its flags and arguments.
func parse(args []string, named bool) (*cobra.Command, error) {
	c, rest, err := newRoot(&app{out: io.Discard, err: io.Discard}).Find(args)
	if err != nil {
		return nil, err
	}
	if err := c.ParseFlags(rest); err != nil {
		return c, err
	}
	switch err := c.ValidateArgs(c.Flags().Args()); {
	case err == nil, named && slices.Equal(c.Flags().Args(), []string{"..."}):
	case named && len(c.Flags().Args()) == 0: // it is only named
	default:
		return c, err
	}
	if c.HasSubCommands() && c.Parent() != nil && len(c.Flags().Args()) > 0 {
		return c, fmt.Errorf("there is no %q", c.Flags().Args()[0])
	}
	return c, nil
}

var declared = regexp.MustCompile(`(?:flag|flags|fs)\.(String|Bool|Duration|Int|Var|Func|StringVar|BoolVar|DurationVar)\((?:&?[\w.]+, )?"([a-z-]+)"`)

// flagsOf are the flags that a program's source declares.
func flagsOf(t *testing.T, program string) *flag.FlagSet {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", program, "main.go"))
	if err != nil {
		t.Fatal(err)
	}
	f := flag.NewFlagSet(program, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	for _, m := range declared.FindAllSubmatch(text, -1) {
		if strings.HasPrefix(string(m[1]), "Bool") {
			f.Bool(string(m[2]), false, "")
		} else {
			f.String(string(m[2]), "", "")
		}
	}
	return f
}

func makeTargets(t *testing.T) map[string]bool {
	t.Helper()
	text, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^([a-z-]+):`).FindAllSubmatch(text, -1) {
		all[string(m[1])] = true
	}
	return all
}

// elsewhere are commands that need more than hosts in memory, or do not end: by which test,
// in vmtests or testdata/script, each is run. Its file has the words of the command.
var elsewhere = map[string]string{
	"belay replace-vmm":     "../../vmtests/replace_test.go",
	"belay kexec":           "../../vmtests/wholehost/kexec_test.go",
	"belay patch apply":     "testdata/script/patch.txtar",
	"belay patch inspect":   "testdata/script/patch.txtar",
	"belay patch revert":    "testdata/script/patch.txtar",
	"belay patch reload":    "testdata/script/patch.txtar",
	"belay patch microcode": "testdata/script/patch.txtar",
	"belay patch qemu":      "testdata/script/patch-qemu.txtar",
	"belay patch watch":     "testdata/script/patch.txtar",
	"belay update create":   "testdata/script/update.txtar",
	"belay top":             "testdata/script/top.txtar",
	"belay events watch":    "testdata/script/events.txtar",
	"belay man":             "testdata/script/shell.txtar",
}

// ends are the exit codes of those that do not exit with 0 on hosts in memory, and why.
var ends = map[string]int{
	"belay patch covers": exitFailed,  // the change is not known there
	"belay doctor":       exitFailed,  // nothing listens at libvirt's port
	"belay plan":         exitBlocked, // kernels and package lists of the examples are not there

	"belay ops abort":         exitNothing, // in memory operations end within milliseconds
	"belay maintenance defer": exitFailed,  // as does what was booked for now
}

// TestDocumentedCommandsRun runs the documentation's command lines, block by block, against
// belayds of hosts in memory. One that cannot be run so is in a list, with the test that runs it.
func TestDocumentedCommandsRun(t *testing.T) {
	var last documented
	var w *documentedWorld
	ran := make(map[string]bool)
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	scripts, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("%v, %v", scripts, err)
	}
	for _, d := range commandLines(t) {
		if d.words[0] != "belay" || d.block == 0 && len(d.words) == 1 {
			continue
		}
		c, err := parse(d.words[1:], true)
		if err != nil {
			continue // TestDocumentedCommands says so
		}
		path := c.CommandPath()
		if d.block == 0 || elsewhere[path] != "" {
			if _, known := ran[path]; !known {
				ran[path] = false
			}
			continue
		}
		file, _, _ := strings.Cut(d.at, ":")
		if before, _, _ := strings.Cut(last.at, ":"); w == nil || before != file || last.block != d.block {
			w = newDocumentedWorld(t)
		}
		last = d
		t.Run(d.at, func(t *testing.T) {
			_, code := w.run(t, d.words[1:])
			if want := ends[path]; code != exitDone && code != want { // what came before may be in the way
				out, code := newDocumentedWorld(t).run(t, d.words[1:])
				w = nil // so that the next one has its own, too
				if code != exitDone && code != want {
					t.Errorf("%s: exit code %d:\n%s", strings.Join(d.words, " "), code, out)
				}
			}
		})
		ran[path] = true
	}
	if len(ran) < 30 {
		t.Errorf("only %d commands are documented", len(ran))
	}
	for path, done := range ran {
		file, listed := elsewhere[path]
		files := scripts
		if listed {
			files = []string{file}
		}
		if !done && !slices.ContainsFunc(files, func(f string) bool { return runs(t, filepath.Join(here, f), path) }) {
			t.Errorf("no test runs %q, which the documentation has (%v)", path, files)
		}
	}
}

// runs reports whether a test's file has a command.
func runs(t *testing.T, file, path string) bool {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	words := strings.TrimPrefix(path, "belay ")
	return strings.Contains(string(text), path+" ") || strings.Contains(string(text), path+"\n") ||
		strings.Contains(string(text), `"`+strings.ReplaceAll(words, " ", `", "`)+`"`)
}

// documentedUpdate stands for the documentation's manifests, which have programs that are not
// here. That these can be planned is tested in agent/update.
const documentedUpdate = `id = "documented"
[[changes]]
name = "bridge"
kind = "network"
apply.command = ["true"]
`

// documentedWorld is the world that the documentation's commands speak of.
type documentedWorld struct {
	*agenttest.World
	ctx context.Context
}

func newDocumentedWorld(t *testing.T) *documentedWorld {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	dir := t.TempDir()
	t.Chdir(dir)
	w := &documentedWorld{agenttest.New(t, slog.New(slog.DiscardHandler), func(c *config.Config) {
		c.Events = config.Events{Enabled: true, Policy: "all"}
	}, "host-a", "host-b"), ctx}
	a := w.Nodes[0]
	for _, name := range []string{"web-1", "db-1", "voip-1"} {
		a.Host.PutGuest(name, func(g *maint.Guest) { g.Autostart = true })
	}
	return w
}

// run runs belay, approves in the guests' place, and gives what it has written.
func (w *documentedWorld) run(t *testing.T, args []string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	args = w.fill(t, args)
	if !slices.Contains(args, "events") && !slices.Contains(args, "--detach") {
		for _, n := range w.Nodes {
			go approve(ctx, n.Client)
		}
	}
	var out strings.Builder
	ended := make(chan int, 1)
	go func() {
		ended <- run(append([]string{"--socket", w.Nodes[0].Config.API.Socket}, args...), &out, &out)
	}()
	select {
	case code := <-ended:
		return out.String(), code
	case <-w.ctx.Done():
		t.Fatalf("belay %s does not end", strings.Join(args, " "))
		return "", 0
	}
}

// approve has every event of a host begin.
func approve(ctx context.Context, c *api.Client) {
	_ = c.WatchEvents(ctx, false, func(events []maint.ScheduledEvent) error {
		for _, e := range events {
			_, _ = c.ApproveEvent(ctx, e.ID, "") // it may have begun
		}
		return nil
	})
}

// fill puts the world's own names in the place of placeholders, and "true" in the place of
// programs of the host; what is to be there for it is made.
func (w *documentedWorld) fill(t *testing.T, args []string) []string {
	t.Helper()
	args = slices.Clone(args)
	if i := slices.Index(args, "--"); i >= 0 {
		args = append(args[:i+1], "true")
	}
	for i, word := range args {
		switch {
		case word == "ID" && args[0] == "events":
			args[i] = w.event(t)
		case word == "ID", strings.HasPrefix(word, "drain-2"):
			args[i] = w.operation(t)
		case strings.HasSuffix(word, ".toml") && args[i-1] != "--out":
			args[i] = filepath.Base(word)
			if err := os.WriteFile(args[i], []byte(documentedUpdate), 0o600); err != nil {
				t.Fatal(err)
			}
		case i > 0 && (args[i-1] == "--verify" || args[i-1] == "--undo"):
			args[i] = "true"
		case i > 0 && args[i-1] == "--at": // the documentation's moment passes
			args[i] = time.Now().Add(5 * 24 * time.Hour).Format("2006-01-02 15:04")
		}
	}
	if args[0] == "maintenance" && len(args) > 2 && args[1] != "create" {
		w.campaign(t, maint.CampaignID(args[2]))
	}
	return args
}

// operation is the latest one, or one that is made.
func (w *documentedWorld) operation(t *testing.T) string {
	t.Helper()
	c := w.Nodes[0].Client
	ops, err := c.Ops(w.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(ops) > 0 {
		return string(ops[len(ops)-1].ID)
	}
	op, err := c.Hold(w.ctx, maint.HoldRequest{All: true, Step: maint.HostStep{Command: []string{"true"}}})
	if err != nil {
		t.Fatal(err)
	}
	return string(op.ID)
}

// event is the latest one.
func (w *documentedWorld) event(t *testing.T) (id string) {
	t.Helper()
	w.operation(t)
	found := errors.New("found")
	err := w.Nodes[0].Client.WatchEvents(w.ctx, true, func(all []maint.ScheduledEvent) error {
		if len(all) == 0 {
			return nil
		}
		id = string(all[len(all)-1].ID)
		return found
	})
	if !errors.Is(err, found) {
		t.Fatal(err)
	}
	return id
}

// campaign makes one of that name, unless there is.
func (w *documentedWorld) campaign(t *testing.T, id maint.CampaignID) {
	t.Helper()
	c := w.Nodes[0].Client
	if _, err := c.Campaign(w.ctx, id); err == nil {
		return
	}
	if _, err := c.CreateCampaign(w.ctx, maint.CampaignRequest{ID: id, MaxDefers: 1, Action: maint.CampaignAction{Migrate: &maint.MigrateRequest{To: "host-b"}}}); err != nil {
		t.Fatal(err)
	}
}
