// Package vmmtest has a host in memory whose guests have QEMUs with all that a
// replacement touches: processes, memory in files, folders of libvirt's, sockets,
// migrations, and the real hook.
//
//	h := world.AddHost("host-a", hypervisortest.HostOptions{})
//	m := vmmtest.New(t, h)
//	web := m.PutGuest(t, "web-1")
//	r := &vmm.Replacement{UUID: web, Host: m, Places: m.Places(), …}
//
// It keeps account of what a guest has done: a guest that goes on from a state
// or a memory that is not its latest, that runs in two QEMUs, or that boots
// afresh, is Damage.
package vmmtest

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/hypervisor/hypervisortest"
	"belay/patch/vmm"
)

// Machine is a host.
type Machine struct {
	*hypervisortest.Host
	// Root is its root folder.
	Root string

	// Backing is memory_backing_dir, for guests that are put there from then on: /ram.
	Backing string
	// NoHook: libvirt does not run the hook.
	NoHook bool
	// FailStarts, FailLoads and FailSaves are how many of the next starts of a
	// QEMU, loads of a state and saves go wrong.
	FailStarts, FailLoads, FailSaves int
	// FailMigrate has QEMUs fail to send their state; HangMigrate has them
	// never end.
	FailMigrate, HangMigrate bool
	// OnQuit, unless nil, is what comes of a QEMU's being told to quit, which else ends at once, as does its
	// domain: gone ends the process, down has libvirt take the domain down, and the error is the answer.
	OnQuit func(gone, down func()) error
	// Confined QEMUs cannot use sockets.
	Confined bool

	mu        sync.Mutex
	intercept func(command string) (any, bool)
	lastPID   int
	qemus     map[string]*qemu // by UUID of the guest, those that live
	latest    map[string]int   // how far each guest has got
	xmls      map[string]string
	damage    []string
}

// New makes a machine of an in-memory host. Its files are on a tmpfs, and go
// with the test.
func New(t testing.TB, h *hypervisortest.Host) *Machine {
	t.Helper()
	root, err := os.MkdirTemp("/dev/shm", "vmm") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	m := &Machine{Host: h, Root: root, Backing: "/ram", lastPID: 5_000_000, // more than a real process has
		qemus: make(map[string]*qemu), latest: make(map[string]int), xmls: make(map[string]string)}
	m.mkdir("/run/belay/vmm", "/run/libvirt/qemu", "/var/lib/libvirt/qemu", "/ram/libvirt/qemu", "/proc/sys/kernel/random")
	m.write("/proc/sys/kernel/random/boot_id", "first-boot\n")
	m.installHook(t)
	h.OnQMP(m.qmp)
	return m
}

// Places are the machine's.
func (m *Machine) Places() vmm.Places { return vmm.Places{Root: m.Root, Copies: "/copies"} }

// PutGuest adds a guest that runs, with its memory in a file.
func (m *Machine) PutGuest(t testing.TB, name string, edits ...func(*maint.Guest)) (uuid string) {
	t.Helper()
	share := func(g *maint.Guest) { g.MemorySource, g.MemoryShared = "file", true }
	uuid = m.Host.PutGuest(name, append([]func(*maint.Guest){share}, edits...)...)
	m.mu.Lock()
	defer m.mu.Unlock()
	x, err := m.Host.GuestXML(context.Background(), uuid)
	if err != nil {
		t.Fatal(err)
	}
	g, err := m.Host.Guest(context.Background(), uuid)
	if err != nil {
		t.Fatal(err)
	}
	if g.State.Active() {
		m.latest[uuid] = 1
		m.folders(g)
		m.spawn(g, x.Live)
		m.qemus[uuid].dev = 1
		m.put(g, 1)
		_ = m.hook(name, "started", x.Live)
	}
	return uuid
}

// Booted is the host's having gone down and come up, with a boot ID: QEMUs are gone, and what is in
// Backing is as they left it.
func (m *Machine) Booted(bootID string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for uuid, q := range m.qemus {
		q.mem.Close()
		for _, c := range q.chardevs {
			c.Close()
		}
		os.RemoveAll(m.at(fmt.Sprintf("/proc/%d", q.pid)))
		delete(m.qemus, uuid)
		delete(m.xmls, uuid)
	}
	for _, dir := range []string{"/run/belay/vmm", "/run/libvirt/qemu", "/var/lib/libvirt/qemu"} {
		os.RemoveAll(m.at(dir))
		m.mkdir(dir)
	}
	m.write("/proc/sys/kernel/random/boot_id", bootID+"\n")
}

// Knows reports whether a guest is one whose QEMUs are modelled here.
func (m *Machine) Knows(uuid string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.latest[uuid] > 0
}

// Damage is what has happened to guests that must never happen.
func (m *Machine) Damage() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]string(nil), m.damage...)
}

// Progress is how far a guest has got.
func (m *Machine) Progress(uuid string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.latest[uuid]
}

