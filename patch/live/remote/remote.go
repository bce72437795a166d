// Package remote is how belayd, which may load no module, has belay-kernel do so: a request
// is a line of JSON, and a line of JSON comes back. A livepatch's module, or container, goes
// along as a file descriptor.
//
// The server knows no other actions than these, judges each livepatch itself by the keys
// that are its own, and touches no module that is no livepatch, and no process that is no
// guest's QEMU.
package remote

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/kexec"
	"belay/patch/live"
)

// DefaultSocket is where systemd listens for belay-kernel.
const DefaultSocket = "/run/belay/kernel.sock"

// The actions.
const (
	doLoad      = "load"
	doEnable    = "enable"
	doDisable   = "disable"
	doUnload    = "unload"
	doMicrocode = "microcode"
	doTasks     = "tasks"
	doLog       = "log"
	doLogEnd    = "log-end"
	doNothing   = "nothing" // but answer

	doKexecLoad   = "kexec-load"
	doKexecUnload = "kexec-unload"

	doPatchable = "qemu-patchable"
	doApplied   = "qemu-applied"
	doPatch     = "qemu-patch"
	doUnpatch   = "qemu-unpatch"
)

// withFile are the actions that have one file descriptor with them, a livepatch's.
var withFile = []string{doLoad, doPatchable, doApplied, doPatch, doUnpatch}

// request is what is asked.
type request struct {
	Do        string   `json:"do"`
	Name      string   `json:"name,omitempty"`
	Manifest  []byte   `json:"manifest,omitempty"`
	Signature []byte   `json:"signature,omitempty"`
	Functions []string `json:"functions,omitempty"`
	After     uint64   `json:"after,omitempty"`
	// Image is the kernel to keep, to be started in this one's place.
	Image *maint.KernelImage `json:"image,omitempty"`
	// QEMU is the process that a livepatch is for.
	QEMU *live.QEMU `json:"qemu,omitempty"`
}

// maxRequest bounds a request, bytes; a manifest fits in well.
const maxRequest = 4 << 20

// answer is what came of it.
type answer struct {
	Tasks   []maint.KernelTask `json:"tasks,omitempty"`
	Log     []live.Line        `json:"log,omitempty"`
	LogEnd  uint64             `json:"log_end,omitempty"`
	Applied bool               `json:"applied,omitempty"`
	Stopped time.Duration      `json:"stopped_ns,omitempty"`
	Error   string             `json:"error,omitempty"`
	Errno   unix.Errno         `json:"errno,omitempty"`
	Problem *maint.Problem     `json:"problem,omitempty"`
	Refusal *maint.Refusal     `json:"refusal,omitempty"`
}

// fail puts an error into an answer so that it can be told apart by the asker as well.
func (a *answer) fail(err error) {
	if err == nil {
		return
	}
	a.Error = err.Error()
	errors.As(err, &a.Errno)
	errors.As(err, &a.Problem)
	errors.As(err, &a.Refusal)
}

func (a *answer) err() error {
	switch {
	case a.Refusal != nil:
		return a.Refusal
	case a.Problem != nil:
		return a.Problem
	case a.Errno != 0:
		return fmt.Errorf("belay-kernel: %s: %w", a.Error, a.Errno)
	case a.Error != "":
		return errors.New("belay-kernel: " + a.Error)
	}
	return nil
}

// Host is what the server works on: live.Direct, or a test's.
type Host interface {
	live.Kernel
	live.Witness
	live.Microcode
}

// perform does what is asked.
func perform(ctx context.Context, h Host, r request, module []byte) (a answer) {
	var err error
	switch r.Do {
	case doLoad:
		err = h.Load(ctx, live.Artifact{Module: module, Manifest: r.Manifest, Signature: r.Signature})
	case doEnable, doDisable:
		err = h.Enable(ctx, r.Name, r.Do == doEnable)
	case doUnload:
		err = h.Unload(ctx, r.Name)
	case doMicrocode:
		err = h.ReloadMicrocode(ctx)
	case doTasks:
		a.Tasks, err = h.Tasks(ctx, r.Functions)
	case doLog:
		a.Log, err = h.KernelLog(ctx, r.After)
	case doLogEnd:
		a.LogEnd, err = h.LogEnd(ctx)
	case doNothing:
	case doKexecLoad, doKexecUnload:
		err = keep(ctx, h, r)
	case doPatchable, doApplied, doPatch, doUnpatch:
		err = a.ofQEMU(ctx, h, r, module)
	default:
		err = fmt.Errorf("there is no action %q", r.Do)
	}
	a.fail(err)
	return a
}

// ofQEMU does what is asked of a QEMU, where the host can do that as well.
func (a *answer) ofQEMU(ctx context.Context, h Host, r request, container []byte) (err error) {
	u, ok := h.(live.UserSpace)
	switch {
	case !ok:
		return fmt.Errorf("no process can be patched here: %w", unix.ENOSYS)
	case r.QEMU == nil:
		return fmt.Errorf("no process is named: %w", unix.EINVAL)
	}
	artifact := live.Artifact{Module: container, Manifest: r.Manifest, Signature: r.Signature}
	switch r.Do {
	case doPatchable:
		return u.Patchable(ctx, *r.QEMU, artifact)
	case doApplied:
		a.Applied, err = u.Applied(ctx, *r.QEMU, artifact)
	default:
		a.Stopped, err = u.Set(ctx, *r.QEMU, artifact, r.Do == doPatch)
	}
	return err
}

// keep has the kernel keep another, where the host can do that as well.
func keep(ctx context.Context, h Host, r request) error {
	k, ok := h.(kexec.Loader)
	switch {
	case !ok:
		return fmt.Errorf("no kernel can be loaded here: %w", unix.ENOSYS)
	case r.Do == doKexecUnload:
		return k.KexecUnload(ctx)
	case r.Image == nil:
		return fmt.Errorf("no kernel is named: %w", unix.EINVAL)
	}
	return k.KexecLoad(ctx, *r.Image)
}
