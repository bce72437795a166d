package lab_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/vmtests/lab"
)

func goexit() { runtime.Goexit() }

func migrate(t *testing.T, from, to *lab.Host, guest, uri string, flags ...string) {
	t.Helper()
	args := append([]string{"migrate", "--live", "--p2p"}, flags...)
	virsh(t, from, append(args, guest, uri)...)
	wantGuests(t, from, "")
	wantRunning(t, to, guest)
}

func TestMigrateTCP(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{})
	a, b := l.Hosts[0], l.Hosts[1]
	mustStart(t, a, "g1", "")
	migrate(t, a, b, "g1", b.PeerURI(false))
	migrate(t, b, a, "g1", a.PeerURI(false))
}

func TestMigrateTLS(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{TLS: true})
	a, b := l.Hosts[0], l.Hosts[1]
	mustStart(t, a, "g1", "")
	migrate(t, a, b, "g1", b.PeerURI(true))
	migrate(t, b, a, "g1", a.PeerURI(true), "--tls")
	if err := dial(a, b); err == nil {
		t.Error("host-b listens on plain TCP")
	}

	// libvirtd lets in whoever has a host's certificate.
	viewerCert, viewerKey, err := l.IssueClient("viewer")
	if err != nil {
		t.Fatal(err)
	}
	if err := hello(l, a, b.CertFile(), b.KeyFile()); err != nil {
		t.Errorf("with a host's certificate: %v", err)
	}
	if err := hello(l, a, viewerCert, viewerKey); err == nil {
		t.Error("libvirtd lets in a viewer")
	}
	for _, name := range []string{"", "ca", "host-a", "../x"} {
		if _, _, err := l.IssueClient(name); err == nil {
			t.Errorf("issued a certificate for %q", name)
		}
	}
}

// hello connects to a host's libvirtd over TLS and waits for the byte that
// libvirt sends a client whose certificate it accepts.
func hello(l *lab.Lab, h *lab.Host, certFile, keyFile string) error {
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(l.CAFile())
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return errors.New("no certificate in the CA's file")
	}
	return l.InSwitch(func() error {
		plain, err := net.DialTimeout("tcp", h.Addr.String()+":16514", time.Minute)
		if err != nil {
			return err
		}
		defer plain.Close()
		plain.SetDeadline(time.Now().Add(time.Minute))
		conn := tls.Client(plain, &tls.Config{
			RootCAs:      roots,
			ServerName:   h.Name,
			Certificates: []tls.Certificate{cert},
		})
		_, err = io.ReadFull(conn, make([]byte, 1))
		return err
	})
}

// A killed daemon's lock can outlive it, in a program that it had just forked.
func TestStartDaemonAwaitsTheLock(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{Hosts: 1})
	h := l.Hosts[0]
	if err := h.Kill(t.Context(), lab.Virtlogd, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	held, err := os.OpenFile(h.Path("/run/virtlogd.pid"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	lock := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
	if err := unix.FcntlFlock(held.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), ms(300))
	defer cancel()
	if err := h.StartDaemon(short, lab.Virtlogd); err == nil || !strings.Contains(err.Error(), "stays locked") {
		t.Errorf("started while the lock is held: %v", err)
	}
	started := make(chan error, 1)
	go func() { started <- h.StartDaemon(t.Context(), lab.Virtlogd) }()
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-started; err != nil {
		t.Errorf("with the lock free: %v", err)
	}
}

func TestDaemonsKilledAndRestarted(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{Hosts: 1})
	h := l.Hosts[0]
	mustStart(t, h, "g1", "")
	guest := h.Path("/run/libvirt/qemu/g1.pid")
	before, err := os.ReadFile(guest)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range lab.Daemons() {
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
			if err := h.StartDaemon(t.Context(), d); err == nil || !strings.Contains(err.Error(), "already runs") {
				t.Errorf("%s started twice: %v", d, err)
			}
			if err := h.Kill(t.Context(), d, sig); err != nil {
				t.Fatal(err)
			}
			if pid, err := h.DaemonPID(d); pid != 0 || err != nil {
				t.Errorf("%s after %v: %d, %v", d, sig, pid, err)
			}
			if err := h.Kill(t.Context(), d, sig); !errors.Is(err, os.ErrProcessDone) {
				t.Errorf("%s killed twice: %v", d, err)
			}
			if err := h.StartDaemon(t.Context(), d); err != nil {
				t.Fatal(err)
			}
		}
	}
	wantRunning(t, h, "g1")
	if after, err := os.ReadFile(guest); err != nil || string(after) != string(before) {
		t.Errorf("guest was process %s, is %s (%v)", before, after, err)
	}

	// A daemon that cannot start says why.
	if err := h.Kill(t.Context(), lab.Libvirtd, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	conf := h.Path("/etc/libvirt/libvirtd.conf")
	if err := os.WriteFile(conf, []byte("nonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.StartDaemon(t.Context(), lab.Libvirtd); err == nil || !strings.Contains(err.Error(), "libvirtd.conf") {
		t.Errorf("start with a broken configuration: %v", err)
	}
}

func TestSharedDiskIsLeased(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{})
	a, b := l.Hosts[0], l.Hosts[1]
	device, err := l.AddDisk(t.Context(), "g1.raw", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	disk := `<disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/><source dev='` + device + `'/><target dev='vda' bus='virtio'/></disk>`
	mustStart(t, a, "g1", disk)
	if err := start(t, b, "g2", disk); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("the same disk on two hosts: %v", err)
	}
	migrate(t, a, b, "g1", b.PeerURI(false))
	if err := start(t, a, "g2", disk); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("the same disk on two hosts, after migration: %v", err)
	}

	if err := l.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/loop/backing_file"); err == nil &&
		strings.Contains(string(text), l.Name) {
		t.Errorf("%s is still attached to %s", device, text)
	}
}