// PID is the process of a guest's QEMU, 0 without.
func (m *Machine) PID(uuid string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if q := m.qemus[uuid]; q != nil {
		return q.pid
	}
	return 0
}

// IgnoresShared reports whether a migration of the guest would leave its
// memory behind.
func (m *Machine) IgnoresShared(uuid string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.qemus[uuid] != nil && m.qemus[uuid].ignoreShared
}

// Bandwidth is the limit of the guest's migrations.
func (m *Machine) Bandwidth(uuid string) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.qemus[uuid].bandwidth
}

// Intercept has f answer QMP commands, or leave them (false) to the QEMU.
func (m *Machine) Intercept(f func(command string) (any, bool)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.intercept = f
}

// ran books that a guest's vCPUs have run in its QEMU.
func (m *Machine) ran(g maint.Guest) {
	q := m.qemus[g.UUID]
	if q == nil {
		return
	}
	if mem := m.get(q); mem != m.latest[g.UUID] || q.dev != mem {
		m.damage = append(m.damage, fmt.Sprintf("guest %s goes on from state %d and memory %d, and was at %d", g.Name, q.dev, mem, m.latest[g.UUID]))
	}
	m.latest[g.UUID]++
	q.dev = m.latest[g.UUID]
	m.put(g, q.dev)
}

// Suspend implements vmm.VCPUs.
func (m *Machine) Suspend(ctx context.Context, uuid string) error {
	before, _ := m.Host.Guest(ctx, uuid)
	err := m.Host.Suspend(ctx, uuid)
	if err == nil && before.State == maint.GuestRunning {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.ran(before)
	}
	return err
}

// Resume implements vmm.VCPUs.
func (m *Machine) Resume(ctx context.Context, uuid string) error {
	before, _ := m.Host.Guest(ctx, uuid)
	err := m.Host.Resume(ctx, uuid)
	if err == nil && before.State == maint.GuestPaused {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.ran(before)
	}
	return err
}

// GuestXML is the in-memory host's, with what is not in its model.
func (m *Machine) GuestXML(ctx context.Context, uuid string) (hypervisor.GuestXML, error) {
	x, err := m.Host.GuestXML(ctx, uuid)
	m.mu.Lock()
	defer m.mu.Unlock()
	if own := m.xmls[uuid]; own != "" && err == nil {
		x.Live, x.Portable, x.Migratable = own, own, own
	}
	return x, err
}

// SetXML changes a guest's live XML.
func (m *Machine) SetXML(t testing.TB, uuid string, edit func(string) string) {
	t.Helper()
	x, err := m.GuestXML(context.Background(), uuid)
	if err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.xmls[uuid] = edit(x.Live)
}

// Describe implements vmm.Looker.
func (m *Machine) Describe(ctx context.Context, uuid string) (vmm.Description, error) {
	x, err := m.GuestXML(ctx, uuid)
	return vmm.Description{Live: x.Live, Portable: x.Portable, Inactive: x.Inactive, CPU: x.CPU}, err
}

// QuitMigrated implements vmm.QEMU.
func (m *Machine) QuitMigrated(ctx context.Context, uuid string) error {
	g, _ := m.Host.Guest(ctx, uuid)
	if m.OnQuit != nil {
		return m.quit(ctx, g)
	}
	if err := m.Host.QuitMigrated(ctx, uuid); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.end(g)
	return nil
}

// quit has OnQuit say what comes of it.
func (m *Machine) quit(ctx context.Context, g maint.Guest) error {
	var is struct{ Status string }
	b, err := m.Host.QMP(ctx, g.UUID, "query-status", nil)
	if err == nil {
		err = json.Unmarshal(b, &is)
	}
	if err == nil && is.Status != "postmigrate" {
		err = fmt.Errorf("it is %s: %w", is.Status, hypervisor.ErrRunsHere)
	}
	if err != nil {
		return err
	}
	m.mu.Lock()
	q := m.qemus[g.UUID]
	m.mu.Unlock()
	var gone, down sync.Once
	return m.OnQuit(func() {
		gone.Do(func() {
			now, _ := m.Host.Guest(context.Background(), g.UUID)
			m.mu.Lock()
			defer m.mu.Unlock()
			if now.State == maint.GuestRunning {
				m.damage = append(m.damage, fmt.Sprintf("guest %s ran, and was ended by a quit of before", g.Name))
			}
			if m.qemus[g.UUID] == q {
				m.exit(g)
			}
		})
	}, func() {
		down.Do(func() {
			m.Host.Stop(discard{}, g.UUID, "shutdown")
			m.mu.Lock()
			defer m.mu.Unlock()
			m.end(g)
		})
	})
}

// QuitIncoming implements vmm.QEMU.
func (m *Machine) QuitIncoming(ctx context.Context, uuid string) error {
	g, err := m.Host.Guest(ctx, uuid)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if q := m.qemus[uuid]; q == nil || !q.incoming {
		return hypervisor.ErrRunsHere
	}
	m.fail(g)
	return nil
}

