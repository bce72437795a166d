package probe

import (
	"encoding/json"
	"time"
)

// PortName is the virtio-serial port on which the probe answers.
const PortName = "belay.probe.0"

// The commands of the control channel, with the types of argument and result.
const (
	CmdStatus     = "status"      // - → Status
	CmdDirty      = "dirty"       // DirtySettings → MemoryStatus
	CmdVerify     = "verify"      // - → MemoryReport
	CmdCorrupt    = "corrupt"     // CorruptSettings → -
	CmdDiskWrite  = "disk-write"  // DiskSettings → DiskReport
	CmdDiskVerify = "disk-verify" // DiskSettings → DiskReport
	CmdHeartbeat  = "heartbeat"   // HeartbeatSettings → HeartbeatStatus
	CmdKmsg       = "kmsg"        // - → KmsgReport
	CmdClock      = "clock"       // - → ClockReading
)

// Request is one line to the probe. The ID comes back in the reply, so that a
// client can tell the answer to its own question from a late answer to a
// question of a client before it.
type Request struct {
	ID   string          `json:"id"`
	Cmd  string          `json:"cmd"`
	Args json.RawMessage `json:"args,omitempty"`
}

// Reply is one line from the probe. Error is empty on success.
type Reply struct {
	ID     string          `json:"id"`
	Error  string          `json:"error,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
}

// Status is the answer to CmdStatus.
type Status struct {
	Guest       string          `json:"guest"`
	BootID      string          `json:"boot_id"`     // /proc/sys/kernel/random/boot_id
	Incarnation uint64          `json:"incarnation"` // as in the heartbeats
	Uptime      time.Duration   `json:"uptime_ns"`   // CLOCK_BOOTTIME
	Monotonic   time.Duration   `json:"monotonic_ns"`
	Wall        int64           `json:"wall_ns"` // ns since 1970
	ClockSource string          `json:"clocksource"`
	Heartbeat   HeartbeatStatus `json:"heartbeat"`
	Memory      MemoryStatus    `json:"memory"`
	Disk        bool            `json:"disk"` // a block device is there
}

// DirtySettings sets how memory is dirtied.
type DirtySettings struct {
	RateMiBs      float64 `json:"rate_mib_s"`                // 0 stops
	WorkingSetMiB int     `json:"working_set_mib,omitempty"` // 0 keeps the present one
	Random        bool    `json:"random,omitempty"`          // random pages, not round-robin
}

// MemoryStatus tells the settings and counters of the memory ruler.
type MemoryStatus struct {
	WorkingSet uint64        `json:"working_set_bytes"`
	Fixed      uint64        `json:"fixed_bytes"`
	RateMiBs   float64       `json:"rate_mib_s"` // as set
	Random     bool          `json:"random"`
	Dirtied    uint64        `json:"dirtied_bytes"` // since the settings were made
	Dirtying   time.Duration `json:"dirtying_ns"`   // time since the settings were made
}

// MemoryReport is the result of checking every word.
type MemoryReport struct {
	Pages     uint64   `json:"pages"`     // checked, of 4096 bytes
	BadPages  uint64   `json:"bad_pages"` // with content other than expected
	BadSample []uint64 `json:"bad_sample,omitempty"`
	// BadLedger is set when the table of generations disagrees with the count
	// of writes: pages of the table itself were lost.
	BadLedger     bool          `json:"bad_ledger"`
	Checksum      uint64        `json:"checksum"`       // over the working set; moves while it is dirtied
	FixedChecksum uint64        `json:"fixed_checksum"` // over the part that is never dirtied
	Took          time.Duration `json:"took_ns"`
}

// OK reports whether all memory was as it should be.
func (r MemoryReport) OK() bool { return r.BadPages == 0 && !r.BadLedger }

// CorruptSettings names the page whose first bit is to be flipped, to prove
// that the ruler sees it. A second time flips it back.
type CorruptSettings struct {
	Page  uint64 `json:"page"`
	Fixed bool   `json:"fixed,omitempty"` // in the part that is never dirtied
}

// DiskSettings names a pattern on the disk.
type DiskSettings struct {
	SizeMiB int    `json:"size_mib"` // from the start of the device
	Seed    uint64 `json:"seed"`
}

// DiskReport tells what was written or read.
type DiskReport struct {
	Bytes     uint64        `json:"bytes"`
	BadBlocks uint64        `json:"bad_blocks"` // of 4096 bytes
	Checksum  uint64        `json:"checksum"`
	Took      time.Duration `json:"took_ns"`
}

// HeartbeatSettings redirects the heartbeats. Zero values keep what is set.
type HeartbeatSettings struct {
	To         string `json:"to,omitempty"` // IPv4 address:port
	IntervalUs int    `json:"interval_us,omitempty"`
}

// HeartbeatStatus tells what the sender does.
type HeartbeatStatus struct {
	To         string `json:"to"` // empty: not sending
	IntervalUs int    `json:"interval_us"`
	Sequence   uint64 `json:"sequence"` // datagrams sent
	Skipped    uint64 `json:"skipped"`  // ticks missed because the sender was late
	Failed     uint64 `json:"failed"`   // ticks on which sending failed
	LastError  string `json:"last_error,omitempty"`
}

// KmsgReport tells what the guest kernel complained about since boot.
type KmsgReport struct {
	SoftLockups int      `json:"soft_lockups"`
	RCUStalls   int      `json:"rcu_stalls"`
	HungTasks   int      `json:"hung_tasks"`
	Bugs        int      `json:"bugs"`            // BUG:, Oops, general protection fault
	Lines       []string `json:"lines,omitempty"` // the first of them
}

// Clean reports whether the kernel had nothing to complain about.
func (r KmsgReport) Clean() bool {
	return r.SoftLockups == 0 && r.RCUStalls == 0 && r.HungTasks == 0 && r.Bugs == 0
}

// ClockReading is what the guest's clocks say, and how the wall clock was set
// since the probe started.
type ClockReading struct {
	Monotonic time.Duration `json:"monotonic_ns"`
	Wall      int64         `json:"wall_ns"` // ns since 1970
	Steps     []ClockStep   `json:"steps,omitempty"`
}

// ClockStep is one setting of the guest's wall clock.
type ClockStep struct {
	Monotonic time.Duration `json:"monotonic_ns"` // when it was noted
	By        time.Duration `json:"by_ns"`        // positive: forward
}
