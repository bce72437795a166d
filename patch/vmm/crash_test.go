package vmm_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/vmm"
)

// mortal is a host whose user can be killed before and after each call.
type mortal struct {
	vmm.Host
	at func(call string)
}

func (m *mortal) around(call string) func() {
	m.at("before " + call)
	return func() { m.at("after " + call) }
}

func (m *mortal) Guest(ctx context.Context, uuid string) (maint.Guest, error) {
	defer m.around("Guest")()
	return m.Host.Guest(ctx, uuid)
}

func (m *mortal) Info(ctx context.Context) (maint.Host, error) {
	defer m.around("Info")()
	return m.Host.Info(ctx)
}

func (m *mortal) Describe(ctx context.Context, uuid string) (vmm.Description, error) {
	defer m.around("Describe")()
	return m.Host.Describe(ctx, uuid)
}

func (m *mortal) CompareCPU(ctx context.Context, domainType, arch, machine, cpuXML string) error {
	defer m.around("CompareCPU")()
	return m.Host.CompareCPU(ctx, domainType, arch, machine, cpuXML)
}

func (m *mortal) Suspend(ctx context.Context, uuid string) error {
	defer m.around("Suspend")()
	return m.Host.Suspend(ctx, uuid)
}

func (m *mortal) Resume(ctx context.Context, uuid string) error {
	defer m.around("Resume")()
	return m.Host.Resume(ctx, uuid)
}

func (m *mortal) QMP(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	defer m.around(command)()
	return m.Host.QMP(ctx, uuid, command, args)
}

func (m *mortal) QuitMigrated(ctx context.Context, uuid string) error {
	defer m.around("QuitMigrated")()
	return m.Host.QuitMigrated(ctx, uuid)
}

func (m *mortal) QuitIncoming(ctx context.Context, uuid string) error {
	defer m.around("QuitIncoming")()
	return m.Host.QuitIncoming(ctx, uuid)
}

func (m *mortal) CreatePaused(ctx context.Context, xml string) error {
	defer m.around("CreatePaused")()
	return m.Host.CreatePaused(ctx, xml)
}

func (m *mortal) Save(ctx context.Context, uuid, path string) error {
	defer m.around("Save")()
	return m.Host.Save(ctx, uuid, path)
}

func (m *mortal) Restore(ctx context.Context, path string, paused bool) error {
	defer m.around("Restore")()
	return m.Host.Restore(ctx, path, paused)
}

var errKilled = errors.New("killed")

// live runs a replacement in a belayd that is killed at call number k (none:
// k < 0), and tells how many calls there were and at which it died. Killed is
// ended: no call more, and nothing deferred has an effect that a dead process
// would not have.
func live(ctx context.Context, r *vmm.Replacement, n *notebook, k int) (calls int, died string, err error) {
	var at atomic.Int64
	host := r.Host
	r.Host = &mortal{Host: host, at: func(call string) {
		if i := int(at.Add(1)) - 1; k >= 0 && i >= k {
			if i == k {
				died = call
			}
			panic(errKilled)
		}
	}}
	defer func() { calls = int(at.Load()) }()
	defer func() {
		if p := recover(); p != nil {
			if p != errKilled {
				panic(p)
			}
			err = errKilled
		}
	}()
	return 0, "", run(ctx, r, n)
}

// belayd is killed before and after every call, in turn. Meanwhile the leash
// may fire, and somebody may try to start the guest. Started again, it ends the
// operation: the guest runs, in the old QEMU or the new one, as it was.
func TestKilledAtEveryCall(t *testing.T) {
	t.Parallel()
	for _, method := range methods {
		b := newBed(t)
		calls, _, err := live(t.Context(), b.replacement(method), newNotebook(), -1)
		if err != nil {
			t.Fatal(err)
		}
		for _, meanwhile := range []string{"nothing", "leash", "start"} {
			for k := range calls {
				t.Run(fmt.Sprintf("%s, %s, call %d", method, meanwhile, k), func(t *testing.T) {
					t.Parallel()
					killedAt(t, method, meanwhile, k)
				})
			}
		}
	}
}

func killedAt(t *testing.T, method maint.VMMMethod, meanwhile string, k int) {
	b := newBed(t)
	ctx := t.Context()
	pid := b.PID(b.uuid)
	r, n := b.replacement(method), newNotebook()
	armed := false
	r.BeforePause = func(context.Context) error { armed = true; return nil }
	r.PointOfNoReturn = func(context.Context) error { armed = false; return nil }
	_, died, err := live(ctx, r, n, k)
	if err == nil { // QEMU was asked fewer times for the end of something
		b.runs()
		return
	}
	if err != errKilled {
		t.Fatalf("was to be killed, and ended with %v", err)
	}
	switch {
	case meanwhile == "leash" && armed && b.state() == maint.GuestPaused:
		if err := b.Resume(ctx, b.uuid); err != nil {
			t.Fatal(err)
		}
	case meanwhile == "start" && b.state() == maint.GuestShutoff:
		if err := b.Boot(ctx, t, b.uuid); err == nil {
			t.Fatalf("killed %s: somebody else could start it", died)
		}
	}
	again := b.replacement(method)
	again.Op = r.Op
	err = run(ctx, again, n)
	if errors.Is(err, vmm.ErrStuck) {
		t.Fatalf("killed %s: %v", died, err)
	}
	b.runs()
	if t.Failed() {
		t.Errorf("killed %s: ended with %v; notes %q", died, err, n.Notes)
	}
	if moved := b.PID(b.uuid) != pid; moved != (err == nil) {
		t.Errorf("killed %s: in a new QEMU: %t, but the outcome is %v", died, moved, err)
	}
	if err != nil && n.done[vmm.PhaseSwap] {
		t.Errorf("killed %s: after the swap, %v", died, err)
	}
}

