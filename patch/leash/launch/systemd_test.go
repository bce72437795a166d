package launch

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/coreos/go-systemd/v22/dbus"
)

// fakeSystemd has one answer.
type fakeSystemd struct {
	err    error
	result string // of the job; "" for none
	state  string // the unit's
	closed bool
}

func (f *fakeSystemd) StartTransientUnitContext(_ context.Context, _, _ string, _ []dbus.Property, ch chan<- string) (int, error) {
	if f.err == nil && f.result != "" {
		ch <- f.result
	}
	return 1, f.err
}

func (f *fakeSystemd) ListUnitsByNamesContext(context.Context, []string) ([]dbus.UnitStatus, error) {
	if f.state == "unknown" {
		return nil, errors.New("systemd has gone")
	}
	return []dbus.UnitStatus{{ActiveState: f.state}}, nil
}

func (f *fakeSystemd) Close() { f.closed = true }

func TestUnit(t *testing.T) {
	exists := errors.New("unit was already loaded or has a fragment file")
	for name, c := range map[string]struct {
		fake fakeSystemd
		want string // of the error; "" for none
	}{
		"it is started":              {fakeSystemd{result: "done"}, ""},
		"it cannot be executed":      {fakeSystemd{result: "failed"}, `ended as "failed"`},
		"it runs already":            {fakeSystemd{err: exists, state: "active"}, ""},
		"it is being started again":  {fakeSystemd{err: exists, state: "activating"}, ""},
		"it is being stopped":        {fakeSystemd{err: exists, state: "deactivating"}, "already loaded"},
		"systemd refuses":            {fakeSystemd{err: errors.New("no such property"), state: "inactive"}, "no such property"},
		"systemd goes away":          {fakeSystemd{err: exists, state: "unknown"}, "systemd has gone"},
		"its job does not end":       {fakeSystemd{}, "not done it in time"},
		"it cannot be spoken to (-)": {fakeSystemd{state: "-"}, "cannot speak to systemd"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUnits(config("file"))
			u.connect = func(context.Context) (manager, error) {
				if c.fake.state == "-" {
					return nil, errors.New("no socket")
				}
				return &c.fake, nil
			}
			ctx, cancel := context.WithCancel(t.Context())
			if c.fake.err == nil && c.fake.result == "" {
				cancel()
			}
			defer cancel()
			_, err := u.Launch(ctx, testOp)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if c.fake.state != "-" && !c.fake.closed {
				t.Error("the connection is left open")
			}
		})
	}
}
