package maint

import (
	"encoding/json"
	"time"
)

// OpID names an operation, for example "mig-20261122-0231-k3f9".
type OpID string

// OpKind is what an operation does.
type OpKind string

// The kinds of operation.
const (
	OpMigrate OpKind = "migrate"     // rung D: one guest to one peer
	OpHold    OpKind = "hold"        // rung B1: guests held around a host step
	OpReplace OpKind = "replace-vmm" // rung B2: a new QEMU under one guest
	OpDrain   OpKind = "drain"       // every guest to peers, each by a migration of its own
	OpRestore OpKind = "restore"     // and back, each by a migration of the peer's
	OpPatch   OpKind = "patch"       // rung A: the running host is changed, and guests feel nothing
	OpKexec   OpKind = "kexec"       // rung B3: another host kernel, under the same guests
	OpApply   OpKind = "apply"       // an update, as it was planned: each step by an operation of its own
)

// OpKinds are all of them.
var OpKinds = []OpKind{OpMigrate, OpHold, OpReplace, OpDrain, OpRestore, OpPatch, OpKexec, OpApply}

// OpState is where an operation is in its life.
//
//	running ──► undoing ──► ended
//	   └───────────────────► ended
type OpState string

// The states of an operation.
const (
	OpRunning OpState = "running"
	OpUndoing OpState = "undoing"
	OpEnded   OpState = "ended"
)

// Outcome is how an operation ended.
type Outcome string

// The outcomes of an ended operation.
const (
	OutcomeDone    Outcome = "done"
	OutcomeBlocked Outcome = "blocked" // refused before any effect
	OutcomeFailed  Outcome = "failed"  // undone: the guest runs where it ran before
	OutcomeAborted Outcome = "aborted" // undone because somebody asked
	OutcomePartly  Outcome = "partly"  // the main effect holds, something after it does not
	OutcomeStuck   Outcome = "stuck"   // neither forward nor back; needs an operator
)

// TookEffect reports whether an operation has done what it was for, whatever is not well beside.
func (o Outcome) TookEffect() bool { return o == OutcomeDone || o == OutcomePartly }

// Outcomes are all of them.
var Outcomes = []Outcome{OutcomeDone, OutcomeBlocked, OutcomeFailed, OutcomeAborted, OutcomePartly, OutcomeStuck}

// MigrateRequest asks for a live migration.
type MigrateRequest struct {
	Guest string `json:"guest"` // name or UUID
	To    string `json:"to"`    // peer name
	// Timeout bounds the operation; when it passes the copy is cancelled
	// and the guest stays where it is. 0 is the host's default.
	Timeout time.Duration `json:"timeout_ns,omitempty"`
	// BandwidthMiBs limits the memory stream, in MiB/s; 0 is no limit.
	BandwidthMiBs uint64 `json:"bandwidth_mib_s,omitempty"`
	// MaxPause is the longest pause that the copy may end with, as far as can be
	// foreseen. 0 is the host's default.
	MaxPause time.Duration `json:"max_pause_ns,omitempty"`
	// Allow is what may be done to a copy that does not come to its end otherwise;
	// nil is the host's default, and empty nothing.
	Allow []Means `json:"allow"`
	// CopyDisks are the disks that are copied along if they are not shared: CopyAll,
	// CopyNone, or their targets. nil is the host's default.
	CopyDisks []string `json:"copy_disks,omitempty"`
	Reason    string   `json:"reason,omitempty"`
	// Emergency waives the guest's notice, and says why.
	Emergency string `json:"emergency,omitempty"`
}

// Means is what may be done to a copy that does not come to its end because the guest
// writes faster than the network takes it.
type Means string

// The means, in the order in which they are tried: the least impact on the guest first.
const (
	MeansBandwidth Means = "bandwidth" // lift the limit of the copy's bandwidth
	MeansParallel  Means = "parallel"  // copy again, by several connections
	MeansSlow      Means = "slow"      // copy again, and slow the guest's vCPUs down
	MeansPostCopy  Means = "postcopy"  // run it on the destination, and send what is left after it
)

// AllMeans are all, in order.
var AllMeans = []Means{MeansBandwidth, MeansParallel, MeansSlow, MeansPostCopy}

// AbortNow is the Text of a RecAbort that is about what runs of an operation, too.
const AbortNow = "now"

