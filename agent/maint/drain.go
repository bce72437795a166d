package maint

import (
	"slices"
	"time"
)

// DrainRequest asks for every guest that runs on this host to be moved away.
type DrainRequest struct {
	// To are the peers that guests may go to; empty is all of them.
	To []string `json:"to,omitempty"`
	// Partial moves those that can be moved where others cannot; else nothing
	// is begun then.
	Partial bool `json:"partial,omitempty"`
	// Timeout is how long moves are begun. Those that run then are seen to
	// their end. 0 is DrainTimeout.
	Timeout time.Duration `json:"timeout_ns,omitempty"`
	// Parallel is how many guests are moved at once, up to the host's
	// limits.migrations_out; 0 is that, or the host's CPUs if it has fewer.
	Parallel int `json:"parallel,omitempty"`
	// MoveTimeout, BandwidthMiBs, MaxPause, Allow and Emergency are each
	// migration's, as MigrateRequest has them.
	MoveTimeout   time.Duration `json:"move_timeout_ns,omitempty"`
	BandwidthMiBs uint64        `json:"bandwidth_mib_s,omitempty"`
	MaxPause      time.Duration `json:"max_pause_ns,omitempty"`
	Allow         []Means       `json:"allow"`
	Emergency     string        `json:"emergency,omitempty"`
	// CopyDisks is whether disks that are not shared are copied along: CopyAll, CopyNone, or
	// "" for the host's migration.copy_disks.
	CopyDisks string `json:"copy_disks,omitempty"`
	Reason    string `json:"reason,omitempty"`
}

// DrainTimeout is how long a drain or a restore begins moves, unless it is told otherwise.
const DrainTimeout = 12 * time.Hour

// RestoreRequest asks for what a drain has moved away to be brought back.
type RestoreRequest struct {
	// Drain is the drain, or the apply, whose guests are meant, "" the last that has moved
	// any and left them there.
	Drain    OpID          `json:"drain,omitempty"`
	Timeout  time.Duration `json:"timeout_ns,omitempty"` // as a DrainRequest's
	MaxPause time.Duration `json:"max_pause_ns,omitempty"`
	Reason   string        `json:"reason,omitempty"`
}

// MoveState is where one guest of a drain or a restore is.
//
//	planned ──► moving ──► moved
//	   ▲   │       │
//	   └───┼───────┤ tried again, perhaps to another peer
//	       └───────┴─────► left
type MoveState string

// The states of a guest's move.
const (
	MovePlanned MoveState = "planned"
	MoveMoving  MoveState = "moving"
	MoveMoved   MoveState = "moved"
	MoveLeft    MoveState = "left" // it stays where it is: Problems say why
)

// GuestMove is one guest of a drain or a restore.
type GuestMove struct {
	Guest       string `json:"guest"`
	GuestUUID   string `json:"guest_uuid"`
	MemoryBytes uint64 `json:"memory_bytes"`
	// Peer is where it goes, or with a restore comes from; "" where it can go
	// nowhere.
	Peer  string    `json:"peer,omitempty"`
	State MoveState `json:"state"`
	// Op is the migration that moves it: of this host's in a drain, of the
	// peer's in a restore.
	Op    OpID `json:"op,omitempty"`
	Tries int  `json:"tries,omitempty"` // migrations that have failed
	// Downtime is the blackout of a guest that has moved, as its migration measured it; 0:
	// not measured.
	Downtime time.Duration `json:"downtime_ns,omitempty"`
	// Problems are why it is left, or why the last try failed.
	Problems []Problem `json:"problems,omitempty"`
	// Copies are the disks that are copied along, as planned. Of a guest that is left they
	// are those with which it could be moved.
	Copies []DiskCopy `json:"copies,omitempty"`
	// AntiAffinity are the groups of which no other guest may be on its host.
	AntiAffinity []string `json:"anti_affinity,omitempty"`
	// Instead is what else can be done for a guest that cannot be moved.
	Instead []string `json:"instead,omitempty"`
	// Token names one try of a restore to the peer, so that asking again
	// begins no second.
	Token string `json:"token,omitempty"`
}

// DrainPlan is what a drain would do.
type DrainPlan struct {
	// Guests are in the order in which their moves begin, and after them those
	// that are left.
	Guests []GuestMove `json:"guests"`
	// AtOnce is how many are moved at the same time at most.
	AtOnce int `json:"at_once"`
	// Off are guests that do not run: their definitions stay here.
	Off []string `json:"off,omitempty"`
}

// Left are the guests of moves that stay where they are.
func Left(moves []GuestMove) (left []GuestMove) {
	for _, m := range moves {
		if m.State == MoveLeft {
			left = append(left, m)
		}
	}
	return left
}

// PutMove puts a guest's move in its place among others.
func PutMove(moves []GuestMove, m GuestMove) []GuestMove {
	moves = slices.Clone(moves)
	for i := range moves {
		if moves[i].GuestUUID == m.GuestUUID {
			moves[i] = m
			return moves
		}
	}
	return append(moves, m)
}

// PeerRoom is what a host has room for, as it tells a peer that plans.
type PeerRoom struct {
	// FreeBytes is memory for guests that is free and not promised, and
	// LimitBytes what limits.guest_memory leaves; nil is no limit.
	FreeBytes  uint64  `json:"free_bytes"`
	LimitBytes *uint64 `json:"limit_bytes,omitempty"`
	// In is how many guests it takes in at once (limits.migrations_in), Out how
	// many it moves away.
	In  int `json:"in"`
	Out int `json:"out"`
	// Tells says that its guests are told before they are moved.
	Tells bool `json:"tells,omitempty"`
	// AntiAffinity has the groups of its guests, and of those on their way to
	// it, with the name of one of each.
	AntiAffinity map[string]string `json:"anti_affinity,omitempty"`
}

// Validate refuses what no host can mean.
func (r PeerRoom) Validate() error {
	const most = 1 << 16 // guests
	if r.In < 1 || r.Out < 1 || r.In > most || r.Out > most {
		return Problemf(CodePeerRefused, "room", "see that both hosts have the same Belay", "it takes %d guests in at once and moves %d away", r.In, r.Out)
	}
	return nil
}

// GuestBytes is what a guest takes of a PeerRoom: Free of its free memory, Limit
// of its limit. Huge pages are not of the free memory.
type GuestBytes struct{ Free, Limit uint64 }

// ReturnRequest asks a peer to migrate a guest back that came from here.
type ReturnRequest struct {
	// Token names this try: the same one again is no second.
	Token     string        `json:"token"`
	GuestUUID string        `json:"guest_uuid"`
	Arrived   OpID          `json:"arrived"` // the migration by which it came
	MaxPause  time.Duration `json:"max_pause_ns,omitempty"`
	Reason    string        `json:"reason,omitempty"`
}
