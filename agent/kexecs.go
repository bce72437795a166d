package agent

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/agent/run"
	"belay/hypervisor"
	"belay/hypervisor/guestclock"
	"belay/patch/kexec"
	"belay/patch/live/remote"
	"belay/patch/vmm"
)

// Kexec is what rung B3 needs of the host.
type Kexec struct {
	Tree     kexec.Tree
	Dir      string // the file system in the reserved memory
	Loader   kexec.Loader
	Rebooter kexec.Rebooter
	Pace     kexec.Pace
}

// newKexec is the real host's.
func newKexec(cfg config.Config, helper *remote.Client) Kexec {
	k := Kexec{Dir: cfg.Kexec.Dir, Loader: kexec.Direct{}, Rebooter: systemdKexec{}, Pace: kexec.Usual}
	if helper != nil {
		k.Loader = helper
	}
	return k
}

// systemdKexec is what "systemctl kexec" does.
type systemdKexec struct{}

// Kexec starts kexec.target, which ends all units in order and unmounts what is mounted.
//
// Source: org.freedesktop.systemd1.Manager.StartUnit.
func (systemdKexec) Kexec(ctx context.Context) error {
	c, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("cannot speak to systemd: %w", err)
	}
	defer c.Close()
	_, err = c.StartUnitContext(ctx, "kexec.target", "replace-irreversibly", nil)
	return err
}

// Going reads the property SystemState.
func (systemdKexec) Going(ctx context.Context) (bool, error) {
	c, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return false, fmt.Errorf("cannot speak to systemd: %w", err)
	}
	defer c.Close()
	p, err := c.SystemStateContext(ctx)
	if err != nil {
		return false, err
	}
	return p.Value.Value() == "stopping", nil
}

// kexecTimeout bounds what comes before the host goes down; from there on there is none.
const kexecTimeout = 2 * time.Hour

// job is a new kernel as an operation has it.
func (a *Agent) kexecJob(op maint.OpID, r maint.KexecRequest) *kexec.Job {
	k := a.preserve.Kexec
	return &kexec.Job{Op: op, Request: r, Host: a.hyp, Mover: vmm.Mover{Host: vmmHost{a.hyp}, Places: a.preserve.Places}, Loader: k.Loader, Rebooter: k.Rebooter, Tree: k.Tree, Dir: k.Dir, Pace: k.Pace,
		Inside: inside{a.hyp, a.preserve.Clocks}, Life: a.life, Health: a.health(op), InPlace: a.cfg.Kexec.InPlace, ColdStart: a.cfg.Kexec.ColdStart, Log: a.log.With("op", op)}
}

func (a *Agent) checkKexec(by string, r maint.KexecRequest) error {
	if err := a.mayCommand(by); err != nil { // a kernel may do anything
		return err
	}
	for field, path := range map[string]string{"kernel": r.Kernel, "initrd": r.Initrd} {
		if !filepath.IsAbs(path) {
			return badRequest(field, "give an absolute path on this host", "%q is none", path)
		}
	}
	if r.All == (len(r.Guests) > 0) {
		return badRequest("guests", "name all that run, or ask for all", "are to be named, or all")
	}
	return cmp.Or(checkLine("append", r.Append), checkReason(r.Reason), checkEmergency(r.Emergency), checkNames(maint.HoldRequest{Guests: r.Guests}))
}

// PlanKexec says what a new kernel would do, and what stands in its way.
func (a *Agent) PlanKexec(ctx context.Context, by string, r maint.KexecRequest) (maint.KexecPlan, error) {
	if err := a.checkKexec(by, r); err != nil {
		return maint.KexecPlan{}, err
	}
	v, err := a.kexecJob("", r).Plan(ctx)
	if err != nil {
		return v, a.cannotAsk("cannot plan another kernel", err)
	}
	all, err := a.elsewhere()
	if err != nil {
		v.Problems = append(v.Problems, *maint.Problemf(maint.CodeKept, "this host", "look into /run/belay/vmm and /run/belay-twin", "what is kept of guests cannot all be read: %v", err))
	}
	for _, e := range all {
		if a.endsWithKernel(e) {
			v.Problems = append(v.Problems, *e.problem())
		}
	}
	return v, nil
}

// Kexec admits a new kernel under all guests, writes it down and starts it.
func (a *Agent) Kexec(ctx context.Context, by string, r maint.KexecRequest) (maint.Op, error) {
	return a.kexec(ctx, by, r, asAsked)
}

