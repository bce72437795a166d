// Package update reads and writes update manifests: TOML files that say what is to be
// changed of a host. docs/manifest.md is their reference, docs/examples has some.
package update

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"

	"belay/agent/maint"
)

// maxManifest is more than any manifest has, bytes.
const maxManifest = 512 << 10

// Duration is a time.Duration written as "30s" or "1h30m". It is a struct, so that a number
// without its unit does not fit.
type Duration struct{ time.Duration }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return unstable.NewParserError(b, "%q is no duration such as \"30s\" or \"72h\"", b)
	}
	d.Duration = v
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// file is a manifest as it is written.
type file struct {
	ID          string    `toml:"id"`
	Description string    `toml:"description,omitempty"`
	Urgency     string    `toml:"urgency,omitempty"`
	Covers      []string  `toml:"covers,omitempty"`
	Within      *Duration `toml:"within,omitempty"`
	Changes     []change  `toml:"changes"`
	Checks      []check   `toml:"checks,omitempty"`
}

type change struct {
	Name      string     `toml:"name"`
	Kind      string     `toml:"kind"`
	Rungs     []string   `toml:"rungs,omitempty"`
	File      string     `toml:"file,omitempty"`
	Kernel    string     `toml:"kernel,omitempty"`
	Initrd    string     `toml:"initrd,omitempty"`
	Append    string     `toml:"append,omitempty"`
	Version   string     `toml:"version,omitempty"`
	Packages  []string   `toml:"packages,omitempty,multiline"`
	Reboot    bool       `toml:"reboot,omitempty"`
	Expected  *Duration  `toml:"expected,omitempty"`
	Prepare   *step      `toml:"prepare,omitempty"`
	Apply     *step      `toml:"apply,omitempty"`
	Verify    *step      `toml:"verify,omitempty"`
	Undo      *step      `toml:"undo,omitempty"`
	Artifacts []artifact `toml:"artifacts,omitempty"`
}

type step struct {
	Command  []string  `toml:"command,omitempty"`
	Dir      string    `toml:"dir,omitempty"`
	Unit     string    `toml:"unit,omitempty"`
	Job      string    `toml:"job,omitempty"`
	Timeout  *Duration `toml:"timeout,omitempty"`
	Expected *Duration `toml:"expected,omitempty"`
}

type artifact struct {
	Path      string `toml:"path"`
	SHA256    string `toml:"sha256"`
	Signature string `toml:"signature,omitempty"`
}

type check struct {
	Name     string    `toml:"name"`
	When     []string  `toml:"when,omitempty"`
	Command  []string  `toml:"command,omitempty"`
	Unit     string    `toml:"unit,omitempty"`
	TCP      string    `toml:"tcp,omitempty"`
	HTTP     string    `toml:"http,omitempty"`
	Guests   bool      `toml:"guests,omitempty"`
	WarmUp   *Duration `toml:"warm_up,omitempty"`
	Timeout  *Duration `toml:"timeout,omitempty"`
	Failures int       `toml:"failures,omitempty"`
	OnFail   string    `toml:"on_fail,omitempty"`
}

// Parse reads a manifest, and fills in what it leaves out. Its errors are *maint.Problem,
// or a *maint.Refusal that has all that is wrong with it.
func Parse(name string, text []byte) (maint.Update, error) {
	bad := func(remedy, format string, args ...any) (maint.Update, error) {
		return maint.Update{}, maint.Problemf(maint.CodeManifest, "manifest "+name, remedy, format, args...)
	}
	if len(text) > maxManifest {
		return bad("name a manifest", "has %d KiB, more than any manifest", len(text)>>10)
	}
	var f file
	err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&f)
	var missing *toml.StrictMissingError
	var wrong *toml.DecodeError
	switch {
	case err == nil:
	case errors.As(err, &missing) && len(missing.Errors) > 0:
		var ps []maint.Problem
		for _, e := range missing.Errors {
			row, _ := e.Position()
			ps = append(ps, *maint.Problemf(maint.CodeManifest, fmt.Sprintf("%s:%d", name, row), "see docs/manifest.md for the settings", "there is no setting %q", strings.Join(e.Key(), ".")))
		}
		return maint.Update{}, maint.Refuse("cannot read manifest "+name, ps)
	case errors.As(err, &wrong):
		row, col := wrong.Position()
		key := strings.Join(wrong.Key(), ".")
		if key != "" {
			key = " in setting " + key
		}
		return bad("see docs/manifest.md", "line %d, column %d: %s%s", row, col, strings.TrimPrefix(wrong.Error(), "toml: "), key)
	default:
		return bad("see docs/manifest.md", "%v", err)
	}
	u := f.update()
	return u, maint.Refuse("cannot take manifest "+name, Check(u))
}

// Format writes a manifest.
func Format(u maint.Update) ([]byte, error) {
	var b bytes.Buffer
	e := toml.NewEncoder(&b)
	err := e.Encode(write(u))
	return b.Bytes(), err
}

// lasts is a duration that may be left out.
func lasts(d *Duration) time.Duration {
	if d == nil {
		return 0
	}
	return d.Duration
}

func long(d time.Duration) *Duration {
	if d == 0 {
		return nil
	}
	return &Duration{d}
}

