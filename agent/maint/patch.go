package maint

import (
	"slices"
	"time"
)

// PatchAction is what is changed of the running host: rung A.
type PatchAction string

// The actions. None of them is felt by guests.
const (
	PatchApply     PatchAction = "apply"     // load a kernel livepatch
	PatchRevert    PatchAction = "revert"    // take it back and unload it
	PatchReload    PatchAction = "reload"    // load the one that is kept again, after a boot
	PatchMicrocode PatchAction = "microcode" // load CPU microcode late
	PatchRestart   PatchAction = "restart"   // restart a component that guests do not touch
	PatchQEMU      PatchAction = "qemu"      // patch libraries of guests' QEMUs, or take that back
)

// PatchActions are all of them.
var PatchActions = []PatchAction{PatchApply, PatchRevert, PatchReload, PatchMicrocode, PatchRestart, PatchQEMU}

// PatchRequest asks for a change of the running host.
type PatchRequest struct {
	Action PatchAction `json:"action"`
	// File is the livepatch's module on this host, an absolute path that ends in
	// ".ko"; beside it are its manifest (.toml) and the manifest's signature
	// (.toml.minisig). Of a livepatch of QEMU it is libpulp's container, ".so".
	File string `json:"file,omitempty"`
	// Name is the livepatch to revert, or the unit to restart; Job "restart" (default)
	// or "reload".
	Name string `json:"name,omitempty"`
	Job  string `json:"job,omitempty"`
	// Guests are those whose QEMU is patched, names or UUIDs, All those that run; Revert
	// takes it back.
	Guests []string `json:"guests,omitempty"`
	All    bool     `json:"all,omitempty"`
	Revert bool     `json:"revert,omitempty"`
	Reason string   `json:"reason,omitempty"`
	// Boot is the boot in which it was asked for; belayd fills it in. What was begun
	// before the host went down is not gone on with.
	Boot string `json:"boot,omitempty"`
}

// KeptPatch is a livepatch that Belay has loaded and keeps a copy of.
type KeptPatch struct {
	Name       string    `json:"name"`       // of the module
	SHA256     string    `json:"sha256"`     // of the module
	SrcVersion string    `json:"srcversion"` // of the module, or its build ID where it has none
	Release    string    `json:"release"`    // uname -r of the kernel that it is for
	Version    string    `json:"version"`    // uname -v, which tells builds of one release apart
	Cumulative bool      `json:"cumulative"` // it replaces those before it
	Covers     []string  `json:"covers,omitempty"`
	Reboot     []string  `json:"reboot,omitempty"`
	Functions  []string  `json:"functions,omitempty"` // object/function
	Since      time.Time `json:"since,omitzero"`
}

// Patches is what Belay keeps of livepatches, as one record has it.
type Patches struct {
	// Active is the one that is loaded, and loaded again after a boot of the same kernel.
	Active *KeptPatch `json:"active,omitempty"`
	// NoReload says why none is loaded by itself; "": it is.
	NoReload string `json:"no_reload,omitempty"`
}

// PatchedObject is the kernel ("vmlinux") or a module that a livepatch changes.
type PatchedObject struct {
	Name      string   `json:"name"`
	Patched   bool     `json:"patched"`   // it is loaded, and changed
	Functions []string `json:"functions"` // with their place among those of the same name: "f,1"
}

// LivePatch is a livepatch as the kernel shows it.
type LivePatch struct {
	Name       string `json:"name"`
	Enabled    bool   `json:"enabled"`
	Transition bool   `json:"transition"` // tasks are still on their way to it, or back
	// Replace is that it replaces those before it, StackOrder its place among those that
	// are loaded; nil where the kernel does not tell.
	Replace    *bool           `json:"replace,omitempty"`
	StackOrder *int            `json:"stack_order,omitempty"`
	SrcVersion string          `json:"srcversion,omitempty"`
	Objects    []PatchedObject `json:"objects"`
	// Kept is what Belay knows of it; nil: it was loaded by somebody else.
	Kept *KeptPatch `json:"kept,omitempty"`
}

// Whole reports whether every task runs the patched code.
func (p LivePatch) Whole() bool { return p.Enabled && !p.Transition }

