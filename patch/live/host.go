package live

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// Host is the host whose kernel is patched.
type Host struct {
	Tree    Tree
	Kernel  Kernel
	Witness Witness
	Store   Store
	Keys    string // the folder of the keys that are trusted
	Timing  Timing
}

// Timing is how long what may take.
type Timing struct {
	Poll  time.Duration // sysfs tells of no change, so it is read this often
	Name  time.Duration // after this long in transition its stragglers are named
	Limit time.Duration // and after this long it is turned round
	Back  time.Duration // what is taken back may take this long, before a person has to look
	Soak  time.Duration // the host is watched after it for this long
}

// DefaultTiming goes by the kernel, which signals stragglers after 15 s.
var DefaultTiming = Timing{Poll: 25 * time.Millisecond, Name: 15 * time.Second, Limit: 60 * time.Second, Back: 3 * time.Minute, Soak: 30 * time.Second}

// View is what is to be seen of the host, with what Belay knows of it.
func (h Host) View(ctx context.Context, known maint.Patches) (v maint.PatchView, err error) {
	v.Patches = known
	if v.Release, v.Version, err = h.Tree.Kernel(); err != nil {
		return v, err
	}
	if v.Taint, err = h.Tree.Taint(); err != nil {
		return v, err
	}
	if v.Loaded, err = h.Tree.Patches(); err != nil {
		return v, err
	}
	if v.Microcode, err = h.Tree.Microcode(); err != nil {
		return v, err
	}
	for i, p := range v.Loaded {
		if k := known.Active; is(p, k) {
			v.Loaded[i].Kept = k
		}
		if p.Transition && v.Waiting == nil {
			v.Waiting, _ = h.Witness.Tasks(ctx, nil) // who may not see them is told none
		}
	}
	if h.Tree.SwitchedOff() {
		v.AutoOff = "the kernel's command line has belay.nolivepatch"
	} else {
		v.AutoOff = known.NoReload
	}
	return v, nil
}

// is reports whether a livepatch is the very one that is kept. Of one that bears nothing to be
// told by nobody knows.
func is(p maint.LivePatch, k *maint.KeptPatch) bool {
	return k != nil && p.Name == k.Name && p.SrcVersion == k.SrcVersion && p.SrcVersion != ""
}

// Inspect judges a livepatch's files as Preflight would.
func (h Host) Inspect(ctx context.Context, file string, known maint.Patches) (maint.PatchFile, error) {
	var f maint.PatchFile
	a, err := ReadArtifact(file)
	if err != nil {
		return f, err
	}
	k, info, problems := h.judge(a, known)
	f = maint.PatchFile{KeptPatch: k, VerMagic: info.VerMagic, Problems: append([]maint.Problem{}, problems...)}
	f.Forecast = h.forecast(ctx, k)
	return f, nil
}

// forecast are kernel threads that are asleep in what a livepatch changes.
func (h Host) forecast(ctx context.Context, k maint.KeptPatch) []maint.KernelTask {
	if len(k.Functions) == 0 {
		return nil
	}
	tasks, _ := h.Witness.Tasks(ctx, k.Functions) // it is no more than a forecast
	return tasks
}

