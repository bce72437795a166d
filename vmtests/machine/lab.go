package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"belay/vmtests/guest"
	"belay/vmtests/imagecache"
	"belay/vmtests/observer"
	"belay/vmtests/program"
	"belay/vmtests/qemu"
)

const (
	maxHosts      = 2
	defaultMemory = 3072 // MiB
	minMemory     = 2048 // MiB
	// payloadDir is where the lab's files are in a host, by a disk of their own.
	payloadDir = "/srv/lab"
)

// Config says what hosts a lab is to have. Zero values are replaced.
type Config struct {
	Hosts     int    // 1 or 2, default 1
	MemoryMiB int    // of each host, default 3072; 512 of them are reserved, as /dev/pmem0
	Package   string // path of belay_*.deb; default: built from the sources
	// Keys are minisign public keys of those who sign livepatches (*.pub).
	Keys []string
	Log  *slog.Logger
}

// Lab is a set of hosts that are up.
type Lab struct {
	Hosts []*Host
	Image Image
	// Guest is the guests' image; its paths are the hosts'. Guests run under KVM.
	Guest guest.Image

	config Config
	dir    string
	kvm    bool   // this machine's KVM runs hosts that have KVM
	qemu   string // the folder that hosts' QEMU is unpacked in, "" for the machine's own
	lan    *lan
	login  *ssh.ClientConfig
	unlock func()
	// payload is a disk with what hosts are provisioned with, and their guests' image.
	payload string
}

// Up brings up a lab: hosts that have booted, with belayd running. It waits for other labs of
// this kind on the machine to end.
func Up(ctx context.Context, c Config) (*Lab, error) {
	l := &Lab{config: c}
	if err := l.up(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot bring up the hosts: %w", err), l.Down())
	}
	return l, nil
}

// complete fills in what is left open and checks the rest.
func (c *Config) complete() error {
	if c.Hosts == 0 {
		c.Hosts = 1
	}
	if c.MemoryMiB == 0 {
		c.MemoryMiB = defaultMemory
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Hosts < 0 || c.Hosts > maxHosts || c.MemoryMiB < minMemory {
		return fmt.Errorf("%d hosts of %d MiB: want 1 to %d, of %d MiB at least", c.Hosts, c.MemoryMiB, maxHosts, minMemory)
	}
	if os.Geteuid() != 0 {
		return errors.New("taps and the image need root: run as root (sudo)")
	}
	return nil
}

func (l *Lab) up(ctx context.Context) (err error) {
	c := &l.config
	if err := c.complete(); err != nil {
		return err
	}
	cache, err := filepath.Abs(guest.DefaultCache())
	if err != nil {
		return err
	}
	if l.Image, err = Build(ctx, cache, c.Log); err != nil {
		return err
	}
	guestImage, err := guest.Build(ctx, cache, c.Log)
	if err != nil {
		return err
	}
	if l.kvm, err = nestedKVM(ctx, guestImage, c.Log); err != nil {
		return err
	}
	if !l.kvm {
		if l.qemu, err = qemu.ForTCG(ctx, cache, c.Log); err != nil {
			return err
		}
	}
	if l.unlock, err = imagecache.Lock(ctx, filepath.Join(cache, "machines.lock")); err != nil {
		return err
	}
	// What is there now is of a process that was killed.
	base := filepath.Join(cache, "machines")
	if err := errors.Join(os.RemoveAll(base), os.Mkdir(base, 0o700)); err != nil {
		return err
	}
	if l.dir, err = os.MkdirTemp(base, ""); err != nil {
		return err
	}
	if l.login, err = l.Image.login(); err != nil {
		return err
	}
	if l.lan, err = newLAN(netip.MustParsePrefix("10.77.0.254/16")); err != nil {
		return err
	}
	if c.Package == "" {
		if c.Package, err = BuildPackage(ctx, l.dir, ""); err != nil {
			return err
		}
	}
	l.Guest = guest.Image{Kernel: payloadDir + "/guest/vmlinuz", Initrd: payloadDir + "/guest/initrd"}
	if err := l.raise(ctx, cache, guestImage); err != nil {
		return err
	}
	return l.each(func(h *Host) error {
		for _, key := range c.Keys {
			if err := h.Copy(ctx, key, "/etc/belay/keys/"+filepath.Base(key)); err != nil {
				return err
			}
		}
		return nil
	})
}

// raise takes the hosts up where such hosts were frozen, once they had booted and been
// provisioned (freeze.go).
func (l *Lab) raise(ctx context.Context, cache string, g guest.Image) error {
	if l.kvm { // a boot takes no time
		return l.install(ctx, g, l.config.Hosts)
	}
	frozen, err := l.frozen(ctx, cache, g)
	if err != nil {
		return err
	}
	if _, err := os.Stat(frozen); errors.Is(err, os.ErrNotExist) {
		// All that any lab has: which of them one takes up makes no difference.
		if err := l.install(ctx, g, maxHosts); err != nil {
			return err
		}
		if err := l.freeze(ctx, frozen); err != nil {
			return err
		}
		if err := l.unplug(); err != nil {
			return err
		}
	}
	return l.thaw(ctx, frozen)
}

// install has so many hosts boot, and provisions them.
func (l *Lab) install(ctx context.Context, g guest.Image, hosts int) error {
	if err := l.plug(hosts); err != nil {
		return err
	}
	if err := l.makePayload(ctx, g); err != nil {
		return err
	}
	return l.each(func(h *Host) error {
		if err := h.boots(ctx); err != nil {
			return err
		}
		return h.provision(ctx)
	})
}

// hostName and hostAddr are a host's, by its number from 0.
func hostName(i int) string     { return "host-" + string(rune('a'+i)) }
func hostAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 77, 0, byte(1 + i)}) }

