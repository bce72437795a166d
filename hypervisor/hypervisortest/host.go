package hypervisortest

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/internal/feed"
)

// Host is a host in memory. Its methods of the Hypervisor interface behave as
// those of hypervisor.Host; the others are the test's side of it.
type Host struct {
	w         *World
	info      maint.Host
	cannotRun []string
	noPost    bool
	pools     []maint.PagePool
	root      string // of its files

	// All below is guarded by w.mu.
	guests    map[string]*guest // by UUID
	faults    map[string][]*Fault
	up        bool                  // libvirt runs
	cut       bool                  // off the LAN
	hold      bool                  // copies do not converge
	lastID    int                   // of the domain started last
	saved     map[string]savedGuest // by path
	networks  map[string]bool       // by name: active
	storage   map[string]bool       // pools, the same
	secrets   []maint.SecretNeed
	onAgent   Answer
	onQMP     Answer
	cameBy    maint.MoveParams // how the last guest came that came here
	interrupt chan struct{}    // closed when connections to libvirt are lost, and replaced
	frozen    chan struct{}    // closed by Thaw; nil when libvirt is not frozen
	watchers  map[chan cpuTime]bool

	hub       *feed.Hub
	closed    chan struct{}
	closeOnce sync.Once
}

// guest is a domain.
type guest struct {
	maint.Guest
	definition string        // XML given to Define, "" for one made up
	note       string        // that is kept with it
	devices    string        // XML of devices that it was given
	completed  *maint.Job    // statistics of the last job that succeeded
	out, in    *migration    // the migration it leaves or comes by
	late       chan struct{} // closed when the last Suspend was answered; nil before any

	clock       clock
	qemu        string        // the version that it runs in
	postMigrate bool          // its QEMU has sent it away
	rival       bool          // somebody else has its disk's lease
	lag         bool          // libvirt does not know its state
	there, back time.Duration // what a call to its agent takes, before and after the effect
}

// become has the guest enter a state. Its clock stands unless it runs.
func (g *guest) become(state maint.GuestState, reason string) {
	g.State, g.Reason = state, reason
	g.postMigrate = false
	g.clock.follow(state == maint.GuestRunning)
}

// start gives the guest a new QEMU, with its vCPUs stopped.
func (h *Host) start(g *guest) {
	h.lastID++
	g.ID, g.qemu = h.lastID, h.info.QEMUVersion
	g.clock = clock{stood: time.Now()}
}

// PutGuest adds a running, persistent guest of 64 MiB, as changed by edits, and
// returns its UUID. What the guest is to be is up to edits; nothing is checked.
func (h *Host) PutGuest(name string, edits ...func(*maint.Guest)) (uuid string) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.w.serial++
	g := &guest{Guest: maint.Guest{
		UUID:        madeUUID(h.w.serial),
		Name:        name,
		State:       maint.GuestRunning,
		Reason:      "booted",
		MemoryBytes: 64 << 20,
		VCPUs:       1,
		DomainType:  "qemu",
		MachineType: "pc-q35-7.2",
		CPUModel:    "qemu64",
		Persistent:  true,
		Agent:       maint.AgentNone,
		Disks:       []maint.Disk{},
		Devices:     []maint.Device{},
	}}
	for _, edit := range edits {
		edit(&g.Guest)
	}
	h.guests[g.UUID] = g
	h.lifecycle(g, "defined", "added")
	if g.State.Active() {
		h.start(g)
		g.clock.follow(g.State == maint.GuestRunning)
		h.lifecycle(g, "resumed", "unpaused")
		h.lifecycle(g, "started", "booted")
	}
	return g.UUID
}

func madeUUID(serial int) string { return fmt.Sprintf("10000000-0000-4000-8000-%012x", serial) }

// PutNetwork gives libvirt a network, or starts or stops it.
func (h *Host) PutNetwork(name string, active bool) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.networks[name] = active
}

// RemoveNetwork takes a network from libvirt.
func (h *Host) RemoveNetwork(name string) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	delete(h.networks, name)
}

// PutPool gives libvirt a storage pool, or starts or stops it.
func (h *Host) PutPool(name string, active bool) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.storage[name] = active
}

// RemovePool takes a storage pool from libvirt.
func (h *Host) RemovePool(name string) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	delete(h.storage, name)
}

// PutSecret gives libvirt a secret, by its UUID and its usage's name.
func (h *Host) PutSecret(uuid, usage string) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.secrets = append(h.secrets, maint.SecretNeed{UUID: uuid, Usage: usage})
}

// RemoveSecret takes a secret from libvirt.
func (h *Host) RemoveSecret(uuid string) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.secrets = slices.DeleteFunc(h.secrets, func(s maint.SecretNeed) bool { return s.UUID == uuid })
}

// PutDevice gives a guest one more device, as XML that its own XML then has.
func (h *Host) PutDevice(t testing.TB, uuid, xml string) {
	t.Helper()
	h.change(t, uuid, func(g *guest) { g.devices += xml })
}

// RemoveDevices takes from a guest what PutDevice has given it.
func (h *Host) RemoveDevices(t testing.TB, uuid string) {
	t.Helper()
	h.change(t, uuid, func(g *guest) { g.devices = "" })
}

// Edit changes a guest in any way, without an event.
func (h *Host) Edit(t testing.TB, uuid string, edit func(*maint.Guest)) {
	t.Helper()
	h.change(t, uuid, func(g *guest) {
		edit(&g.Guest)
		g.clock.follow(g.State == maint.GuestRunning)
	})
}