// kexec is Kexec of an operation that edit says more of.
func (a *Agent) kexec(ctx context.Context, by string, r maint.KexecRequest, edit func(*maint.Op)) (maint.Op, error) {
	const what = "cannot start another kernel under the guests of this host"
	v, err := a.PlanKexec(ctx, by, r)
	if err != nil {
		return maint.Op{}, err
	}
	if err := maint.Refuse(what, v.Problems); err != nil {
		return maint.Op{}, err
	}
	now := time.Now()
	op := maint.Op{ID: newOpID("kexec", now), Kind: maint.OpKexec, By: by, Reason: r.Reason, Deadline: now.Add(kexecTimeout), Kexec: &r}
	for _, g := range v.Guests {
		op.Guests = append(op.Guests, g.UUID)
	}
	edit(&op)
	a.tell(&op)
	return a.submit(ctx, what, op)
}

// kexecSteps wires the phases of rung B3 to the runner. Up to the check of the new kernel
// whatever fails has the guests brought back under the kernel that runs by then.
func (a *Agent) kexecSteps(op maint.Op) []run.Step {
	with := func(f func(*kexec.Job, context.Context, kexec.Scratch) error) func(context.Context, *run.Scratch) error {
		return func(ctx context.Context, s *run.Scratch) error {
			j := a.kexecJob(op.ID, *op.Kexec)
			j.Record = func(r maint.KexecResult) error { return s.Record(maint.RecKexec, r) }
			return f(j, ctx, s)
		}
	}
	steps := []run.Step{
		{Name: kexec.PhasePreflight, Do: with((*kexec.Job).Preflight)},
		{Name: kexec.PhaseLoad, Do: with((*kexec.Job).Load), Undo: with((*kexec.Job).Unload)},
		{Name: kexec.PhaseSave, Do: with((*kexec.Job).Save), Undo: with(func(j *kexec.Job, ctx context.Context, s kexec.Scratch) error {
			beside, err := j.Back(ctx, s)
			if err == nil && len(beside) > 0 {
				return &run.Beside{Problems: beside}
			}
			return err
		})},
		{Name: kexec.PhaseBoot, Do: with((*kexec.Job).Boot)},
		{Name: kexec.PhaseCheck, Do: with((*kexec.Job).Check)},
		{Name: kexec.PhaseRestore, Commit: true, Do: with((*kexec.Job).Restore)},
		{Name: kexec.PhaseVerify, Do: with(func(j *kexec.Job, _ context.Context, _ kexec.Scratch) error {
			now, _ := a.journal.Op(op.ID)
			return j.Verify(*now.Kexeced)
		})},
	}
	for _, name := range []string{kexec.PhaseSave, kexec.PhaseBoot, kexec.PhaseCheck, kexec.PhaseRestore} {
		steps = a.unlessCalm(name, steps)
	}
	return a.told(op, kexec.PhaseSave, steps)
}

// asker asks guests' agents.
type asker interface {
	AgentCommand(ctx context.Context, uuid, command string, args any) (json.RawMessage, error)
}

// After a boot all guests are asked at once: for their clocks, and, when they have answered, for
// their boot IDs.
const (
	clocksWait = time.Minute
	bootIDWait = 10 * time.Second
)

// inside asks guests themselves.
type inside struct {
	agents asker
	clocks interface {
		Restore(ctx context.Context, g maint.Guest, lost time.Duration) maint.ClockReport
	}
}

// Clock implements kexec.Inside.
func (i inside) Clock(ctx context.Context, g maint.Guest, lost time.Duration) maint.ClockReport {
	ctx, cancel := context.WithTimeout(ctx, clocksWait)
	defer cancel()
	return i.clocks.Restore(ctx, g, lost)
}

