package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// baseDir holds the labs' folders and lock files; see doc.go for why it
	// is here and so short.
	baseDir = "/var/lib/belay-lab"

	stateFile = "lab.json"

	// pollEvery is how often the package looks again at something that
	// changes within milliseconds: a lock, a socket, a dying process.
	pollEvery = 10 * time.Millisecond
)

// state is what lab.json holds: enough to attach to a lab from another process
// and to tell whether anyone still wants it.
type state struct {
	Name  string      `json:"name"`
	TLS   bool        `json:"tls"`
	Hosts []hostState `json:"hosts"`
	// Owner is the process that brought the lab up. A detached lab has one
	// only until it is up.
	Owner *process `json:"owner,omitempty"`
	// Boot is the kernel's boot_id: no lab outlives a reboot, but its folder
	// does.
	Boot string `json:"boot"`
}

type hostState struct {
	Name   string     `json:"name"`
	UUID   string     `json:"uuid"`
	Addr   netip.Addr `json:"addr"`
	Holder int        `json:"holder,omitempty"`
}

// process names a process for good: a process ID alone comes round again.
type process struct {
	PID int `json:"pid"`
	// Start is field 22 of /proc/PID/stat: clock ticks since boot.
	Start uint64 `json:"start"`
}

func (p process) alive() bool {
	start, dead, err := procStat(p.PID)
	return err == nil && !dead && start == p.Start
}

func self() (*process, error) {
	pid := os.Getpid()
	start, _, err := procStat(pid)
	if err != nil {
		return nil, err
	}
	return &process{PID: pid, Start: start}, nil
}

// procStat reads a process's start time, and whether it has ended with all its threads
// and only waits to be reaped (proc(5), /proc/pid/stat): until then its files are open.
func procStat(pid int) (start uint64, dead bool, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false, err
	}
	// The second field is the command in parentheses and may hold anything,
	// parentheses and spaces too: the rest starts after the last ")".
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return 0, false, fmt.Errorf("cannot parse /proc/%d/stat", pid)
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return start, f[0] == "X" || f[0] == "Z" && f[17] == "1", err
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// abandoned tells whether nobody will take the lab down: its owner is dead, or
// the machine has booted since.
func (s *state) abandoned() (bool, error) {
	boot, err := bootID()
	if err != nil {
		return false, err
	}
	return s.Boot != boot || s.Owner != nil && !s.Owner.alive(), nil
}

func readState(name string) (*state, error) {
	b, err := os.ReadFile(filepath.Join(baseDir, name, stateFile))
	if err != nil {
		return nil, err
	}
	s := new(state)
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("cannot read %s of lab %s: %w", stateFile, name, err)
	}
	return s, nil
}

// write replaces lab.json in one step: a reader, or a crash, never sees half.
func (s *state) write() error {
	b, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return err
	}
	path := filepath.Join(baseDir, s.Name, stateFile)
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// errBusy: another process is bringing up or taking down the lab.
var errBusy = errors.New("another process is bringing it up or taking it down")

// lock takes the lock that Up and Down of one name share, waiting for it until
// ctx ends. Closing the file, or the death of the process and of all children
// that inherited it, releases it.
func lock(ctx context.Context, name string) (*os.File, error) {
	for {
		f, err := tryLock(name)
		if !errors.Is(err, errBusy) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", err, context.Cause(ctx))
		case <-time.After(pollEvery):
		}
	}
}

// tryLock is lock without the wait: it returns errBusy.
func tryLock(name string) (*os.File, error) {
	path := lockPath(name)
	for {
		if err := os.MkdirAll(baseDir, 0o700); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // another lab's Down has just removed the empty base
		}
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, errBusy
			}
			return nil, fmt.Errorf("cannot lock %s: %w", path, err)
		}
		// The holder before us may have removed the file: then this lock
		// is on a file nobody else will ever open.
		ours, err1 := f.Stat()
		there, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(ours, there) {
			return f, nil
		}
		f.Close()
	}
}

// unlock releases the lock. With the lab's folder gone the lock file goes too,
// and the base with the last of them; it is removed while still locked.
func unlock(f *os.File, name string) {
	if _, err := os.Stat(filepath.Join(baseDir, name)); errors.Is(err, fs.ErrNotExist) {
		os.Remove(f.Name())
		os.Remove(baseDir) // refused while it holds anything
	}
	f.Close()
}

func lockPath(name string) string { return filepath.Join(baseDir, name+".lock") }