// nestedKVM tells whether guests run under this machine's KVM that have KVM themselves.
func nestedKVM(ctx context.Context, img guest.Image, log *slog.Logger) (bool, error) {
	accel, reason, err := guest.DetectAccel(ctx, img, log)
	if err != nil || accel != guest.KVM {
		log.Info("hosts are emulated", "reason", reason)
		return false, err
	}
	for _, module := range []string{"kvm_intel", "kvm_amd"} {
		b, err := os.ReadFile("/sys/module/" + module + "/parameters/nested")
		if s := strings.TrimSpace(string(b)); err == nil && (s == "Y" || s == "1") {
			return true, nil
		}
	}
	log.Info("hosts are emulated", "reason", "this machine's KVM does not nest")
	return false, nil
}

// login is how this process logs in to hosts of the image.
func (i Image) login() (*ssh.ClientConfig, error) {
	b, err := os.ReadFile(i.key())
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParsePrivateKey(b)
	if err != nil {
		return nil, err
	}
	if b, err = os.ReadFile(filepath.Join(i.Dir, "host.pub")); err != nil {
		return nil, err
	}
	host, _, _, _, err := ssh.ParseAuthorizedKey(b)
	if err != nil {
		return nil, err
	}
	return &ssh.ClientConfig{User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)},
		HostKeyCallback: ssh.FixedHostKey(host), HostKeyAlgorithms: []string{host.Type()}}, nil
}

// makePayload fills the disk.
func (l *Lab) makePayload(ctx context.Context, g guest.Image) error {
	dir := filepath.Join(l.dir, "payload")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	hosts := map[string]netip.Addr{}
	for _, h := range l.Hosts {
		hosts[h.Name] = h.Addr
	}
	if err := fillPayload(dir, hosts, g, l.config.Package); err != nil {
		return err
	}
	l.payload = filepath.Join(l.dir, "payload.img")
	_, err := program.Output(ctx, "", "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-L", "lab", "-d", dir, l.payload, "256M")
	return errors.Join(err, os.RemoveAll(dir))
}

