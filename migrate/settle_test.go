package migrate

import (
	"strings"
	"testing"

	"belay/agent/maint"
)

// People paste what they are told: a guest's name is one word of every command.
func TestRemediesAreWords(t *testing.T) {
	t.Parallel()
	const name, word = "web 1; reboot", "'web 1; reboot'"
	m := &Migration{Op: "mig-1", Guest: name, From: "a", To: "b"}
	for _, state := range []State{Unknown, Both, SecondCopy, Neither, Switching, Doubtful, Stranded, Gone, OldCopy, PausedTwice, PostCopyLostHere, PostCopyLostThere} {
		for _, came := range []bool{false, true} {
			p := maint.AsProblem(m.unsettled(situation{Verdict: Verdict{State: state}, came: came}), "", "")
			if p.Remedy == "" {
				t.Errorf("%s: no remedy", state)
			}
			for _, verb := range []string{"--reason ", "destroy ", "resume ", "start ", "--keep-nvram ", "domstate "} {
				for i, rest := range strings.Split(p.Remedy, "virsh ")[1:] {
					if after, found := strings.CutPrefix(rest, verb); found && strings.HasPrefix(after, "web") {
						t.Errorf("%s, command %d: %q", state, i, p.Remedy)
					}
				}
			}
			if strings.Contains(strings.NewReplacer(word, "", "/var/log/libvirt/qemu/"+name, "").Replace(p.Remedy), "web 1") {
				t.Errorf("%s: %q", state, p.Remedy)
			}
		}
	}
}
