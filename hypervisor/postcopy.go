package hypervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// A QEMU that gives up the connection of its migration in post-copy waits to be resumed,
// and that is by no means sure to work. While a guest comes in, libvirt passes no commands
// to its QEMU; and QEMU answers none, libvirt's neither, where something of it waits, with
// its main lock held, for a page that has not come: a device that its main loop emulates,
// or, of an emulated processor, an interrupt. Its way out is a monitor with commands out of
// band, which libvirt does not ask for. So the connection is kept from being given up, for
// as long as the network may be cut: see HoldOut and HoldIn.

// held is for how long the connection of a post-copy is kept, unless the other end ends it.
const held = 7 * 24 * time.Hour

// Severed reports whether the QEMU of a guest that leaves has given up the connection of
// its post-copy, which then waits to be resumed. libvirt may have lost sight of one that
// QEMU is still at. Its errors are QMP's.
//
// Source: QMP query-migrate.
func Severed(ctx context.Context, q Commander, uuid string) (bool, error) {
	value, err := q.QMP(ctx, uuid, "query-migrate", nil)
	if err != nil {
		return false, err
	}
	var m struct {
		Status string `json:"status"` // QAPI's MigrationStatus
	}
	if err := json.Unmarshal(value, &m); err != nil {
		return false, fmt.Errorf("cannot read how the QEMU of guest %s has its migration: %w", uuid, err)
	}
	return m.Status == "postcopy-paused", nil
}

// HoldOut has a cut network not end the connections of a guest's QEMU to ports from first
// to last of another host, those by which it leaves, and returns them. The kernel would
// give them up after some minutes. It wraps maint.ErrNoGuest.
//
// Sources: the QEMU's pid file, beside libvirt's socket; its sockets, by pidfd_getfd(2);
// TCP_USER_TIMEOUT of tcp(7).
func (h *Host) HoldOut(ctx context.Context, uuid string, first, last uint16) (all []maint.Connection, err error) {
	_, err = h.connections(ctx, uuid, func(local, remote netip.AddrPort) bool {
		meant := remote.Port() >= first && remote.Port() <= last
		if meant {
			all = append(all, maint.Connection{From: local, To: remote})
		}
		return meant
	}, hold)
	return all, err
}

// HoldIn is HoldOut on the host to which a guest comes. It returns how many of the
// connections its QEMU has.
func (h *Host) HoldIn(ctx context.Context, uuid string, all []maint.Connection) (n int, err error) {
	return h.connections(ctx, uuid, among(all), hold)
}

// Sever ends the connections by which a guest comes, whose other ends are gone, for its
// QEMU, and returns how many it has had. QEMU gives up a post-copy then, and loses nothing
// of the guest; before that, the migration fails. A QEMU that has all that the guest needs
// at the moment has nothing to send, and does not learn by itself that its connection is
// dead. It wraps maint.ErrNoGuest.
//
// Sources: as of HoldOut; shutdown(2).
func (h *Host) Sever(ctx context.Context, uuid string, all []maint.Connection) (n int, err error) {
	return h.connections(ctx, uuid, among(all), func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) })
}

// MayHold returns why this process may not hold connections of guests' QEMUs, nil if it may.
// It tries with process 1.
//
// Source: pidfd_getfd(2), where EBADF is for those only who may.
func MayHold() error {
	process, err := unix.PidfdOpen(1, 0)
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, 0, 0)
	switch {
	case err == nil:
		return unix.Close(fd)
	case errors.Is(err, unix.EBADF):
		return nil
	}
	return fmt.Errorf("pidfd_getfd: %w", err)
}

func hold(fd int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(held.Milliseconds()))
}

// among tells those connections as their destination sees them.
func among(all []maint.Connection) func(local, remote netip.AddrPort) bool {
	return func(local, remote netip.AddrPort) bool {
		return slices.Contains(all, maint.Connection{From: remote, To: local})
	}
}

// connections does something to those TCP connections of a guest's QEMU that are meant, and
// returns how many there are.
func (h *Host) connections(ctx context.Context, uuid string, meant func(local, remote netip.AddrPort) bool, do func(fd int) error) (n int, err error) {
	err = h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) error {
		pid, err := qemuPID(s, d.Name)
		if err == nil {
			n, err = connectionsOf(pid, meant, do)
		}
		if err != nil {
			return fmt.Errorf("cannot get at the connections of the QEMU of guest %s: %w", d.Name, err)
		}
		return nil
	})
	return n, err
}

// qemuPID is the process ID of the QEMU of the guest of that name, which a handle has not.
func qemuPID(s *session, name string) (int, error) { return pidBeside(s.conn.socket, name) }

// pidBeside reads the file that the daemon of a socket keeps for each guest that runs.
func pidBeside(socket, name string) (int, error) {
	text, err := os.ReadFile(filepath.Join(filepath.Dir(socket), "qemu", filepath.Base(name)+".pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// QEMUProcess is the process ID of the QEMU of the guest of that name; 0: it is not to be seen.
// It asks nobody, and works while libvirt is away.
//
// Source: the pid files beside libvirt's socket.
func (h *Host) QEMUProcess(name string) int {
	for _, socket := range h.sockets {
		if pid, err := pidBeside(socket, name); err == nil {
			return pid
		}
	}
	return 0
}

// connectionsOf does something to those TCP connections of a process that are meant.
func connectionsOf(pid int, meant func(local, remote netip.AddrPort) bool, do func(fd int) error) (n int, err error) {
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(process)
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	open, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, f := range open {
		number, err := strconv.Atoi(f.Name())
		if to, gone := os.Readlink(filepath.Join(dir, f.Name())); err != nil || gone != nil || !strings.HasPrefix(to, "socket:") {
			continue // another file, or closed meanwhile
		}
		fd, err := unix.PidfdGetfd(process, number, 0)
		switch {
		case errors.Is(err, unix.EBADF): // closed meanwhile
			continue
		case err != nil:
			return n, err
		}
		if local, remote, ok := ends(fd); ok && meant(local, remote) {
			n++
			errs = append(errs, do(fd))
		}
		_ = unix.Close(fd)
	}
	return n, errors.Join(errs...)
}

// ends are the addresses of a TCP connection. ok: it is one.
func ends(fd int) (local, remote netip.AddrPort, ok bool) {
	if kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || kind != unix.IPPROTO_TCP {
		return local, remote, false
	}
	ours, err := unix.Getsockname(fd)
	theirs, none := unix.Getpeername(fd)
	if err != nil || none != nil {
		return local, remote, false
	}
	local, remote = addrPort(ours), addrPort(theirs)
	return local, remote, local.IsValid() && remote.IsValid()
}

// addrPort is a socket's address, invalid for one that is not of IP.
func addrPort(a unix.Sockaddr) netip.AddrPort {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}