// Op is an operation: the fold of its records.
type Op struct {
	ID        OpID   `json:"id"`
	Kind      OpKind `json:"kind"`
	Guest     string `json:"guest,omitempty"`      // name; "" where it is about several
	GuestUUID string `json:"guest_uuid,omitempty"` //
	// Guests are those of an operation on several, by UUID.
	Guests   []string  `json:"guests,omitempty"`
	Peer     string    `json:"peer,omitempty"`
	By       string    `json:"by"` // who asked: "root", "cert:ops-laptop"
	Reason   string    `json:"reason,omitempty"`
	Started  time.Time `json:"started"`
	Deadline time.Time `json:"deadline"`
	// Told says that guests are told beforehand, and have their notice.
	Told bool `json:"told,omitempty"`

	State    OpState         `json:"state"`
	Step     string          `json:"step,omitempty"` // the step in progress
	Outcome  Outcome         `json:"outcome,omitempty"`
	Ended    time.Time       `json:"ended,omitzero"`
	Problems []Problem       `json:"problems,omitempty"` // why it ended as it did
	AbortBy  string          `json:"abort_by,omitempty"`
	Resumed  int             `json:"resumed,omitempty"` // times it was taken up again after a restart
	Steps    []Step          `json:"steps"`
	Migrate  *MigrateRequest `json:"migrate,omitempty"`
	Move     *MoveResult     `json:"move,omitempty"`
	Hold     *HoldRequest    `json:"hold,omitempty"`
	Held     *HoldResult     `json:"held,omitempty"`
	Replace  *ReplaceRequest `json:"replace,omitempty"`
	Replaced *VMMResult      `json:"replaced,omitempty"`
	Leash    []LeashEvent    `json:"leash,omitempty"`
	Patch    *PatchRequest   `json:"patch,omitempty"`
	Patched  *PatchResult    `json:"patched,omitempty"`
	Kexec    *KexecRequest   `json:"kexec,omitempty"`
	Kexeced  *KexecResult    `json:"kexeced,omitempty"`
	Apply    *ApplyRequest   `json:"apply,omitempty"`
	// Arrival is what its new host did for a moved guest, after the operation's end;
	// nil until that has said so.
	Arrival *ArrivalReport `json:"arrival,omitempty"`
	// HealthBefore is how its guest did its work before the move; nil where that was not
	// asked. Arrival has how it did after it.
	HealthBefore *HealthReport `json:"health_before,omitempty"`

	Drain   *DrainRequest   `json:"drain,omitempty"`
	Restore *RestoreRequest `json:"restore,omitempty"`
	Moves   []GuestMove     `json:"moves,omitempty"` // of a drain's or a restore's guests
	// Part is the drain that a migration is part of, or the apply that an operation is a
	// step of, and Return a peer's request
	// that it meets.
	Part   OpID           `json:"part,omitempty"`
	Return *ReturnRequest `json:"return,omitempty"`
	// AbortNow: what runs of it is aborted too.
	AbortNow bool `json:"abort_now,omitempty"`

	// Progress is the last statistics of a running copy; not journaled.
	Progress *Job `json:"progress,omitempty"`
	// Trouble is what is wrong with it while it goes on all the same; not journaled.
	Trouble *Problem `json:"trouble,omitempty"`
}

// Step is one step of an operation as its records tell it.
type Step struct {
	Name    string    `json:"name"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"`
	Status  string    `json:"status"` // doing, done, failed, undoing, undone, undo failed
	Error   string    `json:"error,omitempty"`
	Notes   []string  `json:"notes,omitempty"`
	// Data is what the step wrote down for itself, to survive a crash. It can
	// hold secrets of the guest's definition and stays on the host.
	Data json.RawMessage `json:"-"`
}

// MoveResult is what a finished migration measured.
type MoveResult struct {
	From string `json:"from"`
	To   string `json:"to"`
	// Downtime is the blackout: from the guest's vCPUs being stopped to their being
	// started. It is Started less Stopped, and less what the clocks differ by, where both were
	// seen; else libvirt's measure, from the destination's completed job.
	Downtime time.Duration `json:"downtime_ns"`
	// Stopped and Started are when QEMU did so, each by its own host's clock. Zero: not seen.
	Stopped    time.Time     `json:"stopped,omitzero"`
	Started    time.Time     `json:"started,omitzero"`
	Copy       time.Duration `json:"copy_ns"`  // the libvirt job
	Total      time.Duration `json:"total_ns"` // the whole operation
	MemorySent uint64        `json:"memory_sent_bytes"`
	Iterations uint64        `json:"iterations"`
	// Disks are those that were copied. Their images are left on the host that the guest
	// has left, as they were when it did.
	Disks []DiskCopy `json:"disks,omitempty"`
}

// RecordKind is what a Record says.
type RecordKind string

