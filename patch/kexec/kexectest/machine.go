// Package kexectest is a machine that exists in a folder and in memory only: its kernels, its
// boots, and memory that outlives them. For tests.
package kexectest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/kexec"
	"belay/patch/vmm"
	"belay/patch/vmm/vmmtest"
)

// The releases of its kernels.
const (
	Old  = "6.1.0-28-amd64"
	Next = "6.1.0-30-amd64"
)

// Backing is its libvirt's memory_backing_dir, where the reserved memory is mounted once more.
const Backing = "/var/lib/libvirt/belay"

// Cmdline is what it was started with.
const Cmdline = "root=/dev/vda1 ro quiet memmap=512M!4G"

// Machine is a host whose kernel can be changed under its guests. Those that PutGuest gives it have
// QEMUs, and their memory is in the reserved memory; those that its Host is given have none.
type Machine struct {
	*vmmtest.Machine
	// OnKexec is called, in a goroutine of its own, when the host is to go down for the
	// kernel of that release: it calls Boots, and starts what runs on the host.
	OnKexec func(release string)

	t      testing.TB
	mu     sync.Mutex
	loaded *maint.KernelImage
	going  bool
	boots  int
	// NoKexec has systemd not begin to go down; FailSave has the save of this guest fail.
	NoKexec  bool
	FailSave string
	// FailRestore is how many restores fail, as where a network comes late.
	FailRestore int
}

var (
	_ kexec.Host     = (*Machine)(nil)
	_ kexec.Loader   = (*Machine)(nil)
	_ kexec.Rebooter = (*Machine)(nil)
)

// New makes a machine of an in-memory host.
func New(t testing.TB, h *hypervisortest.Host) *Machine {
	t.Helper()
	m := &Machine{Machine: vmmtest.New(t, h), t: t}
	m.Backing = Backing
	m.Write("/etc/libvirt/qemu.conf", "memory_backing_dir = \""+Backing+"\"\n")
	m.Write("/etc/fstab", "/dev/vda1 / ext4 errors=remount-ro 0 1\n/dev/pmem0 "+kexec.DefaultDir+" ext4 dax,nofail 0 0\n/dev/pmem0 "+Backing+" ext4 dax,nofail 0 0\n")
	m.Write("/proc/cmdline", "BOOT_IMAGE=/boot/vmlinuz "+Cmdline+"\n")
	m.Write("/sys/kernel/kexec_loaded", "0\n")
	m.Write("/sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
	m.RAM(0, 0x1000, 0x9fc00)
	m.RAM(1, 0x100000, 0x80000000)
	m.RAM(2, 4<<30, 12<<30)
	m.Write("/boot/grub/grub.cfg", "linux /boot/vmlinuz-"+Old+" "+Cmdline+"\n")
	for _, r := range []string{Old, Next} {
		m.Write("/boot/vmlinuz-"+r, Image(r))
		m.Write("/boot/initrd.img-"+r, "\x28\xb5\x2f\xfd and so on")
		m.Write("/boot/config-"+r, "CONFIG_KEXEC_FILE=y\nCONFIG_FS_DAX=y\nCONFIG_DAX=y\nCONFIG_EXT4_FS=m\n")
		m.Write("/lib/modules/"+r+"/modules.dep", "kernel/drivers/nvdimm/nd_e820.ko: kernel/x.ko\nkernel/drivers/nvdimm/nd_pmem.ko.xz:\nkernel/fs/ext4/ext4.ko:\n")
	}
	backing := filepath.Join(m.Root, Backing)
	err := errors.Join(os.MkdirAll(filepath.Join(m.Dir(), "libvirt/qemu"), 0o700), os.MkdirAll(filepath.Dir(backing), 0o755), os.Symlink(m.Dir(), backing))
	if err != nil {
		t.Fatal(err)
	}
	m.Boots(Old)
	return m
}

// Image is the beginning of a bzImage of that release.
func Image(release string) string {
	b := make([]byte, 0x400)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x20e:], 0x100)
	return string(append(b[:0x300], release+" (builder@host) #1 SMP\x00"...))
}

// RAM has the firmware tell of memory, from start to before end.
func (m *Machine) RAM(n int, start, end uint64) {
	dir := fmt.Sprintf("/sys/firmware/memmap/%d/", n)
	m.Write(dir+"start", fmt.Sprintf("%#x\n", start))
	m.Write(dir+"end", fmt.Sprintf("%#x\n", end-1))
	m.Write(dir+"type", "System RAM\n")
}

// Write writes a file of the host's.
func (m *Machine) Write(path, text string) {
	m.t.Helper()
	path = filepath.Join(m.Root, path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		m.t.Fatal(err)
	}
}

// Remove removes one.
func (m *Machine) Remove(path string) {
	m.t.Helper()
	if err := os.RemoveAll(filepath.Join(m.Root, path)); err != nil {
		m.t.Fatal(err)
	}
}

// Tree is its files.
func (m *Machine) Tree() kexec.Tree { return kexec.Tree{Root: m.Root} }

// Dir is where the reserved memory is, as the test sees it.
func (m *Machine) Dir() string { return filepath.Join(m.Root, kexec.DefaultDir) }

// Mover has its guests leave and enter QEMUs.
func (m *Machine) Mover() vmm.Mover { return vmm.Mover{Host: m, Places: m.Places()} }

