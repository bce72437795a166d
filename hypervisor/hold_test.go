package hypervisor_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/hypervisor/monitor"
	"belay/vmtests/lab"
)

// holdSite is a host with libvirt and, below it, a boot sector to make guests of.
func holdSite(t testing.TB) *site {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a libvirtd")
	}
	l := lab.ForTest(t, lab.Config{Hosts: 1})
	disk := filepath.Join(l.Shared, "boot.raw")
	if err := os.WriteFile(disk, append(bootSector(), make([]byte, 1<<20-512)...), 0o644); err != nil {
		t.Fatal(err)
	}
	return newSite(t, l.Hosts[0], disk)
}

// wants checks the state of a guest, as libvirt and as QEMU have it, and
// whether virtlockd holds the lease of its disk.
func (s *site) wants(t testing.TB, uuid string, state maint.GuestState, leased bool) {
	t.Helper()
	got, reason, err := s.hv.State(context.Background(), uuid)
	if err != nil {
		t.Fatal(err)
	}
	value, err := s.hv.QMP(context.Background(), uuid, "query-status", nil)
	if err != nil {
		t.Fatal(err)
	}
	var qemu struct{ Status maint.GuestState }
	if err := json.Unmarshal(value, &qemu); err != nil {
		t.Fatal(err)
	}
	if has := s.leased(t, uuid); got != state || qemu.Status != state || has != leased {
		t.Errorf("libvirt says %s (%s), QEMU %s, lease held %t; want %s, %t", got, reason, qemu.Status, has, state, leased)
	}
}

// leased says whether the host's virtlockd has a lock on a guest's disk.
func (s *site) leased(t testing.TB, uuid string) bool {
	t.Helper()
	disk, _ := s.disks.Load(uuid)
	info, err := os.Stat(disk.(string))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := s.host.DaemonPID(lab.Virtlockd)
	if err != nil {
		t.Fatal(err)
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		t.Fatal(err)
	}
	inode := info.Sys().(*syscall.Stat_t).Ino
	for line := range strings.Lines(string(locks)) {
		f := strings.Fields(line) // 1: POSIX ADVISORY WRITE pid major:minor:inode first last
		if len(f) > 5 && f[4] == fmt.Sprint(pid) && strings.HasSuffix(f[5], fmt.Sprintf(":%d", inode)) {
			return true
		}
	}
	return false
}

// qmp says commands to a guest's monitor, which must be free.
func (s *site) qmp(t testing.TB, uuid string, id int, commands ...string) {
	t.Helper()
	path, err := monitor.Find(s.host.Path(monitor.DefaultLibDir), id)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	in := bufio.NewScanner(c)
	for _, command := range append([]string{"qmp_capabilities"}, commands...) {
		fmt.Fprintf(c, `{"execute": %q}`+"\n", command)
		for in.Scan() && !strings.HasPrefix(in.Text(), `{"return"`) {
		}
		if in.Err() != nil {
			t.Fatalf("%s: %v", command, in.Err())
		}
	}
}

// A libvirtd that dies in the middle of Suspend leaves a paused guest whose
// lease is still held. libvirt itself can never resume it.
func TestLeaseLeftByDeadLibvirtd(t *testing.T) {
	s, ctx := holdSite(t), t.Context()
	uuid := s.NewLeasedGuest(t, "left")
	defer s.RemoveGuest(t, uuid)
	s.wants(t, uuid, maint.GuestRunning, true)
	g, err := s.hv.Guest(ctx, uuid)
	if err != nil {
		t.Fatal(err)
	}
	s.KillLibvirt(t)
	s.qmp(t, uuid, g.ID, "stop")
	s.RestartLibvirt(t)
	s.wants(t, uuid, maint.GuestPaused, true)
	if _, err := s.host.Virsh(ctx, "resume", uuid); err == nil {
		t.Log("this libvirt resumes it by itself")
	}
	if err := s.hv.Resume(ctx, uuid); err != nil {
		t.Fatal(err)
	}
	s.wants(t, uuid, maint.GuestRunning, true)
}

