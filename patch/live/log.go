package live

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Line is one record of the kernel's log: "priority,sequence,µs,flags;text" of
// /dev/kmsg (Documentation/ABI/testing/dev-kmsg).
type Line struct {
	Seq  uint64 `json:"seq"`
	Text string `json:"text"`
}

// maxLog bounds what is read of a log at once, bytes.
const maxLog = 32 << 20

// KernelLog gives what the kernel has logged after a record, 0 for all that it still has.
// It wants CAP_SYSLOG.
func (t Tree) KernelLog(after uint64) ([]Line, error) {
	text, err := t.readLog()
	if err != nil {
		return nil, err
	}
	var lines []Line
	for l := range records(text) {
		if l.Seq > after {
			lines = append(lines, l)
		}
	}
	return lines, nil
}

// LogEnd gives the number of the last record, 0 if there is none. It wants CAP_SYSLOG.
func (t Tree) LogEnd() (end uint64, err error) {
	text, err := t.readLog()
	for l := range records(text) {
		end = l.Seq
	}
	return end, err
}

// readLog reads all that the kernel still has of its log.
func (t Tree) readLog() (string, error) {
	// Not by os: each read of the device is one record, and its end is EAGAIN.
	fd, err := unix.Open(t.path("dev/kmsg"), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: t.path("dev/kmsg"), Err: err}
	}
	defer unix.Close(fd)
	var text strings.Builder
	buf := make([]byte, 16<<10)
	for text.Len() < maxLog {
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EPIPE), errors.Is(err, unix.EINTR): // older ones were overwritten meanwhile
			continue
		case errors.Is(err, unix.EAGAIN), n == 0 && err == nil:
			return text.String(), nil
		case err != nil:
			return "", fmt.Errorf("cannot read the kernel's log: %w", err)
		}
		text.Write(buf[:n])
	}
	return "", fmt.Errorf("cannot read the kernel's log: %w", io.ErrShortBuffer)
}

// records are those of a text read from /dev/kmsg.
func records(text string) iter.Seq[Line] {
	return func(yield func(Line) bool) {
		for record := range strings.Lines(text) {
			head, message, found := strings.Cut(strings.TrimSuffix(record, "\n"), ";")
			fields := strings.SplitN(head, ",", 3)
			if !found || len(fields) < 3 || strings.HasPrefix(record, " ") {
				continue // a line of a dictionary
			}
			if seq, err := strconv.ParseUint(fields[1], 10, 64); err == nil && !yield(Line{seq, message}) {
				return
			}
		}
	}
}

// alarm is how the kernel begins to tell that something is wrong with itself.
var alarm = regexp.MustCompile(`^(BUG: |WARNING: |kernel BUG at |Oops|Internal error: |general protection fault|Unable to handle kernel |` +
	`Kernel panic|watchdog: BUG|rcu: .*self-detected stall|INFO: task .* blocked for more than|INFO: rcu.*stall|` +
	`EDAC .*UE |mce: \[Hardware Error\])`)

// Alarm reports whether a line tells of a kernel in trouble.
func (l Line) Alarm() bool { return alarm.MatchString(l.Text) }
