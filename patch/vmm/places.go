package vmm

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// Places are this host's folders. Empty ones have the defaults named.
type Places struct {
	// Root is put before every path: it is how a host is seen from outside.
	Root string
	// Guards has a folder, the guard, for each guest that is between two
	// QEMUs, and must not outlive a boot: /run/belay/vmm. The hook in
	// dist/hooks knows it by that name.
	Guards string
	// Copies is where guests are saved by the copy method, on a tmpfs:
	// /dev/shm/belay-vmm.
	Copies string
	// Hooks is libvirt's: /etc/libvirt/hooks.
	Hooks string
	// Run and Lib are where libvirt keeps what belongs to running guests:
	// /run/libvirt/qemu and /var/lib/libvirt/qemu.
	Run, Lib string
}

func (p Places) guards() string { return cmp.Or(p.Guards, "/run/belay/vmm") }
func (p Places) copies() string { return cmp.Or(p.Copies, "/dev/shm/belay-vmm") }
func (p Places) hooks() string  { return cmp.Or(p.Hooks, "/etc/libvirt/hooks") }
func (p Places) run() string    { return cmp.Or(p.Run, "/run/libvirt/qemu") }
func (p Places) lib() string    { return cmp.Or(p.Lib, "/var/lib/libvirt/qemu") }

// at gives the path by which this process finds a path of the host.
func (p Places) at(path ...string) string {
	return filepath.Join(append([]string{p.Root}, path...)...)
}

// socket is a path for a socket of a domain that runs, inside the host: in its
// own folder, which belongs to QEMU's user and which confinement by AppArmor
// leaves open to it.
func (p Places) socket(id int, name string) (string, error) {
	found, err := filepath.Glob(p.at(p.lib(), fmt.Sprintf("domain-%d-*", id)))
	if err != nil {
		return "", err
	}
	var dir string
	var made time.Time
	for _, f := range found { // an older one of the same number can be left from before a crash
		if info, err := os.Stat(f); err == nil && info.IsDir() && (dir == "" || info.ModTime().After(made)) {
			dir, made = f, info.ModTime()
		}
	}
	if dir == "" {
		return "", fmt.Errorf("domain %d has no folder in %s: %w", id, p.lib(), fs.ErrNotExist)
	}
	return filepath.Join(p.lib(), filepath.Base(dir), name), nil
}

// The files of a guard. Each is there or not, and written in one step.
const (
	guardOrder   = "order"   // for the hook
	guardPlan    = "plan"    // the plan, as in the journal
	guardPaused  = "paused"  // since then the guest is paused, by us
	guardState   = "state"   // the state of its devices, all of it
	guardQuit    = "quit"    // the old QEMU is being ended: the state counts, there is no way back
	guardID      = "id"      // the hook's: the new domain's number
	guardResumed = "resumed" // the guest may have run in the new QEMU: the state is void
)

// guard is what is kept of one replacement in flight.
type guard struct{ dir string }

func (p Places) guard(uuid string) guard { return guard{p.at(p.guards(), uuid)} }

func (g guard) file(name string) string { return filepath.Join(g.dir, name) }

func (g guard) has(name string) bool {
	_, err := os.Stat(g.file(name))
	return err == nil
}

// write replaces a file in one step, without syncing: see the package comment.
func (g guard) write(name string, content []byte) error {
	tmp := g.file(name + ".new")
	if err := os.WriteFile(tmp, content, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, g.file(name))
}

// stamp writes a file whose content is this moment.
func (g guard) stamp(name string) error {
	return g.write(name, []byte(strconv.FormatInt(time.Now().UnixNano(), 10)))
}

// stamped is when a file was stamped, zero if it was not.
func (g guard) stamped(name string) time.Time {
	b, err := os.ReadFile(g.file(name))
	if err != nil {
		return time.Time{}
	}
	n, err := strconv.ParseInt(string(b), 10, 64)
	if err != nil {
		return time.Time{}
	}
	return time.Unix(0, n)
}

