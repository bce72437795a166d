package vmtests

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/patch/vmm"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
)

// tripwire is a host of whose calls each is told before and after.
type tripwire struct {
	vmm.Host
	at func(call string)
}

func (w *tripwire) around(call string) func() {
	w.at("before " + call)
	return func() { w.at("after " + call) }
}

func (w *tripwire) Suspend(ctx context.Context, uuid string) error {
	defer w.around("Suspend")()
	return w.Host.Suspend(ctx, uuid)
}

func (w *tripwire) Resume(ctx context.Context, uuid string) error {
	defer w.around("Resume")()
	return w.Host.Resume(ctx, uuid)
}

func (w *tripwire) QMP(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	defer w.around(command)()
	return w.Host.QMP(ctx, uuid, command, args)
}

func (w *tripwire) QuitMigrated(ctx context.Context, uuid string) error {
	defer w.around("QuitMigrated")()
	return w.Host.QuitMigrated(ctx, uuid)
}

func (w *tripwire) CreatePaused(ctx context.Context, xml string) error {
	defer w.around("CreatePaused")()
	return w.Host.CreatePaused(ctx, xml)
}

func (w *tripwire) Save(ctx context.Context, uuid, path string) error {
	defer w.around("Save")()
	return w.Host.Save(ctx, uuid, path)
}

func (w *tripwire) Restore(ctx context.Context, path string, paused bool) error {
	defer w.around("Restore")()
	return w.Host.Restore(ctx, path, paused)
}

// once has f called at a call, the first time.
func once(call string, f func()) func(string) {
	done := false
	return func(got string) {
		if got == call && !done {
			done = true
			f()
		}
	}
}

// stays checks that the guest runs on, whole, in the QEMU that it was in.
func (b *swapBed) stays(pid string) {
	b.t.Helper()
	if now := b.pid(); now != pid {
		b.t.Fatalf("its QEMU is process %s, was %s", now, pid)
	}
	b.isWhole(b.host)
	b.isTidy()
}