// KernelTask is a task that a livepatch waits for, or would.
type KernelTask struct {
	PID      int      `json:"pid"`
	TID      int      `json:"tid"`
	Comm     string   `json:"comm"`
	Kernel   bool     `json:"kernel_thread"`      // no signal reaches it
	Function string   `json:"function,omitempty"` // a changed one that it is in; "" where none was seen
	Stack    []string `json:"stack,omitempty"`    // innermost first; none where it could not be read
}

// PatchView is what is changed of the running host.
type PatchView struct {
	Release string      `json:"release"`
	Version string      `json:"version"`
	Taint   uint64      `json:"taint"`
	Loaded  []LivePatch `json:"loaded"`
	Patches
	// AutoOff says why nothing is loaded by itself at boot; "": it is.
	AutoOff string `json:"auto_off,omitempty"`
	// Waiting are the tasks that a transition waits for.
	Waiting   []KernelTask   `json:"waiting,omitempty"`
	Microcode []CPUMicrocode `json:"microcode,omitempty"`
}

// CPUMicrocode is the revision of a CPU's microcode.
type CPUMicrocode struct {
	CPU      int    `json:"cpu"`
	Revision string `json:"revision"` // as the kernel has it: "0x1f"
}

// PatchFile is what is to be known of a livepatch before it is loaded.
type PatchFile struct {
	KeptPatch
	VerMagic string `json:"vermagic"`
	// Problems are why it would not be loaded here now.
	Problems []Problem `json:"problems"`
	// Forecast are kernel threads that are asleep in what it changes now: they would hold
	// up its transition. It is no more than a look at stacks.
	Forecast []KernelTask `json:"forecast,omitempty"`
}

// CoverageVerdict is whether the running kernel is mended of something.
type CoverageVerdict string

// The verdicts.
const (
	Covered        CoverageVerdict = "covered"
	NeedsReboot    CoverageVerdict = "needs-reboot"
	CoverageUnsure CoverageVerdict = "unknown"
)

// Coverage is the verdict on one change, such as "CVE-2024-1086".
type Coverage struct {
	Change  string          `json:"change"`
	Verdict CoverageVerdict `json:"verdict"`
	By      string          `json:"by,omitempty"` // the livepatch that covers it, or "update ID"
	Reason  string          `json:"reason"`
}

// Cover is the verdict on a change, from what is loaded and who vouches for it. It is
// covered only where a manifest that was signed says so of a livepatch that is loaded,
// is the very one, and is through with its transition, and where none that Belay does not know
// changes the same functions.
func Cover(v PatchView, change string) Coverage {
	c := Coverage{Change: change, Verdict: CoverageUnsure, Reason: "no livepatch that is loaded here, and that Belay knows, is said to cover it"}
	for _, p := range v.Loaded {
		k := p.Kept
		switch {
		case k == nil:
		case k.Release != v.Release || k.Version != v.Version:
		case slices.Contains(k.Covers, change) && overlaps(p, v.Loaded) != "":
			c.Reason = "livepatch " + p.Name + " is to cover it, and livepatch " + overlaps(p, v.Loaded) + ", which Belay does not know, changes the same functions"
		case slices.Contains(k.Covers, change) && p.Whole() && p.SrcVersion == k.SrcVersion:
			return Coverage{change, Covered, p.Name, "livepatch " + p.Name + " covers it, and every task runs it"}
		case slices.Contains(k.Covers, change):
			c.Reason = "livepatch " + p.Name + " is to cover it, and not every task runs it yet"
		case slices.Contains(k.Reboot, change):
			c.Verdict, c.Reason = NeedsReboot, "the manifest of livepatch "+p.Name+" says that it cannot be mended while the kernel runs: use rung B3 or D"
		}
	}
	return c
}

