package maint

import "time"

// GuestState is the run state of a domain (virDomainState), in virsh's words.
type GuestState string

// The states of virDomainState that Belay tells apart.
const (
	GuestRunning   GuestState = "running"
	GuestPaused    GuestState = "paused"
	GuestShutdown  GuestState = "in shutdown" // being shut down by its own system
	GuestShutoff   GuestState = "shut off"
	GuestCrashed   GuestState = "crashed"
	GuestSuspended GuestState = "pmsuspended"
	GuestBlocked   GuestState = "blocked"
	GuestNoState   GuestState = "no state"
)

// Active reports whether a QEMU process exists for a guest in this state.
func (s GuestState) Active() bool {
	return s != "" && s != GuestShutoff && s != GuestNoState
}

// AgentState says whether the QEMU guest agent can be talked to.
type AgentState string

// A guest has no agent channel, or one that is (dis)connected.
const (
	AgentNone         AgentState = "none"
	AgentConnected    AgentState = "connected"
	AgentDisconnected AgentState = "disconnected"
)

// Guest is one domain as its host's libvirt describes it.
type Guest struct {
	UUID string `json:"uuid"`
	Name string `json:"name"`

	// ID is libvirt's number of the running domain, 0 while it is off.
	ID int `json:"id,omitempty"`

	State  GuestState `json:"state"`
	Reason string     `json:"reason"` // virDomain*Reason, in virsh's words: "booted", "migrated", "user", …

	MemoryBytes uint64 `json:"memory_bytes"` // maximum memory
	// MemorySource is what <memoryBacking> says memory is made of: "" (the
	// process's own), "file", "memfd", "hugepages". MemoryShared is true when
	// another process can map it.
	MemorySource string     `json:"memory_source,omitempty"`
	MemoryShared bool       `json:"memory_shared,omitempty"`
	VCPUs        int        `json:"vcpus"`
	DomainType   string     `json:"domain_type"`  // "kvm" or "qemu" (TCG)
	MachineType  string     `json:"machine_type"` // for example "pc-q35-7.2"
	CPUModel     string     `json:"cpu_model,omitempty"`
	Persistent   bool       `json:"persistent"`
	Autostart    bool       `json:"autostart"`
	Agent        AgentState `json:"agent"`
	// AntiAffinity are the groups that its <metadata> puts it in: of each there
	// should be one guest on a host.
	AntiAffinity []string `json:"anti_affinity,omitempty"`
	// Policy is the text of the policy in its <metadata>, "" for none.
	Policy  string   `json:"policy,omitempty"`
	Disks   []Disk   `json:"disks"`
	Devices []Device `json:"devices"`

	// Job is the domain job in progress, "" when there is none:
	// "migration out", "migration in", "save", … (virDomainJobOperation).
	Job string `json:"job,omitempty"`
}

// Disk is one <disk> of a domain.
type Disk struct {
	Target   string `json:"target"` // vda
	Kind     string `json:"kind"`   // disk, cdrom, floppy, lun
	Type     string `json:"type"`   // file, block, network, volume, …
	Source   string `json:"source,omitempty"`
	Format   string `json:"format,omitempty"`
	Cache    string `json:"cache,omitempty"`
	ReadOnly bool   `json:"read_only,omitempty"`
	Shared   bool   `json:"shareable,omitempty"`
}

// Device is a device of a domain that matters to maintenance: a network
// interface, a host device, a channel, a filesystem, a TPM, …
type Device struct {
	Kind   string `json:"kind"`             // element name: interface, hostdev, channel, tpm, filesystem, …
	Type   string `json:"type,omitempty"`   // its type attribute
	Source string `json:"source,omitempty"` // bridge, PCI address, socket path, …
	Target string `json:"target,omitempty"` // tap name, channel name, …
	MAC    string `json:"mac,omitempty"`
	CID    uint32 `json:"cid,omitempty"` // of a vsock device that runs
}