// Wherever SIGKILL finds libvirtd, its successor knows what state the guest is
// in, and the guest can be released with its lease.
func TestKilledAroundHold(t *testing.T) {
	s, ctx := holdSite(t), t.Context()
	uuid := s.NewLeasedGuest(t, "around")
	defer s.RemoveGuest(t, uuid)
	rounds := 8
	if os.Getenv("BELAY_LONG") != "" {
		rounds = 150
	}
	seen := map[string]int{}
	for i := range rounds {
		call, name := s.hv.Suspend, "suspend"
		if i%2 == 1 {
			call, name = s.hv.Resume, "resume"
			if err := s.hv.Suspend(ctx, uuid); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.hv.Warm(ctx, 1); err != nil {
			t.Fatal(err)
		}
		result := make(chan error, 1)
		go func() { result <- call(ctx, uuid) }()
		time.Sleep(rand.N(8 * time.Millisecond)) // somewhere within the call
		s.KillLibvirt(t)
		err := <-result
		if err != nil && !errors.Is(err, maint.ErrHypervisorDown) {
			t.Errorf("%s: %v", name, err)
		}
		s.RestartLibvirt(t)
		state, reason, stateErr := s.hv.State(ctx, uuid)
		if stateErr != nil {
			t.Fatal(stateErr)
		}
		leased := s.leased(t, uuid)
		s.wants(t, uuid, state, leased)
		seen[fmt.Sprintf("%s, answered %t: %s (%s), leased %t", name, err == nil, state, reason, leased)]++
		if err := s.hv.Resume(ctx, uuid); err != nil {
			t.Fatal(err)
		}
		s.wants(t, uuid, maint.GuestRunning, true)
	}
	for what, n := range seen {
		t.Logf("%d× %s", n, what)
	}
}

// A libvirtd that hangs carries out, when it is itself again, what nobody waits
// for any more. The guest runs again then, and whoever looks at it, or releases
// it, comes after that.
func TestLateSuspend(t *testing.T) {
	s, ctx := holdSite(t), t.Context()
	uuid := s.NewGuest(t, "late")
	defer s.RemoveGuest(t, uuid)
	defer func() { _ = s.host.Kill(context.Background(), lab.Libvirtd, syscall.SIGCONT) }()
	for i := range 6 {
		if err := s.hv.Warm(ctx, 1); err != nil {
			t.Fatal(err)
		}
		s.FreezeLibvirt(t)
		short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		if err := s.hv.Suspend(short, uuid); !errors.Is(err, maint.ErrHypervisorDown) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Suspend: %v", err)
		}
		cancel()
		short, cancel = context.WithTimeout(ctx, 100*time.Millisecond)
		for op, call := range map[string]func() error{
			"Suspend": func() error { return s.hv.Suspend(short, uuid) },
			"Resume":  func() error { return s.hv.Resume(short, uuid) },
			"State":   func() error { _, _, err := s.hv.State(short, uuid); return err },
		} {
			if err := call(); !errors.Is(err, maint.ErrHypervisorDown) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s after one that is not answered: %v", op, err)
			}
		}
		cancel()
		s.ThawLibvirt(t)
		if i%2 == 0 {
			if err := s.hv.Resume(ctx, uuid); err != nil {
				t.Error(err)
			}
		}
		for range 10 { // and stays so
			if state, reason, err := s.hv.State(ctx, uuid); err != nil || state != maint.GuestRunning {
				t.Fatalf("guest is %s (%s), %v", state, reason, err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	// One that is never answered, since libvirtd dies, holds nobody up.
	if err := s.hv.Warm(ctx, 1); err != nil {
		t.Fatal(err)
	}
	s.FreezeLibvirt(t)
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := s.hv.Suspend(short, uuid); err == nil {
		t.Error("a libvirtd that is stopped has suspended the guest")
	}
	s.KillLibvirt(t)
	s.RestartLibvirt(t)
	if err := s.hv.Resume(ctx, uuid); err != nil {
		t.Error(err)
	}
}

// A save outlives who asked for it.
func TestSaveGoesOn(t *testing.T) {
	s, ctx := holdSite(t), t.Context()
	uuid := s.NewGuest(t, "goes-on")
	defer s.RemoveGuest(t, uuid)
	events, cancel := s.hv.Subscribe()
	defer cancel()
	saving, give := context.WithCancel(ctx)
	result := make(chan error, 1)
	file := s.NewFile(t)
	go func() { result <- s.hv.Save(saving, uuid, file) }()
	await(t, events, "suspended") // it has begun
	give()
	if err := <-result; !errors.Is(err, context.Canceled) || errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("Save: %v", err)
	}
	await(t, events, "stopped")
	if state, reason, err := s.hv.State(ctx, uuid); state != maint.GuestShutoff || reason != "saved" {
		t.Errorf("guest is %s (%s), %v", state, reason, err)
	}
	if err := s.hv.Restore(ctx, file, false); err != nil {
		t.Error(err)
	}
}

// await waits for a lifecycle event.
func await(t testing.TB, events <-chan maint.Event, change string) {
	t.Helper()
	timeout := time.After(time.Minute)
	for {
		select {
		case ev := <-events:
			if ev.Kind == maint.EventLifecycle && ev.Change == change {
				return
			}
		case <-timeout:
			t.Fatalf("no event %q", change)
		}
	}
}

// BenchmarkHold measures the calls of a hold, on guests without a system.
func BenchmarkHold(b *testing.B) {
	s, ctx := holdSite(b), context.Background()
	const most = 20
	guests := make([]string, most)
	for i := range guests {
		file := filepath.Join(b.TempDir(), "guest.xml")
		name := fmt.Sprintf("hold-%d", i)
		if err := os.WriteFile(file, fmt.Appendf(nil, `<domain type='qemu'><name>%s</name><memory unit='MiB'>64</memory>`+
			`<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>`, name), 0o600); err != nil {
			b.Fatal(err)
		}
		s.virsh(b, "define", file)
		s.virsh(b, "start", name)
		guests[i] = s.virsh(b, "domuuid", name)
		defer s.RemoveGuest(b, guests[i])
	}
	if err := s.hv.Warm(ctx, most); err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{1, most} {
		all := func(b *testing.B, call func(*hypervisor.Host, string) error) {
			var calls sync.WaitGroup
			for _, uuid := range guests[:n] {
				calls.Go(func() {
					if err := call(s.hv, uuid); err != nil {
						b.Error(err)
					}
				})
			}
			calls.Wait()
		}
		suspend := func(h *hypervisor.Host, uuid string) error { return h.Suspend(ctx, uuid) }
		resume := func(h *hypervisor.Host, uuid string) error { return h.Resume(ctx, uuid) }
		state := func(h *hypervisor.Host, uuid string) error { _, _, err := h.State(ctx, uuid); return err }
		b.Run(fmt.Sprintf("Suspend/%d", n), func(b *testing.B) {
			for b.Loop() {
				all(b, suspend)
				b.StopTimer()
				all(b, resume)
				b.StartTimer()
			}
		})
		b.Run(fmt.Sprintf("Resume/%d", n), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				all(b, suspend)
				b.StartTimer()
				all(b, resume)
			}
		})
		b.Run(fmt.Sprintf("State/%d", n), func(b *testing.B) {
			for b.Loop() {
				all(b, state)
			}
		})
	}
}
