package lab

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Host is one host of a lab. What its fields say never changes while the lab is
// up.
type Host struct {
	// Name is the host's name, host-a and so on; the hosts' /etc/hosts
	// files resolve it.
	Name string
	// UUID is the host UUID that its libvirtd reports.
	UUID string
	// Addr is the host's address on the LAN.
	Addr netip.Addr
	// Dir holds the host's private folders. It is found under the same path
	// inside and outside, so it is a place for a host's own state as well.
	Dir string

	lab   *Lab
	netns string
	// holder is the process whose mount and UTS namespaces are the host's.
	holder int
}

func newHost(l *Lab, s hostState) *Host {
	return &Host{
		Name:   s.Name,
		UUID:   s.UUID,
		Addr:   s.Addr,
		Dir:    filepath.Join(l.Dir, s.Name),
		lab:    l,
		netns:  l.netns(s.Name),
		holder: s.Holder,
	}
}

// make makes the host and starts its daemons.
func (h *Host) make(ctx context.Context) error {
	if err := h.addNetwork(ctx); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	if err := h.writeFiles(ctx); err != nil {
		return fmt.Errorf("files: %w", err)
	}
	if err := h.startHolder(ctx); err != nil {
		return fmt.Errorf("mounts: %w", err)
	}
	// libvirtd last: it wants both others.
	for _, d := range []Daemon{Virtlogd, Virtlockd, Libvirtd} {
		if err := h.StartDaemon(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// Command prepares a program to run inside the host's network, mount and UTS
// namespaces, as root and with the caller's environment. name is looked up in
// PATH and paths are the host's; the working folder is /, whatever cmd.Dir says.
// The process is the program itself: nsenter only steps in and executes it.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := []string{"--target", strconv.Itoa(h.holder), "--mount", "--uts", "--net", "--", name}
	return exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
}

// LibvirtSocket is the path of libvirtd's read-write socket, for a client
// outside the host.
func (h *Host) LibvirtSocket() string { return h.Path("/run/libvirt/libvirt-sock") }

// URI connects a client outside the host to its libvirtd.
func (h *Host) URI() string { return "qemu+unix:///system?socket=" + h.LibvirtSocket() }

// PeerURI is what the other hosts' libvirtds call this host's, as a migration's
// destination: over TCP by address, or over TLS by the name in its certificate.
// Only the one that Config.TLS chose answers.
func (h *Host) PeerURI(tls bool) string {
	if tls {
		return "qemu+tls://" + h.Name + "/system"
	}
	return "qemu+tcp://" + h.Addr.String() + "/system"
}

// privateDirs are the folders of which each host has its own.
func privateDirs() []string {
	return []string{"/etc", "/var/cache/libvirt", "/var/lib/libvirt", "/var/log/libvirt"}
}

// memoryDirs are those that are kept in memory and seen from outside through the
// host's holder.
func memoryDirs() []string { return []string{"/run", MemoryDir} }

func below(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

func belowAny(p string, dirs []string) bool {
	return slices.ContainsFunc(dirs, func(dir string) bool { return below(p, dir) })
}

// Root is the host's root folder as it is seen from outside, with all that is
// mounted in the host, for as long as the lab is up.
func (h *Host) Root() string { return fmt.Sprintf("/proc/%d/root", h.holder) }

// Path translates an absolute path inside the host to where it is outside. It
// does not look at the file: symbolic links are not followed, except that
// /var/run is known to be /run.
func (h *Host) Path(inside string) string {
	p := filepath.Clean(inside)
	if below(p, "/var/run") {
		p = strings.TrimPrefix(p, "/var")
	}
	switch {
	case h.holder != 0 && belowAny(p, memoryDirs()):
		return filepath.Join(h.Root(), p)
	case belowAny(p, privateDirs()):
		return filepath.Join(h.Dir, p)
	}
	return p
}

// Virsh runs virsh outside the host, connected to its libvirtd, in the C
// locale, and returns what it prints on standard output. Paths among the
// arguments are the machine's. The error carries what virsh says.
func (h *Host) Virsh(ctx context.Context, args ...string) (string, error) {
	cmd := tool(ctx, "virsh", append([]string{"-q", "-c", h.URI()}, args...)...)
	// Paths among the arguments are the caller's, relative ones too.
	cmd.Dir = ""
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return stdout.String(), fmt.Errorf("%s: virsh %s: %w", h.Name, strings.Join(args, " "),
			withText(err, stderr.Bytes()))
	}
	return stdout.String(), nil
}

// DialUnix connects to a unix socket of the host, by way of its folder's descriptor: a
// lab's paths are longer than the 108 bytes that fit a socket address.
func (h *Host) DialUnix(ctx context.Context, inside string) (net.Conn, error) {
	path := h.Path(inside)
	dir, err := os.OpenFile(filepath.Dir(path), os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	short := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", short)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return conn, nil
}

// ReadFile reads a file of the host.
func (h *Host) ReadFile(_ context.Context, inside string) ([]byte, error) {
	return os.ReadFile(h.Path(inside))
}