func (f file) update() maint.Update {
	u := maint.Update{ID: f.ID, Description: f.Description, Urgency: cmp.Or(maint.Urgency(f.Urgency), maint.UrgencyNormal), Covers: f.Covers, Within: lasts(f.Within)}
	for _, c := range f.Changes {
		u.Changes = append(u.Changes, c.change())
	}
	for _, c := range f.Checks {
		u.Checks = append(u.Checks, c.check())
	}
	return u
}

func (c change) change() maint.Change {
	m := maint.Change{Name: c.Name, Kind: maint.ChangeKind(c.Kind), File: c.File, Kernel: c.Kernel, Initrd: c.Initrd, Append: c.Append,
		Version: c.Version, Packages: c.Packages, Reboot: c.Reboot, Expected: lasts(c.Expected),
		Prepare: c.Prepare.step(), Apply: c.Apply.step(), Verify: c.Verify.step(), Undo: c.Undo.step()}
	for _, r := range c.Rungs {
		m.Rungs = append(m.Rungs, maint.Rung(r))
	}
	if c.Rungs == nil {
		m.Rungs = usual(m)
	}
	order := m.Kind.Rungs()
	slices.SortStableFunc(m.Rungs, func(a, b maint.Rung) int { return cmp.Compare(slices.Index(order, a), slices.Index(order, b)) })
	for _, a := range c.Artifacts {
		m.Artifacts = append(m.Artifacts, maint.Artifact{Path: a.Path, SHA256: strings.ToLower(a.SHA256), Signature: a.Signature})
	}
	return m
}

// usual are the rungs of a change that does not say which. That guests do not feel a
// command has to be said, unless it is a preparation, which is done while they run; whether
// a unit is one that they do not touch, the host knows.
func usual(c maint.Change) []maint.Rung {
	return slices.DeleteFunc(c.Kind.Rungs(), func(r maint.Rung) bool {
		switch r {
		case maint.RungA:
			switch {
			case c.Kind == maint.ChangeQEMU:
				return c.File == ""
			case c.Kind == maint.ChangePackages && c.Apply == nil:
				return false
			}
			return c.Kind != maint.ChangeLivepatch && c.Kind != maint.ChangeMicrocode && (c.Kind != maint.ChangeService || c.Apply == nil || c.Apply.Unit == "")
		case maint.RungB1:
			return c.Apply == nil
		case maint.RungB3:
			return c.Kind.BootsKernel() && c.Kernel == "" && c.Initrd == ""
		}
		return false
	})
}

func (s *step) step() *maint.ChangeStep {
	if s == nil {
		return nil
	}
	return &maint.ChangeStep{HostStep: maint.HostStep{Command: s.Command, Dir: s.Dir, Unit: s.Unit, Job: s.Job, Timeout: lasts(s.Timeout)}, Expected: lasts(s.Expected)}
}

const (
	defaultTimeout  = 30 * time.Second
	defaultFailures = 3
	httpFailures    = 10
)

func (c check) check() maint.UpdateCheck {
	m := maint.UpdateCheck{Name: c.Name, Command: c.Command, Unit: c.Unit, TCP: c.TCP, HTTP: c.HTTP, Guests: c.Guests,
		WarmUp: lasts(c.WarmUp), Timeout: lasts(c.Timeout), Failures: c.Failures, OnFail: cmp.Or(maint.OnFail(c.OnFail), maint.FailUndo)}
	for _, w := range c.When {
		m.When = append(m.When, maint.CheckWhen(w))
	}
	if c.When == nil {
		m.When = []maint.CheckWhen{maint.CheckBefore, maint.CheckAfter}
	}
	if m.Guests { // each has its own
		return m
	}
	m.Timeout = cmp.Or(m.Timeout, defaultTimeout)
	if m.Failures == 0 {
		m.Failures = defaultFailures
		if m.HTTP != "" {
			m.Failures = httpFailures
		}
	}
	return m
}

// write is an update as it is written; all that Parse fills in is there.
func write(u maint.Update) file {
	f := file{ID: u.ID, Description: u.Description, Urgency: string(u.Urgency), Covers: u.Covers, Within: long(u.Within)}
	put := func(s *maint.ChangeStep) *step {
		if s == nil {
			return nil
		}
		return &step{Command: s.Command, Dir: s.Dir, Unit: s.Unit, Job: s.Job, Timeout: long(s.Timeout), Expected: long(s.Expected)}
	}
	for _, m := range u.Changes {
		c := change{Name: m.Name, Kind: string(m.Kind), File: m.File, Kernel: m.Kernel, Initrd: m.Initrd, Append: m.Append, Version: m.Version,
			Packages: m.Packages, Reboot: m.Reboot, Expected: long(m.Expected), Prepare: put(m.Prepare), Apply: put(m.Apply), Verify: put(m.Verify), Undo: put(m.Undo)}
		for _, r := range m.Rungs {
			c.Rungs = append(c.Rungs, string(r))
		}
		for _, a := range m.Artifacts {
			c.Artifacts = append(c.Artifacts, artifact(a))
		}
		f.Changes = append(f.Changes, c)
	}
	for _, m := range u.Checks {
		c := check{Name: m.Name, Command: m.Command, Unit: m.Unit, TCP: m.TCP, HTTP: m.HTTP, Guests: m.Guests, WarmUp: long(m.WarmUp),
			Timeout: long(m.Timeout), Failures: m.Failures, OnFail: string(m.OnFail)}
		for _, w := range m.When {
			c.When = append(c.When, string(w))
		}
		f.Checks = append(f.Checks, c)
	}
	return f
}