func (g guard) drop(names ...string) error {
	var errs []error
	for _, name := range names {
		if err := os.Remove(g.file(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Kept is a guest whose replacement has not ended.
type Kept struct {
	Op    maint.OpID
	Guest string
	UUID  string
}

// Kept lists the guests that have a guard, for a look at what a belayd that
// died, or an operation that got stuck, has left. A guard that cannot be read is
// an error beside the others.
func (p Places) Kept() (kept []Kept, err error) {
	found, err := filepath.Glob(p.at(p.guards(), "*-*-*-*-*"))
	var errs []error
	for _, dir := range found {
		pl, err := p.kept(filepath.Base(dir))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		kept = append(kept, Kept{pl.Op, pl.Guest, pl.UUID})
	}
	return kept, errors.Join(append(errs, err)...)
}

// kept reads the plan in a guest's guard. It wraps fs.ErrNotExist.
func (p Places) kept(uuid string) (pl plan, err error) {
	name := p.guard(uuid).file(guardPlan)
	b, err := os.ReadFile(name)
	if err == nil {
		err = json.Unmarshal(b, &pl)
	}
	if err != nil {
		return pl, fmt.Errorf("cannot read what is kept of guest %s: %w", uuid, err)
	}
	return pl, nil
}

// privateDir makes a folder that only root can enter. One that is there and is
// somebody else's, or a link, is an error.
func privateDir(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s is not a folder of our own that nobody else can enter", path)
	}
	return nil
}

// room is a file system's free space in bytes, and whether it is in RAM. The
// path need not exist yet; the nearest folder above it does.
func room(path string) (free uint64, inRAM bool, err error) {
	var st unix.Statfs_t
	for {
		err = unix.Statfs(path, &st)
		if !errors.Is(err, fs.ErrNotExist) || path == filepath.Dir(path) {
			break
		}
		path = filepath.Dir(path)
	}
	if err != nil {
		return 0, false, fmt.Errorf("%s: %w", path, err)
	}
	return st.Bavail * uint64(st.Bsize), st.Type == unix.TMPFS_MAGIC, nil
}

// inRAM reports whether a file's pages are memory that processes map, and nothing else has a copy of
// them: it is on a tmpfs, or on persistent memory by DAX (STATX_ATTR_DAX of statx(2), Linux 5.8).
func inRAM(path string) bool {
	if _, tmpfs, err := room(path); err != nil || tmpfs {
		return err == nil
	}
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, 0, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_DAX != 0
}

// process is a process for good: its number alone comes round again.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // field 22 of /proc/PID/stat, in clock ticks since boot
}

// alive reports whether the process is there and has not ended.
func (p Places) alive(proc process) bool {
	now, err := p.process(proc.PID)
	return err == nil && now == proc
}

// process looks at a process; one that has ended and waits to be reaped is not
// there (proc(5), /proc/pid/stat).
func (p Places) process(pid int) (process, error) {
	b, err := os.ReadFile(p.at("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return process{}, err
	}
	// The command, in parentheses, may hold anything, parentheses too.
	text := string(b)
	f := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(f) < 20 {
		return process{}, fmt.Errorf("cannot read the state of process %d", pid)
	}
	start, err := strconv.ParseUint(f[19], 10, 64)
	if err == nil && (f[0] == "Z" || f[0] == "X") {
		err = fmt.Errorf("process %d has ended: %w", pid, os.ErrProcessDone)
	}
	return process{pid, start}, err
}

// qemu is the process of a guest that runs, by libvirt's pid file.
func (p Places) qemu(name string) (process, error) {
	b, err := os.ReadFile(p.at(p.run(), name+".pid"))
	if err != nil {
		return process{}, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return process{}, fmt.Errorf("cannot read the process number of guest %s: %w", name, err)
	}
	return p.process(pid)
}

// maps reports whether a process has a file mapped (proc(5), /proc/pid/maps).
func (p Places) maps(pid int, file string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return false, err
	}
	b, err := os.ReadFile(p.at("/proc", strconv.Itoa(pid), "maps"))
	if err != nil {
		return false, err
	}
	want := fmt.Sprintf(" %02x:%02x %d ", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	return strings.Contains(string(b), want), nil
}

// bootID names the host's present boot.
func (p Places) bootID() (string, error) {
	b, err := os.ReadFile(p.at("/proc/sys/kernel/random/boot_id"))
	return strings.TrimSpace(string(b)), err
}
