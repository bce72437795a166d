package update_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/agent/plan"
	"belay/agent/update"
)

// examples are those of the documentation.
func examples(t testing.TB) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob("../../docs/examples/*.toml")
	if err != nil || len(files) < 8 {
		t.Fatalf("%d examples, %v", len(files), err)
	}
	all := make(map[string][]byte)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(f)] = b
	}
	return all
}

// TestExamples: those of the documentation can be taken, planned, and written again as they
// are. There is one of each kind of change.
func TestExamples(t *testing.T) {
	t.Parallel()
	kinds := make(map[maint.ChangeKind]bool)
	for name, text := range examples(t) {
		u, err := update.Parse(name, text)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, c := range u.Changes {
			kinds[c.Kind] = true
		}
		again, err := update.Format(u)
		if err != nil {
			t.Fatal(err)
		}
		if u2, err := update.Parse(name, again); err != nil || !cmp.Equal(u, u2) {
			t.Errorf("%s is otherwise when it was written: %v\n%s\n%s", name, err, cmp.Diff(u, u2), again)
		}
		if p := plan.Make(u, maint.Ladder{Host: "host-a", Now: time.Now()}, maint.PlanOptions{}); len(p.Steps) < 2 {
			t.Errorf("%s: its plan has %d steps", name, len(p.Steps))
		}
	}
	for _, k := range maint.ChangeKinds {
		if !kinds[k] && k != maint.ChangePackages { // which are in the reference
			t.Errorf("there is no example of %s", k)
		}
	}
}

// TestReference: what docs/manifest.md has of TOML can be taken, and it names every setting.
func TestReference(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../../docs/manifest.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```toml\n(.*?)```").FindAllSubmatch(b, -1)
	if len(blocks) == 0 {
		t.Error("it has no TOML")
	}
	for _, block := range blocks {
		_, err := update.Parse("docs/manifest.md", block[1])
		if bytes.HasPrefix(block[1], []byte("[[health]]")) { // of belayd.toml
			file := filepath.Join(t.TempDir(), "belayd.toml")
			if err := os.WriteFile(file, block[1], 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = config.Load(file)
		}
		if err != nil {
			t.Errorf("%v\n%s", err, block[1])
		}
	}
	for _, word := range update.Settings() {
		if !strings.Contains(string(b), "`"+word+"`") {
			t.Errorf("it says nothing of setting %s", word)
		}
	}
	for _, k := range maint.ChangeKinds {
		if !strings.Contains(string(b), "`"+string(k)+"`") {
			t.Errorf("it says nothing of kind %s", k)
		}
	}
}

const head = "id = \"u\"\n[[changes]]\nname = \"c\"\n"

func TestDefaults(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]maint.Rung{
		"kind = \"service\"\napply.unit = \"a.service\"":                       {"A", "B1", "B3", "D"},
		"kind = \"network\"\napply.command = [\"x\"]":                          {"B1", "B3", "D"},
		"kind = \"network\"\napply.command = [\"x\"]\nrungs = [\"B1\", \"A\"]": {"A", "B1"},
		"kind = \"qemu\"":                                        {"B2", "B3", "D"},
		"kind = \"qemu\"\nfile = \"/a.so\"":                      {"A", "B2", "B3", "D"},
		"kind = \"microcode\"":                                   {"A", "D"},
		"kind = \"microcode\"\nkernel = \"/k\"\ninitrd = \"/i\"": {"A", "B3", "D"},
		"kind = \"kernel\"\nkernel = \"/k\"\ninitrd = \"/i\"":    {"B3", "D"},
		"kind = \"kernel\"":                                      {"D"},
		"kind = \"packages\"\npackages = [\"a=1:2~3\"]\nprepare.command = [\"apt\"]": {"A", "B3", "D"},
	} {
		u, err := update.Parse("m", []byte(head+text))
		if err != nil || !slices.Equal(u.Changes[0].Rungs, want) || u.Urgency != maint.UrgencyNormal {
			t.Errorf("%s: %v, %v", text, u.Changes, err)
		}
	}
	u, err := update.Parse("m", []byte(head+"kind = \"host-leaves\"\n[[checks]]\nname = \"a\"\nhttp = \"http://a/\"\n[[checks]]\nname = \"b\"\nguests = true"))
	if err != nil {
		t.Fatal(err)
	}
	want := maint.UpdateCheck{Name: "a", When: []maint.CheckWhen{"before", "after"}, HTTP: "http://a/", Timeout: 30 * time.Second, Failures: 10, OnFail: "undo"}
	if diff := cmp.Diff(want, u.Checks[0]); diff != "" || u.Checks[1].Failures != 0 || u.Checks[1].Timeout != 0 {
		t.Error(diff, u.Checks[1])
	}
}

