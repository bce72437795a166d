package update

import (
	"encoding/hex"
	"fmt"
	"net"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"belay/agent/maint"
)

// The most that is taken of a manifest.
const (
	maxChanges = 16
	maxMany    = 256 // of anything else
	maxText    = 4096
	maxWait    = 90 * 24 * time.Hour
	maxStep    = 24 * time.Hour
)

var (
	name   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$`)
	unit   = regexp.MustCompile(`^[A-Za-z0-9:_.@\\-]{1,200}\.(service|socket|target|timer|mount|path|slice)$`)
	debian = regexp.MustCompile(`^[a-z0-9][A-Za-z0-9+.:~=_-]{0,199}$`)
)

// checker collects what is wrong.
type checker struct {
	subject  string
	problems []maint.Problem
}

func (c *checker) add(remedy, format string, args ...any) {
	c.problems = append(c.problems, *maint.Problemf(maint.CodeManifest, c.subject, remedy, format, args...))
}

// Check lists what is wrong with an update.
func Check(u maint.Update) []maint.Problem {
	c := &checker{subject: "manifest"}
	if !name.MatchString(u.ID) {
		c.add("write letters, digits and . _ + -, 64 at most", "id %.70q is no name", u.ID)
	}
	if !text(u.Description) {
		c.add("write one line", "description is too long, or has control characters")
	}
	if !slices.Contains(maint.Urgencies, u.Urgency) {
		c.add("", "urgency %.20q is none of %v", u.Urgency, maint.Urgencies)
	}
	switch {
	case u.Within < 0 || u.Within > maxWait:
		c.add("", "within %s is not between 0 and %s", u.Within, maxWait)
	case u.Within != 0 && u.Urgency == maint.UrgencyEmergency:
		c.add("take it out, or choose another urgency", "within: in an emergency nobody is waited for")
	}
	if len(u.Covers) > maxMany || slices.ContainsFunc(u.Covers, func(s string) bool { return s == "" || !text(s) }) {
		c.add("write one entry for each: \"CVE-2026-1234\"", "covers has too many entries, or some that are no names")
	}
	switch n := len(u.Changes); {
	case n == 0:
		c.add("add one: [[changes]]", "changes nothing")
	case n > maxChanges:
		c.add("make several manifests of it", "has %d changes, and can have %d", n, maxChanges)
		return c.problems
	}
	seen := make(map[string]bool)
	for i, change := range u.Changes {
		c.subject = fmt.Sprintf("change %d", i+1)
		if !name.MatchString(change.Name) {
			c.add("write letters, digits and . _ + -, 64 at most", "name %.70q is no name", change.Name)
		} else {
			c.subject = "change " + change.Name
		}
		if seen[change.Name] {
			c.add("name it otherwise", "there are two changes of this name")
		}
		seen[change.Name] = true
		c.change(change)
		if change.Kind == maint.ChangeLeave && i < len(u.Changes)-1 {
			c.add("put it last", "nothing can be changed after the host has left")
		}
	}
	clear(seen)
	if len(u.Checks) > maxMany {
		c.subject = "manifest"
		c.add("", "has %d checks, and can have %d", len(u.Checks), maxMany)
		return c.problems
	}
	for i, k := range u.Checks {
		c.subject = fmt.Sprintf("check %d", i+1)
		if !name.MatchString(k.Name) {
			c.add("write letters, digits and . _ + -, 64 at most", "name %.70q is no name", k.Name)
		} else {
			c.subject = "check " + k.Name
		}
		if seen[k.Name] {
			c.add("name it otherwise", "there are two checks of this name")
		}
		seen[k.Name] = true
		c.check(k)
	}
	return c.problems
}

// change checks one.
func (c *checker) change(m maint.Change) {
	able := m.Kind.Rungs()
	if able == nil {
		c.add("", "kind %.20q is none of %v", m.Kind, maint.ChangeKinds)
		return
	}
	if len(m.Rungs) == 0 {
		c.add("leave rungs out for all that can deliver it", "no rung is able to deliver it")
	}
	for i, r := range m.Rungs {
		switch {
		case !slices.Contains(able, r):
			c.add("name some of those, or leave rungs out", "rung %.10q cannot deliver a change of kind %s; %v can", r, m.Kind, able)
		case slices.Contains(m.Rungs[:i], r):
			c.add("name it once", "rung %s is named twice", r)
		}
	}
	hot := m.Kind == maint.ChangeQEMU && slices.Contains(m.Rungs, maint.RungA)
	if m.Apply == nil && slices.Contains(m.Rungs, maint.RungB1) && m.Kind != maint.ChangeService {
		c.add("say what is done while guests are held: [changes.apply]", "can be delivered by rung B1, and has nothing to apply")
	}
	c.own("file", m.File, m.Kind == maint.ChangeLivepatch || m.Kind == maint.ChangeQEMU, m.Kind == maint.ChangeLivepatch || hot)
	boots := m.Kind.BootsKernel() && slices.Contains(m.Rungs, maint.RungB3)
	c.own("kernel", m.Kernel, m.Kind.BootsKernel(), boots)
	c.own("initrd", m.Initrd, m.Kind.BootsKernel(), boots)
	ext := ".ko"
	if m.Kind == maint.ChangeQEMU {
		ext = ".so"
	}
	if m.File != "" && !strings.HasSuffix(m.File, ext) {
		c.add("name the livepatch; its manifest and signature are beside it", "file %.70q does not end in %s", m.File, ext)
	}
	if m.Append != "" && m.Kernel == "" {
		c.add("name the kernel, or take it out", "append is a kernel's command line, and there is no kernel")
	}
	if !text(m.Append) || !text(m.Version) {
		c.add("", "append or version is too long, or has control characters")
	}
	if len(m.Packages) > maxMany {
		c.add("", "has %d packages, and can have %d", len(m.Packages), maxMany)
	}
	for _, p := range m.Packages {
		if !debian.MatchString(p) {
			c.add("write NAME or NAME=VERSION", "%.70q is no package", p)
		}
	}
	if m.Reboot && slices.ContainsFunc(m.Rungs, func(r maint.Rung) bool { return r != maint.RungB3 && r != maint.RungD }) {
		c.add("have rungs be D, or B3 and D, or take reboot out", "reboot: %v leave guests where a boot would end them", m.Rungs)
	}
	c.duration("expected", m.Expected)
	unfelt := m.Kind == maint.ChangeLivepatch || m.Kind == maint.ChangeLeave
	for _, s := range []struct {
		what string
		step *maint.ChangeStep
	}{{"prepare", m.Prepare}, {"apply", m.Apply}, {"verify", m.Verify}, {"undo", m.Undo}} {
		if s.step != nil && unfelt && s.what != "prepare" {
			c.add("take it out, or make a change of another kind of it", "%s: a change of kind %s is done by Belay itself", s.what, m.Kind)
		}
		c.step(s.what, s.step)
	}
	switch m.Kind {
	case maint.ChangeService:
		if m.Apply == nil || m.Apply.Unit == "" {
			c.add("name it: [changes.apply] unit = \"openvswitch-switch.service\"", "restarts no unit")
		}
	case maint.ChangePackages:
		if len(m.Packages) == 0 {
			c.add("list them, or choose another kind", "has no packages")
		}
		if m.Apply == nil && m.Prepare == nil {
			c.add("say how they are installed: [changes.apply] command = [...], or [changes.prepare] where guests feel nothing of it", "does nothing")
		}
	case maint.ChangeSysctl, maint.ChangeNetwork, maint.ChangeFirmware:
		if m.Apply == nil {
			c.add("say how: [changes.apply] command = [...]", "does nothing")
		}
	}
	if len(m.Artifacts) > maxMany {
		c.add("", "has %d artifacts, and can have %d", len(m.Artifacts), maxMany)
	}
	for i, a := range m.Artifacts {
		c.path("artifact", a.Path)
		if b, err := hex.DecodeString(a.SHA256); err != nil || len(b) != 32 {
			c.add("write what sha256sum prints", "artifact %.70q: sha256 %.70q is not 64 hexadecimal digits", a.Path, a.SHA256)
		}
		if a.Signature != "" {
			c.path("signature", a.Signature)
		}
		if slices.ContainsFunc(m.Artifacts[:i], func(o maint.Artifact) bool { return o.Path == a.Path }) {
			c.add("name it once", "artifact %.70q is named twice", a.Path)
		}
	}
}

// own checks a path that only some kinds have, and some must.
func (c *checker) own(what, file string, may, must bool) {
	switch {
	case file != "" && !may:
		c.add("take it out", "%s is not of this kind", what)
	case file == "" && must:
		c.add("name it: "+what+" = \"/...\"", "has no %s", what)
	case file != "":
		c.path(what, file)
	}
}

func (c *checker) path(what, file string) {
	if !path.IsAbs(file) || path.Clean(file) != file || !text(file) {
		c.add("write an absolute path on the host, without . and ..", "%s %.70q is none", what, file)
	}
}

func (c *checker) duration(what string, d time.Duration) {
	if d < 0 || d > maxStep {
		c.add("", "%s %s is not between 0 and %s", what, d, maxStep)
	}
}

func (c *checker) step(what string, s *maint.ChangeStep) {
	if s == nil {
		return
	}
	switch {
	case (len(s.Command) == 0) == (s.Unit == ""):
		c.add("give command = [...], or unit = \"...\"", "%s has both a command and a unit, or none", what)
	case s.Unit != "" && !unit.MatchString(s.Unit):
		c.add("write its whole name: \"openvswitch-switch.service\"", "%s: %.70q is no unit", what, s.Unit)
	case s.Unit != "" && s.Job != "" && !slices.Contains([]string{"restart", "reload", "start", "stop"}, s.Job):
		c.add("use restart, reload, start or stop", "%s: %.20q is no job of a unit", what, s.Job)
	case s.Unit == "" && s.Job != "":
		c.add("take it out, or name a unit", "%s: job is of units", what)
	case len(s.Command) > maxMany || slices.ContainsFunc(s.Command, func(w string) bool { return len(w) > maxText || strings.ContainsRune(w, 0) }):
		c.add("put it into a script", "%s: the command is too long, or has zero bytes", what)
	case len(s.Command) > 0 && s.Command[0] == "":
		c.add("name the program", "%s: the command's program is empty", what)
	}
	if s.Dir != "" {
		c.path(what+": dir", s.Dir)
	}
	c.duration(what+": timeout", s.Timeout)
	c.duration(what+": expected", s.Expected)
	if s.Timeout != 0 && s.Expected > s.Timeout {
		c.add("give it more time", "%s: is expected to take %s, and ended after %s", what, s.Expected, s.Timeout)
	}
}

func (c *checker) check(k maint.UpdateCheck) {
	asks := 0
	for _, set := range []bool{len(k.Command) > 0, k.Unit != "", k.TCP != "", k.HTTP != "", k.Guests} {
		if set {
			asks++
		}
	}
	if asks != 1 {
		c.add("give one of command, unit, tcp, http and guests; make several checks of several", "asks %d things", asks)
	}
	switch {
	case k.Unit != "" && !unit.MatchString(k.Unit):
		c.add("write its whole name: \"openvswitch-switch.service\"", "%.70q is no unit", k.Unit)
	case k.TCP != "":
		if host, port, err := net.SplitHostPort(k.TCP); err != nil || host == "" || port == "" || !text(k.TCP) {
			c.add("write host:port", "tcp %.70q is none", k.TCP)
		}
	case k.HTTP != "":
		if u, err := url.Parse(k.HTTP); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || !text(k.HTTP) {
			c.add("write http://host/path", "http %.70q is no URL", k.HTTP)
		}
	case len(k.Command) > 0:
		c.step("command", &maint.ChangeStep{HostStep: maint.HostStep{Command: k.Command}})
	}
	if len(k.When) == 0 {
		c.add("leave when out for before and after", "is never asked")
	}
	for i, w := range k.When {
		if w != maint.CheckBefore && w != maint.CheckBetween && w != maint.CheckAfter || slices.Contains(k.When[:i], w) {
			c.add("name some of before, between and after, each once", "when has %.20q", w)
		}
	}
	if k.OnFail != maint.FailUndo && k.OnFail != maint.FailStop && k.OnFail != maint.FailGoOn {
		c.add("", "on_fail %.20q is none of %s, %s and %s", k.OnFail, maint.FailUndo, maint.FailStop, maint.FailGoOn)
	}
	const most = time.Hour
	if k.WarmUp < 0 || k.WarmUp > most || k.Timeout < 0 || k.Timeout == 0 && !k.Guests || k.Timeout > most {
		c.add("", "warm_up %s or timeout %s is not between 0 and %s", k.WarmUp, k.Timeout, most)
	}
	if k.Guests {
		if k.Timeout != 0 || k.Failures != 0 {
			c.add("take them out: each guest has its own, [[health]] in belayd.toml", "has a timeout or failures, and asks guests")
		}
		return
	}
	if k.Failures < 1 || k.Failures > 1000 {
		c.add("", "failures %d is not between 1 and 1000", k.Failures)
	}
}

// text is a line that can be shown.
func text(s string) bool {
	return len(s) <= maxText && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}
