package maint

import "time"

// Status is what `belay status` shows of one host.
type Status struct {
	Version string    `json:"version"`
	Since   time.Time `json:"since"` // when this belayd started
	Now     time.Time `json:"now"`   // this host's clock
	Host    Host      `json:"host"`  // as last seen

	Guests       map[GuestState]int `json:"guests"` // how many in each state, as last seen
	Operations   []Op               `json:"operations"`
	Reservations []Reservation      `json:"reservations"`
	Peers        []PeerStatus       `json:"peers"`
	// Cordon says why the host takes no guests in; nil: it does.
	Cordon *Cordon `json:"cordon,omitempty"`
	// Conditions are what is wrong with this host now; empty is healthy.
	Conditions []Condition `json:"conditions"`
}

// Cordon says that a host takes no guests in. Those that are there, or on their way,
// are left alone.
type Cordon struct {
	Since  time.Time `json:"since"`
	By     string    `json:"by"` // "root", "cert:ops-laptop"
	Reason string    `json:"reason,omitempty"`
}

// Why is ": " and the reason, "" where none was given.
func (c Cordon) Why() string {
	if c.Reason == "" {
		return ""
	}
	return ": " + c.Reason
}

// PeerStatus is how a peer was last found.
type PeerStatus struct {
	Name    string        `json:"name"`
	Address string        `json:"address"`
	OK      bool          `json:"ok"`
	Error   string        `json:"error,omitempty"`
	Checked time.Time     `json:"checked,omitzero"` // zero: not yet
	Latency time.Duration `json:"latency_ns,omitempty"`
	// ClockOffset is the peer's clock less ours, ± Latency/2.
	ClockOffset time.Duration `json:"clock_offset_ns,omitempty"`
	HostUUID    string        `json:"host_uuid,omitempty"`
	Version     string        `json:"version,omitempty"`
	// Cordoned: it takes no guests in.
	Cordoned bool `json:"cordoned,omitempty"`
}

// Condition is something that is wrong with a host for the time being.
type Condition struct {
	Code   Code      `json:"code"`
	Text   string    `json:"text"`
	Remedy string    `json:"remedy,omitempty"`
	Since  time.Time `json:"since,omitzero"`
}

// Inventory is the guests of a host.
type Inventory struct {
	Guests []Guest `json:"guests"`
	// AsOf is when this was true: now while libvirt answers, earlier when it
	// does not; Stale says why.
	AsOf  time.Time `json:"as_of"`
	Stale string    `json:"stale,omitempty"`
}

// CheckResult is the verdict of one check of `belay doctor`.
type CheckResult string

// The verdicts.
const (
	CheckOK   CheckResult = "ok"
	CheckWarn CheckResult = "warn"
	CheckFail CheckResult = "fail"
	CheckNA   CheckResult = "n/a"
)

// Check is one line of `belay doctor`.
type Check struct {
	Rung   string      `json:"rung"` // "host", "A", "B", "C", "D"
	Name   string      `json:"name"`
	Result CheckResult `json:"result"`
	Text   string      `json:"text"`
	Remedy string      `json:"remedy,omitempty"`
}
