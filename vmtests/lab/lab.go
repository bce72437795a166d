package lab

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// DefaultName is the name of a lab whose Config has none.
	DefaultName = "belay"

	defaultHosts = 2
	maxHosts     = 26 // host-a to host-z

	// cleanupTimeout bounds the cleanup of an Up that failed, which goes on
	// when the caller's context has ended.
	cleanupTimeout = 30 * time.Second
)

// Config says what lab to make.
type Config struct {
	// Name tells labs on one machine apart: a lower-case letter, then up to
	// nine letters or digits. Empty means DefaultName.
	Name string
	// Hosts is how many hosts there are, 1 to 26; 0 means 2.
	Hosts int
	// TLS makes libvirtd listen on TLS instead of TCP, with certificates of
	// the lab's CA, and gives QEMU certificates for migration data over TLS.
	TLS bool
	// QEMU is a folder with a QEMU, as it would lie below /, that the hosts
	// have in place of the machine's own. Empty means the machine's own.
	QEMU string
	// Hooks is a folder with libvirt's hooks (dist/hooks has Belay's), to be
	// copied into the hosts. Empty means none.
	Hooks string
	// Detached lets the lab outlive this process: nobody cleans it up but Down.
	Detached bool
	// Log receives what the lab does, at debug level. Nil discards it.
	Log *slog.Logger
}

// Lab is a set of hosts on one LAN.
type Lab struct {
	Name string
	// Dir is the lab's folder, under the same path inside the hosts.
	Dir string
	// Shared is a folder below Dir for shared disks. All hosts see the same
	// file system, so QEMU's and virtlockd's locks work between them.
	Shared string
	// TLS: the hosts' libvirtds listen on TLS, else on TCP.
	TLS bool
	// Hosts are host-a, host-b and so on, with 10.77.0.1, 10.77.0.2, ….
	Hosts []*Host

	log *slog.Logger
	// Config.QEMU and Config.Hooks; needed only while the lab is made.
	qemu, hooks string
	// owner is nil for a lab that is detached.
	owner *process
	// lock is the name's lock while this process brings the lab up.
	lock *os.File

	mu    sync.Mutex
	links []*Link // of this process
}

// validName keeps the names of namespaces, files and sockets short and plain.
var validName = regexp.MustCompile(`^[a-z][a-z0-9]{0,9}$`)

// Check returns an error if no lab can be made of this.
func (c Config) Check() error { return c.complete() }

func (c *Config) complete() error {
	if c.Name == "" {
		c.Name = DefaultName
	}
	if c.Hosts == 0 {
		c.Hosts = defaultHosts
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := checkName(c.Name); err != nil {
		return err
	}
	if c.Hosts < 1 || c.Hosts > maxHosts {
		return fmt.Errorf("%d hosts: a lab has 1 to %d", c.Hosts, maxHosts)
	}
	return nil
}

func checkName(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("invalid lab name %q: use a lower-case letter, then up to nine letters or digits", name)
	}
	return nil
}

// Up makes a lab and returns when every host's libvirtd answers. It first
// removes the labs whose owners have died, whatever their names. If it fails,
// or ctx ends, it removes what it has made; errors of that are joined to the
// error returned. A lab of the same name that is up is an error.
func Up(ctx context.Context, c Config) (_ *Lab, err error) {
	if err := c.complete(); err != nil {
		return nil, fmt.Errorf("cannot bring up lab: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot bring up lab %s: %w", c.Name, err)
		}
	}()
	if err := checkMachine(); err != nil {
		return nil, err
	}
	cleaned, err := CleanCrashed(ctx)
	if err != nil {
		return nil, err
	}
	if len(cleaned) > 0 {
		c.Log.Info("removed labs whose owners have died", "labs", cleaned)
	}

	l := newLab(c.Name, c.Log)
	l.TLS = c.TLS
	if l.lock, err = lock(ctx, c.Name); err != nil {
		return nil, err
	}
	defer func() {
		unlock(l.lock, l.Name)
		l.lock = nil
	}()
	if err := l.refuseLive(); err != nil {
		return nil, err
	}
	// What is there now was made by nobody who lives.
	if err := l.remove(ctx); err != nil {
		return nil, err
	}

	start := time.Now()
	if err := l.make(ctx, c); err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		return nil, errors.Join(err, l.remove(ctx))
	}
	l.log.Debug("lab is up", "hosts", len(l.Hosts), "tls", l.TLS, "took", time.Since(start))
	return l, nil
}

func newLab(name string, log *slog.Logger) *Lab {
	dir := filepath.Join(baseDir, name)
	return &Lab{
		Name:   name,
		Dir:    dir,
		Shared: filepath.Join(dir, "shared"),
		log:    log.With("lab", name),
	}
}

// refuseLive returns an error if a lab of this name is up and wanted.
func (l *Lab) refuseLive() error {
	s, err := readState(l.Name)
	if err != nil {
		// Without a state that can be read, and with the lock free, an Up
		// died right at its start, or the disk was full.
		return nil
	}
	gone, err := s.abandoned()
	if err != nil {
		return err
	}
	if gone {
		return nil
	}
	if s.Owner == nil {
		return errors.New("it is already up, and detached: use it, or take it down first")
	}
	return fmt.Errorf("it is already up and belongs to %s: use another name", s.Owner)
}

