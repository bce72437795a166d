package maint

import (
	"slices"
	"time"
)

// Rung is a rung of the ladder: a way of servicing a host, by what its guests feel.
type Rung string

// The rungs, the one with the least impact first.
const (
	RungA  Rung = "A"  // the running host is changed; nothing is felt
	RungB1 Rung = "B1" // guests are held while a component is serviced: a pause
	RungB2 Rung = "B2" // a new QEMU under a guest: a pause
	RungB3 Rung = "B3" // another host kernel under the guests: a pause
	// RungC is that its owner is told, and may pick the moment; what is done then is
	// another rung.
	RungC Rung = "C"
	RungD Rung = "D" // the guest moves to a peer: a blackout
)

// Rungs are all of them, in order.
var Rungs = []Rung{RungA, RungB1, RungB2, RungB3, RungC, RungD}

// AllOfB stands for B1, B2 and B3 in policies.
const AllOfB Rung = "B"

// Pauses reports whether a rung holds guests where they are: B1, B2, B3.
func (r Rung) Pauses() bool { return r == RungB1 || r == RungB2 || r == RungB3 }

// In reports whether a rung is among those of a policy, where B is three of them.
func (r Rung) In(rungs []Rung) bool {
	return slices.Contains(rungs, r) || r.Pauses() && slices.Contains(rungs, AllOfB)
}

// Estimate is for how long a guest is expected to stand still at one time.
type Estimate struct {
	Low     time.Duration `json:"low_ns"`
	Typical time.Duration `json:"typical_ns"`
	// High is what hardly any exceeds, as far as is known. Limits are held against it.
	High time.Duration `json:"high_ns"`
	// From says what it is taken from: "7 moves of this guest".
	From string `json:"from,omitempty"`
}

// unfelt is what a standstill may be longer by, and nobody tells the difference: it is less
// than any timer of a network's protocols is about.
const unfelt = 10 * time.Millisecond

// Exceeds reports whether a prediction is out of the range of an earlier one, upwards: what is
// typical now was not to be expected then. A tenth beyond it, and what nobody feels, is
// between two predictions that what was felt meanwhile has shifted.
func (e Estimate) Exceeds(told Estimate) bool {
	return e.Typical > told.High+max(told.High/10, unfelt)
}

// Felt is what one guest has felt of one operation: what is predicted from.
type Felt struct {
	Rung   Rung          `json:"rung"`
	Method VMMMethod     `json:"method,omitempty"` // of B2
	UUID   string        `json:"uuid"`
	At     time.Time     `json:"at"`
	Pause  time.Duration `json:"pause_ns"`
	// Work is how long the host's step took within a hold, and Step what it was.
	Work time.Duration `json:"work_ns,omitempty"`
	Step string        `json:"step,omitempty"`
}

// Calibration is how good predictions have been: each of what was felt, held against
// what was known before it.
type Calibration struct {
	Rung   Rung      `json:"rung"`
	Method VMMMethod `json:"method,omitempty"`
	Of     int       `json:"of"`     // predictions that could be made
	Within int       `json:"within"` // that were right: between low and high
	// Ratio is the median of what was felt to what was predicted.
	Ratio float64 `json:"ratio"`
}

// Slot is a stretch of time in which a guest may be disturbed; End is not part of it.
type Slot struct {
	Start time.Time `json:"start"`
	End   time.Time `json:"end"`
}

// Ladder is all that is known when an update is planned: of the host, of each guest, of
// the peers, and what has been felt before.
type Ladder struct {
	Host     string    `json:"host"`
	HostUUID string    `json:"host_uuid"`
	Now      time.Time `json:"now"`
	// Tells is that guests are told, and have their notice (events.enabled).
	Tells bool `json:"tells"`
	// MaxHold is the longest that this host holds guests (hold.max_pause_limit); 0 is no
	// limit.
	MaxHold time.Duration `json:"max_hold_ns,omitempty"`
	// Verdicts are what the host says of changes and rungs: those that it can do, too.
	Verdicts []HostVerdict `json:"verdicts"`
	Guests   []LadderGuest `json:"guests"` // that run
	Off      []string      `json:"off"`    // guests that do not, and feel nothing
	Peers    []LadderPeer  `json:"peers"`
	History  []Felt        `json:"history"`
}

// HostVerdict says whether this host can do a change by a rung, whoever is on it.
type HostVerdict struct {
	Change string `json:"change"` // its name
	Rung   Rung   `json:"rung"`
	// Problems are why not; none: it can.
	Problems []Problem `json:"problems,omitempty"`
}

