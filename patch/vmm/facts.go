package vmm

import (
	"belay/agent/maint"
)

// Facts are what a Survey finds: all that the choice of a method needs.
type Facts struct {
	Guest maint.Guest
	Host  maint.Host

	QEMU     string // version of the guest's
	RunState string // QEMU's own word
	Emulator string // path of the program a new QEMU would be
	PowerOff string // <on_poweroff>
	Sealed   string // type of <launchSecurity>, "" without

	Memory       []Memory
	IgnoreShared bool     // QEMU can leave shared memory where it is
	Blockers     []string // why QEMU cannot be migrated at all
	BlockJobs    []string
	FixedCID     bool     // a vsock has an address of its own
	Unfit        []string // devices that cannot be handed over
	OneWay       []string // devices that only libvirt's own save can carry

	UID, GID int    // QEMU's user and group
	Confined string // QEMU's security label, "" when unconfined
	// Reach says why QEMU cannot connect to a socket of ours, or listen on
	// one for us; "" when it can.
	Reach string
	// Hook says why libvirt does not run Belay's hook; "" when it does.
	Hook string
	// Snapshots: libvirt keeps snapshots of it, which a transient guest
	// loses when it stops.
	Snapshots bool
	// Copies is where it would be saved, and the room there.
	Copies      string
	CopiesFree  uint64
	CopiesInRAM bool
	// Guarded is the operation that has left a guard, "" without; GoesOn is
	// its method if another operation can go on with what it has kept.
	Guarded maint.OpID
	GoesOn  maint.VMMMethod

	// Bounce is what package twin says against its way; with NoBounce that
	// is not offered at all.
	Bounce   []maint.Problem
	NoBounce bool

	process process
}

// Memory is one memory backend of a QEMU (query-memdev, qom-get).
type Memory struct {
	ID      string // "pc.ram"
	Kind    string // "memory-backend-file", "memory-backend-memfd", …
	Bytes   uint64
	Shared  bool
	Discard bool   // QEMU throws the content away when it ends
	Plugged bool   // a virtio-mem device plugs it, piece by piece
	Path    string // of the file
	InRAM   bool   // the file is on a tmpfs, or in reserved memory by DAX
	Mapped  bool   // the file is the one that QEMU has mapped
	Ours    bool   // the file is in a folder that libvirt made for this domain, and goes with it
}