// make makes the lab in the order in which its parts need each other. The state
// comes before everything else, so that a crash at any later point is recognised.
func (l *Lab) make(ctx context.Context, c Config) error {
	owner, err := self()
	if err != nil {
		return err
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	l.owner, l.qemu = owner, c.QEMU
	if c.Hooks != "" {
		if l.hooks, err = filepath.Abs(c.Hooks); err != nil { // tools run elsewhere
			return err
		}
	}
	s := &state{Name: l.Name, TLS: l.TLS, Owner: owner, Boot: boot}
	for i := range c.Hosts {
		uuid, err := newUUID()
		if err != nil {
			return err
		}
		s.Hosts = append(s.Hosts, hostState{
			Name: fmt.Sprintf("host-%c", 'a'+i),
			UUID: uuid,
			Addr: hostAddr(i),
		})
	}
	if err := os.MkdirAll(l.Shared, 0o700); err != nil {
		return err
	}
	if err := s.write(); err != nil {
		return err
	}
	for _, hs := range s.Hosts {
		l.Hosts = append(l.Hosts, newHost(l, hs))
	}

	if err := l.makePKI(); err != nil {
		return fmt.Errorf("certificates: %w", err)
	}
	if err := l.addSwitch(ctx); err != nil {
		return fmt.Errorf("switch: %w", err)
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, h := range l.Hosts {
		g.Go(func() error {
			if err := h.make(gctx); err != nil {
				return fmt.Errorf("%s: %w", h.Name, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}

	for i, h := range l.Hosts {
		s.Hosts[i].Holder = h.holder
	}
	if c.Detached {
		l.owner, s.Owner = nil, nil
	}
	return s.write()
}

// newUUID returns a random UUID. libvirt refuses to migrate between hosts with
// the same one.
func newUUID() (string, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return "", err
	}
	b[6] = b[6]&0x0f | 0x40 // version 4
	b[8] = b[8]&0x3f | 0x80 // variant 1
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), nil
}

// Open attaches to a lab that another process has brought up. If there is none
// the error wraps fs.ErrNotExist.
func Open(name string) (*Lab, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	s, err := readState(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("lab %s is not up: %w", name, fs.ErrNotExist)
	}
	if err != nil {
		return nil, err
	}
	gone, err := s.abandoned()
	if err != nil {
		return nil, err
	}
	if gone {
		return nil, fmt.Errorf("lab %s has crashed: its owner died without taking it down; clean it up", name)
	}
	l := newLab(name, slog.New(slog.DiscardHandler))
	l.TLS, l.owner = s.TLS, s.Owner
	for _, hs := range s.Hosts {
		if hs.Holder == 0 {
			return nil, fmt.Errorf("lab %s is still coming up", name)
		}
		l.Hosts = append(l.Hosts, newHost(l, hs))
	}
	return l, nil
}

// List names the labs that have a folder, crashed ones too, in order.
func List() ([]string, error) {
	entries, err := os.ReadDir(baseDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && checkName(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Host returns the host of that name, nil if there is none.
func (l *Lab) Host(name string) *Host {
	for _, h := range l.Hosts {
		if h.Name == name {
			return h
		}
	}
	return nil
}

// Down ends everything in the lab and removes it: processes, namespaces,
// mounts, files. It may be called again, or after a Down that failed or was
// cancelled half-way. A lab that belongs to another, living process is refused.
func (l *Lab) Down(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot take down lab %s: %w", l.Name, err)
		}
	}()
	if l.owner != nil && l.owner.PID != os.Getpid() && l.owner.alive() {
		return fmt.Errorf("it belongs to %s, which is alive: end that process, then clean up", l.owner)
	}
	held, err := lock(ctx, l.Name)
	if err != nil {
		return err
	}
	defer unlock(held, l.Name)
	return errors.Join(l.closeLinks(), l.remove(ctx))
}

// CleanCrashed removes the labs whose owners died without taking them down, or
// that a reboot has ended, and names them. A lab that is just coming up or going
// down is left alone.
func CleanCrashed(ctx context.Context) ([]string, error) {
	names, err := List()
	if err != nil {
		return nil, err
	}
	var cleaned []string
	var errs []error
	for _, name := range names {
		did, err := cleanCrashed(ctx, name)
		if err != nil {
			errs = append(errs, fmt.Errorf("cannot clean up crashed lab %s: %w", name, err))
		}
		if did {
			cleaned = append(cleaned, name)
		}
	}
	return cleaned, errors.Join(errs...)
}

func cleanCrashed(ctx context.Context, name string) (did bool, err error) {
	l := newLab(name, slog.New(slog.DiscardHandler))
	held, err := tryLock(name)
	if errors.Is(err, errBusy) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer unlock(held, name)
	if _, err := os.Stat(l.Dir); err != nil {
		return false, nil // taken down since it was listed
	}
	if l.refuseLive() != nil {
		return false, nil
	}
	if err := l.remove(ctx); err != nil {
		return false, err
	}
	return true, nil
}

// String names the process for a person: its ID and command.
func (p process) String() string {
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.PID))
	if err != nil {
		return fmt.Sprintf("process %d", p.PID)
	}
	return fmt.Sprintf("process %d (%s)", p.PID, strings.TrimSpace(string(comm)))
}
