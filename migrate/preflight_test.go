package migrate

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// described is a source whose guest is described as it says, and that knows
// whether its marks are there.
type described struct {
	here
	Description
	marked *bool
}

func (d described) Describe(context.Context, string) (Description, error) { return d.Description, nil }

func (d described) Mark(_ context.Context, files []maint.FileNeed) ([]maint.FileNeed, func()) {
	*d.marked = true
	return files, func() { *d.marked = false }
}

// judge is a destination that answers a check as it says.
type judge struct {
	*there
	check func(maint.Arrival) ([]maint.Problem, error)
}

func (j judge) Check(_ context.Context, a maint.Arrival) ([]maint.Problem, error) { return j.check(a) }

func TestSurvey(t *testing.T) {
	t.Parallel()
	disk := maint.FileNeed{For: "disk vda", Path: "/srv/a", Kind: maint.FileRegular, Same: true}
	withDisk := Description{Needs: maint.Needs{Files: []maint.FileNeed{disk}}}
	withDevice := Description{Bound: []maint.BoundDevice{{What: "PCI device p", How: "virsh detach-device"}}}
	careless := Description{Unsafe: []maint.FileNeed{disk}}
	says := func(code maint.Code) []maint.Problem { return []maint.Problem{{Code: code}} }
	unsafe := errors.Join(errors.New("unsafe"), maint.ErrUnsafeStorage)
	refuses := errors.New("libvirt refuses")
	for _, c := range []struct {
		name  string
		d     Description
		dry   error
		there []maint.Problem
		err   error // of the check
		want  []maint.Code
	}{
		{"fits", withDisk, nil, nil, nil, nil},
		{"libvirt refuses", withDisk, refuses, nil, nil, []maint.Code{maint.CodeSourceRefuses}},
		{"both refuse", withDisk, refuses, says(maint.CodeDiskMissing), nil, []maint.Code{maint.CodeDiskMissing, maint.CodeSourceRefuses}},
		{"both refuse the disk", withDisk, unsafe, says(maint.CodeDiskNotShared), nil, []maint.Code{maint.CodeDiskNotShared}},
		{"the disk is not there", withDisk, unsafe, says(maint.CodeDiskMissing), nil, []maint.Code{maint.CodeDiskMissing}},
		{"libvirt alone refuses the disk", withDisk, unsafe, says(maint.CodeCPU), nil, []maint.Code{maint.CodeCPU, maint.CodeSourceRefuses}},
		{"a device of the host", withDevice, nil, nil, nil, []maint.Code{maint.CodeHostDevice}},
		{"libvirt names the device, too", withDevice, refuses, nil, nil, []maint.Code{maint.CodeHostDevice}},
		{"a device, and storage", withDevice, unsafe, nil, nil, []maint.Code{maint.CodeHostDevice, maint.CodeSourceRefuses}},
		{"no flushes", careless, nil, nil, nil, []maint.Code{maint.CodeDiskCache}},
		{"no flushes, says libvirt", careless, unsafe, nil, nil, []maint.Code{maint.CodeDiskCache}},
		{"the peer is away", withDevice, nil, nil, errors.New("no route"), []maint.Code{maint.CodeHostDevice, maint.CodePeerDown}},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := hypervisortest.NewWorld()
			defer w.Close()
			a, b := w.AddHost("a", hypervisortest.HostOptions{}), w.AddHost("b", hypervisortest.HostOptions{})
			if c.dry != nil {
				a.Fault("DryRun", hypervisortest.Fault{Err: c.dry})
			}
			marked, asked := false, false
			m := &Migration{Op: "mig-1", Guest: "web-1", UUID: a.PutGuest("web-1"), From: "a", To: "b", Log: slog.New(slog.DiscardHandler),
				Source: described{here{a}, c.d, &marked},
				Destination: judge{&there{host: b}, func(r maint.Arrival) ([]maint.Problem, error) {
					asked = true
					if !marked || c.d.Needs.Empty() != (r.Needs == nil) {
						t.Errorf("%s: asked with marks %t, needs %+v", c.name, marked, r.Needs)
					}
					return c.there, c.err
				}}}
			ps, err := m.Survey(t.Context())
			if err != nil || !asked || marked {
				t.Errorf("%s: %v, asked %t, marks left %t", c.name, err, asked, marked)
			}
			if d := cmp.Diff(c.want, codes(ps)); d != "" {
				t.Errorf("%s: %s", c.name, d)
			}
			book := make(map[string]bool)
			err = m.Preflight(t.Context(), saving(func() { book["saved"] = true }))
			var r *maint.Refusal
			if refused := errors.As(err, &r); refused != (len(c.want) > 0) || book["saved"] == refused || refused && len(r.Problems) != len(c.want) {
				t.Errorf("%s: preflight says %v, saved: %v", c.name, err, book)
			}
		})
	}
}

// saving is a Scratch that tells when something is saved.
type saving func()

func (s saving) Note(string, ...any) error { return nil }
func (s saving) Save(any) error            { s(); return nil }
func (s saving) Load(string, any) (bool, error) {
	return false, nil
}

// TestSurveyOfAGuestThatIsOff: what its devices need is told all the same, and
// libvirt, which would refuse any guest that is off, is not asked.
func TestSurveyOfAGuestThatIsOff(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		x.a.Stop(t, x.UUID, "shutdown")
		marked := false
		x.Source = described{here{x.a}, Description{Bound: []maint.BoundDevice{{What: "PCI device p"}}}, &marked}
		ps, err := x.Survey(t.Context())
		if d := cmp.Diff([]maint.Code{maint.CodeGuestOff, maint.CodeHostDevice}, codes(ps)); d != "" || err != nil {
			t.Error(d, err)
		}
		if !strings.Contains(ps[1].Reason, "which belongs to a") {
			t.Errorf("%+v", ps[1])
		}
	})
}
