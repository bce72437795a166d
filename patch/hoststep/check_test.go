package hoststep_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/hoststep"
)

// TestShapeIsShort: what is said of a step is, however long the step is.
func TestShapeIsShort(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 900_000)
	for name, step := range map[string]maint.HostStep{
		"unit":           {Unit: long},
		"unit and job":   {Unit: long + ".service", Job: long, Dir: long},
		"program":        {Command: []string{long}},
		"relative":       {Command: []string{"./" + long}, Dir: long},
		"arguments":      {Command: make([]string, 300_000)},
		"command's job":  {Command: []string{"true"}, Job: long},
		"both":           {Command: []string{long}, Unit: long, Job: long},
		"long, NUL, job": {Command: []string{"true", long + "\x00"}, Dir: long + "\x00"},
	} {
		problems := hoststep.Shape(step)
		b, err := json.Marshal(problems)
		if len(problems) == 0 || err != nil || len(b) > 10_000 {
			t.Errorf("%s: %d problems of %d bytes: %.500s", name, len(problems), len(b), b)
		}
	}
	if problems := hoststep.Shape(maint.HostStep{Unit: strings.Repeat("x", 240) + ".automount", Job: "stop"}); len(problems) > 0 {
		t.Errorf("of the longest unit: %+v", problems)
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	plain, good := filepath.Join(dir, "plain"), filepath.Join(dir, "good")
	for file, mode := range map[string]os.FileMode{plain: 0o644, good: 0o755} {
		if err := os.WriteFile(file, []byte("#!/bin/sh\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	systemd := &fakeSystemd{units: map[string]hoststep.UnitState{
		"ok.service":      {Load: "loaded", Active: "active", Sub: "running", CanStart: true, CanStop: true, CanReload: true},
		"manual.service":  {Load: "loaded", Active: "active", CanStop: true},
		"off.service":     {Load: "loaded", Active: "inactive", CanStart: true, CanStop: true, CanReload: true},
		"masked.service":  {Load: "masked"},
		"missing.service": {Load: "not-found", LoadError: "Unit missing.service not found."},
		"busy.service":    {Load: "loaded", Active: "deactivating", CanStart: true, CanStop: true, Job: 17},
	}}
	with := hoststep.New(hoststep.Config{Dir: dir, Systemd: systemd})
	without := hoststep.New(hoststep.Config{Dir: dir})
	broken := hoststep.New(hoststep.Config{Dir: dir, Systemd: &fakeSystemd{lookError: errors.New("connection refused")}})
	command := func(args ...string) maint.HostStep { return maint.HostStep{Command: args} }
	unit := func(name, job string) maint.HostStep { return maint.HostStep{Unit: name, Job: job} }
	in := func(s maint.HostStep, dir string) maint.HostStep { s.Dir = dir; return s }
	within := func(s maint.HostStep, d time.Duration) maint.HostStep { s.Timeout = d; return s }

	for _, c := range []struct {
		on   *hoststep.Runner
		step maint.HostStep
		want string // "": no problem
	}{
		{without, command("true"), ""},
		{without, command("/bin/true", "a\nb", "", "--", "é"), ""},
		{without, command(good), ""},
		{without, in(command("true"), dir), ""},
		{without, within(command("true"), time.Hour), ""},
		{without, maint.HostStep{}, "nothing to do"},
		{without, command(""), "nothing to do"},
		{without, command("no-such-program-here"), "no such program"},
		{without, command("/no/such/file"), "no such file"},
		{without, command("bin/true"), "relative"},
		{without, command("./true"), "relative"},
		{without, command(plain), "not executable"},
		{without, command(plain + "/below"), "not a directory"},
		{without, command(dir), "a folder"},
		{without, command("/dev/null"), "not a file"},
		{without, command("true", "a\x00b"), "NUL"},
		{without, command("tr\x00ue"), "NUL"},
		{without, command(append([]string{"true"}, make([]string, 2000)...)...), "more than"},
		{without, command("true", strings.Repeat("x", 200<<10)), "more than"},
		{without, in(command("true"), "/no/such/folder"), "does not exist"},
		{without, in(command("true"), plain), "not a folder"},
		{without, in(command("true"), "tmp"), "not a full path"},
		{without, in(command("true"), "/\x00"), "NUL"},
		{without, within(command("true"), -time.Second), "no sense"},
		{without, within(command("true"), time.Millisecond), "no sense"},
		{without, within(command("true"), 1000*time.Hour), "no sense"},
		{without, maint.HostStep{Command: []string{"true"}, Job: "start"}, "not for a command"},
		{without, maint.HostStep{Command: []string{"true"}, Unit: "ok.service"}, "both"},
		{without, unit("ok.service", ""), "systemd does not run"},
		{with, unit("ok.service", ""), ""},
		{with, unit("ok.service", "restart"), ""},
		{with, unit("ok.service", "reload"), ""},
		{with, unit("ok.service", "stop"), ""},
		{with, unit("off.service", "start"), ""},
		{with, unit("ok", ""), "not the name of a unit"},
		{with, unit("../ok.service", ""), "not the name of a unit"},
		{with, unit("ok.service\x00", ""), "not the name of a unit"},
		{with, unit("*.service", ""), "not the name of a unit"},
		{with, unit("ok.service", "kill"), "no job"},
		{with, in(unit("ok.service", ""), "/tmp"), "in no folder"},
		{with, unit("manual.service", ""), "does not allow"},
		{with, unit("manual.service", "reload"), "does not allow"},
		{with, unit("off.service", "reload"), "only what runs"},
		{with, unit("masked.service", ""), "masked"},
		{with, unit("missing.service", ""), "not found"},
		{with, unit("busy.service", ""), "job 17"},
		{broken, unit("ok.service", ""), "connection refused"},
	} {
		problems := c.on.Check(context.Background(), c.step)
		if c.want == "" && len(problems) == 0 {
			continue
		}
		if c.want == "" || len(problems) == 0 {
			t.Errorf("%.200q: %.300v, want %q", c.step, problems, c.want)
			continue
		}
		p := problems[0]
		if !strings.Contains(p.Reason, c.want) || p.Subject == "" || p.Remedy == "" || p.Code == "" || len(p.Error()) > 500 {
			t.Errorf("%.200q: %+v, want %q", c.step, p, c.want)
		}
	}
	if all := without.Check(context.Background(), in(command("/no/such/file"), "/no/such/folder")); len(all) != 2 {
		t.Errorf("not all problems are told: %v", all)
	}
	if left, _ := filepath.Glob(dir + "/*"); len(left) != 2 {
		t.Errorf("checking has left %v", left)
	}
	if len(systemd.asked) > 0 {
		t.Errorf("checking has asked for jobs: %v", systemd.asked)
	}
}