// Start starts a guest that is shut off.
func (h *Host) Start(t testing.TB, uuid string) {
	t.Helper()
	h.change(t, uuid, h.boot)
}

// boot gives a guest that is off a QEMU, and has it run.
func (h *Host) boot(g *guest) {
	h.start(g)
	g.become(maint.GuestRunning, "booted")
	h.lifecycle(g, "resumed", "unpaused")
	h.lifecycle(g, "started", "booted")
}

// Pause stops a guest's vCPUs, as an operator would (virsh suspend).
func (h *Host) Pause(t testing.TB, uuid string) {
	t.Helper()
	h.change(t, uuid, h.pause)
}

// pause stops a guest's vCPUs for somebody. In the copy of a migration libvirt takes that for
// a part of it.
func (h *Host) pause(g *guest) {
	reason, detail := "user", "paused"
	if g.out != nil {
		reason, detail = "migrating", "migrated"
	}
	g.become(maint.GuestPaused, reason)
	h.lifecycle(g, "suspended", detail)
}

// FailDisk has a guest's vCPUs stopped by QEMU, for an error of its disk.
func (h *Host) FailDisk(t testing.TB, uuid string) {
	t.Helper()
	h.change(t, uuid, func(g *guest) {
		g.become(maint.GuestPaused, "I/O error")
		h.lifecycle(g, "suspended", "i/o error")
	})
}

// Unpause starts a guest's vCPUs, as an operator would (virsh resume), or, while
// libvirt is down, as whoever speaks to QEMU's monitor does.
func (h *Host) Unpause(t testing.TB, uuid string) {
	t.Helper()
	h.change(t, uuid, func(g *guest) {
		g.become(maint.GuestRunning, "unpaused")
		h.lifecycle(g, "resumed", "unpaused")
	})
}

// Stop ends a guest: detail is "shutdown", "destroyed" or "crashed". A
// transient one is gone. A migration of it fails.
func (h *Host) Stop(t testing.TB, uuid, detail string) {
	t.Helper()
	h.change(t, uuid, func(g *guest) { h.stop(g, detail) })
}

// KillQEMU kills the guest's QEMU on this host: of an incoming migration
// (which fails), of an outgoing one (both are gone), or of a running guest.
func (h *Host) KillQEMU(t testing.TB, uuid string) {
	t.Helper()
	h.change(t, uuid, func(g *guest) { h.stop(g, "crashed") })
}

// stop ends a guest and its migration, whichever side of it this is.
func (h *Host) stop(g *guest, detail string) {
	for _, m := range []*migration{g.in, g.out} {
		if m != nil && m.post.begun {
			m.halve()
			g.in, g.out = nil, nil
			h.stopped(g, detail)
			return
		}
	}
	if m := g.in; m != nil {
		m.end(m.src.failed(opPerform, codeOperationFailed, "operation failed: domain is not running on the destination"))
		return // with the migration the guest is gone from here
	}
	if m := g.out; m != nil {
		m.sourceGone = true
		m.end(h.failed(opPerform, codeOperationFailed, "operation failed: domain is not running"))
	}
	h.stopped(g, detail)
}

// stopped is a guest's end: state, event, and no more of a transient one.
func (h *Host) stopped(g *guest, detail string) {
	g.become(maint.GuestShutoff, detail)
	g.ID = 0
	h.lifecycle(g, "stopped", detail)
	if !g.Persistent {
		delete(h.guests, g.UUID)
	}
}

// Remove takes a guest out of the host without a trace.
func (h *Host) Remove(t testing.TB, uuid string) {
	t.Helper()
	h.change(t, uuid, func(g *guest) { delete(h.guests, uuid) })
}

// SetAgent says whether the guest's agent is connected, and sends its event.
func (h *Host) SetAgent(t testing.TB, uuid string, state maint.AgentState) {
	t.Helper()
	h.change(t, uuid, func(g *guest) {
		g.Agent = state
		h.publish(maint.Event{
			Kind: maint.EventAgent, UUID: g.UUID, Name: g.Name,
			Change: string(state), Detail: "channel event",
		})
	})
}

// HoldCopies keeps migrations that leave this host copying until
// ReleaseCopies.
func (h *Host) HoldCopies() { h.setHold(true) }

// ReleaseCopies lets migrations end their copying with the pass they are in.
func (h *Host) ReleaseCopies() { h.setHold(false) }

func (h *Host) setHold(on bool) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.hold = on
}

// change runs f on a guest under the lock.
func (h *Host) change(t testing.TB, uuid string, f func(*guest)) {
	t.Helper()
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	g, ok := h.guests[uuid]
	if !ok {
		t.Fatalf("%s has no guest %s", h.info.Name, uuid)
	}
	f(g)
}

// lifecycle publishes a lifecycle event.
func (h *Host) lifecycle(g *guest, change, detail string) {
	h.lifecycleAt(g, change, detail, time.Now())
}

// lifecycleAt is lifecycle where the vCPUs are stopped or started at a time of its own.
func (h *Host) lifecycleAt(g *guest, change, detail string, at time.Time) {
	h.tellCPUs(g.UUID, change, at)
	h.publish(maint.Event{
		Kind: maint.EventLifecycle, UUID: g.UUID, Name: g.Name,
		Change: change, Detail: detail,
	})
}

// publish sends an event if libvirt is there to send it.
func (h *Host) publish(ev maint.Event) {
	if h.up {
		h.hub.Publish(ev)
	}
}