// The kinds of record. See journal.Fold for the transition table.
const (
	RecAccepted   RecordKind = "accepted"    // an operation was admitted; Data is the Op
	RecResumed    RecordKind = "resumed"     // taken up again after a restart
	RecStepStart  RecordKind = "step-start"  // intent: written before the effect
	RecStepNote   RecordKind = "step-note"   // Text for people, Data for the step itself
	RecStepDone   RecordKind = "step-done"   //
	RecStepFailed RecordKind = "step-failed" // Text is the error, Data the Ending it leads to
	RecUndoStart  RecordKind = "undo-start"  //
	RecUndoDone   RecordKind = "undo-done"   //
	RecUndoFailed RecordKind = "undo-failed" //
	RecAbort      RecordKind = "abort"       // By asked for an abort; Text "now" has what runs of it aborted too
	RecMove       RecordKind = "guest-move"  // of a drain or a restore; Data is a GuestMove
	RecMoved      RecordKind = "moved"       // Data is the MoveResult
	RecHealth     RecordKind = "health"      // before a move; Data is a HealthReport
	RecHeld       RecordKind = "held"        // Data is the HoldResult
	RecReplaced   RecordKind = "replaced"    // Data is the VMMResult
	RecLeash      RecordKind = "leash"       // Data is a LeashEvent
	RecPatched    RecordKind = "patched"     // Data is the PatchResult
	RecKexec      RecordKind = "kexec"       // Data is the KexecResult
	RecPatches    RecordKind = "patches"     // of this host: Data is the Patches, in place of those before
	RecClock      RecordKind = "clock"       // in journals of before RecSeenTo; Data is a ClockReport
	RecEnded      RecordKind = "ended"       // Data is an Ending
	RecSeenTo     RecordKind = "seen-to"     // after the end: Data is the ArrivalReport of the guest's new host
	RecReserved   RecordKind = "reserved"    // room kept for an arriving guest; Data is the Reservation
	RecReleased   RecordKind = "released"    // that room was given up
	RecArrived    RecordKind = "arrived"     // a guest has come, or was seen to; Data is the Arrived
	RecDisks      RecordKind = "disks"       // files made for its disks; Data is the MadeDisks
	RecEvent      RecordKind = "event"       // scheduled events; Data is the EventChange
	RecCordoned   RecordKind = "cordoned"    // the host takes no guests in; Data is the Cordon
	RecUncordoned RecordKind = "uncordoned"  // and does again; By asked for it
)

// Record is one line of the journal: a fact or an intent, on disk before
// what follows from it.
type Record struct {
	Seq  uint64          `json:"seq"`
	Time time.Time       `json:"time"`
	Op   OpID            `json:"op"`
	Kind RecordKind      `json:"kind"`
	Step string          `json:"step,omitempty"`
	By   string          `json:"by,omitempty"`
	Text string          `json:"text,omitempty"`
	Data json.RawMessage `json:"data,omitempty"`
}

// Ending is the data of a RecEnded record.
type Ending struct {
	Outcome  Outcome   `json:"outcome"`
	Problems []Problem `json:"problems,omitempty"`
}

// Arrived is a guest that has come to this host from a peer.
type Arrived struct {
	Op        OpID      `json:"op"`   // of its old host
	From      string    `json:"from"` // that host's certificate name
	GuestUUID string    `json:"guest_uuid"`
	Guest     string    `json:"guest"`
	At        time.Time `json:"at"`
	// Report is what was done for it since; nil while that goes on.
	Report *ArrivalReport `json:"report,omitempty"`
}

// ArrivalReport is what a host did for a guest that has come to it, when it ran there.
type ArrivalReport struct {
	Clock ClockReport `json:"clock"`
	// Agent is AgentAnswers or AgentSilent; "" for a guest that has none, or does not run.
	Agent string        `json:"agent,omitempty"`
	Ports []ArrivedPort `json:"ports,omitempty"`
	// Health is how it was found to do its work; nil where nothing says how to ask, or somebody
	// has paused it.
	Health *HealthReport `json:"health,omitempty"`
}

// HealthReport is how a guest was found to do its work.
type HealthReport struct {
	Check   string `json:"check"` // "tcp 192.0.2.10:443"
	Healthy bool   `json:"healthy"`
	// Reason is why it is not, as of the last try.
	Reason string        `json:"reason,omitempty"`
	Tries  int           `json:"tries"`
	Took   time.Duration `json:"took_ns"` // until it was healthy, or given up
}

// What became of the guest agent of a guest that has come.
const (
	AgentAnswers = "answers"
	AgentSilent  = "does not answer"
)

// ArrivedPort is an interface of a guest that has come, on a Linux bridge.
type ArrivedPort struct {
	MAC string `json:"mac"`
	Tap string `json:"tap"`
	// Learned is that the new host's bridge has learned that the guest is behind it, and
	// Announced how often its QEMU was told to announce it again for that.
	Learned   bool `json:"learned"`
	Announced int  `json:"announced,omitempty"`
	// SeenAt is the port by which the old host's bridge sees the guest now, "" where it
	// has not heard of it since.
	SeenAt string `json:"seen_at,omitempty"`
}

// Reservation is room kept on a destination for a guest that is on its way.
// It lapses by itself at Expires unless renewed, so a source that died for
// good does not hold it for ever.
type Reservation struct {
	Op          OpID      `json:"op"`
	From        string    `json:"from"` // the source host's certificate name
	GuestUUID   string    `json:"guest_uuid"`
	Guest       string    `json:"guest"`
	MemoryBytes uint64    `json:"memory_bytes"`
	Expires     time.Time `json:"expires"`
	// Pages are the huge pages that its memory is to be made of.
	Pages []PageNeed `json:"pages,omitempty"`
	// AntiAffinity are groups of which no other guest may be there.
	AntiAffinity []string `json:"anti_affinity,omitempty"`
	// Disks are those that are to be copied along.
	Disks []DiskCopy `json:"disks,omitempty"`
}
