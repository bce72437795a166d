package twin

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// overhead is what a QEMU process has beside its guest's memory, bytes, with a
// margin for the host.
const overhead = 512 << 20

// room refuses what does not fit. need is in bytes; inFiles says that the guest's
// memory is to be files.
func room(guest string, need uint64, inFiles bool, memoryDir string) ([]maint.Problem, error) {
	var problems []maint.Problem
	add := func(have uint64, where string) {
		problems = append(problems, *maint.Problemf(maint.CodeNoRoom, "guest "+guest, "free some, or move it to another host instead (belay migrate)",
			"while it changes its QEMU it needs %d MiB more, and %s has %d MiB", need>>20, where, have>>20))
	}
	available, err := availableMemory("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	if available < need {
		add(available, "this host")
	}
	if inFiles {
		have, err := freeSpace(memoryDir)
		if err != nil {
			return nil, err
		}
		if have < need {
			add(have, memoryDir)
		}
	}
	return problems, nil
}

// availableMemory is the kernel's own estimate, bytes (proc_meminfo(5)). Unlike
// what libvirt tells it does not take memory in files of a tmpfs, such as other
// guests', for free.
func availableMemory(meminfo string) (uint64, error) {
	text, err := os.ReadFile(meminfo)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		var kib uint64
		if n, _ := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); n == 1 {
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("%s does not tell what is available", meminfo)
}

// freeSpace is what a folder, which may not be there yet, has room for, bytes.
func freeSpace(dir string) (uint64, error) {
	for {
		var s unix.Statfs_t
		err := unix.Statfs(dir, &s)
		if err == nil {
			return s.Bavail * uint64(s.Bsize), nil
		}
		if !errors.Is(err, fs.ErrNotExist) || dir == "/" {
			return 0, fmt.Errorf("cannot see how much room %s has: %w", dir, err)
		}
		dir = filepath.Dir(dir)
	}
}
