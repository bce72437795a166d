package live

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// Kernel is what is done to the kernel. Its errors are of the kernel (unix.Errno) where it
// has refused; whether something holds is never concluded from them.
type Kernel interface {
	// Load has the kernel take a livepatch in, and returns when its transition has begun.
	Load(ctx context.Context, a Artifact) error
	// Enable writes a livepatch's enabled. On its way in it turns round for false, and on
	// its way out for true.
	Enable(ctx context.Context, name string, on bool) error
	// Unload removes the module of a livepatch that is not enabled.
	Unload(ctx context.Context, name string) error
}

// Witness is what only the privileged can see.
type Witness interface {
	Tasks(ctx context.Context, functions []string) ([]maint.KernelTask, error)
	KernelLog(ctx context.Context, after uint64) ([]Line, error)
	// LogEnd is the last record of the kernel's log.
	LogEnd(ctx context.Context) (uint64, error)
}

// Microcode loads CPU microcode late.
type Microcode interface {
	ReloadMicrocode(ctx context.Context) error
}

// Direct does it by itself. It wants CAP_SYS_MODULE, and what Tree's methods want. It judges
// every artifact itself, whoever has judged it before.
type Direct struct {
	Tree Tree
	Keys string // the folder of the keys that are trusted
}

var (
	_ Kernel    = Direct{}
	_ Witness   = Direct{}
	_ Microcode = Direct{}
)

// Load is init_module(2): the image is memory of this process, which nobody changes
// between the check and the call.
func (d Direct) Load(_ context.Context, a Artifact) error {
	keys, err := ReadKeys(d.Keys)
	if err != nil {
		return err
	}
	m, info, err := a.Check(keys)
	if err != nil {
		return err
	}
	if err := maint.Refuse("cannot load livepatch "+m.Name, d.Tree.Fits(m, info)); err != nil {
		return err
	}
	return syscallError("init_module", unix.InitModule(a.Module, ""))
}

// Enable writes /sys/kernel/livepatch/<name>/enabled.
func (d Direct) Enable(_ context.Context, name string, on bool) error {
	if !IsModuleName(name) {
		return unix.EINVAL
	}
	value := "0"
	if on {
		value = "1"
	}
	return write(d.Tree.path(livepatches, name, "enabled"), value)
}

// Unload is delete_module(2), of livepatches only.
func (d Direct) Unload(_ context.Context, name string) error {
	if !IsModuleName(name) {
		return unix.EINVAL
	}
	if _, _, livepatch := d.Tree.Module(name); !livepatch {
		return fmt.Errorf("module %s is no livepatch: %w", name, unix.EPERM)
	}
	return syscallError("delete_module", unix.DeleteModule(name, unix.O_NONBLOCK))
}

// Tasks implements Witness.
func (d Direct) Tasks(_ context.Context, functions []string) ([]maint.KernelTask, error) {
	return d.Tree.Tasks(functions)
}

// KernelLog implements Witness.
func (d Direct) KernelLog(_ context.Context, after uint64) ([]Line, error) {
	return d.Tree.KernelLog(after)
}

// LogEnd implements Witness.
func (d Direct) LogEnd(context.Context) (uint64, error) { return d.Tree.LogEnd() }

// ReloadMicrocode writes /sys/devices/system/cpu/microcode/reload; it returns when all CPUs
// are done. ENOENT: the kernel cannot.
func (d Direct) ReloadMicrocode(context.Context) error {
	return write(d.Tree.path(microcodeReload), "1")
}

// write writes a file that is there, at once.
func write(name, value string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

func syscallError(call string, err error) error {
	if err != nil {
		return os.NewSyscallError(call, err)
	}
	return nil
}
