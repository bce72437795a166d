package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// Host is one host of a lab.
type Host struct {
	Name string     // host-a, host-b
	Addr netip.Addr // on the LAN
	// Dir, on this machine, has the host's disk and its console.
	Dir string
	// Kernel is the release that the boot loader boots, one of [Image.Kernels]. It counts from
	// the next [Host.Start] on, and for every reset after that.
	Kernel string
	// AppArmor confines guests and libvirtd from the next [Host.Start] on, as Debian has it. It is
	// off otherwise: to load its profiles takes an emulated host a while, at boot and for each guest.
	AppArmor bool

	lab      *Lab
	tap      *os.File
	incoming []string // further arguments of QEMU, to take up a frozen host
	forwards []net.Listener

	mu      sync.Mutex
	control string        // where QEMU forwards to its sshd
	ended   chan struct{} // closed when its QEMU has ended; nil before the first start
	process *os.Process
	client  *ssh.Client
}

// Start switches the host on; it does not wait until it is up ([Host.AwaitUp]). What its disk
// had when it was switched off is there.
func (h *Host) Start(ctx context.Context) error {
	var err error
	// Another program may take the port before QEMU does.
	for range 3 {
		if err = h.boot(ctx); err == nil || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("cannot start %s: %w", h.Name, err)
	}
	return nil
}

func (h *Host) boot(ctx context.Context) error {
	if !h.dead() {
		return errors.New("it is on")
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(h.file("qemu.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	if err := os.Remove(h.file("qmp")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	cmd := exec.Command(h.lab.qemuProgram(), append(h.arguments(port), h.incoming...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{h.tap} // 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		// The signal comes when the thread ends: it is kept for as long as QEMU runs.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its log
		}
		close(ended)
	}()
	if err := <-started; err != nil {
		return err
	}
	h.mu.Lock()
	h.control, h.ended, h.process = net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), ended, cmd.Process
	h.mu.Unlock()
	// Its monitor answers when it has all that it wants.
	for {
		_, err := qmp(ctx, h.file("qmp"), "query-status", nil)
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return fmt.Errorf("QEMU has ended: %s", h.qemuLog())
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// qemuProgram is the QEMU that hosts run in.
func (l *Lab) qemuProgram() string { return filepath.Join(l.qemu, "/usr/bin/qemu-system-x86_64") }

// commandLine is the kernel's. The reserved memory is above the hole that q35 has below 4 GiB. A
// kernel that panics resets the machine.
const commandLine = "root=/dev/vda rw console=ttyS0 memmap=512M!4G mitigations=off panic=1"

func (h *Host) commandLine() string {
	if h.AppArmor {
		return commandLine
	}
	return commandLine + " apparmor=0"
}

func (h *Host) arguments(port int) []string {
	number := int(h.Addr.As4()[3])
	args := []string{
		"-name", h.Name, "-uuid", fmt.Sprintf("b31a0000-0000-4000-8000-%012d", number),
		"-machine", "q35,hpet=off", "-smp", "2", "-m", strconv.Itoa(h.lab.config.MemoryMiB),
		"-nodefaults", "-no-user-config", "-display", "none",
		"-kernel", h.lab.Image.Kernel(h.Kernel), "-initrd", h.lab.Image.Initrd(h.Kernel),
		"-append", h.commandLine(),
		// Neither does a power cut take what is in this machine's cache.
		"-drive", "if=virtio,cache=unsafe,format=qcow2,file=" + h.file("disk.qcow2"),
		"-drive", "if=virtio,cache=unsafe,format=raw,readonly=on,file=" + h.lab.payload,
		"-netdev", fmt.Sprintf("user,id=control,ipv6=off,hostfwd=tcp:127.0.0.1:%d-:22", port),
		"-device", "virtio-net-pci,netdev=control,romfile=,mac=52:54:00:77:ff:01",
		"-netdev", "tap,id=lan,fd=3",
		"-device", fmt.Sprintf("virtio-net-pci,netdev=lan,romfile=,mac=52:54:00:77:00:%02x", number),
		"-device", "virtio-rng-pci",
		"-chardev", "file,id=console,append=on,path=" + h.file("console"), "-serial", "chardev:console",
		"-qmp", "unix:" + h.file("qmp") + ",server=on,wait=off",
	}
	if h.lab.qemu != "" {
		share := filepath.Join(h.lab.qemu, "usr/share")
		args = append(args, "-L", filepath.Join(share, "qemu"), "-L", filepath.Join(share, "seabios"))
	}
	if h.lab.kvm {
		return append(args, "-accel", "kvm", "-cpu", "host")
	}
	return append(args, "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off")
}

// Reset presses the host's reset button: its memory stays as it is, and the boot loader's
// kernel starts.
func (h *Host) Reset(ctx context.Context) error {
	_, err := qmp(ctx, h.file("qmp"), "system_reset", nil)
	h.disconnect()
	if err != nil {
		return fmt.Errorf("cannot reset %s: %w", h.Name, err)
	}
	return nil
}

// Cut cuts the host's power: its memory is gone, and what it has not flushed to its disk may
// be. It is off until [Host.Start].
func (h *Host) Cut() error {
	h.mu.Lock()
	process, ended := h.process, h.ended
	h.mu.Unlock()
	if process == nil {
		return nil
	}
	if err := process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("cannot cut the power of %s: %w", h.Name, err)
	}
	<-ended
	h.disconnect()
	return nil
}

// AwaitOff waits until the host has switched itself off (poweroff).
func (h *Host) AwaitOff(ctx context.Context) error {
	h.mu.Lock()
	ended := h.ended
	h.mu.Unlock()
	select {
	case <-ended:
		h.disconnect()
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s does not switch off: %w", h.Name, context.Cause(ctx))
	}
}

// SetLink plugs the host's cable of the LAN in, or pulls it. This process reaches it all the
// same, by another one.
func (h *Host) SetLink(up bool) error { return h.lab.lan.setLink(h.Name, up) }

// dead tells that the host is off.
func (h *Host) dead() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended == nil {
		return true
	}
	select {
	case <-h.ended:
		return true
	default:
		return false
	}
}

func (h *Host) file(name string) string { return filepath.Join(h.Dir, name) }

// Console is what the host's kernels have said on the serial console so far.
func (h *Host) Console() (string, error) {
	b, err := os.ReadFile(h.file("console"))
	return string(b), err
}

func (h *Host) qemuLog() string {
	b, err := os.ReadFile(h.file("qemu.log"))
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(b))
}

var panicLine = regexp.MustCompile(`(?m)^.*Kernel panic - not syncing: .*$`)

// panics are the lines by which the host's kernels have said that they panic.
func (h *Host) panics() []string {
	text, err := h.Console()
	if err != nil {
		return nil // it was never on
	}
	return panicLine.FindAllString(text, -1)
}
