package hoststep

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

const (
	// maxArguments and maxBytes are far more than anybody writes, and less
	// than what Linux refuses.
	maxArguments = 1024
	maxBytes     = 100 << 10
	maxShown     = 250 // bytes of what is wrong, which the longest unit's name has
	// minTimeout and maxTimeout: what is outside is a mistake with the unit.
	minTimeout = 10 * time.Millisecond
	maxTimeout = 24 * time.Hour
)

var (
	validUnit = regexp.MustCompile(`^[A-Za-z0-9:_.\\@-]{1,240}\.(service|socket|target|mount|automount|swap|timer|path|slice|scope|device)$`)
	jobs      = []string{"restart", "reload", "start", "stop"}
)

// Check gives every reason why a step cannot be run on this host. It changes
// nothing. What it sees is what belayd sees: a sandbox around belayd can hide
// files from it.
func (r *Runner) Check(ctx context.Context, step maint.HostStep) []maint.Problem {
	problems := Shape(step)
	if len(problems) > 0 {
		return problems
	}
	if step.Unit != "" {
		return r.checkUnit(ctx, step)
	}
	if p := checkProgram(step.Command[0]); p != nil {
		problems = append(problems, *p)
	}
	if p := checkDir(step.Dir); p != nil {
		problems = append(problems, *p)
	}
	return problems
}

// subject names a step in a problem.
func subject(step maint.HostStep) string {
	if step.Unit != "" {
		return "host step " + short(jobOf(step)) + " " + short(step.Unit)
	}
	if len(step.Command) == 0 {
		return "host step"
	}
	return "host step " + short(step.Command[0])
}

// short is the beginning of a text, for a problem.
func short(s string) string {
	if len(s) <= maxShown {
		return valid(s)
	}
	return valid(s[:maxShown]) + "…"
}

// Shape gives what is wrong with a step on any host, which it does not ask. What
// it says is short, however long what it is given.
func Shape(step maint.HostStep) (problems []maint.Problem) {
	bad := func(remedy, reason string, args ...any) {
		problems = append(problems, *maint.Problemf(maint.CodeBadRequest, subject(step), remedy, reason, args...))
	}
	switch {
	case len(step.Command) > 0 && step.Unit != "":
		bad("make two operations of it, or a script", "it has both a command and a unit")
	case step.Unit != "":
		if !validUnit.MatchString(step.Unit) {
			bad("give its full name, like openvswitch-switch.service", "%q is not the name of a unit", short(step.Unit))
		}
		if !slices.Contains(jobs, jobOf(step)) {
			bad("say one of "+strings.Join(jobs, ", "), "%q is no job of a unit", short(step.Job))
		}
		if step.Dir != "" {
			bad("leave the folder out", "a unit's job runs in no folder")
		}
	case len(step.Command) == 0 || step.Command[0] == "":
		bad("give a command, or a unit and its job", "there is nothing to do")
	case strings.Contains(step.Command[0], "/") && !filepath.IsAbs(step.Command[0]):
		bad("give its full path", "the program's path is relative to no known folder")
	case step.Job != "":
		bad("leave the job out", "a job is for a unit, not for a command")
	}
	size := len(step.Dir)
	for _, arg := range step.Command {
		size += len(arg)
		if strings.Contains(arg, "\x00") {
			bad("leave it out", "an argument has a NUL byte")
			break
		}
	}
	if strings.Contains(step.Dir, "\x00") {
		bad("leave it out", "the folder's name has a NUL byte")
	}
	if len(step.Command) > maxArguments || size > maxBytes {
		bad("put it into a script on the host", "%d arguments of %d bytes are more than %d of %d", len(step.Command), size, maxArguments, maxBytes)
	}
	if t := step.Timeout; t != 0 && (t < minTimeout || t > maxTimeout) {
		bad(fmt.Sprintf("give one between %v and %v, or none", minTimeout, maxTimeout), "a timeout of %v makes no sense", t)
	}
	return problems
}

func checkProgram(program string) *maint.Problem {
	subject := subject(maint.HostStep{Command: []string{program}})
	problem := func(remedy, reason string, args ...any) *maint.Problem {
		return maint.Problemf(maint.CodeBadRequest, subject, remedy, reason, args...)
	}
	file, err := find(program)
	if err != nil {
		return problem("install it, or give its full path", "there is no such program in %s", searchPath)
	}
	st, err := os.Stat(file)
	switch {
	case os.IsNotExist(err):
		return problem("install it, or correct the path", "there is no such file")
	case err != nil:
		return problem("correct the path", "%v", err)
	case st.IsDir():
		return problem("give a program", "it is a folder")
	case !st.Mode().IsRegular():
		return problem("give a program", "it is not a file")
	case st.Mode()&0o111 == 0:
		return problem("make it executable (chmod +x)", "it is not executable")
	}
	return nil
}

func checkDir(dir string) *maint.Problem {
	if dir == "" {
		return nil
	}
	problem := func(reason string, args ...any) *maint.Problem {
		return maint.Problemf(maint.CodeBadRequest, "folder "+short(dir), "make it, or name another", reason, args...)
	}
	if !filepath.IsAbs(dir) {
		return problem("it is not a full path")
	}
	if st, err := os.Stat(dir); os.IsNotExist(err) {
		return problem("it does not exist")
	} else if err != nil {
		return problem("%v", err)
	} else if !st.IsDir() {
		return problem("it is not a folder")
	}
	return nil
}

func (r *Runner) checkUnit(ctx context.Context, step maint.HostStep) []maint.Problem {
	problem := func(code maint.Code, remedy, reason string, args ...any) []maint.Problem {
		return []maint.Problem{*maint.Problemf(code, subject(step), remedy, reason, args...)}
	}
	if r.cfg.Systemd == nil {
		return problem(maint.CodeBadRequest, "give a command", "systemd does not run here")
	}
	u, err := r.cfg.Systemd.Unit(ctx, step.Unit)
	if err != nil {
		return problem(maint.CodeFailed, "see to systemd", "systemd cannot be asked: %v", err)
	}
	if u.Load != "loaded" {
		return problem(maint.CodeBadRequest, "see systemctl status "+step.Unit, "systemd has not loaded it: %s %s", u.Load, u.LoadError)
	}
	job := jobOf(step)
	can := map[string]bool{"restart": u.CanStart && u.CanStop, "start": u.CanStart, "stop": u.CanStop, "reload": u.CanReload}[job]
	if !can {
		return problem(maint.CodeBadRequest, "choose another job", "the unit does not allow it")
	}
	if job == "reload" && u.Active != "active" {
		return problem(maint.CodeBadRequest, "start it", "only what runs can be reloaded; it is %s", u)
	}
	if u.Job != 0 {
		return problem(maint.CodeHostBusy, "wait for it, see systemctl list-jobs", "systemd has a job for the unit already: it is %s", u)
	}
	return nil
}
