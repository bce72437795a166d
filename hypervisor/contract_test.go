package hypervisor_test

import (
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"belay/hypervisor"
	"belay/hypervisor/hypervisortest"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
)

// TestContract holds package hypervisor to the contract of its in-memory
// counterpart, with two real libvirtds and real guests.
func TestContract(t *testing.T) {
	if testing.Short() {
		t.Skip("needs two libvirtds")
	}
	l := lab.ForTest(t, lab.Config{Hosts: 2})
	disk := filepath.Join(l.Shared, "boot.raw")
	if err := os.WriteFile(disk, append(bootSector(), make([]byte, 1<<20-512)...), 0o644); err != nil {
		t.Fatal(err)
	}
	hypervisortest.Contract(t, hypervisortest.Env{
		A: newSite(t, l.Hosts[0], disk),
		B: newSite(t, l.Hosts[1], disk),
		// No CPU that TCG emulates has Intel's transactional memory.
		HardCPU: "<cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model>" +
			"<feature policy='require' name='rtm'/></cpu>",
	})
}

// site is a host of the lab under the contract.
type site struct {
	host *lab.Host
	hv   *hypervisor.Host
	disk string

	disks, rivals sync.Map // of leased guests, by UUID: path, *os.File that has the lock
}

func newSite(t testing.TB, host *lab.Host, disk string) *site {
	hv := hypervisor.New(hypervisor.Config{Socket: host.LibvirtSocket()})
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	run.Go(func() {
		if err := hv.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		run.Wait()
		if err := hv.Close(); err != nil {
			t.Error(err)
		}
	})
	s := &site{host: host, hv: hv, disk: disk}
	s.connected(t)
	return s
}

// connected waits until events flow: a subscriber gets a resync at once.
func (s *site) connected(t testing.TB) {
	t.Helper()
	events, cancel := s.hv.Subscribe()
	defer cancel()
	select {
	case <-events:
	case <-time.After(time.Minute):
		t.Fatal("no events connection")
	}
}