// Host is one libvirt host as its hypervisor describes it.
type Host struct {
	Name            string   `json:"name"` // hostname as libvirt reports it
	UUID            string   `json:"uuid"` // host UUID; migration needs two different ones
	Arch            string   `json:"arch"`
	CPUModel        string   `json:"cpu_model"`
	CPUs            int      `json:"cpus"`
	MemoryBytes     uint64   `json:"memory_bytes"`
	FreeMemoryBytes uint64   `json:"free_memory_bytes"` // free + reclaimable (buffers, page cache)
	LibvirtVersion  string   `json:"libvirt_version"`   // for example "9.0.0"
	QEMUVersion     string   `json:"qemu_version"`
	DomainTypes     []string `json:"domain_types"`  // kvm, qemu
	MachineTypes    []string `json:"machine_types"` // canonical names and aliases
}

// EventKind tells what an Event reports.
type EventKind string

const (
	// EventLifecycle is virDomainEventLifecycle: a domain was defined,
	// started, suspended, resumed, stopped, …
	EventLifecycle EventKind = "lifecycle"
	// EventAgent is virConnectDomainEventAgentLifecycle.
	EventAgent EventKind = "agent"
	// EventDevice is VIR_DOMAIN_EVENT_ID_DEVICE_ADDED and _REMOVED: Change is
	// "added" or "removed", Detail the device's alias.
	EventDevice EventKind = "device"
	// EventResync says that events may have been missed (the connection to
	// libvirt was lost and is back): list everything again.
	EventResync EventKind = "resync"
	// EventDown says that the connection to libvirt was lost.
	EventDown EventKind = "down"
)

// Event is a change on a host. For EventResync and EventDown only Kind and
// Time are set.
type Event struct {
	Kind   EventKind `json:"kind"`
	Time   time.Time `json:"time"` // when it was received
	UUID   string    `json:"uuid,omitempty"`
	Name   string    `json:"name,omitempty"`
	Change string    `json:"change,omitempty"` // "started", "suspended", "resumed", "stopped", "defined", "undefined", …
	Detail string    `json:"detail,omitempty"` // "migrated", "booted", "shutdown", …
}

// Job is the statistics of a domain job (virDomainGetJobStats).
type Job struct {
	// Active is true while the job runs. A job that has just begun can
	// report zeros everywhere for most of a second.
	Active    bool   `json:"active"`
	Operation string `json:"operation,omitempty"` // "migration out", "migration in", …
	// State is the job's type in virsh's words: none, bounded, unbounded,
	// completed, failed, cancelled.
	State string `json:"state"`

	Elapsed time.Duration `json:"elapsed_ns"`
	// Downtime is an estimate while the job is active, and QEMU's own
	// measure of the blackout once it is completed.
	Downtime time.Duration `json:"downtime_ns"`
	// Started is when QEMU started the vCPUs of a guest that had come, by that host's
	// clock; zero: not seen.
	Started        time.Time     `json:"started,omitzero"`
	Setup          time.Duration `json:"setup_ns"`
	MemoryTotal    uint64        `json:"memory_total_bytes"`
	MemorySent     uint64        `json:"memory_sent_bytes"` // transferred, resends counted again
	MemoryLeft     uint64        `json:"memory_left_bytes"`
	BytesPerSecond uint64        `json:"bytes_per_second"`
	DirtyPerSecond uint64        `json:"dirty_bytes_per_second"` // page rate × page size
	Iteration      uint64        `json:"iteration"`              // passes over memory
	// DiskTotal, DiskLeft and DiskPerSecond are of disks that are copied along, bytes: all
	// of them first, then, beside memory, what the guest writes to them.
	DiskTotal     uint64 `json:"disk_total_bytes,omitempty"`
	DiskLeft      uint64 `json:"disk_left_bytes,omitempty"`
	DiskPerSecond uint64 `json:"disk_bytes_per_second,omitempty"`
	// PostCopy is not "" once the guest runs on the destination and its memory follows.
	PostCopy PostCopy `json:"post_copy,omitempty"`
	// SlowedPercent is by how much the guest's vCPUs are slowed down for the copy
	// (auto-converge).
	SlowedPercent int `json:"slowed_percent,omitempty"`
}

