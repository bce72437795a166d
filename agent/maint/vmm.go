package maint

import "time"

// VMMMethod is a way of putting a new QEMU under a running guest: rung B2.
type VMMMethod string

// The methods, by what they cost a guest.
const (
	// VMMBounce: live migration into a second libvirt daemon on this host
	// and back. The guest feels two blackouts; its memory is there twice
	// meanwhile.
	VMMBounce VMMMethod = "bounce"
	// VMMPrewarmed: as bounce, but its memory, in a file that two processes can
	// map, stays where it is; the guest feels two pauses of some ten
	// milliseconds.
	VMMPrewarmed VMMMethod = "prewarmed"
	// VMMInPlace: device state through a socket, memory stays where it is.
	// Needs memory that another process can map.
	VMMInPlace VMMMethod = "in-place"
	// VMMCopy: saved to and restored from a file in RAM. The pause grows
	// with memory, which is there twice meanwhile.
	VMMCopy VMMMethod = "copy"
)

// VMMMethods are all of them.
var VMMMethods = []VMMMethod{VMMPrewarmed, VMMInPlace, VMMCopy, VMMBounce}

// ReplaceRequest asks for a new QEMU under a guest.
type ReplaceRequest struct {
	Guest  string    `json:"guest"`            // name or UUID
	Method VMMMethod `json:"method,omitempty"` // "": the cheapest that is possible
	// MaxPause is the longest pause the operator accepts; a method whose
	// estimate is longer is refused. 0 is the host's default.
	MaxPause time.Duration `json:"max_pause_ns,omitempty"`
	Reason   string        `json:"reason,omitempty"`
	// Emergency waives the guest's notice, and says why.
	Emergency string `json:"emergency,omitempty"`
}

// VMMChoice is the planner's word on one method for one guest.
type VMMChoice struct {
	Method VMMMethod `json:"method"`
	// Pause is the estimated longest single standstill of the guest.
	Pause time.Duration `json:"pause_ns"`
	// MemoryBytes is what the method needs beside the guest's own memory.
	MemoryBytes uint64 `json:"memory_bytes"`
	// Problems are why it is not possible; none: it is.
	Problems []Problem `json:"problems,omitempty"`
	// Unproven is why it is not taken unless it is asked for by name; "": it may be.
	Unproven string `json:"unproven,omitempty"`
}

// VMMResult is what replacing a QEMU did.
type VMMResult struct {
	Guest    string        `json:"guest"`
	UUID     string        `json:"uuid"`
	Method   VMMMethod     `json:"method"`
	Choices  []VMMChoice   `json:"choices,omitempty"`
	OldQEMU  string        `json:"old_qemu,omitempty"` // version
	NewQEMU  string        `json:"new_qemu,omitempty"`
	Pause    time.Duration `json:"pause_ns"`           // longest standstill
	Pauses   int           `json:"pauses"`             // how many
	Total    time.Duration `json:"total_ns"`           //
	Attempts int           `json:"attempts,omitempty"` // starts of the new QEMU
	Clock    *ClockReport  `json:"clock,omitempty"`
}

// Lost is how long the guest stood still in all, at most.
func (r VMMResult) Lost() time.Duration { return r.Pause * time.Duration(max(1, r.Pauses)) }

// The codes of what stands in the way of a method.
const (
	CodeMemory     Code = "memory-not-shareable" // no other QEMU can map the guest's memory
	CodeHook       Code = "hook-missing"         // libvirt does not run Belay's hook
	CodeConfined   Code = "qemu-confined"        // QEMU cannot reach what it must
	CodeDevice     Code = "device-stays"         // a device cannot be handed over
	CodeQEMU       Code = "qemu-refuses"         // QEMU itself, or its version
	CodeLongPause  Code = "pause-estimate"       // longer than accepted
	CodeKept       Code = "memory-kept"          // an earlier operation has kept its memory
	CodeStarted    Code = "started-meanwhile"    // somebody else started the guest, afresh
	CodeBetween    Code = "between-qemus"        // the guest is off, its memory and state are kept
	CodeDefinition Code = "definition-changed"   // of the guest, by somebody else, meanwhile
)
