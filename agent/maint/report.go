package maint

import "time"

// Report is what an operation came to: for people who ask afterwards what was done to
// their guests, and why.
type Report struct {
	Host    string        `json:"host"` // where it was made
	Op      OpID          `json:"op"`
	Kind    OpKind        `json:"kind"`
	What    string        `json:"what"` // "moves guest web-1 to host-b"
	By      string        `json:"by"`
	Reason  string        `json:"reason,omitempty"`
	State   OpState       `json:"state"`
	Step    string        `json:"step,omitempty"` // the step in progress
	Outcome Outcome       `json:"outcome,omitempty"`
	Started time.Time     `json:"started"`
	Ended   time.Time     `json:"ended,omitzero"`
	Took    time.Duration `json:"took_ns"` // until now while it runs
	Resumed int           `json:"resumed,omitempty"`

	Guests    []GuestReport `json:"guests"`
	HostDone  []string      `json:"host_done"` // what became of the host
	Steps     []StepReport  `json:"steps"`
	Decisions []ReportLine  `json:"decisions"`
	Timeline  []ReportLine  `json:"timeline"`
	Problems  []Problem     `json:"problems"`
	Parts     []OpID        `json:"parts,omitempty"` // the operations that it was made of
}

// GuestReport is what one guest felt of an operation.
type GuestReport struct {
	Guest string `json:"guest"`
	UUID  string `json:"uuid"`
	Fate  string `json:"fate"` // "moved to host-b", "released by belayd", "left: it is paused"
	// Felt is how it stood still; nil: nothing was done to it, or that it felt anything is
	// not known. See Fate.
	Felt *Standstill `json:"felt,omitempty"`
	// Expected is what was predicted beforehand; nil: nothing was.
	Expected *Estimate `json:"expected,omitempty"`
	// Limit is how long it was to stand still at most; 0: no limit was set.
	Limit    time.Duration `json:"limit_ns,omitempty"`
	Clock    *ClockReport  `json:"clock,omitempty"`
	SameBoot *bool         `json:"same_boot,omitempty"` // its boot ID is as before; nil: not asked
	Remarks  []string      `json:"remarks,omitempty"`
	Problems []Problem     `json:"problems,omitempty"`
}

// Standstill is how a guest's vCPUs stood still.
type Standstill struct {
	Blackout bool          `json:"blackout,omitempty"` // of a move; else a pause where it is
	Longest  time.Duration `json:"longest_ns"`         // 0 with Times > 0: not measured
	Times    int           `json:"times"`              // 0: it did not, as far as was seen
	// AtMost: it was shorter than Longest, by how much was not seen.
	AtMost bool `json:"at_most,omitempty"`
}

// Known reports whether it is known how long it was.
func (s Standstill) Known() bool { return s.Times == 0 || s.Longest > 0 }

// StepReport is how long a step took.
type StepReport struct {
	Name   string        `json:"name"`
	Status string        `json:"status"`
	Took   time.Duration `json:"took_ns"` // 0: it has not ended
	Error  string        `json:"error,omitempty"`
}

// ReportLine is something that happened, or was decided.
type ReportLine struct {
	Time time.Time `json:"time,omitzero"` // zero: of the whole operation
	Step string    `json:"step,omitempty"`
	Text string    `json:"text"`
}
