package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// killGrace is how long processes may take to end by themselves (SIGTERM),
// before they are killed.
const killGrace = 2 * time.Second

// remove removes whatever there is of the lab. It goes by what it finds on the
// machine and not by what this process knows, so it serves Down, an Up that
// failed half-way, and a lab that crashed in another process. The folder, by
// which a cleanup recognises the lab, goes last.
func (l *Lab) remove(ctx context.Context) error {
	namespaces, err := filepath.Glob(netnsPath(l.netns("*")))
	if err != nil {
		return err
	}
	for i, path := range namespaces {
		namespaces[i] = filepath.Base(path)
	}
	if err := endProcesses(ctx, namespaces); err != nil {
		return err
	}
	if err := l.detachDisks(); err != nil {
		return err
	}
	if err := l.saveCapabilities(); err != nil {
		return err
	}
	for _, ns := range namespaces {
		path := netnsPath(ns)
		// EINVAL: not mounted; a crash between making the file and the
		// mount leaves that.
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("cannot unmount %s: %w", path, err)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	// The lab makes no mounts outside its hosts, but somebody else may have
	// mounted something below the folder, which is not to be emptied.
	if err := unmountBelow(l.Dir); err != nil {
		return err
	}
	return os.RemoveAll(l.Dir)
}

// endProcesses ends every process in the network namespaces, and looks again
// until there are none left: one may have started another meanwhile.
func endProcesses(ctx context.Context, namespaces []string) error {
	ids, err := netnsIDs(namespaces...)
	if err != nil {
		return err
	}
	signalled := map[int]bool{}
	start := time.Now()
	for {
		pids, err := processesIn(ids)
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			sig := syscall.SIGTERM
			// A guest would take its time to shut down, or refuse.
			if isGuest(pid) || time.Since(start) > killGrace {
				sig = syscall.SIGKILL
			} else if signalled[pid] {
				continue
			}
			signalled[pid] = true
			if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("cannot end process %d: %w", pid, err)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v do not end: %w", pids, context.Cause(ctx))
		case <-time.After(pollEvery):
		}
	}
}

// Guests are the QEMU processes of the host, whatever libvirt knows of them.
func (h *Host) Guests() ([]int, error) {
	ns, err := netnsIDs(h.netns)
	if err != nil {
		return nil, err
	}
	pids, err := processesIn(ns)
	return slices.DeleteFunc(pids, func(pid int) bool { return !isGuest(pid) }), err
}

func isGuest(pid int) bool {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && strings.HasPrefix(filepath.Base(exe), "qemu-system-")
}

// nsID identifies a namespace for as long as it lives.
type nsID struct{ dev, ino uint64 }

func statNS(path string) (nsID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nsID{}, err
	}
	return nsID{uint64(st.Dev), st.Ino}, nil
}

func netnsIDs(names ...string) (map[nsID]bool, error) {
	ids := map[nsID]bool{}
	for _, name := range names {
		id, err := statNS(netnsPath(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		ids[id] = true
	}
	return ids, nil
}

// processesIn lists the processes in the network namespaces, without this one:
// one of its threads, which may be the first, can be in there for a moment
// ([Host.InNet]).
func processesIn(ids map[nsID]bool) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err == nil && pid != os.Getpid() && inside(pid, ids) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// inside tells whether the process lives in one of the namespaces. One that has
// ended and was not yet reaped is in none.
func inside(pid int, ids map[nsID]bool) bool {
	id, err := statNS(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil && ids[id]
}

// unmountBelow detaches all mounts at or below the folder.
func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	// The newest come last in the file and lie on top.
	for i := len(lines) - 1; i >= 0; i-- {
		f := strings.Fields(lines[i])
		if len(f) < 5 {
			continue
		}
		at := unescapeMount(f[4])
		if at != dir && !strings.HasPrefix(at, dir+"/") {
			continue
		}
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("cannot unmount %s: %w", at, err)
		}
	}
	return nil
}

// unescapeMount undoes the octal escapes of /proc/PID/mountinfo (proc(5)).
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
