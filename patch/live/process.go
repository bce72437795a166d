package live

import (
	"context"
	"debug/elf"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// fits judges whether the process takes the livepatch.
func (t *turn) fits() error {
	if why := t.Ready(t.q.PID); why != "" {
		return QEMUVerdict(t.q.Guest, why)
	}
	switch there, err := t.maps(t.m.BuildID); {
	case err != nil:
		return maint.Problemf(maint.CodeQEMURefused, "guest "+t.q.Guest, "see that belay-kernel has the capabilities of its unit",
			"what its QEMU (process %d) has mapped cannot be read: %v", t.q.PID, err)
	case !there:
		return QEMUVerdict(t.q.Guest, "it has not mapped "+t.m.Library+" of build "+t.m.BuildID+", which livepatch "+t.m.Name+" is for")
	}
	// It may have a root folder, or a mount namespace, of its own.
	seen, err := os.Stat(filepath.Join(t.proc("root"), t.file))
	ours, err2 := os.Stat(t.file)
	if err != nil || err2 != nil || !os.SameFile(seen, ours) {
		return maint.Problemf(maint.CodeQEMURefused, "guest "+t.q.Guest, "have that folder be in its mount namespace", "its QEMU (process %d) does not see %s", t.q.PID, t.file)
	}
	if who := field(t.proc("status"), "TracerPid"); who != "0" {
		return maint.Problemf(maint.CodeQEMURefused, "guest "+t.q.Guest, "end that: a debugger, strace", "its QEMU (process %d) is being traced by process %s", t.q.PID, who)
	}
	return nil
}

// maps reports whether the process has mapped, for execution, a file of that build ID. It
// looks at what is mapped, which is not always what has its name by now.
func (t *turn) maps(build string) (bool, error) {
	b, err := os.ReadFile(t.proc("maps"))
	if err != nil {
		return false, err
	}
	first, code := make(map[string]string), make(map[string]bool) // by device and inode
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line) // range, rights, offset, device, inode, path
		if len(f) < 6 || f[4] == "0" {
			continue
		}
		file := f[3] + " " + f[4]
		if strings.Trim(f[2], "0") == "" {
			first[file] = f[0]
		}
		code[file] = code[file] || strings.Contains(f[1], "x")
	}
	for file, addresses := range first {
		if !code[file] {
			continue
		}
		switch id, err := readBuildID(t.proc("map_files", addresses)); {
		case err != nil:
			return false, err
		case id == build:
			return true, nil
		}
	}
	return false, nil
}

// readBuildID gives an ELF file's build ID, hexadecimal; "" where it has none.
func readBuildID(name string) (string, error) {
	file, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer file.Close()
	f, err := elf.NewFile(file)
	if err != nil {
		return "", nil // no ELF file
	}
	s := f.Section(buildIDNote)
	if s == nil || s.Size > maxManifest {
		return "", nil
	}
	note, err := s.Data()
	return buildID(note), err
}

// field is that of a line "name: value" of a file.
func field(file, name string) string {
	b, _ := os.ReadFile(file) // a process that has gone has none
	for line := range strings.Lines(string(b)) {
		if v, found := strings.CutPrefix(line, name+":"); found {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// stillFor is how long a thread is in the kernel without a break before it is said to hang.
const stillFor = 500 * time.Millisecond

// stoppable is an error if a thread hangs in the kernel (state D: a disk that is away): ulp
// would wait for it without limit, with the other threads stopped.
func (t *turn) stoppable(ctx context.Context) error {
	hang := t.hanging()
	if len(hang) == 0 {
		return nil
	}
	select {
	case <-time.After(stillFor):
	case <-ctx.Done():
		return ctx.Err()
	}
	for _, now := range t.hanging() {
		if slices.Contains(hang, now) {
			return maint.Problemf(maint.CodeQEMURefused, "guest "+t.q.Guest, "try again when its disks and networks answer",
				"a thread of its QEMU (process %d) hangs in the kernel, and could not be stopped: %s", t.q.PID, now)
		}
	}
	return nil
}

// hanging names the threads that are in state D, with how often each has given way.
func (t *turn) hanging() (all []string) {
	files, _ := filepath.Glob(t.proc("task", "*", "status"))
	for _, f := range files {
		if strings.HasPrefix(field(f, "State"), "D") {
			all = append(all, field(f, "Name")+" (task "+field(f, "Pid")+", switched "+field(f, "voluntary_ctxt_switches")+" times)")
		}
	}
	return all
}
