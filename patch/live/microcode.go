package live

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// MicrocodeUpdate loads CPU microcode late, from where the kernel finds it
// (/lib/firmware). What is loaded is not taken back.
type MicrocodeUpdate struct {
	Host
	Microcode Microcode
	Record    func(maint.PatchResult) error
}

type revisions struct {
	CPUs   []maint.CPUMicrocode `json:"cpus"`
	Taint  uint64               `json:"taint"`
	LogSeq uint64               `json:"log_seq"`
}

const whatMicrocode = "cannot load CPU microcode"

func noLateLoading() *maint.Problem {
	return maint.Problemf(maint.CodeNeedsReboot, "CPU microcode", "put it into the initrd, and use rung B3 or D",
		"this kernel loads none late: it has no /%s", microcodeReload)
}

// Preflight judges whether the kernel can, and notes the revisions.
func (u *MicrocodeUpdate) Preflight(ctx context.Context, s Scratch) error {
	if !u.Tree.LoadsMicrocode() {
		return maint.Refuse(whatMicrocode, []maint.Problem{*noLateLoading()})
	}
	before, err := u.look(ctx)
	if err != nil {
		return maint.Refuse(whatMicrocode, []maint.Problem{*maint.AsProblem(err, maint.CodeUnwell, "CPU microcode")})
	}
	if len(before.CPUs) == 0 {
		return maint.Refuse(whatMicrocode, []maint.Problem{*maint.Problemf(maint.CodeNeedsReboot, "CPU microcode", "use rung B3 or D", "no CPU shows its revision, so nobody could tell whether it was loaded")})
	}
	return s.Save(before)
}

func (u *MicrocodeUpdate) look(ctx context.Context) (r revisions, err error) {
	if r.CPUs, err = u.Tree.Microcode(); err != nil {
		return r, err
	}
	if r.Taint, err = u.Tree.Taint(); err != nil {
		return r, err
	}
	r.LogSeq, err = u.Witness.LogEnd(ctx)
	return r, err
}

// Load has the kernel load it, and reads the revision of every CPU. Doing it twice does no
// harm: the kernel loads only what is newer.
func (u *MicrocodeUpdate) Load(ctx context.Context, s Scratch) error {
	var before revisions
	if _, err := s.Load(PhasePreflight, &before); err != nil {
		return err
	}
	begun := time.Now()
	said := u.Microcode.ReloadMicrocode(ctx)
	if errors.Is(said, unix.ENOENT) {
		return noLateLoading()
	}
	after, err := u.Tree.Microcode()
	if err != nil {
		return err
	}
	old, now := kinds(before.CPUs), kinds(after)
	lines, err := u.Witness.KernelLog(ctx, before.LogSeq)
	if err != nil {
		return err
	}
	alarm := slices.IndexFunc(lines, Line.Alarm)
	switch {
	case len(after) != len(before.CPUs) || len(now) > len(old):
		return maint.Problemf(maint.CodeUnwell, "CPU microcode", "drain the host and boot it (rung D)", "CPUs are not alike any more: %v, and were %v", now, old)
	case alarm >= 0:
		return maint.Problemf(maint.CodeUnwell, "CPU microcode", "see the kernel's log (dmesg)", "after it was loaded the kernel says %q", lines[alarm].Text)
	case slices.Equal(before.CPUs, after) && said != nil:
		return maint.Problemf(maint.CodeKernelRefused, "CPU microcode", "see the kernel's log (dmesg)", "the kernel does not load it: %v", said)
	case slices.Equal(before.CPUs, after):
		return maint.Refuse(whatMicrocode, []maint.Problem{*maint.Problemf(maint.CodeNothing, "CPU microcode", "install a newer one in /lib/firmware (intel-microcode, amd64-microcode)",
			"the kernel has found none that is newer than %v", old)})
	}
	return u.Record(maint.PatchResult{Name: "microcode", Transition: time.Since(begun), Before: before.CPUs, After: after})
}

// kinds are the revisions that there are, in words.
func kinds(cpus []maint.CPUMicrocode) (all []string) {
	for _, c := range cpus {
		all = append(all, fmt.Sprint(c.Revision))
	}
	slices.Sort(all)
	return slices.Compact(all)
}
