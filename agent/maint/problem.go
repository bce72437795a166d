package maint

import (
	"errors"
	"fmt"
	"strings"
)

// Sentinels that callers branch on. Adapters wrap them with what they know.
var (
	// ErrNoGuest: the host has no domain of that name or UUID.
	ErrNoGuest = errors.New("no such guest")
	// ErrHypervisorDown: libvirt on this host cannot be reached.
	ErrHypervisorDown = errors.New("libvirt is not reachable")
	// ErrPeerDown: the belayd of a peer host cannot be reached.
	ErrPeerDown = errors.New("peer is not reachable")
	// ErrNoJob: the guest has no job that could be aborted.
	ErrNoJob = errors.New("no job is running")
	// ErrNoAgent: the guest's agent is not there, or does not answer.
	ErrNoAgent = errors.New("the guest agent does not answer")
	// ErrUnsafeStorage: libvirt refuses a migration for how the guest's disks are
	// stored or cached.
	ErrUnsafeStorage = errors.New("libvirt holds its storage unsafe to migrate")
	// ErrCertificate: a migration failed for a certificate, or for how TLS began.
	ErrCertificate = errors.New("a certificate is not accepted")
	// ErrParameter: libvirt knows nothing of a parameter or flag, and has done nothing.
	ErrParameter = errors.New("libvirt does not take this parameter")
	// ErrLocked: a disk's lease is held by somebody else.
	ErrLocked = errors.New("a disk's lease is held by somebody else")
)

// Code names a kind of problem, stable for programs to branch on.
type Code string

// The codes of problems that an operation or a request can meet.
const (
	CodeBadRequest       Code = "bad-request"
	CodeForbidden        Code = "forbidden"
	CodeUnknownGuest     Code = "unknown-guest"
	CodeUnknownPeer      Code = "unknown-peer"
	CodeUnknownOp        Code = "unknown-operation"
	CodePeerDown         Code = "peer-unreachable"
	CodePeerRefused      Code = "peer-refused"
	CodeHypervisorDown   Code = "libvirt-unreachable"
	CodeBusy             Code = "guest-busy"
	CodeHostBusy         Code = "host-busy"
	CodeCordoned         Code = "cordoned"
	CodeGuestOff         Code = "guest-off"
	CodeGuestPaused      Code = "guest-paused"
	CodeGuestState       Code = "guest-state"
	CodeSameHost         Code = "same-host"
	CodeNameTaken        Code = "name-taken"
	CodeNoRoom           Code = "no-room"
	CodeAntiAffinity     Code = "anti-affinity"
	CodeCPU              Code = "cpu-incompatible"
	CodeMachineType      Code = "machine-type"
	CodeDomainType       Code = "domain-type"
	CodeDiskMissing      Code = "disk-missing"
	CodeDiskNotShared    Code = "disk-not-shared"
	CodeDiskDiffers      Code = "disk-differs"
	CodeDiskCache        Code = "disk-cache"
	CodeDiskInTheWay     Code = "disk-in-the-way"
	CodeDiskCopy         Code = "disk-copy"
	CodeStorageHangs     Code = "storage-hangs"
	CodeNetwork          Code = "network-missing"
	CodeHostDevice       Code = "host-device"
	CodeNoPages          Code = "no-huge-pages"
	CodeTPM              Code = "tpm"
	CodeSecret           Code = "secret-missing"
	CodeSocket           Code = "socket"
	CodePort             Code = "port"
	CodeTLS              Code = "tls-required"
	CodeCertificate      Code = "certificate"
	CodeMigrationNetwork Code = "migration-network"
	CodeSourceRefuses    Code = "source-refuses"
	CodeJournal          Code = "journal-unwritable"
	CodeShuttingDown     Code = "shutting-down"
	CodeFailed           Code = "failed"
	CodeTimeout          Code = "timed-out"
	CodeAborted          Code = "aborted"
	CodeUnverified       Code = "unverified"
	CodeLeftover         Code = "leftover"
	CodeAutostart        Code = "autostart"
	CodePostCopy         Code = "post-copy"
	CodeNoJob            Code = "no-job"
	CodeNothing          Code = "nothing-to-do"
	CodeStep             Code = "step-failed"
	CodeLeash            Code = "leash"
	CodePaused           Code = "still-paused"
	CodePauseTooLong     Code = "paused-too-long"
	CodeReleased         Code = "released-by-somebody"
	CodeClock            Code = "clock-behind"
	CodeFrozen           Code = "file-systems-frozen"
	CodeCampaign         Code = "campaign-state"
	CodeNoSlot           Code = "no-slot"
	CodeNoDefers         Code = "no-deferrals-left"
	CodeEnded            Code = "operation-ended"
	CodeEventState       Code = "event-state"
	CodeGuestsUntold     Code = "guests-untold"
	CodeMethodNotAllowed Code = "method-not-allowed"
	CodeNotFound         Code = "not-found"
	CodeInternal         Code = "internal"
)

// Problem is one thing that stands in the way: what it is about, why, and
// what would lift it. It is an error and travels as JSON.
type Problem struct {
	Code    Code   `json:"code"`
	Subject string `json:"subject"` // "guest web-1", "peer host-b", "host host-a"
	Reason  string `json:"reason"`
	Remedy  string `json:"remedy,omitempty"`
}

// Error implements error: "guest web-1: is shut off (start it first)".
func (p *Problem) Error() string {
	s := p.Reason
	if p.Subject != "" {
		s = p.Subject + ": " + s
	}
	if p.Remedy != "" {
		s += " (" + p.Remedy + ")"
	}
	return s
}

// Is lets callers branch on the sentinels also when the problem has come over
// the API.
func (p *Problem) Is(target error) bool {
	switch p.Code {
	case CodeUnknownGuest:
		return target == ErrNoGuest
	case CodeHypervisorDown:
		return target == ErrHypervisorDown
	case CodePeerDown:
		return target == ErrPeerDown
	case CodeNoJob:
		return target == ErrNoJob
	}
	return false
}

// Problemf makes a Problem; reason is formatted with args.
func Problemf(code Code, subject, remedy, reason string, args ...any) *Problem {
	return &Problem{Code: code, Subject: subject, Remedy: remedy, Reason: fmt.Sprintf(reason, args...)}
}

// Refusal is every reason for which something was not begun. Nothing has
// been changed when a Refusal is returned.
type Refusal struct {
	What     string    `json:"what"` // "cannot migrate guest web-1 to host-b"
	Problems []Problem `json:"problems"`
}

// Error lists all problems.
func (r *Refusal) Error() string {
	parts := make([]string, len(r.Problems))
	for i := range r.Problems {
		parts[i] = r.Problems[i].Error()
	}
	return r.What + ": " + strings.Join(parts, "; ")
}

// Refuse returns a Refusal, or nil when there is no problem.
func Refuse(what string, problems []Problem) error {
	if len(problems) == 0 {
		return nil
	}
	return &Refusal{What: what, Problems: problems}
}

// ShellWord is a text as one word of a shell, for commands in remedies: paths and names
// can come from elsewhere, and people paste what they are told.
func ShellWord(s string) string {
	plain := func(c rune) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("/._-+:,@%", c)
	}
	if s != "" && !strings.HasPrefix(s, "-") && strings.IndexFunc(s, func(c rune) bool { return !plain(c) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// AsProblem gives the Problem inside err, or one made of its text with the
// code given.
func AsProblem(err error, code Code, subject string) *Problem {
	var p *Problem
	if errors.As(err, &p) {
		return p
	}
	return &Problem{Code: code, Subject: subject, Reason: err.Error()}
}
