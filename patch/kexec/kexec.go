package kexec

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/internal/linux"
	"belay/patch/vmm"
)

// Guests sees the host's guests.
type Guests interface {
	Guests(ctx context.Context) ([]maint.Guest, error)
	Guest(ctx context.Context, nameOrUUID string) (maint.Guest, error)
	Info(ctx context.Context) (maint.Host, error)
}

// Saver has guests saved and restored. Its calls go on when their context ends.
type Saver interface {
	Save(ctx context.Context, uuid, path string) error
	Restore(ctx context.Context, path string, paused bool) error
	Resume(ctx context.Context, uuid string) error
}

// Starter starts what is defined.
type Starter interface {
	SetAutostart(ctx context.Context, uuid string, on bool) error
	Launch(ctx context.Context, uuid string) error
}

// Host is this host's hypervisor; see package hypervisor.
type Host interface {
	Guests
	Saver
	Starter
}

// Loader has the kernel keep another one, to be started by Rebooter.
type Loader interface {
	KexecLoad(ctx context.Context, k maint.KernelImage) error
	KexecUnload(ctx context.Context) error
}

// Rebooter ends what runs on the host, in order, and starts the kernel that is loaded.
type Rebooter interface {
	// Kexec returns when that has been begun.
	Kexec(ctx context.Context) error
	// Going reports whether the host is going down.
	Going(ctx context.Context) (bool, error)
}

// Inside asks guests themselves. Its answers are "" where a guest does not tell.
type Inside interface {
	BootID(ctx context.Context, g maint.Guest) string
	// Clock puts a guest's clock right that has lost so much.
	Clock(ctx context.Context, g maint.Guest, lost time.Duration) maint.ClockReport
}

// Scratch is where a phase writes down what people should read (Note) and what
// it must know after a crash (Save, Load).
type Scratch interface {
	Note(format string, args ...any) error
	Save(v any) error
	Load(phase string, v any) (bool, error)
}

// The names of the phases.
const (
	PhasePreflight = "preflight"
	PhaseLoad      = "load"
	PhaseSave      = "save"
	PhaseBoot      = "boot"
	PhaseCheck     = "check"
	PhaseRestore   = "restore"
	PhaseVerify    = "verify"
)

// DefaultDir is where the file system in the reserved memory is mounted.
const DefaultDir = "/var/lib/belay/memory"

// Job is a new kernel under this host's guests. The phases are its methods.
type Job struct {
	Op       maint.OpID
	Request  maint.KexecRequest
	Host     Host
	Mover    vmm.Mover // of guests whose memory stays in place
	Loader   Loader
	Rebooter Rebooter
	Inside   Inside
	Tree     Tree
	Dir      string // the file system in the reserved memory
	// Life ends when this process is to: the host's going down does that.
	Life context.Context
	// Health, unless nil, says whether the new kernel is well.
	Health func(context.Context) error
	// InPlace has memory stay in place that is in the reserved memory already; what was kept so is
	// restored in any case.
	InPlace bool
	// ColdStart has a guest that is lost boot afresh, where it had autostart.
	ColdStart bool
	Record    func(maint.KexecResult) error
	Log       *slog.Logger
	Pace      Pace
}

// Pace is how patient it is.
type Pace struct {
	Poll   time.Duration // what tells of nothing is looked at this often
	Going  time.Duration // how long the host has to begin to go down
	Healed time.Duration // how long libvirt has to answer in the new kernel, or to take a guest down
}

// Usual is the pace on a real host.
var Usual = Pace{Poll: 200 * time.Millisecond, Going: 30 * time.Second, Healed: 2 * time.Minute}

// member is a guest of the plan.
type member struct {
	Name      string `json:"name"`
	UUID      string `json:"uuid"`
	Bytes     uint64 `json:"bytes"`
	Machine   string `json:"machine"`
	Domain    string `json:"domain,omitempty"` // its type: kvm, qemu
	CPU       string `json:"cpu,omitempty"`    // its <cpu>, as it runs
	Paused    bool   `json:"paused,omitempty"` // by its owner
	Autostart bool   `json:"autostart,omitempty"`
	BootID    string `json:"boot_id,omitempty"` // its own
	// InPlace: its memory is in the reserved memory already, and stays where it is.
	InPlace bool `json:"in_place,omitempty"`
	// Disks are the files that it writes to, alone.
	Disks []string `json:"disks,omitempty"`
}

// disks are the files that a guest writes to, and no other does.
func disks(g maint.Guest) (files []string) {
	for _, d := range g.Disks {
		if d.Type == "file" && !d.ReadOnly && !d.Shared && filepath.IsAbs(d.Source) {
			files = append(files, d.Source)
		}
	}
	return files
}

// plan is all that the phases after preflight need to know.
type plan struct {
	Boot   string            `json:"boot"` // the host's
	Old    maint.KernelImage `json:"old"`
	New    maint.KernelImage `json:"new"`
	Guests []member          `json:"guests"`
}

func (j *Job) load(s Scratch) (pl plan, err error) {
	ok, err := s.Load(PhasePreflight, &pl)
	if err == nil && !ok {
		err = fmt.Errorf("there is no plan")
	}
	return pl, err
}

// dir is the folder of what is kept, as this process sees it.
func (j *Job) dir() string { return j.Tree.at(j.Dir) }

// wait waits for d and reports whether ctx is still alive.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Direct is a Loader by kexec_file_load(2). It wants CAP_SYS_BOOT.
type Direct struct{}

var _ Loader = Direct{}

// KexecLoad implements Loader. The kernel and its initrd must be root's, and nobody else's to write.
func (Direct) KexecLoad(_ context.Context, k maint.KernelImage) error {
	kernel, err := trusted(k.Kernel)
	if err != nil {
		return err
	}
	defer kernel.Close()
	initrd, err := trusted(k.Initrd)
	if err != nil {
		return err
	}
	defer initrd.Close()
	err = unix.KexecFileLoad(int(kernel.Fd()), int(initrd.Fd()), k.Cmdline, 0)
	return os.NewSyscallError("kexec_file_load", err)
}

// kexecFileUnload is KEXEC_FILE_UNLOAD of linux/kexec.h.
const kexecFileUnload = 1

// KexecUnload implements Loader. To unload nothing is a success.
func (Direct) KexecUnload(context.Context) error {
	return os.NewSyscallError("kexec_file_load", unix.KexecFileLoad(-1, -1, "", kexecFileUnload))
}

// trusted opens a file that nobody but root can have changed.
func trusted(path string) (*os.File, error) {
	refused := func(why any) error {
		return maint.Problemf(maint.CodeImage, "file "+path, "name a file that belay-kernel can see (not in /home, /root or /tmp), which is root's and in root's folders (chown root, chmod go-w)", "%v", why)
	}
	f, err := linux.OpenTrusted(path)
	if err != nil {
		return nil, refused(err)
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, refused("is not a file")
	}
	return f, nil
}
