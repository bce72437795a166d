package maint

import (
	"slices"
	"time"
)

// Urgency is how long an update can wait.
type Urgency string

// The urgencies.
const (
	UrgencyNormal Urgency = "normal"
	// UrgencySecurity: it closes a hole. Guests have less notice, if their policy says so,
	// and owners less time.
	UrgencySecurity Urgency = "security"
	// UrgencyEmergency: nobody is waited for.
	UrgencyEmergency Urgency = "emergency"
)

// Urgencies are all of them.
var Urgencies = []Urgency{UrgencyNormal, UrgencySecurity, UrgencyEmergency}

// Within is how long after it was planned an update is to be done, unless it says so
// itself: those who are asked, or have windows, are waited for until then.
func (u Urgency) Within() time.Duration {
	switch u {
	case UrgencySecurity:
		return 3 * 24 * time.Hour
	case UrgencyEmergency:
		return 0
	}
	return 14 * 24 * time.Hour
}

// Update is what is to be done to a host: changes, in order, with checks around them.
type Update struct {
	ID          string  `json:"id"`
	Description string  `json:"description"`
	Urgency     Urgency `json:"urgency"`
	// Covers are what it mends: "CVE-2026-1234".
	Covers []string `json:"covers,omitempty"`
	// Within is how long owners are waited for; 0 is the urgency's.
	Within  time.Duration `json:"within_ns,omitempty"`
	Changes []Change      `json:"changes"`
	Checks  []UpdateCheck `json:"checks,omitempty"`
}

// Deadline is when an update that is planned at a moment is done at the latest, whoever
// is waited for.
func (u Update) Deadline(now time.Time) time.Time {
	if u.Within != 0 && u.Urgency != UrgencyEmergency {
		return now.Add(u.Within)
	}
	return now.Add(u.Urgency.Within())
}

// ChangeKind is what is changed.
type ChangeKind string

// The kinds of change.
const (
	ChangeLivepatch ChangeKind = "livepatch"
	ChangeMicrocode ChangeKind = "microcode"
	ChangePackages  ChangeKind = "packages"
	ChangeService   ChangeKind = "service"
	ChangeSysctl    ChangeKind = "sysctl"
	ChangeNetwork   ChangeKind = "network"
	ChangeQEMU      ChangeKind = "qemu"
	ChangeKernel    ChangeKind = "kernel"
	ChangeFirmware  ChangeKind = "firmware"
	ChangeLeave     ChangeKind = "host-leaves" // the host goes out of service
)

// ChangeKinds are all of them.
var ChangeKinds = []ChangeKind{ChangeLivepatch, ChangeMicrocode, ChangePackages, ChangeService, ChangeSysctl, ChangeNetwork,
	ChangeQEMU, ChangeKernel, ChangeFirmware, ChangeLeave}

// Rungs are those that can deliver a change of this kind at all, in order. What is done
// by B3 is done in the boot that another change needs.
func (k ChangeKind) Rungs() []Rung {
	switch k {
	case ChangeLivepatch:
		return []Rung{RungA}
	case ChangeMicrocode:
		return []Rung{RungA, RungB3, RungD}
	case ChangePackages, ChangeService, ChangeSysctl, ChangeNetwork:
		return []Rung{RungA, RungB1, RungB3, RungD}
	case ChangeQEMU:
		return []Rung{RungA, RungB2, RungB3, RungD}
	case ChangeKernel:
		return []Rung{RungB3, RungD}
	case ChangeFirmware, ChangeLeave:
		return []Rung{RungD}
	}
	return nil
}

// BootsKernel reports whether a change of this kind names the kernel that rung B3 boots.
func (k ChangeKind) BootsKernel() bool { return k == ChangeKernel || k == ChangeMicrocode }

