package leash

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Harden protects this process against what may become of the host while it is
// serviced: it keeps its memory out of the OOM killer's reach and in RAM, its
// program included, for its disk may be what is serviced; runs before others; and
// lets go of files and folders that it has inherited. It does what it can, and
// says what it cannot.
func Harden() (warnings []string) {
	try := func(what string, err error) {
		if err != nil {
			warnings = append(warnings, fmt.Sprintf("it cannot %s: %v", what, err))
		}
	}
	try("let go of its folder", os.Chdir("/"))
	closeInherited()
	unix.Umask(0o077)
	try("be spared by the OOM killer", os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0))
	// What is touched stays; not all that Go has reserved, which is much more
	// than it uses.
	try("keep its memory in RAM", unix.Mlockall(unix.MCL_CURRENT|unix.MCL_FUTURE|unix.MCL_ONFAULT))
	try("keep its program in RAM", lockProgram())
	try("run before others", beNice())
	return warnings
}

// lockProgram reads all of the program into RAM and keeps it there.
func lockProgram() error {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		// 00400000-0062c000 r-xp 00000000 fe:00 1234    /usr/sbin/belay-leash
		if !strings.HasSuffix(strings.TrimSpace(line), " "+self) {
			continue
		}
		var from, to uintptr
		if _, err := fmt.Sscanf(line, "%x-%x ", &from, &to); err != nil {
			return err
		}
		if _, _, errno := unix.Syscall(unix.SYS_MLOCK, from, to-from, 0); errno != 0 {
			return errno
		}
	}
	return nil
}

// highest is the highest priority that is not a real-time one.
const highest = -20

// beNice raises the priority of every thread: on Linux each has its own, which
// those that it starts inherit.
func beNice() error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, t := range threads {
		id, err := strconv.Atoi(t.Name())
		if err != nil {
			return err
		}
		if err := unix.Setpriority(unix.PRIO_PROCESS, id, highest); err != nil && err != unix.ESRCH {
			return err
		}
	}
	return nil
}

// closeInherited closes what is open beside the standard streams, and is not
// Go's own: an inherited file could keep a file system from being unmounted, or
// somebody's lock held. It must be called before anything is opened.
func closeInherited() {
	const dir = "/proc/self/fd"
	open, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, f := range open {
		fd, err := strconv.Atoi(f.Name())
		if err != nil || fd <= 2 {
			continue
		}
		target, err := os.Readlink(filepath.Join(dir, f.Name()))
		if err != nil || strings.HasPrefix(target, "anon_inode:") { // Go's poller
			continue
		}
		_ = unix.Close(fd)
	}
}
