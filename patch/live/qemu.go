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

// PhaseQEMU is the phase in which QEMUs are patched.
const PhaseQEMU = "patch-qemu"

// QEMUPatch has a livepatch applied to guests' QEMUs, or taken back from them, one after the
// other. The first that fails has those before put as they were.
type QEMUPatch struct {
	UserSpace UserSpace
	Store     Store
	Keys      string // the folder of the keys that are trusted
	Request   maint.PatchRequest
	Guests    func(context.Context) ([]maint.Guest, error)
	// Process finds a guest's QEMU.
	Process func(guest string) (QEMU, error)
	// Answers asks a guest's QEMU something by QMP.
	Answers func(ctx context.Context, uuid string) error
	Record  func(maint.PatchResult) error
}

// qemuPlan is what is on disk before anything is done.
type qemuPlan struct {
	Patch  maint.KeptPatch `json:"patch"` // name and hash of what is to be done
	Guests []qemuGuest     `json:"guests"`
}

type qemuGuest struct {
	Name string `json:"name"`
	UUID string `json:"uuid"`
	QEMU QEMU   `json:"qemu"`
}

// Preflight judges the livepatch and every guest's QEMU, and keeps a copy.
func (j *QEMUPatch) Preflight(ctx context.Context, s Scratch) error {
	plan, a, problems := j.judge(ctx)
	// Those of earlier operations are of no more use.
	if len(problems) == 0 {
		if err := errors.Join(j.Store.Keep(), j.Store.Put(plan.Patch.Name, a)); err != nil {
			problems = []maint.Problem{*maint.Problemf(maint.CodePatchFile, "folder "+j.Store.Dir, "make it writable, and room in it", "no copy can be kept: %v", err)}
		}
	}
	if err := maint.Refuse("cannot patch QEMU", problems); err != nil {
		return err
	}
	return s.Save(plan)
}

// Judge lists what stands in the way, and changes nothing.
func (j *QEMUPatch) Judge(ctx context.Context) []maint.Problem {
	_, _, problems := j.judge(ctx)
	return problems
}

func (j *QEMUPatch) judge(ctx context.Context) (plan qemuPlan, a Artifact, problems []maint.Problem) {
	a, m, err := j.container()
	if err != nil {
		return plan, a, []maint.Problem{*maint.AsProblem(err, maint.CodePatchFile, "livepatch "+j.Request.File)}
	}
	guests, err := j.Guests(ctx)
	if err != nil {
		return plan, a, []maint.Problem{*maint.Problemf(maint.CodeHypervisorDown, "libvirt", "systemctl status libvirtd virtqemud", "does not answer: %v", err)}
	}
	chosen, problems := j.choose(guests)
	plan.Patch = maint.KeptPatch{Name: m.Name, SHA256: m.SHA256, Covers: m.Covers, Functions: m.Functions}
	for _, g := range chosen {
		q, err := j.Process(g.Name)
		if err == nil {
			err = j.UserSpace.Patchable(ctx, q, a)
		}
		if err != nil {
			problems = append(problems, *maint.AsProblem(err, maint.CodeQEMURefused, "guest "+g.Name))
		}
		plan.Guests = append(plan.Guests, qemuGuest{g.Name, g.UUID, q})
	}
	if len(problems) == 0 && len(chosen) == 0 {
		problems = append(problems, *maint.Problemf(maint.CodeNothing, "this host", "", "no guest runs"))
	}
	return plan, a, problems
}

func (j *QEMUPatch) container() (a Artifact, m UserManifest, err error) {
	if a, err = ReadContainer(j.Request.File); err != nil {
		return a, m, err
	}
	keys, err := ReadKeys(j.Keys)
	if err == nil {
		m, err = a.CheckContainer(keys)
	}
	return a, m, err
}

// choose are the guests that were asked for, each once.
func (j *QEMUPatch) choose(guests []maint.Guest) (chosen []maint.Guest, problems []maint.Problem) {
	for _, g := range guests {
		if j.Request.All && g.State.Active() {
			chosen = append(chosen, g)
		}
	}
	for _, name := range j.Request.Guests {
		i := slices.IndexFunc(guests, func(g maint.Guest) bool { return g.Name == name || g.UUID == name })
		switch {
		case i < 0:
			problems = append(problems, *maint.Problemf(maint.CodeUnknownGuest, "guest "+name, "see 'belay guests' for the names", "is not on this host"))
		case !guests[i].State.Active():
			problems = append(problems, *maint.Problemf(maint.CodeNothing, "guest "+name, "leave it out: its next QEMU is a new one", "does not run"))
		case !slices.ContainsFunc(chosen, func(g maint.Guest) bool { return g.UUID == guests[i].UUID }):
			chosen = append(chosen, guests[i])
		}
	}
	return chosen, problems
}

// progress is what was done, on disk before each effect: of the last of QEMUs it may not be so
// yet.
type progress struct {
	QEMUs []maint.PatchedQEMU `json:"qemus"`
}

// setWithin is more than ulp takes, which gives up after 100 s.
const setWithin = 3 * time.Minute

