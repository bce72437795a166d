package maint

import "time"

// KexecRequest asks for another kernel under the guests of this host: rung B3. A kernel's boot
// ends every guest that it finds, so that all that run are part of it.
type KexecRequest struct {
	Kernel string `json:"kernel"` // absolute path of the image on this host
	Initrd string `json:"initrd"` // absolute path
	// Append is the command line, "" for the one that this kernel was started with.
	Append string `json:"append,omitempty"`
	// Guests are names or UUIDs, none with All. One that runs and is not among them is a
	// reason not to begin.
	Guests []string `json:"guests,omitempty"`
	All    bool     `json:"all,omitempty"`
	Reason string   `json:"reason,omitempty"`
	// Emergency waives the guests' notice, and says why.
	Emergency string `json:"emergency,omitempty"`
}

// KernelImage is a kernel and how it is started.
type KernelImage struct {
	Kernel  string `json:"kernel"` // path
	Initrd  string `json:"initrd"` // path
	Cmdline string `json:"cmdline"`
	Release string `json:"release"` // uname -r, as the image says
}

// KexecPlan is what a new kernel would do, and why it would not be begun.
type KexecPlan struct {
	Old    KernelImage  `json:"old"`
	New    KernelImage  `json:"new"`
	Dir    string       `json:"dir"` // the file system in the reserved memory
	Guests []KexecGuest `json:"guests"`
	// NeedBytes is what guests take there at most, and FreeBytes what there is.
	NeedBytes uint64    `json:"need_bytes"`
	FreeBytes uint64    `json:"free_bytes"`
	Problems  []Problem `json:"problems"`
}

// KexecFate is what became of a guest under which the kernel changed.
type KexecFate string

// The fates.
const (
	KexecRestored KexecFate = "restored" // it goes on where it was
	KexecRan      KexecFate = "ran on"   // it was not saved: it never left its QEMU
	KexecLeft     KexecFate = "left"     // its owner ended it, or it has gone from here
	KexecKept     KexecFate = "kept"     // it is in the reserved memory still, whole, and does not run
	KexecLost     KexecFate = "lost"     // it is nowhere any more
)

// KexecMemory is how a guest's memory is kept over the change.
type KexecMemory string

// The ways.
const (
	KexecInPlace KexecMemory = "in place" // it is in the reserved memory already, and stays there
	KexecCopied  KexecMemory = "copied"   // there, and back
)

// KexecGuest is one guest under which the kernel changes.
type KexecGuest struct {
	Guest string `json:"guest"`
	UUID  string `json:"uuid"`
	// Bytes is how much is saved of it, and of its memory in place; in a plan, the room that it
	// takes at most.
	Bytes uint64    `json:"bytes"`
	Fate  KexecFate `json:"fate,omitempty"`
	// Memory is how its memory is kept, "" where that is not known, and Why, in a plan, is why it
	// is copied.
	Memory KexecMemory `json:"memory,omitempty"`
	Why    string      `json:"why,omitempty"`
	// Pause is from the beginning of its save to its running again.
	Pause   time.Duration `json:"pause_ns,omitempty"`
	Save    time.Duration `json:"save_ns,omitempty"`
	Check   time.Duration `json:"check_ns,omitempty"` // comparing the checksum
	Restore time.Duration `json:"restore_ns,omitempty"`
	// SameBoot: the guest's own boot ID is as before; nil: its agent does not tell.
	SameBoot *bool        `json:"same_boot,omitempty"`
	Clock    *ClockReport `json:"clock,omitempty"`
	// Started: it was lost, and booted afresh as the configuration has it (kexec.cold_start).
	Started bool     `json:"started,omitempty"`
	Problem *Problem `json:"problem,omitempty"`
}

// KexecResult is what became of the host's kernel and of its guests.
type KexecResult struct {
	Before     string `json:"before"` // uname -r
	After      string `json:"after"`
	BootBefore string `json:"boot_before"` // boot IDs of the host
	BootAfter  string `json:"boot_after"`
	// Down is from the host's being told to go down to the new kernel's start, Up from there
	// until guests were restored; 0 where that is not known.
	Down   time.Duration `json:"down_ns,omitempty"`
	Up     time.Duration `json:"up_ns,omitempty"`
	Guests []KexecGuest  `json:"guests"`
}

// The codes of what a new kernel meets.
const (
	CodeNoRegion   Code = "no-reserved-memory" // the host keeps no memory over a boot
	CodeKexec      Code = "kexec"              // the kernel cannot be started from this one
	CodeImage      Code = "kernel-image"       // it, or what belongs to it, is not fit
	CodeNoWayBack  Code = "no-way-back"        // the old kernel could not be started again
	CodeCmdline    Code = "command-line"       // the new kernel would not find memory or root
	CodeVolatile   Code = "volatile-storage"   // a disk is in memory
	CodeGuestsUnit Code = "libvirt-guests"     // that unit would end or start guests
	CodeUncovered  Code = "guest-not-covered"  // it runs, and is not part of it
	CodeKernelOld  Code = "kernel-not-booted"  // the host has come up with another kernel
	CodeKernelSick Code = "kernel-not-healthy" //
	CodeLostGuest  Code = "guest-lost"         // it is nowhere any more
	CodeKeptGuest  Code = "guest-kept"         // it is in the reserved memory still
	CodeOtherBoot  Code = "guest-rebooted"     // its own boot ID has changed
)
