package live

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// UserSpace patches programs while they run: guests' QEMUs. A process that has ended, or is
// another one by now, is ESRCH. That a process may have been left inconsistent is a Problem
// with CodeQEMUUnsure: nothing more is to be done to it.
type UserSpace interface {
	// Patchable judges whether a livepatch could be applied to a process. It does nothing
	// to it.
	Patchable(ctx context.Context, q QEMU, a Artifact) error
	// Applied reports whether a process has it.
	Applied(ctx context.Context, q QEMU, a Artifact) (bool, error)
	// Set applies it, or takes it back, and says for how long the process was stopped at
	// most. It is never given up half way, which would end the process. To apply what is
	// applied is an error, and so is to take back what is not.
	Set(ctx context.Context, q QEMU, a Artifact, on bool) (stopped time.Duration, err error)
}

// QEMU is a guest's process.
type QEMU struct {
	Guest string `json:"guest"` // name
	PID   int    `json:"pid"`
	// Start tells it from another process of that number: /proc/PID/stat's starttime,
	// clock ticks since boot.
	Start uint64 `json:"start"`
}

// Process is a guest's QEMU by the file that libvirt keeps for each guest that runs.
func (t Tree) Process(guest string) (QEMU, error) {
	q := QEMU{Guest: guest}
	if guest == "" || strings.Contains(guest, "/") {
		return q, fmt.Errorf("guest %q has no process: %w", guest, unix.ESRCH)
	}
	s, err := t.text("run/libvirt/qemu", guest+".pid")
	if err == nil {
		q.PID, err = strconv.Atoi(s)
	}
	if err == nil {
		q.Start, err = t.start(q.PID)
	}
	if err != nil {
		return q, fmt.Errorf("the process of guest %s cannot be told: %v: %w", guest, err, unix.ESRCH)
	}
	return q, nil
}

// start is when a process has started, clock ticks since boot.
func (t Tree) start(pid int) (uint64, error) {
	s, err := t.text("proc", strconv.Itoa(pid), "stat")
	if err != nil {
		return 0, err
	}
	// The second field is the program's name, in brackets, and may have any in it.
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat cannot be read: %q", pid, s)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// QEMUVerdict tells of a guest whose QEMU cannot be patched while it runs which rung it
// needs instead.
func QEMUVerdict(guest, why string) *maint.Problem {
	return maint.Problemf(maint.CodeNeedsPause, "guest "+guest, fmt.Sprintf("use rung B2 (belay replace-vmm %s)", maint.ShellWord(guest)),
		"its QEMU cannot be patched while it runs: %s", why)
}

// UserManifest is what whoever signs a livepatch of a library vouches for.
type UserManifest struct {
	Name   string `toml:"name"`   // letters, digits, _
	SHA256 string `toml:"sha256"` // of the container, hexadecimal
	Size   int64  `toml:"size"`   // of the container, bytes
	// Library is what it changes, for people; BuildID is that very build (readelf -n).
	Library   string   `toml:"library"`
	BuildID   string   `toml:"build_id"`
	Covers    []string `toml:"covers"`
	Functions []string `toml:"functions"`
}

// ReadContainer reads the three files of a library's livepatch by its container's path.
func ReadContainer(file string) (Artifact, error) {
	if !filepath.IsAbs(file) || filepath.Ext(file) != containerExt {
		return Artifact{}, maint.Problemf(maint.CodePatchFile, "livepatch "+file, "give the absolute path of a container of libpulp's, FILE.so", "is no path of a container")
	}
	return readFiles(file, containerExt)
}

var isBuildID = regexp.MustCompile(`^[0-9a-f]{16,128}$`)

// CheckContainer judges a library's livepatch by itself: who signed it, whether it is whole,
// and what it is.
func (a Artifact) CheckContainer(keys []Key) (m UserManifest, err error) {
	if err := a.vouched(keys, &m); err != nil {
		return m, err
	}
	m.SHA256, m.BuildID = strings.ToLower(m.SHA256), strings.ToLower(m.BuildID)
	if !IsModuleName(m.Name) || m.Library == "" || !isBuildID.MatchString(m.BuildID) {
		return m, maint.Problemf(maint.CodePatchFile, "livepatch", "see docs/rung-a-hot-patch.md for what a manifest has", "its manifest lacks a name, a library or a build ID")
	}
	subject := "livepatch " + m.Name
	if err := a.whole(subject, m.Size, m.SHA256); err != nil {
		return m, err
	}
	f, err := elf.NewFile(bytes.NewReader(a.Module))
	if err != nil {
		return m, maint.Problemf(maint.CodeNoLivepatch, subject, "give a container of libpulp's", "%v", err)
	}
	// libpulp keeps what is to be done, and how it is taken back, in sections of their own.
	if f.Type != elf.ET_DYN || f.Section(".ulp") == nil || f.Section(".ulp.rev") == nil {
		return m, maint.Problemf(maint.CodeNoLivepatch, subject, "make it one: ulp packer FILE.dsc", "is no container of libpulp's: it has no sections .ulp and .ulp.rev")
	}
	return m, nil
}