func (s *site) virsh(t testing.TB, args ...string) string {
	t.Helper()
	out, err := s.host.Virsh(context.Background(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func (s *site) Hypervisor() hypervisortest.Hypervisor { return s.hv }
func (s *site) URI() string                           { return s.host.PeerURI(false) }

func (s *site) NewGuest(t testing.TB, name string) string {
	t.Helper()
	return s.define(t, name, s.disk, "<readonly/>")
}

// define starts a guest of the boot sector that disk has.
func (s *site) define(t testing.TB, name, disk, readonly string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "guest.xml")
	var path strings.Builder
	_ = xml.EscapeText(&path, []byte(disk))
	text := fmt.Sprintf(`<domain type='qemu'>
  <name>%s</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model></cpu>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source file='%s'/>
      <target dev='vda' bus='virtio'/>
      %s
    </disk>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>`, name, path.String(), readonly)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	s.virsh(t, "define", file)
	s.virsh(t, "start", name)
	return s.virsh(t, "domuuid", name)
}

func (s *site) StartGuest(t testing.TB, uuid string)   { t.Helper(); s.virsh(t, "start", uuid) }
func (s *site) PauseGuest(t testing.TB, uuid string)   { t.Helper(); s.virsh(t, "suspend", uuid) }
func (s *site) ResumeGuest(t testing.TB, uuid string)  { t.Helper(); s.virsh(t, "resume", uuid) }
func (s *site) DestroyGuest(t testing.TB, uuid string) { t.Helper(); s.virsh(t, "destroy", uuid) }

func (s *site) RemoveGuest(t testing.TB, uuid string) {
	t.Helper()
	// Whichever of these does not apply fails, and may.
	_, _ = s.host.Virsh(context.Background(), "destroy", uuid)
	_, _ = s.host.Virsh(context.Background(), "undefine", uuid)
	if out := s.virsh(t, "list", "--all", "--uuid"); strings.Contains(out, uuid) {
		t.Errorf("guest %s cannot be removed from %s", uuid, s.host.Name)
	}
}

func (s *site) KillQEMU(t testing.TB, uuid string) {
	t.Helper()
	text, err := os.ReadFile(s.host.Path("/run/libvirt/qemu/" + s.virsh(t, "domname", uuid) + ".pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

func (s *site) NewAgentGuest(t testing.TB, name string) string {
	t.Helper()
	img, accel := guest.ForTest(t)
	if _, err := guest.Start(t.Context(), s.host, guest.Spec{Name: name, Accel: accel}, img); err != nil {
		t.Fatal(err)
	}
	return s.virsh(t, "domuuid", name)
}

func (s *site) NewDiskGuest(t testing.TB, name string) (uuid, path string) {
	t.Helper()
	text, err := os.ReadFile(s.disk)
	if err != nil {
		t.Fatal(err)
	}
	path = "/var/lib/libvirt/images/" + name + ".raw"
	s.WriteFile(t, path, text)
	return s.define(t, name, path, ""), path
}

func (s *site) WriteFile(t testing.TB, path string, text []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(s.host.Path(path)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.host.Path(path), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *site) ReadFile(t testing.TB, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(s.host.Path(path))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return text
}

// NewLeasedGuest starts a guest with a disk that it may write, which is what
// virtlockd keeps leases of.
func (s *site) NewLeasedGuest(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(s.disk)
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(disk, text, 0o600); err != nil {
		t.Fatal(err)
	}
	uuid := s.define(t, name, disk, "")
	s.disks.Store(uuid, disk)
	return uuid
}

// TakeLease locks what virtlockd would lock: the disk's first byte.
func (s *site) TakeLease(t testing.TB, uuid string) {
	t.Helper()
	disk, _ := s.disks.Load(uuid)
	file, err := os.OpenFile(disk.(string), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	lock := syscall.Flock_t{Type: syscall.F_WRLCK, Len: 1}
	if err := syscall.FcntlFlock(file.Fd(), syscall.F_SETLK, &lock); err != nil {
		t.Fatalf("the lease of a guest that is held is not to be had: %v", err)
	}
	s.rivals.Store(uuid, file)
}

func (s *site) FreeLease(t testing.TB, uuid string) {
	t.Helper()
	file, _ := s.rivals.LoadAndDelete(uuid)
	if err := file.(*os.File).Close(); err != nil {
		t.Fatal(err)
	}
}

// SendAway has QEMU migrate to a socket that swallows it.
func (s *site) SendAway(t testing.TB, uuid string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "b") // t.TempDir is too long for a socket's address
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	l, err := net.Listen("unix", filepath.Join(dir, "sink"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}
	}()
	if err := s.hv.Suspend(ctx, uuid); err != nil {
		t.Fatal(err)
	}
	if _, err := s.hv.QMP(ctx, uuid, "migrate", map[string]string{"uri": "unix:" + l.Addr().String()}); err != nil {
		t.Fatal(err)
	}
	for {
		value, err := s.hv.QMP(ctx, uuid, "query-migrate", nil)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(value), `"completed"`) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// PutNetwork has a network without a bridge of its own making, address or DHCP.
func (s *site) PutNetwork(t testing.TB, name string, active bool) {
	t.Helper()
	if !strings.Contains(s.virsh(t, "net-list", "--all", "--name"), name) {
		s.virsh(t, "net-define", s.file(t, "<network><name>"+name+"</name><forward mode='bridge'/><bridge name='"+lab.Bridge+"'/></network>"))
	}
	if active {
		s.virsh(t, "net-start", name)
	}
}

func (s *site) RemoveNetwork(t testing.TB, name string) {
	t.Helper()
	_, _ = s.host.Virsh(context.Background(), "net-destroy", name) // it may not be active
	s.virsh(t, "net-undefine", name)
}

// PutPool has a pool of a folder that is always there.
func (s *site) PutPool(t testing.TB, name string, active bool) {
	t.Helper()
	if !strings.Contains(s.virsh(t, "pool-list", "--all", "--name"), name) {
		s.virsh(t, "pool-define", s.file(t, "<pool type='dir'><name>"+name+"</name><target><path>"+filepath.Dir(s.disk)+"</path></target></pool>"))
	}
	if active {
		s.virsh(t, "pool-start", name)
	}
}

func (s *site) RemovePool(t testing.TB, name string) {
	t.Helper()
	_, _ = s.host.Virsh(context.Background(), "pool-destroy", name) // it may not be active
	s.virsh(t, "pool-undefine", name)
}

func (s *site) PutSecret(t testing.TB, uuid, usage string) {
	t.Helper()
	s.virsh(t, "secret-define", s.file(t, "<secret ephemeral='yes' private='yes'><uuid>"+uuid+"</uuid><usage type='ceph'><name>"+usage+"</name></usage></secret>"))
}

func (s *site) RemoveSecret(t testing.TB, uuid string) {
	t.Helper()
	s.virsh(t, "secret-undefine", uuid)
}

// file writes a text for virsh to read.
func (s *site) file(t testing.TB, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "define.xml")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func (s *site) NewFile(t testing.TB) string { return filepath.Join(t.TempDir(), "saved") }

// Hold does nothing: 1 MiB/s holds a guest of the boot sector.
func (s *site) Hold(testing.TB) {}

func (s *site) Release(t testing.TB, uuid string) {
	t.Helper()
	s.virsh(t, "migrate-setspeed", uuid, "10000")
}

func (s *site) BreakPostCopy(t testing.TB, uuid string) {
	t.Helper()
	s.virsh(t, "domjobabort", "--postcopy", uuid)
}

func (s *site) signal(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if err := s.host.Kill(context.Background(), lab.Libvirtd, sig); err != nil {
		t.Fatal(err)
	}
}

func (s *site) KillLibvirt(t testing.TB)   { t.Helper(); s.signal(t, syscall.SIGKILL) }
func (s *site) FreezeLibvirt(t testing.TB) { t.Helper(); s.signal(t, syscall.SIGSTOP) }
func (s *site) ThawLibvirt(t testing.TB)   { t.Helper(); s.signal(t, syscall.SIGCONT) }

func (s *site) RestartLibvirt(t testing.TB) {
	t.Helper()
	if err := s.host.StartDaemon(context.Background(), lab.Libvirtd); err != nil {
		t.Fatal(err)
	}
}
