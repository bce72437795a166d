package maint

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"
)

// PlanOptions are what is asked of a plan beside its update.
type PlanOptions struct {
	// To are the peers that guests may go to; empty is all.
	To []string `json:"to,omitempty"`
	// Return has guests that were moved away brought back at the end.
	Return bool `json:"return,omitempty"`
}

// PlanRequest asks for a plan.
type PlanRequest struct {
	Name     string      `json:"name,omitempty"` // of the manifest, for what is said of it
	Manifest string      `json:"manifest"`       // its text, TOML
	Options  PlanOptions `json:"options"`
}

// PlanVersion is of the form of a Plan.
const PlanVersion = 1

// Plan is how an update is done to one host. It is never changed once it is made: Hash
// names it, and it has all that doing it needs.
type Plan struct {
	Version int    `json:"version"`
	Hash    string `json:"hash"` // SHA-256 of the rest, in hexadecimal
	// World is a hash of what it was made from, but for what changes by itself: the time,
	// free memory, what has been felt.
	World    string      `json:"world"`
	Host     string      `json:"host"`
	HostUUID string      `json:"host_uuid"`
	Made     time.Time   `json:"made"`
	Deadline time.Time   `json:"deadline"` // when those who are waited for are waited for no longer
	Options  PlanOptions `json:"options"`
	Update   Update      `json:"update"`

	Changes []PlannedChange `json:"changes"`
	Guests  []PlannedGuest  `json:"guests"`
	Off     []string        `json:"off,omitempty"`
	Steps   []PlanStep      `json:"steps"`
	// Blockers are why it cannot be applied; none: it can.
	Blockers    []Problem     `json:"blockers,omitempty"`
	Calibration []Calibration `json:"calibration,omitempty"`
}

// PlannedChange is by which rung a change is delivered to guests that stay. D is that
// none can stay.
type PlannedChange struct {
	Change string     `json:"change"`
	Kind   ChangeKind `json:"kind"`
	Rung   Rung       `json:"rung"` // "": by none
	// Refused are the rungs before it, and why not those.
	Refused []RefusedRung `json:"refused,omitempty"`
}

// RefusedRung is a rung that was not taken, and why.
type RefusedRung struct {
	Rung     Rung      `json:"rung"`
	Problems []Problem `json:"problems"`
}

// PlannedGuest is what an update comes to for one guest.
type PlannedGuest struct {
	Guest string `json:"guest"`
	UUID  string `json:"uuid"`
	// Rung is the one that it is served by: A if it feels nothing, C if its owner has a
	// say in when; "": by none, see Refused.
	Rung Rung `json:"rung"`
	// Feels are the rungs that it feels, in order.
	Feels  []Rung    `json:"feels,omitempty"`
	Method VMMMethod `json:"method,omitempty"` // of B2
	To     string    `json:"to,omitempty"`     // the peer, of D
	// Pause is its longest standstill by rung B, Blackout of its move. Pauses is how often
	// it stands still.
	Pause    *Estimate `json:"pause,omitempty"`
	Blackout *Estimate `json:"blackout,omitempty"`
	Pauses   int       `json:"pauses,omitempty"`
	// Told is when it is told, Begin when it feels it at the earliest without approval.
	Told  time.Time `json:"told,omitzero"`
	Begin time.Time `json:"begin,omitzero"`
	// Asked is that it begins earlier if its owner approves.
	Asked bool   `json:"asked,omitempty"`
	Note  string `json:"note,omitempty"`
	// Refused are rungs with less impact, and what would lift each reason.
	Refused []RefusedRung `json:"refused,omitempty"`
}

// Outlasts reports whether a guest is to stand still for longer, or more often, than another
// plan has told.
func (g PlannedGuest) Outlasts(told PlannedGuest) bool {
	is, was := cmp.Or(g.Pause, g.Blackout), cmp.Or(told.Pause, told.Blackout)
	return is != nil && (was == nil || g.Pauses > told.Pauses || is.Exceeds(*was))
}

// PlanStepKind is what a step of a plan does.
type PlanStepKind string

