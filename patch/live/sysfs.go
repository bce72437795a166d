package live

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// Tree reads what the kernel shows below Root; "" is the host's own root folder.
type Tree struct{ Root string }

func (t Tree) path(elem ...string) string {
	return filepath.Join(append([]string{"/", t.Root}, elem...)...)
}

func (t Tree) text(elem ...string) (string, error) {
	b, err := os.ReadFile(t.path(elem...))
	return strings.TrimSpace(string(b)), err
}

const livepatches = "sys/kernel/livepatch"

// Supported says why this kernel takes no livepatch; "": it does.
func (t Tree) Supported() string {
	if _, err := os.Stat(t.path(livepatches)); err != nil {
		return "the kernel was built without CONFIG_LIVEPATCH: " + err.Error()
	}
	return ""
}

// Kernel gives uname -r and -v (/proc/sys/kernel/osrelease, version).
func (t Tree) Kernel() (release, version string, err error) {
	release, err = t.text("proc/sys/kernel/osrelease")
	if err == nil {
		version, err = t.text("proc/sys/kernel/version")
	}
	return release, version, err
}

// Bits of /proc/sys/kernel/tainted, see Documentation/admin-guide/tainted-kernels.rst.
const (
	taintMCE      = 1 << 4
	taintBadPage  = 1 << 5
	taintDie      = 1 << 7 // an Oops or BUG
	taintWarn     = 1 << 9
	taintLockup   = 1 << 14
	taintSick     = taintMCE | taintBadPage | taintDie | taintLockup
	taintSickened = taintSick | taintWarn
)

// Taint is /proc/sys/kernel/tainted.
func (t Tree) Taint() (uint64, error) {
	s, err := t.text("proc/sys/kernel/tainted")
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(s, 10, 64)
}

// SwitchedOff reports whether the kernel's command line has belay.nolivepatch.
func (t Tree) SwitchedOff() bool {
	s, _ := t.text("proc/cmdline")
	return slices.ContainsFunc(strings.Fields(s), func(w string) bool {
		return w == "belay.nolivepatch" || w == "belay.nolivepatch=1"
	})
}

var moduleName = regexp.MustCompile(`^[A-Za-z0-9_]{1,55}$`)

// IsModuleName reports whether a module can be called so (MODULE_NAME_LEN).
func IsModuleName(name string) bool { return moduleName.MatchString(name) }

// Patches lists the livepatches that the kernel has, loaded or on their way out, in order of
// their names.
func (t Tree) Patches() ([]maint.LivePatch, error) {
	entries, err := os.ReadDir(t.path(livepatches))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	patches := []maint.LivePatch{}
	for _, e := range entries {
		p, err := t.patch(e.Name())
		if gone(err) {
			continue // just now
		}
		if err != nil {
			return nil, err
		}
		patches = append(patches, p)
	}
	return patches, nil
}

// Patch is the livepatch of that name; nil: the kernel has none.
func (t Tree) Patch(name string) (*maint.LivePatch, error) {
	p, err := t.patch(name)
	if gone(err) {
		return nil, nil
	}
	return &p, err
}

// gone reports whether a file of sysfs is not there: one that has gone after it was opened is read with
// ENODEV (fs/kernfs/file.c).
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

func (t Tree) patch(name string) (p maint.LivePatch, err error) {
	dir := filepath.Join(livepatches, name)
	p.Name = name
	if p.Enabled, err = t.flag(dir, "enabled"); err != nil {
		return p, err
	}
	if p.Transition, err = t.flag(dir, "transition"); err != nil {
		return p, err
	}
	if replace, err := t.flag(dir, "replace"); err == nil {
		p.Replace = &replace
	}
	if s, err := t.text(dir, "stack_order"); err == nil {
		if n, err := strconv.Atoi(s); err == nil {
			p.StackOrder = &n
		}
	}
	p.SrcVersion = t.srcVersion(name)
	objects, err := os.ReadDir(t.path(dir))
	if err != nil {
		return p, err
	}
	p.Objects = []maint.PatchedObject{}
	for _, o := range objects {
		if !o.IsDir() {
			continue
		}
		object := maint.PatchedObject{Name: o.Name()}
		object.Patched, _ = t.flag(filepath.Join(dir, o.Name()), "patched")
		functions, err := os.ReadDir(t.path(dir, o.Name()))
		if err != nil {
			return p, err
		}
		for _, f := range functions {
			if f.IsDir() {
				object.Functions = append(object.Functions, f.Name())
			}
		}
		p.Objects = append(p.Objects, object)
	}
	return p, nil
}

func (t Tree) flag(dir, name string) (bool, error) {
	s, err := t.text(dir, name)
	if err != nil {
		return false, err
	}
	switch s {
	case "0":
		return false, nil
	case "1":
		return true, nil
	}
	return false, fmt.Errorf("%s is %q, neither 0 nor 1", t.path(dir, name), s)
}

// Module says whether a module is loaded, its srcversion, and whether it is a livepatch
// (taint K, which stays with it also when its patch has been replaced).
func (t Tree) Module(name string) (loaded bool, srcVersion string, livepatch bool) {
	if _, err := os.Stat(t.path("sys/module", name, "initstate")); err != nil {
		return false, "", false // built in, or none
	}
	srcVersion = t.srcVersion(name)
	taint, _ := t.text("sys/module", name, "taint")
	return true, srcVersion, strings.Contains(taint, "K")
}

// srcVersion is a loaded module's, as ModInfo has it.
func (t Tree) srcVersion(name string) string {
	if s, err := t.text("sys/module", name, "srcversion"); err == nil {
		return s
	}
	note, _ := os.ReadFile(t.path("sys/module", name, "notes", buildIDNote)) // it may bear neither
	return buildID(note)
}

// Microcode gives the revision of every CPU that shows one.
func (t Tree) Microcode() ([]maint.CPUMicrocode, error) {
	files, err := filepath.Glob(t.path("sys/devices/system/cpu/cpu[0-9]*/microcode/version"))
	if err != nil {
		return nil, err
	}
	var cpus []maint.CPUMicrocode
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		n, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(filepath.Dir(f))), "cpu"))
		if err != nil {
			return nil, err
		}
		cpus = append(cpus, maint.CPUMicrocode{CPU: n, Revision: strings.TrimSpace(string(b))})
	}
	slices.SortFunc(cpus, func(a, b maint.CPUMicrocode) int { return a.CPU - b.CPU })
	return cpus, nil
}

// microcodeReload is there where the kernel can load microcode late.
const microcodeReload = "sys/devices/system/cpu/microcode/reload"

// LoadsMicrocode reports whether the kernel can load CPU microcode late.
func (t Tree) LoadsMicrocode() bool {
	_, err := os.Stat(t.path(microcodeReload))
	return err == nil
}