// BootID implements kexec.Inside: it reads /proc/sys/kernel/random/boot_id in the guest.
//
// Source: guest-file-open, guest-file-read, guest-file-close (QEMU guest agent), which
// distributions may switch off.
func (i inside) BootID(ctx context.Context, g maint.Guest) string {
	if g.Agent == maint.AgentNone {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, bootIDWait)
	defer cancel()
	ask := func(command string, args, answer any) bool {
		b, err := i.agents.AgentCommand(ctx, g.UUID, command, args)
		return err == nil && (answer == nil || json.Unmarshal(b, answer) == nil)
	}
	var handle int64
	if !ask("guest-file-open", map[string]any{"path": "/proc/sys/kernel/random/boot_id", "mode": "r"}, &handle) {
		return ""
	}
	defer ask("guest-file-close", map[string]any{"handle": handle}, nil)
	var read struct {
		Text string `json:"buf-b64"`
	}
	if !ask("guest-file-read", map[string]any{"handle": handle, "count": 64}, &read) {
		return ""
	}
	id, err := base64.StdEncoding.DecodeString(read.Text)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

// Rescue restores every guest that the reserved memory holds: what a belayd does that cannot
// start, or has lost its journal. Guests that are not back are an error.
func Rescue(ctx context.Context, cfg config.Config, hyp *hypervisor.Host, log *slog.Logger) error {
	k := newKexec(cfg, nil)
	j := &kexec.Job{Host: hyp, Mover: vmm.Mover{Host: vmmHost{hyp}, Places: vmm.Places{Lib: cfg.Libvirt.StateDir}}, Tree: k.Tree, Dir: k.Dir, Pace: k.Pace, Life: ctx, Log: log, Inside: inside{hyp, guestclock.New(hyp, clocksAtOnce)}}
	guests, err := j.Rescue(ctx)
	for _, g := range guests {
		log.Info("guest "+g.Guest, "fate", g.Fate, "pause", g.Pause)
	}
	problems := kexec.Problems(guests)
	return errors.Join(err, maint.Refuse("not all is well", problems))
}

// ofKexec is what is wrong with guests that wait in reserved memory: nobody is at work on them.
func (a *Agent) ofKexec() []maint.Condition {
	for _, op := range a.journal.Ops() {
		if op.Kind == maint.OpKexec && op.State != maint.OpEnded {
			return nil
		}
	}
	k := a.preserve.Kexec
	op, guests := k.Tree.Kept(k.Dir)
	if len(guests) == 0 {
		return nil
	}
	return []maint.Condition{{Code: maint.CodeKeptGuest, Text: fmt.Sprintf("guests wait in reserved memory (%s), saved by operation %s: %s", k.Dir, op, strings.Join(guests, ", ")),
		Remedy: fmt.Sprintf("belay ops show %s says why; mend that, then: belayd -restore", op)}}
}

// doctorKexec says what is missing for rung B3.
func (a *Agent) doctorKexec() []maint.Check {
	k := a.preserve.Kexec
	var checks []maint.Check
	add := func(name string, r maint.CheckResult, remedy, format string, args ...any) {
		checks = append(checks, maint.Check{Rung: "B", Name: name, Result: r, Text: fmt.Sprintf(format, args...), Remedy: remedy})
	}
	var need uint64
	a.running(func(g maint.Guest) bool { need += kexec.Needs(g.MemoryBytes); return true })
	problems := k.Tree.Missing(k.Dir, need)
	for _, p := range problems {
		add("kexec", maint.CheckNA, p.Remedy, "no new kernel under running guests (B3): %s %s", p.Subject, p.Reason)
	}
	if len(problems) == 0 {
		add("kexec", maint.CheckOK, "", "another kernel can be started under the guests, which wait in %s", k.Dir)
		n, names := a.running(func(g maint.Guest) bool { return g.MemorySource != "file" || !g.MemoryShared })
		if !a.cfg.Kexec.InPlace {
			add("kexec in place", maint.CheckNA, "to leave memory in place: kexec.in_place = true in belayd.toml, and docs/rung-b-kexec.md", "guests are copied into reserved memory for another kernel")
		} else if p := k.Tree.NotInPlace(k.Dir); p != nil {
			add("kexec in place", maint.CheckNA, p.Remedy, "guests are copied into reserved memory for another kernel: %s", p.Reason)
		} else if n > 0 {
			add("kexec in place", maint.CheckNA, "give them <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>, which holds from their next start",
				"%d guests are copied into reserved memory for another kernel: %s", n, names)
		} else {
			add("kexec in place", maint.CheckOK, "", "memory of guests that are files is in reserved memory, and stays in place under another kernel")
		}
	}
	if ways := k.Tree.Newer(); len(ways) > 0 {
		add("kexec handover", maint.CheckOK, "", "this kernel also has %s, which Belay does not use yet", strings.Join(ways, " and "))
	}
	return checks
}