// The kinds, in the order in which they come.
const (
	PlanCheck    PlanStepKind = "check"
	PlanAnnounce PlanStepKind = "announce"
	PlanPrepare  PlanStepKind = "prepare"
	PlanCordon   PlanStepKind = "cordon"
	PlanMove     PlanStepKind = "move"
	PlanPatch    PlanStepKind = "patch"   // A
	PlanHold     PlanStepKind = "hold"    // B1
	PlanReplace  PlanStepKind = "replace" // B2
	PlanKexec    PlanStepKind = "kexec"   // B3
	PlanService  PlanStepKind = "service" // of a host without guests
	PlanReboot   PlanStepKind = "reboot"  // the same
	PlanVerify   PlanStepKind = "verify"
	PlanReturn   PlanStepKind = "return"
	PlanUncordon PlanStepKind = "uncordon"
)

// PlanStep is one step of a plan.
type PlanStep struct {
	N       int          `json:"n"`
	Kind    PlanStepKind `json:"kind"`
	Text    string       `json:"text"`
	Changes []string     `json:"changes,omitempty"`
	Guests  []string     `json:"guests,omitempty"` // UUIDs
	To      string       `json:"to,omitempty"`     // peer
	// At is when it begins at the earliest; zero: when the one before it has ended.
	At       time.Time     `json:"at,omitzero"`
	Expected time.Duration `json:"expected_ns,omitempty"` // 0: not known
	// Undo is how it is taken back when a later one fails, "" for a step that is not.
	Undo string `json:"undo,omitempty"`
}

// Name is what the step is called in an operation: "4-move".
func (s PlanStep) Name() string { return fmt.Sprintf("%d-%s", s.N, s.Kind) }

// Seal gives the plan with its hash.
func (p Plan) Seal() Plan {
	p.Hash = p.hash()
	return p
}

func (p Plan) hash() string {
	p.Hash = ""
	sum := sha256.Sum256(p.encode())
	return hex.EncodeToString(sum[:])
}

// Brief is a plan without its guests, its steps and what was decided of each.
func (p Plan) Brief() Plan {
	return Plan{Version: p.Version, Hash: p.Hash, World: p.World, Host: p.Host, HostUUID: p.HostUUID, Made: p.Made, Deadline: p.Deadline, Options: p.Options, Update: p.Update}
}

// Same reports whether another plan does the same to the same guests. When, how long it is
// expected to take, and to which peers they move may be otherwise.
func (p Plan) Same(as Plan) bool {
	return slices.EqualFunc(p.Steps, as.Steps, func(a, b PlanStep) bool {
		return a.N == b.N && a.Kind == b.Kind && (a.To == "") == (b.To == "") && slices.Equal(a.Changes, b.Changes) && slices.Equal(a.Guests, b.Guests)
	}) && slices.EqualFunc(p.Guests, as.Guests, func(a, b PlannedGuest) bool {
		return a.UUID == b.UUID && a.Method == b.Method && (a.To == "") == (b.To == "") && a.Asked == b.Asked && slices.Equal(a.Feels, b.Feels)
	})
}

// Encode writes a plan: one form for one plan.
func (p Plan) Encode() []byte { return p.encode() }

func (p Plan) encode() []byte {
	b, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		panic(fmt.Sprintf("vocabulary type %T does not marshal: %v", p, err)) // it has nothing that could not
	}
	return append(b, '\n')
}

// MaxPlan is more than a plan for a host can have, bytes: of 2000 guests, for each of which
// there is much to be said, it has a quarter of that.
const MaxPlan = 32 << 20

// DecodePlan reads a plan that was saved. One that is not as it was made is refused. The
// hash is no signature: who applies a plan makes it again, and compares.
func DecodePlan(name string, b []byte) (p Plan, err error) {
	bad := func(format string, args ...any) (Plan, error) {
		return Plan{}, Problemf(CodeTampered, "plan "+name, "make it again (belay plan MANIFEST --out FILE)", format, args...)
	}
	if len(b) > MaxPlan {
		return bad("has %d MiB, more than any plan", len(b)>>20)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return bad("is no plan: %v", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return bad("goes on after its end")
	}
	switch {
	case p.Version != PlanVersion:
		return bad("is of version %d, and this Belay reads %d", p.Version, PlanVersion)
	case p.Hash != p.hash():
		return bad("has been changed since it was made: its hash is %.12s, and it says %.12q", p.hash(), p.Hash)
	case !bytes.Equal(b, p.encode()):
		return bad("is not in the form in which it was written")
	}
	return p, nil
}
