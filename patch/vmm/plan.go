package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"belay/agent/maint"
)

// plan is all that the phases after preflight, and a start after a crash, need
// to know. It is written down before anything is touched.
type plan struct {
	// Op is the operation that made the plan; its ID is the token of the new
	// QEMU. An operation that takes up what another has kept goes by that's.
	Op       maint.OpID      `json:"op"`
	Adopted  bool            `json:"adopted,omitempty"`
	Method   maint.VMMMethod `json:"method"`
	Boot     string          `json:"boot"` // the host's
	Seat                     // in place, all of it; copy: Kept is the folder of the image
	OldQEMU  string          `json:"old_qemu"`           // version
	Inactive string          `json:"inactive,omitempty"` // the definition
	Disks    []string        `json:"disks,omitempty"`    // files that the guest writes

	Choices []maint.VMMChoice `json:"choices,omitempty"`
}

// image is the file of a guest that is saved.
func (pl plan) image() string { return filepath.Join(pl.Kept, "saved") }

// Preflight surveys guest and host and returns a *maint.Refusal with every
// reason why the method is not possible. It writes the plan down, and changes
// nothing.
//
// For a guest that is between two QEMUs, and of which an earlier operation has kept memory and
// state, the plan is that operation's: it is gone on with.
func (r *Replacement) Preflight(ctx context.Context, s Scratch) error {
	left, err := r.Places.kept(r.UUID)
	if err == nil && r.adoptable(ctx, left) {
		left.Adopted, left.Choices = true, nil
		if err := s.Save(left); err != nil {
			return err
		}
		return s.Note("goes on with what operation %s has kept of the guest", left.Op)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, r.paced().libvirt)
	defer cancel()
	f, err := Survey(ctx, r.Host, r.Places, r.UUID)
	if err != nil {
		return err
	}
	f.NoBounce = true // is package twin's
	choices := Choices(f)
	if _, err := Choose(r.Guest, choices, r.Method, r.MaxPause); err != nil {
		return err
	}
	if err := r.probe(ctx, f); err != nil {
		return err
	}
	pl, err := r.plan(ctx, f)
	if err != nil {
		return fmt.Errorf("cannot plan a new QEMU for guest %s: %w", r.Guest, err)
	}
	pl.Choices = choices
	return s.Save(pl)
}

// probe has libvirt look at the QEMU that it will start.
func (r *Replacement) probe(ctx context.Context, f Facts) error {
	d, err := r.Host.Describe(ctx, r.UUID)
	if err != nil {
		return err
	}
	err = CanRun(ctx, r.Host, f.Guest, f.Host.Arch, d.CPU)
	if p := new(maint.Problem); errors.As(err, &p) {
		return maint.Refuse("cannot put a new QEMU under guest "+r.Guest, []maint.Problem{*p})
	}
	return err
}

// CanRun is a *maint.Problem if libvirt says that the QEMU that it would start for a guest, which had
// that <cpu>, cannot run that. libvirt looks at that QEMU for it, and believes what it has learnt as long as
// program and kernel are the same; any other error says that it has not answered.
func CanRun(ctx context.Context, h Prober, g maint.Guest, arch, cpuXML string) error {
	for step := 100 * time.Millisecond; ; step = min(2*step, 2*time.Second) {
		err := h.CompareCPU(ctx, g.DomainType, arch, g.MachineType, cpuXML)
		if err == nil {
			return nil
		}
		if !errors.Is(err, maint.ErrHypervisorDown) && ctx.Err() == nil { // or it is still looking
			return maint.Problemf(maint.CodeCPU, "guest "+g.Name, "install a QEMU that can", "libvirt says that the QEMU of this host cannot run its CPU: %v", err)
		}
		if !wait(ctx, step) {
			return err
		}
	}
}

// adoptable: the guest is between two QEMUs, and has been left there.
func (r *Replacement) adoptable(ctx context.Context, left plan) bool {
	now, err := r.look(ctx, left)
	return err == nil && (now == atOff && r.whole(left) == nil || now == atNew)
}