// Stop ends a guest, as its user or an operator would.
func (m *Machine) Stop(t testing.TB, uuid, detail string) {
	t.Helper()
	g, err := m.Host.Guest(context.Background(), uuid)
	if err != nil {
		t.Fatal(err)
	}
	m.Host.Stop(t, uuid, detail)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.end(g)
}

// Boot starts a guest afresh, as 'virsh start' does.
func (m *Machine) Boot(ctx context.Context, t testing.TB, uuid string) error {
	t.Helper()
	x, err := m.Host.GuestXML(ctx, uuid)
	if err != nil {
		return err
	}
	if err := m.create(ctx, x.Live, func() error { m.Host.Start(t, uuid); return nil }); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.damage = append(m.damage, "guest booted afresh")
	m.latest[uuid], m.qemus[uuid].dev = 0, 0
	return nil
}

// CreatePaused implements vmm.Starter.
func (m *Machine) CreatePaused(ctx context.Context, xml string) error {
	if _, err := hypervisor.ParseGuest(xml); err != nil {
		return err
	}
	return m.create(ctx, xml, func() error { return m.Host.CreatePaused(context.WithoutCancel(ctx), xml) })
}

// domainID is the number in the XML of a domain that runs.
var domainID = regexp.MustCompile(` id='\d+'`)

// create is a start of a QEMU as libvirt does it: prepare, folders, start.
func (m *Machine) create(ctx context.Context, xml string, start func() error) error {
	ctx = context.WithoutCancel(ctx) // it goes on
	parsed, err := hypervisor.ParseGuest(xml)
	if err != nil {
		return err
	}
	if now, err := m.Host.Guest(ctx, parsed.UUID); err == nil && now.State.Active() {
		return start() // refuses
	}
	if err := m.hook(parsed.Name, "prepare", xml); err != nil {
		return err
	}
	if err := start(); err != nil {
		return err
	}
	g, err := m.Host.Guest(ctx, parsed.UUID)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.folders(g)
	numbered := strings.Replace(domainID.ReplaceAllString(xml, ""), "<domain ", fmt.Sprintf("<domain id='%d' ", g.ID), 1)
	err = m.hook(g.Name, "start", numbered)
	if err == nil && m.FailStarts > 0 {
		m.FailStarts--
		err = errors.New("internal error: process exited while connecting to monitor")
	}
	if err != nil {
		m.fail(g)
		return err
	}
	m.spawn(g, xml)
	return m.hook(g.Name, "started", xml)
}

// saved is what is in an image after libvirt's header.
type saved struct {
	UUID string
	At   int
}

// SavedHeader is how a file begins in which libvirt has saved a guest (libvirt, qemu_saveimage.h).
func SavedHeader(ran bool) string {
	head := append([]byte("LibvirtQemudSave"), make([]byte, 12)...)
	binary.NativeEndian.PutUint32(head[16:], 2)
	if ran {
		binary.NativeEndian.PutUint32(head[24:], 1)
	}
	return string(head)
}

// Save implements vmm.Starter.
func (m *Machine) Save(ctx context.Context, uuid, path string) error {
	g, err := m.Host.Guest(ctx, uuid)
	if err != nil {
		return err
	}
	m.mu.Lock()
	if m.FailSaves > 0 {
		m.FailSaves--
		m.write(path, "LibvirtQemudPart")
		m.mu.Unlock()
		return errors.New("operation failed: no space left on device")
	}
	if g.State == maint.GuestRunning {
		m.ran(g)
	}
	if q := m.qemus[uuid]; q != nil && q.ignoreShared {
		m.damage = append(m.damage, fmt.Sprintf("guest %s is saved without its memory", g.Name))
	}
	text, _ := json.Marshal(saved{uuid, m.latest[uuid]})
	m.write(path, SavedHeader(g.State == maint.GuestRunning)+string(text))
	m.mu.Unlock()
	if err := m.Host.Save(context.WithoutCancel(ctx), uuid, path); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.end(g)
	return nil
}

// Restore implements vmm.Starter.
func (m *Machine) Restore(ctx context.Context, path string, paused bool) error {
	ctx = context.WithoutCancel(ctx)
	b, err := os.ReadFile(m.at(path))
	if err != nil {
		return err
	}
	var s saved
	if err := json.Unmarshal(b[min(len(b), len(SavedHeader(true))):], &s); err != nil {
		return err
	}
	xml, err := m.Host.SavedXML(ctx, path)
	if err != nil {
		return err
	}
	g, err := hypervisor.ParseGuest(xml)
	if err != nil {
		return err
	}
	if err := m.hook(g.Name, "restore", xml); err != nil {
		return err
	}
	if err := m.create(ctx, xml, func() error { return m.Host.Restore(ctx, path, paused) }); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	q := m.qemus[s.UUID]
	if q == nil {
		return errors.New("internal error: QEMU has ended")
	}
	q.dev = s.At
	now, _ := m.Host.Guest(ctx, s.UUID)
	m.put(now, s.At)
	return nil
}

func (m *Machine) at(path string) string { return filepath.Join(m.Root, path) }