// Change is one thing that is changed of a host.
type Change struct {
	Name  string     `json:"name"` // in its update
	Kind  ChangeKind `json:"kind"`
	Rungs []Rung     `json:"rungs"` // that are able to deliver it
	// File is a livepatch's module; Kernel, Initrd and Append are a kernel's, as of a
	// KexecRequest; Version is what is there afterwards.
	File    string `json:"file,omitempty"`
	Kernel  string `json:"kernel,omitempty"`
	Initrd  string `json:"initrd,omitempty"`
	Append  string `json:"append,omitempty"`
	Version string `json:"version,omitempty"`
	// Packages are the host's, as its package manager writes them with their versions.
	Packages  []string   `json:"packages,omitempty"`
	Artifacts []Artifact `json:"artifacts,omitempty"`
	// Prepare is done while guests run and before any feels anything; Apply is the change
	// itself; Verify sees that it has worked, Undo takes it back.
	Prepare *ChangeStep `json:"prepare,omitempty"`
	Apply   *ChangeStep `json:"apply,omitempty"`
	Verify  *ChangeStep `json:"verify,omitempty"`
	Undo    *ChangeStep `json:"undo,omitempty"`
	// Reboot: the host boots anew to have it, where no guest is on it.
	Reboot bool `json:"reboot,omitempty"`
	// Expected is how long guests that stay stand still for it, as far as its maker
	// knows; 0 is Apply's and Verify's.
	Expected time.Duration `json:"expected_ns,omitempty"`
}

// Delivers reports whether a rung can deliver the change.
func (c Change) Delivers(r Rung) bool { return slices.Contains(c.Rungs, r) }

// Standstill is how long guests that are held for the change are expected to stand still,
// by its maker; 0: not known.
func (c Change) Standstill() (d time.Duration) {
	if c.Expected != 0 {
		return c.Expected
	}
	for _, s := range []*ChangeStep{c.Apply, c.Verify} {
		if s != nil {
			d += s.Expected
		}
	}
	return d
}

// ChangeStep is a host step, and how long it is expected to take.
type ChangeStep struct {
	HostStep
	Expected time.Duration `json:"expected_ns,omitempty"`
}

// Artifact is a file that a change takes, and how it is known to be the right one.
type Artifact struct {
	Path   string `json:"path"`   // absolute, on the host
	SHA256 string `json:"sha256"` // in hexadecimal
	// Signature is the path of a minisign signature of the file, "" for none: its hash is
	// then vouched for by who wrote the manifest.
	Signature string `json:"signature,omitempty"`
}

// CheckWhen is when a check is asked.
type CheckWhen string

// Checks are asked before the first change, between changes, and after the last.
const (
	CheckBefore  CheckWhen = "before"
	CheckBetween CheckWhen = "between"
	CheckAfter   CheckWhen = "after"
)

// OnFail is what follows from a check that fails. One that fails before the first change
// always has nothing begun.
type OnFail string

// What can follow.
const (
	FailUndo OnFail = "undo" // the changes are taken back, in reverse order
	FailStop OnFail = "stop" // nothing further is begun
	FailGoOn OnFail = "go-on"
)

// UpdateCheck is one question to the host or its guests.
type UpdateCheck struct {
	Name string      `json:"name"`
	When []CheckWhen `json:"when"`
	// One of them: a command that exits with 0, a unit that is active, host:port that
	// accepts connections, a URL that answers 200 to 399, or every guest's own check
	// ([[health]] in belayd's configuration).
	Command []string `json:"command,omitempty"`
	Unit    string   `json:"unit,omitempty"`
	TCP     string   `json:"tcp,omitempty"`
	HTTP    string   `json:"http,omitempty"`
	Guests  bool     `json:"guests,omitempty"`
	// WarmUp is waited before the first try, Timeout how long tries go on, and Failures
	// how many of them in a row are a failure; of Guests each has its own of the two.
	WarmUp   time.Duration `json:"warm_up_ns,omitempty"`
	Timeout  time.Duration `json:"timeout_ns"`
	Failures int           `json:"failures"`
	OnFail   OnFail        `json:"on_fail"`
}

// At reports whether a check is asked then.
func (c UpdateCheck) At(when CheckWhen) bool { return slices.Contains(c.When, when) }