// Perform has one QEMU after the other be as asked for. Each is asked first, and after it.
func (j *QEMUPatch) Perform(ctx context.Context, s Scratch) error {
	plan, a, err := j.planned(s)
	if err != nil {
		return err
	}
	var p progress
	if _, err := s.Load(PhaseQEMU, &p); err != nil {
		return err
	}
	for i, g := range plan.Guests {
		if err := ctx.Err(); err != nil {
			return err
		}
		if i == len(p.QEMUs) {
			before, err := j.UserSpace.Applied(ctx, g.QEMU, a)
			p.QEMUs = append(p.QEMUs, maint.PatchedQEMU{Guest: g.Name, UUID: g.UUID, PID: g.QEMU.PID, Before: before, Applied: before, Gone: errors.Is(err, unix.ESRCH)})
			if err != nil && !p.QEMUs[i].Gone { // it was not begun with, so this is not saved
				p.QEMUs[i].Problem = maint.AsProblem(err, maint.CodeQEMURefused, "guest "+g.Name)
				return errors.Join(err, j.record(plan, p))
			}
			if err := s.Save(p); err != nil {
				return err
			}
		}
		if p.QEMUs[i].Gone {
			continue
		}
		if err := j.set(ctx, g, a, !j.Request.Revert, &p.QEMUs[i]); err != nil {
			p.QEMUs[i].Problem = maint.AsProblem(err, maint.CodeQEMURefused, "guest "+g.Name)
			return errors.Join(err, s.Save(p), j.record(plan, p))
		}
		if err := s.Save(p); err != nil {
			return err
		}
	}
	return j.record(plan, p)
}

func (j *QEMUPatch) planned(s Scratch) (plan qemuPlan, a Artifact, err error) {
	if _, err = s.Load(PhasePreflight, &plan); err != nil {
		return plan, a, err
	}
	if a, err = j.Store.Read(plan.Patch); err == nil && a.SHA256() != plan.Patch.SHA256 {
		err = maint.Problemf(maint.CodePatchHash, "livepatch "+plan.Patch.Name, "apply it again from its own files", "the copy in %s is not what was judged", j.Store.Dir)
	}
	return plan, a, err
}

// set has a QEMU have the livepatch, or not, and sees that it is so, and that it answers.
func (j *QEMUPatch) set(ctx context.Context, g qemuGuest, a Artifact, on bool, r *maint.PatchedQEMU) error {
	gone := func(err error) error {
		if r.Gone = errors.Is(err, unix.ESRCH); r.Gone {
			return nil
		}
		return err
	}
	var err error
	if r.Applied, err = j.UserSpace.Applied(ctx, g.QEMU, a); err != nil || r.Applied == on {
		return gone(err)
	}
	// Not given up half way: what comes of it must be to be seen below.
	setting, cancel := context.WithTimeout(context.WithoutCancel(ctx), setWithin)
	defer cancel()
	stopped, setErr := j.UserSpace.Set(setting, g.QEMU, a, on)
	r.Stopped += stopped
	if Unsure(setErr) {
		return setErr
	}
	if r.Applied, err = j.UserSpace.Applied(setting, g.QEMU, a); err != nil {
		return gone(err)
	}
	switch {
	case r.Applied != on && setErr != nil:
		return setErr
	case r.Applied != on:
		return maint.Problemf(maint.CodeQEMURefused, "guest "+g.Name, fmt.Sprintf("see 'ulp messages -p %d'; else use rung B2 (belay replace-vmm %s)", g.QEMU.PID, maint.ShellWord(g.Name)),
			"ulp says that its QEMU was patched, and libpulp in it that it is as before")
	}
	if err := j.Answers(setting, g.UUID); err != nil {
		return maint.Problemf(maint.CodeQEMURefused, "guest "+g.Name, "see its log in /var/log/libvirt/qemu", "its QEMU (process %d) does not answer since it was patched: %v", g.QEMU.PID, err)
	}
	return nil
}

// Unsure reports whether an error says of a QEMU that it may be inconsistent.
func Unsure(err error) bool {
	p := new(maint.Problem)
	return errors.As(err, &p) && p.Code == maint.CodeQEMUUnsure
}

func (j *QEMUPatch) record(plan qemuPlan, p progress) error {
	return j.Record(maint.PatchResult{Name: plan.Patch.Name, QEMUs: p.QEMUs})
}

// Undo puts each QEMU as it was that was begun with, the last one first. One that may be
// inconsistent ends it.
func (j *QEMUPatch) Undo(ctx context.Context, s Scratch) error {
	plan, a, err := j.planned(s)
	if err != nil {
		return err
	}
	var p progress
	if _, err := s.Load(PhaseQEMU, &p); err != nil {
		return err
	}
	var failed error
	for i := len(p.QEMUs) - 1; i >= 0 && !Unsure(failed); i-- {
		if p.QEMUs[i].Gone {
			continue
		}
		if err := j.set(ctx, plan.Guests[i], a, p.QEMUs[i].Before, &p.QEMUs[i]); err != nil {
			p.QEMUs[i].Problem = maint.AsProblem(err, maint.CodeQEMURefused, "guest "+p.QEMUs[i].Guest)
			failed = errors.Join(failed, err)
		}
	}
	return errors.Join(failed, j.record(plan, p))
}