// TestRefused: each of these is refused with its reason, named by its change or line.
func TestRefused(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"":                                    "id \"\" is no name",
		"id = \"u\"":                          "changes nothing",
		"id = \"u\"\nurgency = \"soon\"":      `urgency "soon" is none of [normal security emergency]`,
		"id = 7":                              "line 1, column 6",
		"id = \"u\"\nwithin = 3":              "in setting within",
		"id = \"u\"\nwithin = \"3 days\"":     `"3 days" is no duration such as`,
		"id = \"u\"\nwithin = \"-1h\"":        "within -1h0m0s is not between",
		"id = \"u\"\nurgencie = \"x\"":        `m:2: there is no setting "urgencie"`,
		"id = \"u\"\nid = \"v\"":              "line 2",
		"id = \"a b\"":                        "is no name",
		"id = \"u\"\ndescription = \"a\\nb\"": "control characters",
		"id = \"u\"\nurgency = \"emergency\"\nwithin = \"1h\"":                                        "nobody is waited for",
		head + "kind = \"kernal\"":                                                                    `change c: kind "kernal" is none of`,
		head + "kind = \"livepatch\"":                                                                 "change c: has no file",
		head + "kind = \"livepatch\"\nfile = \"/a.ko\"\nrungs = [\"B1\"]":                             `rung "B1" cannot deliver a change of kind livepatch; [A] can`,
		head + "kind = \"livepatch\"\nfile = \"/a.ko\"\nrungs = []":                                   "no rung is able",
		head + "kind = \"livepatch\"\nfile = \"/a.ko\"\nrungs = [\"A\", \"A\"]":                       "rung A is named twice",
		head + "kind = \"livepatch\"\nfile = \"a.ko\"":                                                `file "a.ko" is none`,
		head + "kind = \"livepatch\"\nfile = \"/a\"":                                                  "does not end in .ko",
		head + "kind = \"livepatch\"\nfile = \"/a.ko\"\napply.command = [\"x\"]":                      "is done by Belay itself",
		head + "kind = \"qemu\"\nrungs = [\"A\"]":                                                     "has no file",
		head + "kind = \"qemu\"\nfile = \"/a.ko\"":                                                    "does not end in .so",
		head + "kind = \"qemu\"\nkernel = \"/k\"":                                                     "kernel is not of this kind",
		head + "kind = \"qemu\"\nappend = \"quiet\"":                                                  "there is no kernel",
		head + "kind = \"qemu\"\nreboot = true":                                                       "leave guests where a boot would end them",
		head + "kind = \"qemu\"\npackages = [\"--force\"]":                                            `"--force" is no package`,
		head + "kind = \"kernel\"\nrungs = [\"B3\"]":                                                  "has no kernel",
		head + "kind = \"service\"":                                                                   "restarts no unit",
		head + "kind = \"service\"\napply.unit = \"ovs\"":                                             `apply: "ovs" is no unit`,
		head + "kind = \"service\"\napply.unit = \"a.service\"\napply.job = \"kill\"":                 `"kill" is no job`,
		head + "kind = \"network\"":                                                                   "does nothing",
		head + "kind = \"network\"\napply.command = []":                                               "both a command and a unit, or none",
		head + "kind = \"network\"\napply.command = [\"\"]":                                           "program is empty",
		head + "kind = \"network\"\napply.command = [\"x\"]\napply.dir = \"tmp\"":                     "dir \"tmp\"",
		head + "kind = \"network\"\napply = {command = [\"x\"], timeout = \"1s\", expected = \"2s\"}": "is expected to take 2s, and ended after 1s",
		head + "kind = \"packages\"\napply.command = [\"x\"]":                                         "has no packages",
		head + "kind = \"packages\"\npackages = [\"a\"]\nprepare.command = [\"x\"]\nrungs = [\"B1\"]": "has nothing to apply",
		head + "kind = \"packages\"\npackages = [\"a\"]":                                              "does nothing",
		head + "kind = \"qemu\"\n[[changes.artifacts]]\npath = \"/a\"\nsha256 = \"12\"":               "64 hexadecimal digits",
		head + "kind = \"qemu\"\n[[changes]]\nname = \"c\"\nkind = \"qemu\"":                          "two changes of this name",
		head + "kind = \"host-leaves\"\n[[changes]]\nname = \"d\"\nkind = \"qemu\"":                   "nothing can be changed after the host has left",
		head + "kind = \"qemu\"\n[[checks]]\nname = \"k\"":                                            "check k: asks 0 things",
		head + "kind = \"qemu\"\n[[checks]]\nname = \"k\"\nguests = true\ntcp = \"a:1\"":              "asks 2 things",
		head + "kind = \"qemu\"\n[[checks]]\nname = \"k\"\ntcp = \"a\"":                               "tcp \"a\" is none",
		head + "kind = \"qemu\"\n[[checks]]\nname = \"k\"\nhttp = \"ftp://a\"":                        "is no URL",
		head + "kind = \"qemu\"\n[[checks]]\nname = \"k\"\nguests = true\nwhen = [\"later\"]":         "when has \"later\"",
		head + "kind = \"qemu\"\n[[checks]]\nname = \"k\"\nguests = true\non_fail = \"panic\"":        "on_fail \"panic\"",
		head + "kind = \"qemu\"\n[[checks]]\nname = \"k\"\ntcp = \"a:1\"\ntimeout = \"2h\"":           "timeout 2h0m0s is not between",
		head + "kind = \"qemu\"\n[[checks]]\nname = \"k\"\ntcp = \"a:1\"\nfailures = -1":              "failures -1",
		head + "kind = \"qemu\"\n[[checks]]\nname = \"k\"\nguests = true\nfailures = 5":               "asks guests",
		strings.Repeat("#", 600<<10):                                                                  "more than any manifest",
	} {
		_, err := update.Parse("m", []byte(text))
		var p *maint.Problem
		var r *maint.Refusal
		if !errors.As(err, &p) && !errors.As(err, &r) {
			t.Errorf("%.80s: %v", text, err)
			continue
		}
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: %v, want %q", text, err, want)
		}
	}
}

// FuzzParse: what is taken can be planned, and is written so that it is taken as the same.
func FuzzParse(f *testing.F) {
	for _, text := range examples(f) {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		u, err := update.Parse("m", text)
		if err != nil {
			return
		}
		again, err := update.Format(u)
		if err != nil {
			t.Fatal(err)
		}
		if u2, err := update.Parse("m", again); err != nil || string(plan.Make(u, maint.Ladder{}, maint.PlanOptions{}).Encode()) != string(plan.Make(u2, maint.Ladder{}, maint.PlanOptions{}).Encode()) {
			t.Errorf("%v: %s", err, again)
		}
	})
}
