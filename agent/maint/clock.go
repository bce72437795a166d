package maint

import "time"

// ClockState says what is known of a guest's clock.
type ClockState string

// The states of a clock.
const (
	// ClockSynchronised: it was measured, and is within tolerance.
	ClockSynchronised ClockState = "synchronised"
	// ClockOff: it was measured, and is not within tolerance.
	ClockOff ClockState = "off"
	// ClockUnsynchronised: nothing is known: the guest has no agent, or its
	// agent did not answer. Never a success.
	ClockUnsynchronised ClockState = "unsynchronised"
)

// ClockOffset is a guest's wall clock less the host's, with its error bar.
type ClockOffset struct {
	Offset time.Duration `json:"offset_ns"` // negative: the guest is behind
	Error  time.Duration `json:"error_ns"`  // ± half the round trip and the resolution
}

// ClockReport is what was found and done to one guest's clock.
type ClockReport struct {
	Guest  string       `json:"guest"`
	UUID   string       `json:"uuid"`
	State  ClockState   `json:"state"`
	Before *ClockOffset `json:"before,omitempty"` // nil: not measured
	After  *ClockOffset `json:"after,omitempty"`  // nil: nothing was set, or it could not be measured
	Shots  int          `json:"shots,omitempty"`  // how often the clock was set
	// Stale is how long the guest ran with a wrong clock after its release,
	// ± StaleError; 0 where nothing had to be set.
	Stale      time.Duration `json:"stale_ns,omitempty"`
	StaleError time.Duration `json:"stale_error_ns,omitempty"`
	Reason     string        `json:"reason,omitempty"` // why it is not synchronised
}

// farOff is what a guest's own time service is not trusted to put right unnoticed.
const farOff = 500 * time.Millisecond

// Behind is the problem of a guest with an agent that has lost some time, and not been given it back.
func (r ClockReport) Behind(lost time.Duration) *Problem {
	reason := ""
	switch {
	case r.State == ClockSynchronised || lost < farOff:
	case r.State == ClockUnsynchronised:
		reason = "its clock may be " + lost.Round(time.Millisecond).String() + " behind: " + r.Reason
	case r.After != nil && r.After.Offset < -farOff && (r.Before == nil || r.Before.Offset-r.After.Offset > farOff):
		reason = "its clock is " + (-r.After.Offset).Round(time.Millisecond).String() + " behind"
	}
	if reason == "" {
		return nil
	}
	return Problemf(CodeClock, "guest "+r.Guest, "when its agent answers: belay clock "+ShellWord(r.Guest)+" --sync", "%s", reason)
}