// Boots has it come up with a kernel, after the hypervisor has ended its guests (Reboot).
func (m *Machine) Boots(release string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.boots++
	m.loaded, m.going = nil, false
	m.Write("/sys/kernel/kexec_loaded", "0\n")
	m.Write("/proc/sys/kernel/osrelease", release+"\n")
	m.Write("/proc/uptime", "12.34 20.11\n")
	m.Booted(fmt.Sprintf("boot-%d", m.boots))
	m.Mount(true)
}

// Mount says whether the reserved memory is mounted, for Belay and for QEMU.
func (m *Machine) Mount(on bool) {
	if on {
		m.mount(kexec.DefaultDir, Backing)
	} else {
		m.mount()
	}
}

// MountNotForQEMU has the reserved memory be mounted for Belay only.
func (m *Machine) MountNotForQEMU() { m.mount(kexec.DefaultDir) }

func (m *Machine) mount(points ...string) {
	text := "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n23 22 0:21 / /dev/shm rw - tmpfs tmpfs rw\n"
	for i, point := range points {
		text += fmt.Sprintf("%d 22 259:0 / %s rw,relatime shared:9 - ext4 /dev/pmem0 rw,dax=always\n", 40+i, point)
	}
	m.Write("/proc/self/mountinfo", text)
}

// PowerCut empties the reserved memory.
func (m *Machine) PowerCut() {
	entries, err := os.ReadDir(m.Dir())
	if err != nil {
		m.t.Fatal(err)
	}
	for _, e := range entries {
		m.Remove(filepath.Join(kexec.DefaultDir, e.Name()))
	}
	if err := os.MkdirAll(filepath.Join(m.Dir(), "libvirt/qemu"), 0o700); err != nil { // libvirt's
		m.t.Fatal(err)
	}
}

// Spoil changes a byte of what is saved of a guest.
func (m *Machine) Spoil(uuid string) { m.spoil(uuid + ".save") }

// SpoilMemory changes a byte of what a guest has in place.
func (m *Machine) SpoilMemory(uuid string) { m.spoil(uuid + ".memory/pc.ram") }

func (m *Machine) spoil(name string) {
	path := filepath.Join(m.Dir(), name)
	b, err := os.ReadFile(path)
	if err != nil {
		m.t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// Save implements kexec.Saver.
func (m *Machine) Save(ctx context.Context, uuid, path string) error {
	file := filepath.Join(m.Root, path)
	if err := os.WriteFile(file, []byte("LibvirtQemudPart"), 0o600); err != nil {
		return err
	}
	m.mu.Lock()
	fail := m.FailSave == uuid
	m.mu.Unlock()
	if fail {
		return errors.New("operation failed: no space left on device")
	}
	if m.Knows(uuid) {
		return m.Machine.Save(ctx, uuid, path)
	}
	g, err := m.Host.Guest(context.WithoutCancel(ctx), uuid)
	if err != nil {
		return err
	}
	if err := m.Host.Save(context.WithoutCancel(ctx), uuid, path); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(Saved(uuid, g.State == maint.GuestRunning)), 0o600)
}

// Saved is what libvirt writes of a guest, in short: its header, and no memory.
func Saved(uuid string, ran bool) string {
	return vmmtest.SavedHeader(ran) + " of guest " + uuid
}

// Restore implements kexec.Saver: what is restored is what the file has.
func (m *Machine) Restore(ctx context.Context, path string, paused bool) error {
	b, err := os.ReadFile(filepath.Join(m.Root, path))
	if err != nil {
		return err
	}
	uuid := strings.TrimSuffix(filepath.Base(path), ".save")
	if m.Knows(uuid) {
		return m.Machine.Restore(ctx, path, paused)
	}
	if !strings.HasPrefix(string(b), "LibvirtQemudSave") || !strings.HasSuffix(string(b), " of guest "+uuid) {
		return errors.New("operation failed: it is no image of the guest")
	}
	m.mu.Lock()
	fail := m.FailRestore > 0
	m.FailRestore--
	m.mu.Unlock()
	if fail {
		return errors.New("operation failed: network 'default' is not active")
	}
	return m.Host.Restore(context.WithoutCancel(ctx), path, paused)
}

// KexecLoad implements kexec.Loader.
func (m *Machine) KexecLoad(_ context.Context, k maint.KernelImage) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range []string{k.Kernel, k.Initrd} {
		if _, err := os.Stat(filepath.Join(m.Root, f)); err != nil {
			return err
		}
	}
	if k.Cmdline == "" {
		return errors.New("no command line")
	}
	m.loaded = &k
	m.Write("/sys/kernel/kexec_loaded", "1\n")
	return nil
}

// KexecUnload implements kexec.Loader.
func (m *Machine) KexecUnload(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.loaded = nil
	m.Write("/sys/kernel/kexec_loaded", "0\n")
	return nil
}

// Loaded reports whether a kernel is.
func (m *Machine) Loaded() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.loaded != nil
}

// Kexec implements kexec.Rebooter.
func (m *Machine) Kexec(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.NoKexec:
		return errors.New("unit kexec.target is masked")
	case m.going:
		return nil
	case m.loaded == nil:
		return errors.New("no kernel is loaded")
	}
	m.going = true
	release := m.loaded.Release
	go func() {
		time.Sleep(2 * time.Millisecond) // the host goes on for a while
		m.OnKexec(release)
	}()
	return nil
}

// Going implements kexec.Rebooter.
func (m *Machine) Going(context.Context) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.going, nil
}

// IsGoing reports whether the host is going down.
func (m *Machine) IsGoing() bool {
	going, _ := m.Going(context.Background())
	return going
}