// plug sets up so many hosts, which are off.
func (l *Lab) plug(hosts int) error {
	for i := range hosts {
		h := &Host{Name: hostName(i), Addr: hostAddr(i), Kernel: l.Image.Kernels[0], lab: l}
		h.Dir = filepath.Join(l.dir, h.Name)
		l.Hosts = append(l.Hosts, h)
		if err := h.plug(); err != nil {
			return err
		}
	}
	return nil
}

// unplug cuts the power of all hosts, and removes them.
func (l *Lab) unplug() error {
	var errs []error
	for _, h := range l.Hosts {
		for _, listener := range h.forwards {
			errs = append(errs, listener.Close())
		}
		errs = append(errs, h.Cut())
		if h.tap != nil {
			errs = append(errs, h.tap.Close())
		}
		errs = append(errs, os.RemoveAll(h.Dir))
	}
	l.Hosts = nil
	return errors.Join(errs...)
}

// plug gives the host its cables.
func (h *Host) plug() (err error) {
	if err := os.Mkdir(h.Dir, 0o700); err != nil {
		return err
	}
	if h.tap, err = h.lab.lan.addTap(h.Name); err != nil {
		return err
	}
	return errors.Join(h.forward(libvirtSocket, h.file("libvirt")), h.forward(belaydSocket, h.file("belayd")))
}

// addDisk makes the host's disk, with what is on another in the beginning.
func (h *Host) addDisk(ctx context.Context, on, format string) error {
	_, err := program.Output(ctx, "", "qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", on, h.file("disk.qcow2"))
	return err
}

// boots has the host boot from an empty disk.
func (h *Host) boots(ctx context.Context) error {
	if err := h.addDisk(ctx, h.lab.Image.Root(), "raw"); err != nil {
		return err
	}
	begin := time.Now()
	if err := h.Start(ctx); err != nil {
		return err
	}
	if _, err := h.AwaitUp(ctx, ""); err != nil {
		return err
	}
	h.lab.config.Log.Info("host is up", "host", h.Name, "took", time.Since(begin).Round(time.Second))
	return nil
}

// provision makes a host with Belay of a machine that has booted.
func (h *Host) provision(ctx context.Context) error {
	begin := time.Now()
	_, err := h.Script(ctx, `mkdir -p `+payloadDir+`
echo 'LABEL=lab `+payloadDir+` ext4 ro,nofail,x-systemd.device-timeout=90s 0 0' >>/etc/fstab
systemctl daemon-reload
systemctl start srv-lab.mount`)
	if err != nil {
		return err
	}
	args := []string{"sh", payloadDir + "/provision.sh", payloadDir, h.Name, h.Addr.String()}
	for _, peer := range h.lab.Hosts {
		if peer != h {
			args = append(args, peer.Name, peer.Addr.String())
		}
	}
	if _, err := h.Run(ctx, args...); err != nil {
		return fmt.Errorf("provision %s: %w", h.Name, err)
	}
	h.lab.config.Log.Info("host is provisioned", "host", h.Name, "took", time.Since(begin).Round(time.Second))
	return nil
}

// each does something with all hosts at once.
func (l *Lab) each(f func(*Host) error) error {
	errs := make([]error, len(l.Hosts))
	var wg sync.WaitGroup
	for i, h := range l.Hosts {
		wg.Go(func() { errs[i] = f(h) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Host is the host of that name, or nil.
func (l *Lab) Host(name string) *Host {
	for _, h := range l.Hosts {
		if h.Name == name {
			return h
		}
	}
	return nil
}

// Observe listens for heartbeats of guests on the hosts' LAN, where its address is this
// process's.
func (l *Lab) Observe() (*observer.Observer, error) {
	conn, err := l.lan.listenUDP()
	if err != nil {
		return nil, err
	}
	return observer.Listen(conn, observer.Options{})
}

// Down ends the hosts, as a power cut does, and removes what there was of them.
func (l *Lab) Down() error {
	errs := []error{l.unplug()}
	if l.lan != nil {
		l.lan.close()
	}
	if l.dir != "" {
		errs = append(errs, os.RemoveAll(l.dir))
	}
	if l.unlock != nil {
		l.unlock()
	}
	return errors.Join(errs...)
}
