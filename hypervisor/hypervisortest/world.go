package hypervisortest

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/internal/feed"
)

// World is some hosts that can reach each other.
type World struct {
	mu      sync.Mutex // guards everything in the World, its hosts and guests
	hosts   []*Host
	copy    Copy
	onCall  func(Call)
	onPhase func(uuid string, p Phase)
	serial  int
	running sync.WaitGroup // migrations, and calls that outlive their callers

	life context.Context // ends with Close
	end  context.CancelFunc
}

// Copy says how a migration gets on. Zero fields have the defaults given.
type Copy struct {
	Passes   int           // over memory, before the guest is suspended; 3
	Step     time.Duration // each pass; 100 ms
	Blackout time.Duration // suspended to resumed; 50 ms
	PostCopy time.Duration // from there to all memory's being there; 100 ms

	// Writes, unless zero, has the copy depend on what the guest writes instead: it
	// ends when a pass leaves no more than can be sent in the longest pause.
	Writes Writes
}

// Writes is what a guest writes while it is copied, and what takes it.
type Writes struct {
	PerSecond  uint64 // bytes
	WorkingSet uint64 // bytes
	Network    uint64 // takes so many bytes a second; by several connections twice as many
}

// Call is a call to a host, for OnCall.
type Call struct {
	Host string // its name
	Op   string // the method: "Migrate"
	Done bool   // false before the call, true after it
}

// Phase is where a migration is, for OnPhase.
type Phase string

// The phases of a migration, in their order. See the package's documentation.
const (
	PhaseDisks     Phase = "disks"     // begun, where disks are copied; the destination has the guest, paused
	PhaseCopying   Phase = "copying"   // begun; the destination has the guest, paused
	PhaseSuspended Phase = "suspended" // the source's vCPUs are stopped
	PhasePerformed Phase = "performed" // all is sent, and the destination does not know yet
	PhaseResumed   Phase = "resumed"   // the destination's run
	PhasePostCopy  Phase = "post-copy" // the same, and memory follows; then resumed, stopped
	PhaseStopped   Phase = "stopped"   // the source's domain has stopped
)

// NewWorld makes a World without hosts.
func NewWorld() *World {
	w := &World{}
	w.life, w.end = context.WithCancel(context.Background())
	w.SetCopy(Copy{})
	return w
}

// Close ends running migrations as killed hosts would, and closes all hosts.
func (w *World) Close() {
	w.end()
	w.mu.Lock()
	for _, h := range w.hosts {
		for _, g := range h.guests {
			for _, m := range []*migration{g.out, g.in} {
				if m != nil {
					m.end(h.connectionLost("DomainMigratePerform3Params"))
					m.quit()
				}
			}
		}
	}
	w.mu.Unlock()
	w.running.Wait()
	for _, h := range w.hosts {
		_ = h.Close()
	}
}

// SetCopy says how migrations that begin from now on get on.
func (w *World) SetCopy(c Copy) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.copy = Copy{
		Passes:   cmp.Or(c.Passes, 3),
		Step:     cmp.Or(c.Step, 100*time.Millisecond),
		Blackout: cmp.Or(c.Blackout, 50*time.Millisecond),
		PostCopy: cmp.Or(c.PostCopy, 100*time.Millisecond),
		Writes:   c.Writes,
	}
}

// OnCall has f called before and after every call to a host, in the caller's
// goroutine and without locks held: f may change the World, block for ever, or
// end the goroutine (runtime.Goexit), as a crash would.
func (w *World) OnCall(f func(Call)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.onCall = f
}

// OnPhase has f called as a migration has entered a phase, in the migration's
// goroutine and without locks held: f may kill what it likes.
func (w *World) OnPhase(f func(uuid string, p Phase)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.onPhase = f
}

func (w *World) called(c Call) {
	w.mu.Lock()
	f := w.onCall
	w.mu.Unlock()
	if f != nil {
		f(c)
	}
}

func (w *World) entered(uuid string, p Phase) {
	w.mu.Lock()
	f := w.onPhase
	w.mu.Unlock()
	if f != nil {
		f(uuid, p)
	}
}

// HostOptions describe a host. Zero fields have the defaults given.
type HostOptions struct {
	UUID         string // made from the order of hosts
	Arch         string // x86_64
	CPUModel     string // qemu64
	CPUs         int    // 4
	MemoryBytes  uint64 // 16 GiB
	Libvirt      string // 9.0.0
	QEMU         string // 7.2.9
	DomainTypes  []string
	MachineTypes []string
	// CannotRun are words (CPU models, features) that CompareCPU refuses
	// when they are in a CPU's XML.
	CannotRun []string
	HugePages []maint.PagePool
	// Root is the folder that stands for the host's own, for the files of disks that are
	// copied. Only then are there any.
	Root string
	// NoPostCopy: its kernel lets QEMU have no userfaultfd.
	NoPostCopy bool
}

// AddHost adds a host with libvirt running and no guests.
func (w *World) AddHost(name string, o HostOptions) *Host {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := &Host{
		w: w,
		info: maint.Host{
			Name:           name,
			UUID:           cmp.Or(o.UUID, fmt.Sprintf("00000000-0000-4000-8000-%012x", len(w.hosts)+1)),
			Arch:           cmp.Or(o.Arch, "x86_64"),
			CPUModel:       cmp.Or(o.CPUModel, "qemu64"),
			CPUs:           cmp.Or(o.CPUs, 4),
			MemoryBytes:    cmp.Or(o.MemoryBytes, 16<<30),
			LibvirtVersion: cmp.Or(o.Libvirt, "9.0.0"),
			QEMUVersion:    cmp.Or(o.QEMU, "7.2.9"),
			DomainTypes:    o.DomainTypes,
			MachineTypes:   o.MachineTypes,
		},
		cannotRun: o.CannotRun,
		noPost:    o.NoPostCopy,
		pools:     o.HugePages,
		root:      o.Root,
		networks:  make(map[string]bool),
		storage:   make(map[string]bool),
		guests:    make(map[string]*guest),
		faults:    make(map[string][]*Fault),
		saved:     make(map[string]savedGuest),
		up:        true,
		interrupt: make(chan struct{}),
		watchers:  make(map[chan cpuTime]bool),
		hub:       &feed.Hub{},
		closed:    make(chan struct{}),
	}
	if h.info.DomainTypes == nil {
		h.info.DomainTypes = []string{"kvm", "qemu"}
	}
	if h.info.MachineTypes == nil {
		h.info.MachineTypes = []string{"pc", "pc-i440fx-7.2", "pc-q35-7.2", "q35"}
	}
	h.hub.Publish(maint.Event{Kind: maint.EventResync})
	w.hosts = append(w.hosts, h)
	return h
}

// byURI finds the host that answers at a migration's destination URI, by whatever
// transport.
func (w *World) byURI(uri string) *Host {
	_, place, _ := strings.Cut(uri, "://")
	for _, h := range w.hosts {
		if _, own, _ := strings.Cut(h.URI(), "://"); own == place {
			return h
		}
	}
	return nil
}
