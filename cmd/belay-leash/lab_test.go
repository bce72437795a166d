package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/hypervisor/monitor"
	"belay/patch/leash"
	"belay/vmtests/lab"
)

// asHolder, in the environment of this test binary, makes it a belayd that holds
// guests until it is killed. Its value is a holding as JSON.
const asHolder = "BELAY_TEST_HOLDER"

func TestMain(m *testing.M) {
	text := os.Getenv(asHolder)
	if text == "" {
		os.Exit(m.Run())
	}
	var h holding
	err := json.Unmarshal([]byte(text), &h)
	if err == nil {
		err = h.hold(context.Background())
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	select {}
}

// holding is what a holder does.
type holding struct {
	Dir     string
	Command []string // starts a leash, but for the operation
	Socket  string   // libvirt's
	Order   leash.Order
	// Early: it is killed before it can tell the leash what it has paused.
	Early bool
}

// hold arms a leash, pauses the guests that run and says so.
func (h *holding) hold(ctx context.Context) error {
	client := leash.Client{Dir: h.Dir, Launcher: launcher(h.Command), Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	line, err := client.Arm(ctx, h.Order)
	if err != nil {
		return err
	}
	libvirt := hypervisor.New(hypervisor.Config{Socket: h.Socket})
	for _, uuid := range line.Ours() {
		if err := libvirt.Suspend(ctx, uuid); err != nil {
			return err
		}
		if !h.Early {
			line.Paused(uuid)
		}
	}
	if _, err := line.Events(ctx); err != nil { // the leash has heard it
		return err
	}
	fmt.Println("held")
	return nil
}

// launcher starts the leash in a host of the lab: its command line but for the
// operation.
type launcher []string

func (l launcher) Launch(_ context.Context, op maint.OpID) ([]string, error) {
	cmd := exec.Command(l[0], append(l[1:], "-op", string(op))...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() { _ = cmd.Wait() }()
	return nil, nil
}

// site is a host of the lab with guests.
type site struct {
	*lab.Host
	t       testing.TB
	libvirt *hypervisor.Host
	client  leash.Client
	command []string
	ops     int
	guests  map[string]maint.Guest // by name
	disk    string                 // db's
}

// db has a disk with a lease; by is one that somebody else has paused.
var names = []string{"web", "db", "by"}

func newSite(t testing.TB) *site {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a libvirtd")
	}
	host := lab.ForTest(t, lab.Config{Hosts: 1}).Hosts[0]
	dir, err := os.MkdirTemp("/dev/shm", "leash") // short, in RAM, and the same inside
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	program := filepath.Join(t.TempDir(), "belay-leash")
	if out, err := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s := &site{Host: host, t: t, guests: make(map[string]maint.Guest), disk: filepath.Join(t.TempDir(), "disk.raw"),
		command: host.Command(context.Background(), program, "-dir", dir).Args,
		libvirt: hypervisor.New(hypervisor.Config{Socket: host.LibvirtSocket()})}
	t.Cleanup(func() { _ = s.libvirt.Close() })
	s.client = leash.Client{Dir: dir, Launcher: launcher(s.command), Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	must(t, os.WriteFile(s.disk, make([]byte, 1<<20), 0o600))
	for _, name := range names {
		disk := ""
		if name == "db" {
			disk = `<disk type='file'><driver name='qemu' type='raw'/><source file='` + s.disk + `'/><target dev='vda' bus='virtio'/></disk>`
		}
		file := filepath.Join(t.TempDir(), name+".xml")
		must(t, os.WriteFile(file, []byte(`<domain type='qemu'><name>`+name+`</name><memory unit='MiB'>32</memory>`+
			`<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>`+disk+`<memballoon model='none'/></devices></domain>`), 0o600))
		s.virsh("create", file)
		s.guests[name], err = s.libvirt.Guest(t.Context(), name)
		must(t, err)
	}
	s.virsh("suspend", "by")
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (s *site) virsh(args ...string) {
	s.t.Helper()
	_, err := s.Virsh(s.t.Context(), args...)
	must(s.t, err)
}

// order is one for all guests, with an operation of its own.
func (s *site) order(maxPause time.Duration) leash.Order {
	s.ops++
	o := leash.Order{Op: maint.OpID(fmt.Sprintf("hold-%d", s.ops)), MaxPause: maxPause, Silence: time.Second}
	for _, name := range names {
		g := s.guests[name]
		o.Guests = append(o.Guests, leash.Guest{UUID: g.UUID, Name: name, ID: g.ID})
	}
	return o
}

// holder starts a belayd that holds the guests, and renews until it is killed.
func (s *site) holder(o leash.Order, early bool) *exec.Cmd {
	s.t.Helper()
	text, err := json.Marshal(holding{s.client.Dir, s.command, s.LibvirtSocket(), o, early})
	must(s.t, err)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), asHolder+"="+string(text))
	cmd.Stderr = s.t.Output()
	out, err := cmd.StdoutPipe()
	must(s.t, err)
	must(s.t, cmd.Start())
	s.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if said, err := bufio.NewReader(out).ReadString('\n'); said != "held\n" {
		s.t.Fatalf("the holder says %q, %v", said, err)
	}
	for _, name := range []string{"web", "db"} {
		s.is(name, maint.GuestPaused)
	}
	return cmd
}

// is checks a guest's state, as libvirt has it.
func (s *site) is(name string, want maint.GuestState) {
	s.t.Helper()
	if state, reason, err := s.libvirt.State(s.t.Context(), s.guests[name].UUID); err != nil || state != want {
		s.t.Errorf("guest %s is %s (%s), %v; want %s", name, state, reason, err, want)
	}
}

// run waits until guests run and gives how long that took.
func (s *site) run(guests ...string) time.Duration {
	s.t.Helper()
	begun := time.Now()
	for _, name := range guests {
		for {
			if state, _, err := s.libvirt.State(s.t.Context(), s.guests[name].UUID); err == nil && state == maint.GuestRunning {
				break
			}
			if time.Since(begun) > time.Minute {
				s.t.Fatalf("guest %s does not run", name)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	return time.Since(begun)
}

// runPastLibvirt is the same by the guests' QEMUs, without libvirtd.
func (s *site) runPastLibvirt(guests ...string) time.Duration {
	s.t.Helper()
	begun := time.Now()
	for _, name := range guests {
		path, err := monitor.Find(s.Path(monitor.DefaultLibDir), s.guests[name].ID)
		must(s.t, err)
		for status := ""; status != monitor.Running; {
			if m, err := monitor.Dial(s.t.Context(), path); err == nil {
				status, err = m.Status(s.t.Context())
				must(s.t, errors.Join(err, m.Close()))
			}
			if time.Since(begun) > time.Minute {
				s.t.Fatalf("guest %s is %q", name, status)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return time.Since(begun)
}

// leased says whether virtlockd has the lease of db's disk.
func (s *site) leased() bool {
	s.t.Helper()
	info, err := os.Stat(s.disk)
	must(s.t, err)
	pid, err := s.DaemonPID(lab.Virtlockd)
	must(s.t, err)
	locks, err := os.ReadFile("/proc/locks")
	must(s.t, err)
	for line := range strings.Lines(string(locks)) {
		f := strings.Fields(line) // 1: POSIX ADVISORY WRITE pid major:minor:inode first last
		if len(f) > 5 && f[4] == fmt.Sprint(pid) && strings.HasSuffix(f[5], fmt.Sprintf(":%d", info.Sys().(*syscall.Stat_t).Ino)) {
			return true
		}
	}
	return false
}

// end takes the leash up, checks that it sees nobody as held, and gives what it
// has done.
func (s *site) end(op maint.OpID) []maint.LeashEvent {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	line, err := s.client.Attach(ctx, op)
	must(s.t, err)
	defer line.Close()
	events, err := line.Disarm(ctx)
	must(s.t, err)
	s.is("by", maint.GuestPaused) // whatever has happened
	for _, e := range events {
		if e.UUID == s.guests["by"].UUID {
			s.t.Errorf("somebody else's guest: %+v", e)
		}
	}
	return events
}

// has finds an event.
func has(events []maint.LeashEvent, kind, guest, way string) bool {
	return slices.ContainsFunc(events, func(e maint.LeashEvent) bool { return e.Kind == kind && e.Guest == guest && e.Way == way })
}

// leash is the process that has an operation's socket.
func (s *site) leash(op maint.OpID) (pid int) {
	s.t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(s.t, err)
	defer unix.Close(fd)
	must(s.t, unix.Connect(fd, &unix.SockaddrUnix{Name: filepath.Join(s.client.Dir, string(op)+".sock")}))
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	must(s.t, err)
	return int(peer.Pid)
}

func (s *site) signal(d lab.Daemon, sig syscall.Signal) {
	s.t.Helper()
	must(s.t, s.Kill(s.t.Context(), d, sig))
}

// takeLease takes the lease of db's disk, as another host would.
func (s *site) takeLease() (free func()) {
	s.t.Helper()
	f, err := os.OpenFile(s.disk, os.O_RDWR, 0)
	must(s.t, err)
	first := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Len: 1}
	must(s.t, unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &first))
	return func() { must(s.t, f.Close()) }
}

// leftovers are the events in the notes, by operation.
func leftovers(dir string) (map[maint.OpID][]maint.LeashEvent, error) {
	all, err := leash.Leftovers(dir)
	events := make(map[maint.OpID][]maint.LeashEvent)
	for _, l := range all {
		events[l.Op] = l.Events
	}
	return events, err
}
