package probe

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// reserve is what must stay available in the guest beside the working set.
const reserve = 16 * mib

// available is MemAvailable of /proc/meminfo, in bytes.
func available() (uint64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "MemAvailable:" {
			kib, err := strconv.ParseUint(f[1], 10, 64)
			return kib * 1024, err
		}
	}
	return 0, errors.New("no MemAvailable in /proc/meminfo")
}

// readLine returns a one-line file without its line end, or "" when there is
// none to read.
func readLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// count books a line if it is what a kernel prints when it, or its host,
// starves or breaks.
func (r *KmsgReport) count(line string) {
	switch l := strings.ToLower(line); {
	case strings.Contains(l, "soft lockup"):
		r.SoftLockups++
	case strings.Contains(l, "rcu") && (strings.Contains(l, "stall") || strings.Contains(l, "starved")):
		r.RCUStalls++
	case strings.Contains(l, "blocked for more than"):
		r.HungTasks++
	case strings.Contains(l, "bug:"), strings.Contains(l, "oops:"), strings.Contains(l, "general protection"):
		r.Bugs++
	default:
		return
	}
	if len(r.Lines) < 20 {
		r.Lines = append(r.Lines, line)
	}
}

// Kmsg reads the kernel log at path (/dev/kmsg, see
// Documentation/ABI/testing/dev-kmsg) from its oldest record on.
func Kmsg(path string) (KmsgReport, error) {
	var r KmsgReport
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return r, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	buf := make([]byte, 8192)
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case err == unix.EPIPE: // records were overwritten under us; go on with the next
			continue
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN, err == nil && n == 0:
			return r, nil
		case err != nil:
			return r, fmt.Errorf("read %s: %w", path, err)
		}
		// "priority,sequence,µs,flags;text", then continuation lines.
		if _, text, ok := bytes.Cut(buf[:n], []byte(";")); ok {
			first, _, _ := bytes.Cut(text, []byte("\n"))
			r.count(string(first))
		}
	}
}