// PostCopy is how a migration in post-copy gets on.
type PostCopy string

// The ways.
const (
	PostCopyRunning PostCopy = "running"
	PostCopyBroken  PostCopy = "broken" // libvirt has lost sight of the other host; QEMU may yet go on
)

// MoveParams says how a live migration is to be performed
// (virDomainMigrateToURI3, peer to peer).
type MoveParams struct {
	// DestURI is the libvirt URI the source's libvirtd uses to reach the
	// destination's, for example "qemu+tls://host-b/system".
	DestURI string `json:"dest_uri"`
	// MigrateURI is where QEMU sends memory, "" to let the destination choose.
	MigrateURI string `json:"migrate_uri,omitempty"`
	// Listen is the address that QEMU listens on at the destination, "" for what its
	// qemu.conf says.
	Listen string `json:"listen,omitempty"`
	// TLS encrypts the memory stream with QEMU's native TLS; TLSName is the
	// name in the destination's certificate where it differs from the URI's.
	TLS     bool   `json:"tls,omitempty"`
	TLSName string `json:"tls_name,omitempty"`
	// BandwidthMiBs limits the memory stream, in MiB/s; 0 is no limit.
	BandwidthMiBs uint64 `json:"bandwidth_mib_s,omitempty"`
	// Parallel is by how many connections memory is sent; 0 is one.
	Parallel int `json:"parallel,omitempty"`
	// Slow has QEMU slow the guest's vCPUs down, more and more, while it writes more
	// than can be sent (auto-converge).
	Slow bool `json:"slow,omitempty"`
	// Compression is one of Compressions, "" for none; ZeroCopy has memory sent from
	// where it is. Some of it needs Parallel (see Compressions).
	Compression string `json:"compression,omitempty"`
	ZeroCopy    bool   `json:"zero_copy,omitempty"`
	// CopyDisks are the targets of the disks that are copied along; nil is none.
	CopyDisks []string `json:"copy_disks,omitempty"`
	// CopyOverlays has overlays be copied without the images below them.
	CopyOverlays bool `json:"copy_overlays,omitempty"`
	// SyncWrites has each write to such a disk wait for the destination.
	SyncWrites bool `json:"sync_writes,omitempty"`
	// PostCopy has the copy be one that can go on as post-copy, when it is told to;
	// BandwidthMiBs is then for both. QEMU before 10.1 refuses it with Parallel.
	PostCopy bool `json:"post_copy,omitempty"`
	// SameHost says that source and destination are on one host: a disk that
	// is opened through the host's page cache, or is a local file, is then the
	// same for both (VIR_MIGRATE_UNSAFE).
	SameHost bool `json:"same_host,omitempty"`
	// Persist defines the guest on the destination and undefines it on the
	// source; false for a transient guest.
	Persist bool `json:"persist"`
}

// The ways to compress guests' memory. XBZRLE sends of a page that was sent before what
// has changed of it, by one connection only; the others compress what several
// connections carry.
const (
	CompressXBZRLE = "xbzrle"
	CompressZlib   = "zlib"
	CompressZstd   = "zstd"
)

// Compressions are all of them.
var Compressions = []string{CompressXBZRLE, CompressZlib, CompressZstd}

// MoveSupport is what the QEMU of a guest can do for its migration.
type MoveSupport struct {
	Capabilities []string // QAPI's MigrationCapability: "xbzrle", "zero-copy-send", …
	// Multifd are the compressions of several connections: "zlib", "zstd", …
	Multifd []string
}