// judge says all that stands in the way of loading a livepatch here and now.
func (h Host) judge(a Artifact, known maint.Patches) (k maint.KeptPatch, info ModInfo, problems []maint.Problem) {
	add := func(err error) bool {
		if err != nil {
			problems = append(problems, *maint.AsProblem(err, maint.CodePatchFile, "livepatch"))
		}
		return err != nil
	}
	host := func(code maint.Code, remedy, format string, args ...any) {
		problems = append(problems, *maint.Problemf(code, "this host's kernel", remedy, format, args...))
	}
	if why := h.Tree.Supported(); why != "" {
		host(maint.CodeNeedsReboot, "boot a kernel with CONFIG_LIVEPATCH=y; until then use rung B3 or D", "%s", why)
	}
	keys, err := ReadKeys(h.Keys)
	if add(err) {
		return k, info, problems
	}
	m, info, err := a.Check(keys)
	if add(err) {
		return k, info, problems
	}
	k = Describe(m, info)
	problems = append(problems, h.Tree.Fits(m, info)...)
	switch taint, err := h.Tree.Taint(); {
	case err != nil:
		host(maint.CodeTainted, "see that /proc is mounted", "its taint cannot be read: %v", err)
	case taint&taintSick != 0:
		host(maint.CodeTainted, "see the kernel's log (dmesg); boot it anew before it is patched", "something went wrong in it before (Oops, bad page, lockup or machine check; tainted %d)", taint)
	}
	loaded, err := h.Tree.Patches()
	if err != nil {
		host(maint.CodeFailed, "see /sys/kernel/livepatch", "its livepatches cannot be read: %v", err)
	}
	stacked := false
	for _, p := range loaded {
		if p.Transition {
			host(maint.CodeTransition, "wait for it (belay patch watch)", "livepatch %s is in transition", p.Name)
		}
		switch {
		case p.Name == m.Name:
			problems = append(problems, *maint.Problemf(maint.CodePatchLoaded, "livepatch "+p.Name, "nothing is to be done; see 'belay patch list'", "is loaded already"))
			stacked = true
		case !is(p, known.Active):
			host(maint.CodePatchStack, fmt.Sprintf("have it unloaded by whoever loaded it (echo 0 > /sys/kernel/livepatch/%s/enabled; rmmod %s)", p.Name, p.Name),
				"livepatch %s was loaded by somebody else, and nobody could bring it back", p.Name)
			stacked = true
		case !m.Cumulative:
			host(maint.CodePatchStack, "revert it first (belay patch revert "+p.Name+"), or use a cumulative one", "livepatch %s is loaded, and %s is not cumulative", p.Name, m.Name)
			stacked = true
		}
	}
	if there, _, livepatch := h.Tree.Module(m.Name); there && !livepatch && !stacked {
		problems = append(problems, *maint.Problemf(maint.CodePatchLoaded, "livepatch "+m.Name, "have it built under another name", "another module of that name is loaded"))
	}
	return k, info, problems
}

// refused makes a problem of what the kernel said to a load.
func refused(name string, err error) error {
	subject := "livepatch " + name
	var p *maint.Problem
	var r *maint.Refusal
	switch {
	case err == nil:
		return maint.Problemf(maint.CodeKernelRefused, subject, "see the kernel's log (dmesg)", "the kernel took it in, and does not have it")
	case errors.As(err, &r), errors.As(err, &p):
		return err
	case errors.Is(err, unix.EBUSY):
		return maint.Problemf(maint.CodeTransition, subject, "wait for the other one (belay patch watch), and try again", "another livepatch is in transition (EBUSY)")
	case errors.Is(err, unix.EEXIST):
		return maint.Problemf(maint.CodePatchLoaded, subject, "see 'belay patch list' and lsmod", "a module of that name is loaded already (EEXIST)")
	case errors.Is(err, unix.ENOEXEC):
		return maint.Problemf(maint.CodeWrongKernel, subject, "get the one for this very kernel; dmesg says more", "the kernel does not take it: wrong vermagic or symbol versions (ENOEXEC)")
	case errors.Is(err, unix.EKEYREJECTED), errors.Is(err, unix.ENOKEY):
		return maint.Problemf(maint.CodePatchSigned, subject, "sign the module with a key of the kernel (sign-file), or boot without module.sig_enforce", "the kernel demands a module signature of its own: %v", err)
	case errors.Is(err, unix.EPERM):
		return maint.Problemf(maint.CodeKernelRefused, subject, "run belay-kernel, which has CAP_SYS_MODULE; see also lockdown and kernel.modules_disabled", "loading modules is not permitted (EPERM)")
	}
	return maint.Problemf(maint.CodeKernelRefused, subject, "see the kernel's log (dmesg)", "the kernel does not take it: %v", err)
}

func names(tasks []maint.KernelTask) string {
	const most = 5
	var words []string
	for i, t := range tasks {
		if i == most {
			words = append(words, fmt.Sprintf("and %d more", len(tasks)-most))
			break
		}
		words = append(words, Name(t))
	}
	if len(words) == 0 {
		return "tasks that cannot be told"
	}
	return strings.Join(words, "; ")
}
