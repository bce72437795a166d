package migrate

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestStatesHaveRunbooks: each state of a guest in which a person is asked has a section in the
// runbooks, by its words; so has each in which the guest is to be started again, for where it
// cannot be.
func TestStatesHaveRunbooks(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../docs/runbooks.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := regexp.MustCompile(`(?m)^### stuck: (.*)$`).FindAllStringSubmatch(string(text), -1)
	n := 0
	for v := range short { // all verdicts that there are
		switch {
		case v.Action == Alarm, v.Action == Wait && !v.PostCopy(), v.Action == ResumeSource, v.Action == StartSource:
		default:
			continue
		}
		n++
		has := false
		for _, s := range sections {
			has = has || strings.HasPrefix(string(v.State), s[1])
		}
		if !has {
			t.Errorf("a guest that is %q: the runbooks have no section for it", v.State)
		}
	}
	if n < 10 {
		t.Errorf("only %d states", n)
	}
}