// Killed at any call, and again at any call of its next life.
func TestKilledTwice(t *testing.T) {
	t.Parallel()
	step := 7
	if testing.Short() {
		step = 29
	}
	for _, method := range methods {
		b := newBed(t)
		calls, _, err := live(t.Context(), b.replacement(method), newNotebook(), -1)
		if err != nil {
			t.Fatal(err)
		}
		for k := 0; k < calls; k += 3 {
			for j := k % 3; ; j += step {
				b := newBed(t)
				r, n := b.replacement(method), newNotebook()
				if _, _, err := live(t.Context(), r, n, k); err == nil {
					break // there were fewer calls
				}
				second := b.replacement(method)
				second.Op = r.Op
				_, _, err := live(t.Context(), second, n, j)
				if err != errKilled {
					b.runs()
					break
				}
				third := b.replacement(method)
				third.Op = r.Op
				if err := run(t.Context(), third, n); errors.Is(err, vmm.ErrStuck) {
					t.Fatalf("%s, killed at %d and %d: %v", method, k, j, err)
				}
				if b.runs(); t.Failed() {
					t.Fatalf("%s, killed at %d and %d: %v, notes %q", method, k, j, err, n.Notes)
				}
			}
		}
	}
}

// off takes a guest to where it is off and all of it kept, belayd being dead.
func off(t *testing.T, b *bed, method maint.VMMMethod) (*vmm.Replacement, *notebook) {
	t.Helper()
	r, n := b.replacement(method), newNotebook()
	host := r.Host
	r.Host = &mortal{Host: host, at: func(call string) {
		if call == "before CreatePaused" || call == "before Restore" {
			panic(errKilled)
		}
	}}
	func() {
		defer func() { _ = recover() }()
		t.Errorf("was to be killed, and ended with %v", run(t.Context(), r, n))
	}()
	if b.state() != maint.GuestShutoff {
		t.Fatalf("the guest is %s", b.state())
	}
	again := b.replacement(method)
	again.Op = r.Op
	return again, n
}

// What is kept is not used if somebody has run the guest since: its memory would
// not fit its disks.
func TestDiskWrittenMeanwhile(t *testing.T) {
	t.Parallel()
	for _, method := range methods {
		b := newBed(t)
		r, n := off(t, b, method)
		later := time.Now().Add(time.Second)
		if err := os.Chtimes(filepath.Join(b.Root, b.disk), later, later); err != nil {
			t.Fatal(err)
		}
		var p *maint.Problem
		if err := run(t.Context(), r, n); !errors.Is(err, vmm.ErrStuck) || !errors.As(err, &p) || p.Code != maint.CodeBetween {
			t.Fatalf("ended with %v", err)
		}
		if b.state() != maint.GuestShutoff || len(b.Damage()) > 0 {
			t.Errorf("the guest is %s, %q", b.state(), b.Damage())
		}
	}
}

// Memory does not outlive a boot, and nor does what is kept.
func TestHostBooted(t *testing.T) {
	t.Parallel()
	for _, method := range methods {
		b := newBed(t)
		r, n := off(t, b, method)
		if err := os.WriteFile(filepath.Join(b.Root, "proc/sys/kernel/random/boot_id"), []byte("second-boot\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := run(t.Context(), r, n); !errors.Is(err, vmm.ErrStuck) || b.state() != maint.GuestShutoff {
			t.Fatalf("ended with %v, the guest is %s", err, b.state())
		}
	}
}

// Once the guest has run in its new QEMU what was kept is out of date: a QEMU
// that dies then is not replaced.
func TestNewQEMUDiesLater(t *testing.T) {
	t.Parallel()
	for _, method := range methods {
		b := newBed(t)
		r, n := b.replacement(method), newNotebook()
		host := r.Host
		r.Host = &mortal{Host: host, at: func(call string) {
			if call == "after Resume" {
				panic(errKilled)
			}
		}}
		func() {
			defer func() { _ = recover() }()
			_ = run(t.Context(), r, n)
		}()
		b.Stop(t, b.uuid, "crashed")
		again := b.replacement(method)
		again.Op = r.Op
		if err := run(t.Context(), again, n); !errors.Is(err, vmm.ErrStuck) || b.state() != maint.GuestShutoff || len(b.Damage()) > 0 {
			t.Fatalf("ended with %v, the guest is %s, %q", err, b.state(), b.Damage())
		}
	}
}

// A guest that is complete in its new QEMU runs also where nothing can be written down any more, and is
// not taken back to the state that was kept.
func TestNoRoomForNotes(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	r, n := b.replacement(maint.VMMInPlace), newNotebook()
	guard := filepath.Join(b.Root, "run/belay/vmm", b.uuid)
	r.PointOfNoReturn = func(context.Context) error { return os.Mkdir(filepath.Join(guard, "resumed.new"), 0o700) }
	for _, phase := range []struct {
		name string
		do   func(context.Context, vmm.Scratch) error
	}{{vmm.PhasePreflight, r.Preflight}, {vmm.PhasePrepare, r.Prepare}, {vmm.PhaseSwap, r.Swap}} {
		n.Phase = phase.name
		if err := phase.do(t.Context(), n); err != nil {
			t.Fatalf("%s: %v", phase.name, err)
		}
	}
	if b.state() != maint.GuestRunning || len(b.Damage()) > 0 {
		t.Errorf("it is %s; damage: %q", b.state(), b.Damage())
	}
	b.Stop(t, b.uuid, "shutdown")
	if err := r.Swap(t.Context(), n); !errors.Is(err, vmm.ErrStuck) || b.state() != maint.GuestShutoff {
		t.Errorf("%v; it is %s", err, b.state())
	}
}