// LadderGuest is a guest that runs, and what can be done with it.
type LadderGuest struct {
	Guest  string      `json:"guest"`
	UUID   string      `json:"uuid"`
	Takes  GuestBytes  `json:"takes"` // of a peer's room
	Policy GuestPolicy `json:"policy"`
	// Verdicts are of B1, B2, B3 and D; a rung that is not among them is not possible.
	Verdicts []GuestVerdict `json:"verdicts"`
	// Peers are those that it could go to, if rung D is possible at all.
	Peers []PeerVerdict `json:"peers,omitempty"`
	// Slots are when it may be disturbed, in order, if its policy has windows.
	Slots []Slot `json:"slots,omitempty"`
}

// GuestVerdict says whether a rung is possible for a guest. Whether it is allowed is the
// policy's affair.
type GuestVerdict struct {
	Rung     Rung      `json:"rung"`
	Problems []Problem `json:"problems,omitempty"` // why not, and what would lift each
	// Untouched says why it is not needed, and nothing would be felt: "its QEMU is the
	// new one"; "": it is.
	Untouched string `json:"untouched,omitempty"`
	// Method is the cheapest of B2, and Pause what its planner expects; 0: not known.
	Method VMMMethod     `json:"method,omitempty"`
	Pause  time.Duration `json:"pause_ns,omitempty"`
}

// PeerVerdict says whether a peer takes a guest, its room aside.
type PeerVerdict struct {
	Peer     string    `json:"peer"`
	Problems []Problem `json:"problems,omitempty"`
}

// LadderPeer is a peer that guests may go to.
type LadderPeer struct {
	Name string   `json:"name"`
	Room PeerRoom `json:"room"`
}

// LadderView is the ladder as it is now, whatever the update: which rungs can be taken with
// each guest, which may be, what it would feel, and what stands in the way.
type LadderView struct {
	Host   string       `json:"host"`
	Rungs  []HostRung   `json:"rungs"`
	Guests []GuestRungs `json:"guests"` // that run
	Off    []string     `json:"off"`    // guests that do not
}

// HostRung is what doctor says of the rungs of one letter, "A" to "D"; "host" is what all need.
type HostRung struct {
	Rung   string      `json:"rung"`
	Worst  CheckResult `json:"worst"`
	Checks []Check     `json:"checks"`
}

// Wanting are the checks that did not go well.
func (r HostRung) Wanting() (all []Check) {
	for _, c := range r.Checks {
		if c.Result == CheckWarn || c.Result == CheckFail {
			all = append(all, c)
		}
	}
	return all
}

// ByRung has doctor's checks by rung, in the order in which they come.
func ByRung(checks []Check) []HostRung {
	rungs := []HostRung{}
	order := []CheckResult{CheckNA, CheckOK, CheckWarn, CheckFail}
	for _, c := range checks {
		i := slices.IndexFunc(rungs, func(r HostRung) bool { return r.Rung == c.Rung })
		if i < 0 {
			i = len(rungs)
			rungs = append(rungs, HostRung{Rung: c.Rung, Worst: CheckNA})
		}
		r := &rungs[i]
		r.Checks = append(r.Checks, c)
		if slices.Index(order, c.Result) > slices.Index(order, r.Worst) {
			r.Worst = c.Result
		}
	}
	return rungs
}

// GuestRungs is a guest that runs, and every rung: A, B1, B2, B3, C, D.
type GuestRungs struct {
	Guest string        `json:"guest"`
	UUID  string        `json:"uuid"`
	Rungs []RungVerdict `json:"rungs"`
}

// RungVerdict says whether a rung can be taken with a guest now, and whether its policy
// allows that.
type RungVerdict struct {
	Rung   Rung      `json:"rung"`
	Cannot []Problem `json:"cannot,omitempty"`  // why not, and what would lift each
	MayNot []Problem `json:"may_not,omitempty"` // the same, of its policy
	Asks   bool      `json:"asks,omitempty"`    // its owner is asked first
	// Untouched says why nothing would be felt.
	Untouched string    `json:"untouched,omitempty"`
	Method    VMMMethod `json:"method,omitempty"` // of B2
	Peers     []string  `json:"peers,omitempty"`  // of D: those that would take it
	// Feels is for how long it would stand still, of B1 beside the host's step; none of A and C.
	Feels *Estimate `json:"feels,omitempty"`
}

// The codes of what stands in the way of a rung, and of a plan.
const (
	CodeRung      Code = "rung-cannot"    // a rung cannot deliver a change, or is not built
	CodePolicy    Code = "policy"         // a policy has something against it
	CodeUnserved  Code = "guest-unserved" // no rung is possible and allowed
	CodeManifest  Code = "manifest"       // of an update
	CodeTampered  Code = "plan-changed"   // since it was made
	CodeStalePlan Code = "plan-out-of-date"
)
