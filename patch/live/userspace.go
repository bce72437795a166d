package live

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"belay/agent/maint"
)

// UserSpace patches programs while they run, such as QEMU.
type UserSpace interface {
	Name() string
	// Patchable says why a process cannot be patched; "": it can.
	Patchable(pid int) string
}

// Libpulp is ulp(1). It patches libraries that were built for it, in processes that were
// started with libpulp.so preloaded; a stock QEMU is neither.
type Libpulp struct{ Tree Tree }

var _ UserSpace = Libpulp{}

// Name implements UserSpace.
func (Libpulp) Name() string { return "libpulp" }

// Patchable implements UserSpace. The library must be mapped (/proc/PID/maps).
func (l Libpulp) Patchable(pid int) string {
	if _, err := exec.LookPath("ulp"); err != nil {
		return "ulp(1) is not installed"
	}
	maps, err := os.ReadFile(l.Tree.path("proc", strconv.Itoa(pid), "maps"))
	if err != nil {
		return err.Error()
	}
	if !strings.Contains(string(maps), "/libpulp.so") {
		return "it was not started with libpulp.so preloaded"
	}
	return ""
}

// QEMUVerdict says whether a guest's QEMU can be patched while it runs: nil, or which rung it
// needs instead.
func QEMUVerdict(by UserSpace, guest string, pid int) *maint.Problem {
	why := "its process cannot be told"
	if pid > 0 {
		why = by.Patchable(pid)
	}
	if why == "" {
		return nil
	}
	return maint.Problemf(maint.CodeNeedsPause, "guest "+guest, fmt.Sprintf("use rung B2 (belay replace-vmm %s)", maint.ShellWord(guest)),
		"its QEMU cannot be patched while it runs by %s: %s", by.Name(), why)
}