func (r *Replacement) plan(ctx context.Context, f Facts) (pl plan, err error) {
	pl = plan{Op: r.Op, Method: r.Method, OldQEMU: f.QEMU}
	if pl.Boot, err = r.Places.bootID(); err != nil {
		return pl, err
	}
	d, err := r.Host.Describe(ctx, r.UUID)
	if err != nil {
		return pl, err
	}
	pl.Inactive = d.Inactive
	for _, disk := range f.Guest.Disks {
		if disk.Type == "file" && !disk.ReadOnly && disk.Source != "" {
			pl.Disks = append(pl.Disks, disk.Source)
		}
	}
	if r.Method == maint.VMMCopy {
		pl.Seat, err = f.seat()
		pl.Kept = filepath.Join(r.Places.copies(), r.UUID)
		return pl, err
	}
	if pl.Seat, err = r.mover().seat(ctx, f, d.Portable, string(r.Op)); err != nil {
		return pl, err
	}
	// <memory_backing_dir>/libvirt/qemu/<id>-<name> is libvirt's; by default it is
	// /var/lib/libvirt/qemu/ram/<id>-<name>.
	pl.Kept = filepath.Join(strings.TrimSuffix(pl.folder(), "/libvirt/qemu"), "belay", r.UUID)
	return pl, nil
}

// load reads the plan.
func (r *Replacement) load(s Scratch) (pl plan, err error) {
	ok, err := s.Load(PhasePreflight, &pl)
	if err == nil && !ok {
		err = errors.New("there is no plan")
	}
	return pl, err
}

// Prepare sets the guard and links the memory: all that can be done while the
// guest runs. It may be done over.
func (r *Replacement) Prepare(ctx context.Context, s Scratch) error {
	pl, err := r.load(s)
	if err != nil || pl.Adopted {
		return err
	}
	if err := r.prepare(pl); err != nil {
		return fmt.Errorf("cannot prepare a new QEMU for guest %s: %w", r.Guest, err)
	}
	return nil
}

func (r *Replacement) prepare(pl plan) error {
	text, err := json.Marshal(pl)
	if err != nil {
		return err
	}
	if err := privateDir(filepath.Dir(r.Places.at(pl.Kept))); err != nil {
		return err
	}
	order := "copy " + string(pl.Op) + "\n" + pl.Kept + "\n\n"
	if pl.Method == maint.VMMInPlace {
		if err := r.mover().Keep(pl.Seat); err != nil {
			return err
		}
		order = pl.Order(string(pl.Method), string(pl.Op))
	} else if err := privateDir(r.Places.at(pl.Kept)); err != nil {
		return err
	}
	// libvirt's hook looks for the guard, so it comes when it can be obeyed.
	g := r.Places.guard(pl.UUID)
	if err := os.MkdirAll(filepath.Dir(g.dir), 0o755); err != nil {
		return err
	}
	if err := privateDir(g.dir); err != nil {
		return err
	}
	return errors.Join(g.write(guardPlan, text), g.write(guardOrder, []byte(order)))
}

// link makes a hard link. One of another file, which nobody has a guard for any
// more, gives way.
func link(from, to string) error {
	err := os.Link(from, to)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	a, errA := os.Stat(from)
	b, errB := os.Lstat(to)
	if errA == nil && errB == nil && os.SameFile(a, b) {
		return nil
	}
	if err := errors.Join(errA, errB, os.Remove(to)); err != nil {
		return err
	}
	return os.Link(from, to)
}

// Unprepare is the undo of Prepare. It leaves everything while the guest is
// between two QEMUs.
func (r *Replacement) Unprepare(ctx context.Context, s Scratch) error {
	pl, err := r.load(s)
	if err != nil || pl.Adopted {
		return err
	}
	if now, err := r.settled(ctx, pl); err != nil {
		return err
	} else if now != atOld && r.Places.guard(pl.UUID).has(guardQuit) {
		return r.stuck(pl, now, errors.New("it has left its old QEMU"))
	}
	return r.drop(pl)
}

// drop removes all that is kept, the guard last: the hook goes by it.
func (r *Replacement) drop(pl plan) error {
	return errors.Join(os.RemoveAll(r.Places.at(pl.Kept)), os.RemoveAll(r.Places.guard(pl.UUID).dir))
}