// overlaps names a livepatch of somebody else's that changes a function which p changes, too:
// whose code runs depends on which was loaded last. "" is none.
func overlaps(p LivePatch, loaded []LivePatch) string {
	changed := make(map[string]bool)
	for _, o := range p.Objects {
		for _, f := range o.Functions {
			changed[o.Name+"/"+f] = true
		}
	}
	for _, q := range loaded {
		for _, o := range q.Objects {
			if q.Kept == nil && slices.ContainsFunc(o.Functions, func(f string) bool { return changed[o.Name+"/"+f] }) {
				return q.Name
			}
		}
	}
	return ""
}

// PatchResult is what a change of the running host did.
type PatchResult struct {
	Name       string         `json:"name"`                     // livepatch or unit
	Transition time.Duration  `json:"transition_ns,omitempty"`  // from loading it to every task running it
	Soaked     time.Duration  `json:"soaked_ns,omitempty"`      // watched after that
	Replaced   string         `json:"replaced,omitempty"`       // the livepatch before it
	Before     []CPUMicrocode `json:"microcode_from,omitempty"` //
	After      []CPUMicrocode `json:"microcode_to,omitempty"`   //
	// Unwatched: libvirt or belayd was away meanwhile, so a pause may have been missed.
	Unwatched bool         `json:"unwatched,omitempty"`
	Guests    []GuestProof `json:"guests,omitempty"` // of a restart
	// QEMUs are those that were patched, in turn.
	QEMUs []PatchedQEMU `json:"qemus,omitempty"`
}

// PatchedQEMU is what was done to a guest's QEMU.
type PatchedQEMU struct {
	Guest string `json:"guest"`
	UUID  string `json:"uuid"`
	PID   int    `json:"pid"`
	// Before and Applied are whether it had the livepatch before, and has it since; it was
	// asked each time (ulp check).
	Before  bool `json:"before"`
	Applied bool `json:"applied"`
	// Stopped is for how long its threads were stopped at most: as long as ulp was at
	// work. 0: nothing was to be done, or belayd has died meanwhile.
	Stopped time.Duration `json:"stopped_ns,omitempty"`
	// Gone: it had ended before its turn.
	Gone    bool     `json:"gone,omitempty"`
	Problem *Problem `json:"problem,omitempty"`
}

// GuestProof is what shows that a guest felt nothing.
type GuestProof struct {
	Guest   string     `json:"guest"`
	UUID    string     `json:"uuid"`
	QEMU    int        `json:"qemu_pid"` // before and after; 0: not to be seen
	ID      int        `json:"id"`       // libvirt's number of the running domain, likewise
	State   GuestState `json:"state"`    // before and after
	Pauses  int        `json:"pauses"`   // of it, that were seen meanwhile
	Problem *Problem   `json:"problem,omitempty"`
}

// The codes of what stands in the way of a livepatch, and of what it can come to.
const (
	CodePatchFile     Code = "patch-file"       // it cannot be read, or is cut short
	CodePatchHash     Code = "patch-hash"       // it is not the file that was signed
	CodePatchSigned   Code = "patch-signature"  // nobody who is trusted has signed it
	CodeNoLivepatch   Code = "not-a-livepatch"  // it is another module, or none
	CodeWrongKernel   Code = "wrong-kernel"     // it is for another one
	CodePatchLoaded   Code = "patch-loaded"     // it is there already
	CodePatchStack    Code = "patch-stack"      // others are loaded
	CodeTransition    Code = "patch-transition" // one is under way (EBUSY)
	CodeTainted       Code = "kernel-tainted"   // something went wrong before
	CodeStalled       Code = "patch-stalled"    // tasks did not get to it
	CodeUnwell        Code = "host-unwell"      // after it
	CodeNoHelper      Code = "kernel-helper"    // belay-kernel
	CodeKernelRefused Code = "kernel-refuses"   // with an errno
	CodeHostRebooted  Code = "host-rebooted"    // meanwhile
	CodeNeedsReboot   Code = "needs-reboot"     // rung B3 or D
	CodeNeedsPause    Code = "needs-pause"      // rung B2
	CodeComponent     Code = "component"        // of a unit
	CodeGuestFelt     Code = "guest-felt-it"    // what no guest was to feel
	CodeQEMURefused   Code = "qemu-refuses"     // a livepatch; it is as it was
	CodeQEMUUnsure    Code = "qemu-unsure"      // it may be inconsistent since
)
