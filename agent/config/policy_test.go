package config

import (
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
)

// TestPolicyText: a policy is read from a guest's definition as it was written there, and an
// empty list, which says none, is not one that says nothing.
func TestPolicyText(t *testing.T) {
	t.Parallel()
	for name, p := range map[string]maint.GuestPolicy{
		"nothing": {},
		"none":    {Refuse: []maint.Rung{}, Prefer: []maint.Rung{}, Ask: []maint.Rung{}, Windows: []maint.Window{}},
		"all": {MaxPause: 1500 * time.Millisecond, MaxBlackout: time.Second, Refuse: []maint.Rung{"B3"}, Prefer: []maint.Rung{"D"}, Ask: []maint.Rung{"B1", "B2"},
			Notice: 24 * time.Hour, SecurityNotice: time.Hour, AntiAffinity: []string{"a b", "ü\"<&>"}, Priority: -3, Owner: "shop ]]>",
			Windows: []maint.Window{{Rule: "FREQ=DAILY;BYHOUR=2", Zone: "Europe/Berlin", Length: 4 * time.Hour, From: "2026-12-01", Except: []string{"2026-12-24"}},
				{Rule: "FREQ=WEEKLY;BYDAY=SA;BYHOUR=2", Zone: "UTC", Length: 2 * time.Hour}}},
	} {
		text, err := FormatPolicy(p)
		if err != nil || (text == "") != (name == "nothing") {
			t.Errorf("%s: %q, %v", name, text, err)
		}
		got, err := ParsePolicy("guest web-1", text)
		if d := cmp.Diff(p, got); err != nil || d != "" {
			t.Errorf("%s: %v\n%s\n%s", name, err, text, d)
		}
	}
	for text, want := range map[string]string{
		"max_pause = 3":            "cannot be read",
		"refuse = \"B1\"":          "cannot be read",
		"maxpause = \"3s\"":        `there is no setting "maxpause"`,
		strings.Repeat("#", 1<<17): "128 KiB",
	} {
		if _, err := ParsePolicy("guest web-1", text); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "guest web-1") {
			t.Errorf("%.30s: %v", text, err)
		}
	}
}

// FuzzPolicyText: whatever is in a guest's definition is read, or refused; what is read can
// be judged and written.
func FuzzPolicyText(f *testing.F) {
	f.Add("max_pause = \"1s\"\nrefuse = []\nwindows = [{rule = \"FREQ=DAILY\", zone = \"UTC\", length = \"2h\"}]")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParsePolicy("guest web-1", text)
		if err != nil {
			return
		}
		p.Check("guest web-1")
		again, err := FormatPolicy(p)
		if err != nil {
			t.Fatal(err)
		}
		if p2, err := ParsePolicy("guest web-1", again); err != nil || cmp.Diff(p.Over(maint.GuestPolicy{}), p2.Over(maint.GuestPolicy{})) != "" {
			t.Errorf("%q is written as %q: %v", text, again, err)
		}
	})
}

// TestPolicyDocument: the example of docs/policy.md can be taken, and every setting is there.
func TestPolicyDocument(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```toml\n(.*?)```").FindSubmatch(b)
	if block == nil {
		t.Fatal("it has no TOML")
	}
	c, err := Load(one(t, string(block[1])))
	if err != nil || len(c.Policy.Guests) != 1 || len(c.Policy.Guests[0].Windows) != 1 {
		t.Errorf("%+v, %v", c.Policy, err)
	}
	for _, name := range []string{"max_pause", "max_blackout", "refuse", "prefer", "ask", "notice", "security_notice", "windows", "anti_affinity", "priority", "owner"} {
		if !strings.Contains(string(b), "| `"+name+"` | `--") {
			t.Errorf("it says nothing of %s", name)
		}
	}
}

// TestPolicyRefused: what contradicts itself is refused when belayd starts.
func TestPolicyRefused(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"[policy]\nrefuse = [\"B1\"]\nprefer = [\"B\"]":                             "policy: refuses and prefers [B1]",
		"[policy]\nrefuse = [\"B\", \"D\"]":                                         "refuses every rung that is felt",
		"[policy]\nowner = \"me\"":                                                  "put them into [[policy.guests]]",
		"[[policy.guests]]\nmax_pause = \"1s\"":                                     "policy.guests, number 1: is for no guests",
		"[[policy.guests]]\nnames = [\"a\"]\nmax_pause = \"48h\"":                   "max_pause 48h0m0s is out of range",
		"[[policy.guests]]\nnames = [\"a\"]\nask = [\"D\"]\nrefuse = [\"D\"]":       "refuses [D], and has them ask",
		"[[policy.guests]]\nnames = [\"a\"]\nnotice = \"1m\"":                       "notice 1m0s is not between 15m0s and 168h0m0s",
		"[[policy.guests]]\nnames = [\"a\"]\nrefuse = [\"E\"]":                      `refuse has "E"`,
		"[[policy.guests]]\nnames = [\"a\"]\nnotices = \"1h\"":                      "there is no setting",
		"[[policy.guests]]\nnames = [\"a\"]\npriority = 1000":                       "priority 1000 is not between",
		"[[policy.guests]]\nnames = [\"a\"]\nnotice=\"1h\"\nsecurity_notice=\"2h\"": "security_notice 2h0m0s is longer than notice",
	} {
		if _, err := Load(one(t, text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}