// With a real libvirt and QEMU, what fails before the old QEMU ends has the
// guest run on in that, and what fails after is tried again, or kept.
func TestNewQEMUFaults(t *testing.T) {
	t.Parallel()
	longOnly(t)
	b := newSwapBed(t, lab.Config{}, guest.Spec{FileMemory: true})
	fails := func(name string, method maint.VMMMethod, change func(*vmm.Replacement)) error {
		t.Helper()
		r := b.replacement(method)
		change(r)
		err := newNotebook().run(b.ctx(4*time.Minute), r)
		if err == nil {
			t.Fatalf("%s: it succeeded", name)
		}
		t.Logf("%s: %v", name, err)
		return err
	}
	works := func(name string, method maint.VMMMethod, call string, f func()) {
		t.Helper()
		pid, _ := readHostFile(b.host, pidFile) // none when it is off
		r, n := b.replacement(method), newNotebook()
		r.Host = &tripwire{Host: r.Host, at: once(call, f)}
		if err := n.run(b.ctx(4*time.Minute), r); err != nil {
			t.Fatalf("%s: %v; notes %q", name, err, n.Notes)
		}
		if b.pid() == pid {
			t.Fatalf("%s: it is in its old QEMU", name)
		}
		t.Logf("%s: %s %q", name, n.Saved[vmm.PhaseSwap], n.Notes)
		b.isWhole(b.host)
		b.isTidy()
	}
	guard := "/run/belay/vmm/" + b.uuid

	pid := b.pid()
	fails("called off with all of the state out", maint.VMMInPlace, func(r *vmm.Replacement) {
		r.PointOfNoReturn = func(context.Context) error { return errors.New("no") }
	})
	b.stays(pid)
	fails("resumed by the leash", maint.VMMInPlace, func(r *vmm.Replacement) {
		r.PointOfNoReturn = func(context.Context) error { b.virsh("resume", "web-1"); return nil }
	})
	b.stays(pid)
	fails("libvirtd dies before the state is out", maint.VMMInPlace, func(r *vmm.Replacement) {
		r.Host = &tripwire{Host: r.Host, at: once("after Suspend", b.loseLibvirt)}
	})
	b.stays(pid)
	fails("no room for a copy", maint.VMMCopy, func(*vmm.Replacement) { b.leaveRoom(50) })
	b.stays(pid)
	b.leaveRoom(4096)
	fails("the room is gone when it is needed", maint.VMMCopy, func(r *vmm.Replacement) {
		r.Host = &tripwire{Host: r.Host, at: once("before Save", func() { b.leaveRoom(10) })}
	})
	b.leaveRoom(4096)
	b.stays(pid)

	works("somebody else starts it", maint.VMMInPlace, "before CreatePaused", func() {
		if out, err := b.host.Virsh(t.Context(), "start", "web-1"); err == nil || !strings.Contains(err.Error(), "belay replace-vmm web-1") {
			t.Errorf("somebody could start it: %q, %v", out, err)
		}
	})
	works("somebody else starts it, copy", maint.VMMCopy, "before Restore", func() {
		if out, err := b.host.Virsh(t.Context(), "start", "web-1"); err == nil || !strings.Contains(err.Error(), "belay replace-vmm web-1") {
			t.Errorf("somebody could start it: %q, %v", out, err)
		}
	})
	works("the new QEMU is killed", maint.VMMInPlace, "before migrate-incoming", func() { b.killQEMU() })
	works("libvirtd dies with the guest off", maint.VMMInPlace, "before CreatePaused", b.loseLibvirt)
	works("libvirtd dies with the new QEMU waiting", maint.VMMInPlace, "after CreatePaused", b.loseLibvirt)
	works("libvirtd dies before the guest is resumed", maint.VMMInPlace, "before Resume", b.loseLibvirt)

	// A state that no QEMU can load: all is kept, and gone on with later.
	state := b.host.Path(guard + "/state")
	var whole []byte
	err := fails("damaged state", maint.VMMInPlace, func(r *vmm.Replacement) {
		r.Host = &tripwire{Host: r.Host, at: once("before CreatePaused", func() {
			var err error
			if whole, err = os.ReadFile(state); err == nil {
				err = os.WriteFile(state, whole[:len(whole)/2], 0o600)
			}
			if err != nil {
				t.Error(err)
			}
		})}
	})
	if !errors.Is(err, vmm.ErrStuck) {
		t.Fatal("it is not said to be stuck")
	}
	if got := b.virsh("domstate", "web-1"); got != "shut off" {
		t.Fatalf("the guest is %s", got)
	}
	if _, err := b.host.Virsh(t.Context(), "start", "web-1"); err == nil {
		t.Fatal("somebody could start it")
	}
	if err := os.WriteFile(state, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	works("taken up with the state put right", maint.VMMInPlace, "", nil)

	// A hook that is not there any more.
	hook, away := b.host.Path(lab.HooksDir+"/qemu.d/belay"), b.host.Path("/etc/belay-hook")
	err = fails("no hook", maint.VMMInPlace, func(r *vmm.Replacement) {
		r.PointOfNoReturn = func(context.Context) error { return os.Rename(hook, away) }
	})
	if !errors.Is(err, vmm.ErrStuck) || !strings.Contains(err.Error(), "did not run the hook") {
		t.Fatal("it is not said that there is no hook")
	}
	if err := os.Rename(away, hook); err != nil {
		t.Fatal(err)
	}
	works("taken up with the hook back", maint.VMMInPlace, "", nil)
}

// loseLibvirt kills libvirtd, and starts it again a little later.
func (b *swapBed) loseLibvirt() {
	b.t.Helper()
	ctx := b.ctx(2 * time.Minute)
	if err := b.host.Kill(ctx, lab.Libvirtd, syscall.SIGKILL); err != nil {
		b.t.Error(err)
	}
	time.AfterFunc(500*time.Millisecond, func() {
		if err := b.host.StartDaemon(ctx, lab.Libvirtd); err != nil {
			b.t.Error(err)
		}
	})
}

func (b *swapBed) killQEMU() {
	b.t.Helper()
	var pid int
	if _, err := fmt.Sscan(b.pid(), &pid); err != nil {
		b.t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		b.t.Error(err)
	}
}

// leaveRoom has the tmpfs with the guests' memory and copies have that much
// room left, in MiB.
func (b *swapBed) leaveRoom(mib uint64) {
	b.t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(b.host.Path(lab.MemoryDir), &fs); err != nil {
		b.t.Fatal(err)
	}
	size := (fs.Blocks-fs.Bfree)*uint64(fs.Bsize) + mib<<20
	if out, err := b.host.Command(b.t.Context(), "mount", "-o", fmt.Sprintf("remount,size=%d", size), lab.MemoryDir).CombinedOutput(); err != nil {
		b.t.Errorf("%v: %s", err, out)
	}
}

// What stands in the way of a guest with memory of its own is said, and how to
// change it; a copy is possible.
func TestNewQEMUByCopy(t *testing.T) {
	t.Parallel()
	longOnly(t)
	b := newSwapBed(t, lab.Config{Hooks: noHooks}, guest.Spec{Disk: "web-1.raw"})
	pid := b.pid()
	err := newNotebook().run(b.ctx(time.Minute), b.replacement(maint.VMMInPlace))
	var r *maint.Refusal
	if !errors.As(err, &r) || !strings.Contains(err.Error(), "access mode='shared'") || !strings.Contains(err.Error(), "does not run Belay's hook") {
		t.Fatalf("in place: %v", err)
	}
	b.stays(pid)
	for range 2 {
		b.swap(maint.VMMCopy)
	}
}

// child is what a replacement in a process of its own needs to know.
type child struct {
	Socket, Root, UUID, Op, Notebook, Die string
	Method                                maint.VMMMethod
}

const childEnv = "BELAY_TEST_REPLACEMENT"

// TestReplacementChild is not a test: it is a belayd that dies, by SIGKILL, at
// the call that it is told.
func TestReplacementChild(t *testing.T) {
	text := os.Getenv(childEnv)
	if text == "" {
		t.Skip("is run by TestNewQEMUKilled")
	}
	var c child
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	n, err := openNotebook(c.Notebook)
	if err != nil {
		t.Fatal(err)
	}
	hv := hypervisor.New(hypervisor.Config{Socket: c.Socket})
	at := func(call string) {
		if call == c.Die {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	hook := func(name string) func(context.Context) error {
		return func(context.Context) error { at(name); return nil }
	}
	r := &vmm.Replacement{Op: maint.OpID(c.Op), Guest: "web-1", UUID: c.UUID, Method: c.Method,
		Host: &tripwire{Host: vmmHost{hv}, at: at}, Places: vmm.Places{Root: c.Root, Copies: lab.MemoryDir + "/copies"},
		Log: slog.New(slog.DiscardHandler), BeforePause: hook("BeforePause"), PointOfNoReturn: hook("PointOfNoReturn")}
	t.Fatalf("it was to be killed, and ended with %v", n.run(t.Context(), r))
}

// belayd dies by SIGKILL, for real, at each place where something changes. What
// libvirt has begun goes on. Its next life ends the operation, and the guest
// runs, whole, in the one QEMU or the other.
func TestNewQEMUKilled(t *testing.T) {
	t.Parallel()
	longOnly(t)
	b := newSwapBed(t, lab.Config{}, guest.Spec{FileMemory: true})
	inPlace := []string{"BeforePause", "before Suspend", "after Suspend", "before migrate", "after migrate", "PointOfNoReturn",
		"before QuitMigrated", "after QuitMigrated", "before CreatePaused", "after CreatePaused", "before migrate-incoming",
		"after migrate-incoming", "before Resume", "after Resume"}
	for _, die := range inPlace {
		b.killed(maint.VMMInPlace, die)
	}
	for _, die := range []string{"BeforePause", "before Save", "after Save", "before Restore", "after Restore", "after Resume"} {
		b.killed(maint.VMMCopy, die)
	}
	// libvirt begins what it was asked for, though who asked is dead.
	for method, call := range map[maint.VMMMethod]string{maint.VMMInPlace: "CreatePaused", maint.VMMCopy: "Save"} {
		b.killedWithin(method, call)
	}
}

// killed has a replacement be killed at a call, and another take it up.
func (b *swapBed) killed(method maint.VMMMethod, die string) {
	b.t.Helper()
	pid := b.pid()
	c := b.child(method, die)
	if err := c.Run(); err == nil || !strings.Contains(err.Error(), "killed") {
		b.t.Fatalf("%s, %s: the child ended with %v: %s", method, die, err, c.Stdout)
	}
	b.takeUp(method, "killed "+die, pid, c.notebook)
}

// killedWithin has a replacement be killed a moment after a call has begun.
func (b *swapBed) killedWithin(method maint.VMMMethod, call string) {
	b.t.Helper()
	pid := b.pid()
	c := b.child(method, "within "+call)
	if err := c.Start(); err != nil {
		b.t.Fatal(err)
	}
	ctx := b.ctx(time.Minute)
	defer c.Process.Kill()
	for !b.within(call) {
		if ctx.Err() != nil {
			b.t.Fatalf("%s: never within %s", method, call)
		}
	}
	if err := c.Process.Kill(); err != nil {
		b.t.Fatal(err)
	}
	_ = c.Wait()
	b.takeUp(method, "killed within "+call, pid, c.notebook)
}

// within reports whether libvirt is in the middle of a call: of a start, after it
// has run the hook and before there is a QEMU; of a save, while it is a job.
func (b *swapBed) within(call string) bool {
	if call == "CreatePaused" {
		_, err := readHostFile(b.host, "/run/belay/vmm/"+b.uuid+"/id")
		return err == nil
	}
	reason, err := b.host.Virsh(b.t.Context(), "domstate", "--reason", "web-1")
	return err == nil && strings.Contains(reason, "(saving)")
}

type childCmd struct {
	*exec.Cmd
	notebook string
}

func (b *swapBed) child(method maint.VMMMethod, die string) childCmd {
	b.t.Helper()
	b.ops++
	c := child{Socket: b.host.LibvirtSocket(), Root: b.host.Root(), UUID: b.uuid, Op: fmt.Sprintf("rep-%d", b.ops),
		Notebook: filepath.Join(b.t.TempDir(), fmt.Sprintf("notes-%d", b.ops)), Die: die, Method: method}
	text, err := json.Marshal(c)
	if err != nil {
		b.t.Fatal(err)
	}
	cmd := exec.CommandContext(b.ctx(2*time.Minute), os.Args[0], "-test.run=^TestReplacementChild$", "-test.v")
	cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	cmd.Stdout = new(strings.Builder)
	return childCmd{cmd, c.Notebook}
}

// takeUp ends an operation that was killed, as belayd's next life does.
func (b *swapBed) takeUp(method maint.VMMMethod, how, pid, notes string) {
	b.t.Helper()
	n, err := openNotebook(notes)
	if err != nil {
		b.t.Fatal(err)
	}
	before := strings.TrimSpace(must(b.host.Virsh(b.t.Context(), "domstate", "--reason", "web-1")))
	r := b.replacement(method)
	r.Op = maint.OpID(fmt.Sprintf("rep-%d", b.ops-1))
	err = n.run(b.ctx(4*time.Minute), r)
	if errors.Is(err, vmm.ErrStuck) {
		b.t.Fatalf("%s, %s, found %s: %v", method, how, before, err)
	}
	moved := b.pid() != pid
	b.t.Logf("%s, %s: found %s; in its new QEMU: %t; %v", method, how, before, moved, err)
	if moved != (err == nil) {
		b.t.Fatalf("in a new QEMU: %t, and the outcome is %v", moved, err)
	}
	b.isWhole(b.host)
	b.isTidy()
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
