package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/notify"
	"belay/notify/channel"
)

// asGuest in the environment has the test's binary be belay-guest.
const asGuest = "BELAY_GUEST_TEST_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(asGuest) == "" {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// needsRoot leaves out a test that makes network namespaces.
func needsRoot(t *testing.T) {
	t.Helper()
	if os.Getenv("BELAY_LAB") == "skip" {
		t.Skip("BELAY_LAB=skip: tests that need namespaces are left out")
	}
	if os.Getuid() != 0 {
		t.Fatal("this test makes network namespaces and needs root (BELAY_LAB=skip leaves it out)")
	}
}

// netns is a network namespace, open as long as the test.
type netns struct{ *os.File }

// inThread calls f on a thread of its own, which ends with it.
func inThread(f func() error) error {
	err := make(chan error)
	go func() {
		runtime.LockOSThread()
		err <- f()
	}()
	return <-err
}

// newNetns makes one with a lo that is down, as in an initramfs.
func newNetns(t *testing.T) (ns netns) {
	t.Helper()
	err := inThread(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			ns.File, err = os.Open("/proc/thread-self/ns/net")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// do calls f in the namespace.
func (ns netns) do(f func() error) error {
	return inThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

func (ns netns) dial(ctx context.Context, _, _ string) (c net.Conn, err error) {
	err = ns.do(func() (err error) {
		var d net.Dialer
		c, err = d.DialContext(ctx, "tcp4", "169.254.169.254:80")
		return err
	})
	return c, err
}

// client asks as programs in the guest do.
func (ns netns) client(t *testing.T) *http.Client {
	tr := &http.Transport{DialContext: ns.dial, MaxIdleConnsPerHost: 4}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func get(c *http.Client, path string) (string, error) {
	r, err := c.Get("http://169.254.169.254" + path)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return string(b), err
}

// vm is a guest: a namespace, a pseudo-terminal for a virtio-serial port, and the
// socket of a QEMU that carries bytes between the two.
type vm struct {
	t      *testing.T
	ns     netns
	uuid   string
	device string
	socket string
	notify string
	ready  *net.UnixConn
}

func newVM(t *testing.T, uuid string) *vm {
	t.Helper()
	dir := t.TempDir()
	v := &vm{t: t, ns: newNetns(t), uuid: uuid, socket: filepath.Join(dir, "qemu"), notify: filepath.Join(dir, "notify")}
	port := v.pty()
	in, err := net.Listen("unix", v.socket)
	if err != nil {
		t.Fatal(err)
	}
	if v.ready, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: v.notify, Net: "unixgram"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); v.ready.Close() })
	go emulate(in, port)
	return v
}

// pty opens the pseudo-terminal that programs in the guest find at v.device.
func (v *vm) pty() *os.File {
	v.t.Helper()
	port, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { port.Close() })
	raw, err := port.SyscallConn() // Fd would make it block
	if err != nil {
		v.t.Fatal(err)
	}
	n := -1
	raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	})
	if err != nil {
		v.t.Fatal(err)
	}
	v.device = fmt.Sprintf("/dev/pts/%d", n)
	device, err := os.OpenFile(v.device, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { device.Close() })
	state, err := unix.IoctlGetTermios(int(device.Fd()), unix.TCGETS)
	if err == nil { // cfmakeraw(3)
		state.Iflag, state.Oflag, state.Lflag = 0, 0, 0
		state.Cflag = state.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
		state.Cc[unix.VMIN], state.Cc[unix.VTIME] = 1, 0
		err = unix.IoctlSetTermios(int(device.Fd()), unix.TCSETS, state)
	}
	if err != nil {
		v.t.Fatal(err)
	}
	return port
}

// emulate is QEMU: one client, and what the guest says to nobody is dropped.
func emulate(in net.Listener, port *os.File) {
	var mu sync.Mutex
	var client net.Conn
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := port.Read(b)
			if err != nil {
				return
			}
			mu.Lock()
			c := client
			mu.Unlock()
			if c != nil {
				c.Write(b[:n])
			}
		}
	}()
	for {
		c, err := in.Accept()
		if err != nil {
			return
		}
		mu.Lock()
		client = c
		mu.Unlock()
		io.Copy(port, c)
		mu.Lock()
		client = nil
		mu.Unlock()
		c.Close()
	}
}

// start runs belay-guest in the guest, and waits until it says that it is ready.
func (v *vm) start(args ...string) *exec.Cmd {
	v.t.Helper()
	c := exec.Command("/proc/self/exe", append([]string{"-device", v.device}, args...)...)
	c.Env = append(os.Environ(), asGuest+"=1", "NOTIFY_SOCKET="+v.notify)
	c.Stderr = v.t.Output()
	if err := v.ns.do(c.Start); err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	said := make([]byte, 100)
	v.ready.SetReadDeadline(time.Now().Add(time.Minute))
	if n, err := v.ready.Read(said); err != nil || string(said[:n]) != "READY=1" {
		v.t.Fatalf("belay-guest says %q, %v", said[:n], err)
	}
	return c
}

// host is belayd's part.
type host struct {
	*channel.Listener
	parked  chan string // guests that poll long
	release chan struct{}
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{Listener: channel.NewListener(slog.New(slog.NewTextHandler(t.Output(), nil))), parked: make(chan string, 100), release: make(chan struct{})}
	mux := http.NewServeMux()
	who := func(w http.ResponseWriter, r *http.Request) {
		guest, _ := notify.GuestOf(r.Context())
		fmt.Fprint(w, guest)
	}
	mux.HandleFunc("/who", who)
	mux.HandleFunc("/wait", func(w http.ResponseWriter, r *http.Request) {
		guest, _ := notify.GuestOf(r.Context())
		h.parked <- guest
		select {
		case <-h.release:
			who(w, r)
		case <-r.Context().Done():
			h.parked <- "gone"
		}
	})
	mux.HandleFunc("/much", func(w http.ResponseWriter, _ *http.Request) {
		h.parked <- "much"
		io.WriteString(w, strings.Repeat("x", much))
	})
	mux.HandleFunc("/metadata/scheduledevents", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Metadata") != "true" || r.Host != "169.254.169.254" {
			http.Error(w, "bad request", http.StatusBadRequest)
			return
		}
		guest, _ := notify.GuestOf(r.Context())
		fmt.Fprintf(w, `{"DocumentIncarnation":7,"Events":[{"Resources":[%q]}]}`, guest)
	})
	server := &http.Server{Handler: mux, ConnContext: channel.ConnContext, ReadHeaderTimeout: time.Minute}
	go server.Serve(h.Listener)
	t.Cleanup(func() { server.Close() })
	return h
}

// much is more bytes than fit between host and guest.
const much = 8 << 20

// connect serves the guest until the test ends, or stop is called.
func (h *host) connect(v *vm) (stop func()) {
	ctx, cancel := context.WithCancel(v.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.Connect(ctx, v.uuid, v.socket)
	}()
	stop = func() { cancel(); <-done }
	v.t.Cleanup(stop)
	return stop
}
